//! A student's figures on drawn scenes, where every word's region is known.

use serde::{Deserialize, Serialize};

use super::attention::entropy;
use crate::align::filter::WordRules;
use crate::align::loss::mean_mean;
use crate::align::maps::{SampleWords, min_max_host, word_maps};
use crate::align::store::SIDE;
use crate::autograd::{Var, no_grad};
use crate::data::drawn::CAPTION_PROMPT;
use crate::data::scenes::{Mask, Scene};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::train::batch::{Batch, Example, answer_words};
use crate::vlm::processor::template::Message;
use crate::vlm::{Prepared, Student, Taps};

/// Scenes in one forward.
const BATCH: usize = 8;

/// Figures over a set of scenes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Mean negative log-likelihood of the questions' answers, nats per token.
    pub answer_loss: f64,
    /// Share of questions whose every answer token is the model's first choice.
    pub answer_accuracy: f64,
    /// Mean entropy of the captions' word maps (mean over layers and heads), nats.
    pub attention_entropy: f64,
    /// Share of word maps whose maximum lies in the word's region.
    pub pointing: f64,
    /// The share that pointing at random would reach: the regions' mean area.
    pub chance: f64,
}

/// Mean over heads and layers of each word's map, [words, R·R], of the samples given.
///
/// # Errors
/// A GPU fault.
pub fn raw_maps(gpu: &Gpu, student: &Student, examples: &[&Example]) -> Result<Vec<f32>> {
    let batch = Batch::new(gpu, examples);
    let Some(rows) = batch.tap_rows.clone() else {
        return Ok(Vec::new());
    };
    let layers: Vec<usize> = (0..student.hooked_layers()).collect();
    let taps = Taps {
        layers: &layers,
        rows,
        columns: batch.tap_columns.clone(),
        mirror: None,
    };
    let prepared: Vec<&Prepared> = examples.iter().map(|e| &e.prepared).collect();
    no_grad(|| {
        let output = student.forward(&prepared, Some(&taps))?;
        let samples: Vec<_> = examples
            .iter()
            .zip(&batch.grids)
            .map(|(e, &grid)| (&e.words, grid))
            .collect();
        let maps: Vec<Var> = output
            .taps
            .iter()
            .filter_map(|tap| word_maps(gpu, tap, &samples))
            .collect();
        mean_mean(&maps).value().to_f32()
    })
}

/// Losses and first choices of the labelled tokens: (nats, right) per example.
fn answers(gpu: &Gpu, student: &Student, examples: &[&Example]) -> Result<Vec<(Vec<f64>, bool)>> {
    let batch = Batch::new(gpu, examples);
    let prepared: Vec<&Prepared> = examples.iter().map(|e| &e.prepared).collect();
    let logits = no_grad(|| -> Result<Vec<f32>> {
        let hidden = student.forward(&prepared, None)?.hidden;
        let width = hidden.value().last_dim();
        let rows = hidden.reshape(&[hidden.value().elements() / width, width]);
        student
            .logits(&rows.gather_rows(&batch.label_rows))
            .value()
            .to_f32()
    })?;
    let labels = batch.labels.to_u32()?;
    let mut rows = logits.chunks_exact(student.vocabulary()).zip(labels);
    Ok(examples
        .iter()
        .map(|example| {
            let (mut losses, mut right) = (Vec::new(), true);
            for (row, label) in rows.by_ref().take(example.prepared.learned()) {
                let label = label as usize;
                let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|&v| f64::from(v - most).exp()).sum();
                losses.push(sum.ln() - f64::from(row[label] - most));
                right &= row.iter().all(|&v| v <= row[label]);
            }
            (losses, right)
        })
        .collect())
}

/// A caption sample whose tapped words are those with a region.
fn caption(student: &Student, scene: &Scene, regions: &[(String, Mask)]) -> Result<Example> {
    let turns = [
        Message::image_and_text(CAPTION_PROMPT),
        Message::text("assistant", &scene.caption),
    ];
    let prepared = student.prepare(&scene.image, &turns)?;
    let words: Vec<_> = answer_words(&prepared, &WordRules::default())
        .into_iter()
        .filter(|word| regions.iter().any(|(text, _)| *text == word.text))
        .collect();
    Ok(Example {
        id: String::new(),
        words: SampleWords::new(&words),
        targets: Vec::new(),
        known: None,
        prepared,
    })
}

fn question(student: &Student, scene: &Scene, (ask, answer): &(String, String)) -> Result<Example> {
    let turns = [
        Message::image_and_text(ask),
        Message::text("assistant", answer),
    ];
    Ok(Example {
        id: String::new(),
        prepared: student.prepare(&scene.image, &turns)?,
        words: SampleWords::new(&[]),
        targets: Vec::new(),
        known: None,
    })
}

/// Figures of `student` on `scenes`; `on_scene` is called after each.
///
/// # Errors
/// A GPU fault, or a caption longer than the model's context.
pub fn figures(
    gpu: &Gpu,
    student: &Student,
    scenes: &[Scene],
    mut on_scene: impl FnMut(),
) -> Result<Figures> {
    let mut sum = Figures::default();
    let (mut tokens, mut questions, mut words) = (0usize, 0usize, 0usize);
    for scenes in scenes.chunks(BATCH) {
        let regions: Vec<_> = scenes.iter().map(Scene::word_masks).collect();
        let captions = scenes
            .iter()
            .zip(&regions)
            .map(|(scene, regions)| caption(student, scene, regions))
            .collect::<Result<Vec<_>>>()?;
        let maps = raw_maps(gpu, student, &captions.iter().collect::<Vec<_>>())?;
        let mut maps = maps.chunks_exact(SIDE * SIDE);
        for (example, regions) in captions.iter().zip(&regions) {
            for (word, map) in example.words.words.iter().zip(maps.by_ref()) {
                let Some((_, mask)) = regions.iter().find(|(text, _)| text == word) else {
                    continue;
                };
                sum.attention_entropy += f64::from(entropy(map));
                sum.pointing += f64::from(u8::from(mask.is_hit_by(&min_max_host(map))));
                sum.chance += f64::from(mask.area());
                words += 1;
            }
        }
        for scene in scenes {
            let asked = scene
                .questions
                .iter()
                .map(|q| question(student, scene, q))
                .collect::<Result<Vec<_>>>()?;
            for asked in asked.chunks(BATCH) {
                for (losses, right) in answers(gpu, student, &asked.iter().collect::<Vec<_>>())? {
                    sum.answer_loss += losses.iter().sum::<f64>();
                    tokens += losses.len();
                    sum.answer_accuracy += f64::from(u8::from(right));
                    questions += 1;
                }
            }
            on_scene();
        }
    }
    let over = |total: f64, n: usize| total / n.max(1) as f64;
    Ok(Figures {
        answer_loss: over(sum.answer_loss, tokens),
        answer_accuracy: over(sum.answer_accuracy, questions),
        attention_entropy: over(sum.attention_entropy, words),
        pointing: over(sum.pointing, words),
        chance: over(sum.chance, words),
    })
}
