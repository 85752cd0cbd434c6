//! The evaluation loop: every sample that has no prediction yet, one line each.

use super::forced;
use super::item::{Item, Skipped};
use super::predictions::{Line, Predictions};
use super::score::{Benchmark, Score};
use crate::data::Turn;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::train::batch::{Example, message};
use crate::vlm::processor::labels::Tail;
use crate::vlm::processor::template::Message;
use crate::vlm::{Prepared, Sampling, Student};

/// How samples are measured.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// What is measured.
    pub benchmark: Benchmark,
    /// Most tokens of a reply.
    pub max_tokens: usize,
    /// Samples in one forward where expected answers are read; replies are written one by one.
    pub batch: usize,
}

/// Measures `items` and adds their lines to `predictions`; those whose image or text is unusable go to `skipped`.
/// Replies are greedy and end at the end-of-turn token. `on_sample` is called after each with a short text for the
/// progress bar; its error stops the work, and what is measured stays in `predictions`.
///
/// # Errors
/// GPU errors, predictions that cannot be written, the error of `on_sample`.
pub fn evaluate(
    student: &Student,
    items: &[&Item],
    options: Options,
    predictions: &mut Predictions,
    skipped: &mut Vec<Skipped>,
    on_sample: &mut dyn FnMut(String) -> Result<()>,
) -> Result<()> {
    let benchmark = options.benchmark;
    let batch = match benchmark.generates() {
        true => 1,
        false => options.batch.max(1),
    };
    for items in items.chunks(batch) {
        let mut ready: Vec<(&Item, Prepared)> = Vec::with_capacity(items.len());
        for &item in items {
            match prepare(student, item, benchmark) {
                Ok(prepared) => ready.push((item, prepared)),
                Err(error) => {
                    skipped.push(Skipped {
                        index: item.index.clone(),
                        reason: error.to_string(),
                    });
                    on_sample(format!("`{}` skipped", item.index))?;
                }
            }
        }
        for (item, reply, score) in measure(student, ready, options)? {
            let shown = format!("{}: {}", item.index, reply.trim().replace('\n', " "));
            predictions.push(Line::new(item, benchmark.category(item), &reply, score))?;
            on_sample(shown.chars().take(60).collect())?;
        }
    }
    Ok(())
}

/// Opens the image and renders the conversation, with the expected answer where it is read.
fn prepare(student: &Student, item: &Item, benchmark: Benchmark) -> Result<Prepared> {
    let picture = item.image.open()?;
    let messages = |turns: &[Turn]| turns.iter().map(message).collect::<Vec<Message>>();
    match benchmark.generates() {
        true => student.prepare_with(&[picture], &messages(&item.turns), Tail::GenerationPrompt),
        false => student.prepare(&picture, &messages(&item.sample().turns)),
    }
}

fn measure<'a>(
    student: &Student,
    ready: Vec<(&'a Item, Prepared)>,
    options: Options,
) -> Result<Vec<(&'a Item, String, Score)>> {
    if ready.is_empty() {
        return Ok(Vec::new());
    }
    let gpu: &Gpu = student.gpu();
    let (items, prepared): (Vec<&Item>, Vec<Prepared>) = ready.into_iter().unzip();
    let scores = match options.benchmark {
        Benchmark::Caption => {
            let batch: Vec<&Prepared> = prepared.iter().collect();
            forced::losses(gpu, student, &batch)?
        }
        Benchmark::Attention => {
            let pairs = items.iter().zip(prepared);
            let examples: Vec<Example> = pairs.map(|(i, p)| forced::example(i, p)).collect();
            let examples: Vec<&Example> = examples.iter().collect();
            forced::word_maps(gpu, student, &items, &examples)?
        }
        benchmark => {
            let mut scored = Vec::with_capacity(items.len());
            for (item, prompt) in items.into_iter().zip(&prepared) {
                let greedy = Sampling::default();
                let reply = student.generate(prompt, options.max_tokens, greedy, &mut |_, _| ())?;
                // Unusable items were left out before.
                if let Some(score) = benchmark.score(item, &reply.text) {
                    scored.push((item, reply.text.trim().to_owned(), score));
                }
            }
            return Ok(scored);
        }
    };
    let triples = items.into_iter().zip(scores);
    Ok(triples
        .map(|(item, score)| (item, String::new(), score))
        .collect())
}
