//! Teacher-forced figures: the loss of expected answers, and the maps of their words.

use super::attention::{best_iou, entropy, points_inside};
use super::drawn::raw_maps;
use super::item::Item;
use super::score::{Score, WordScore};
use crate::align::filter::WordRules;
use crate::align::maps::SampleWords;
use crate::align::store::SIDE;
use crate::autograd::no_grad;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::ops::cross_entropy::IGNORE;
use crate::tensor::Tensor;
use crate::train::batch::{Example, answer_words};
use crate::vlm::{Prepared, Student};

/// Values of logits computed at once, 64 MiB of f32.
const MAX_LOGITS: usize = 16 << 20;

/// Loss of each sample's learned tokens.
///
/// # Errors
/// GPU errors.
pub fn losses(gpu: &Gpu, student: &Student, batch: &[&Prepared]) -> Result<Vec<Score>> {
    no_grad(|| {
        let hidden = student.forward(batch, None)?.hidden;
        let (length, width) = (hidden.dim(1), hidden.dim(2));
        let hidden = hidden.reshape(&[batch.len() * length, width]);
        let step = (MAX_LOGITS / student.vocabulary()).max(1);
        let mut scores = Vec::with_capacity(batch.len());
        for (b, sample) in batch.iter().enumerate() {
            let learned = sample.labels.iter().enumerate();
            let (rows, labels): (Vec<u32>, Vec<u32>) = learned
                .filter(|&(_, &label)| label != IGNORE)
                .map(|(t, &label)| ((b * length + t) as u32, label))
                .unzip();
            let mut nats = 0.0;
            for (rows, labels) in rows.chunks(step).zip(labels.chunks(step)) {
                let count = rows.len();
                let rows = hidden.gather_rows(&Tensor::from_u32(gpu, rows, &[count]));
                let labels = Tensor::from_u32(gpu, labels, &[count]);
                let mean = student.logits(&rows).cross_entropy(&labels, count);
                nats += f64::from(mean.value().to_f32()?[0]) * count as f64;
            }
            let tokens = rows.len();
            scores.push(Score::Caption { nats, tokens });
        }
        Ok(scores)
    })
}

/// A sample with those of its answer's words that are measured: the ones with a region where any has one, else all.
pub fn example(item: &Item, prepared: Prepared) -> Example {
    let known = |word: &str| item.regions.iter().any(|(text, _)| text == word);
    let words: Vec<_> = answer_words(&prepared, &WordRules::default())
        .into_iter()
        .filter(|word| word.occurrences.iter().flatten().any(|&t| t > 0))
        .filter(|word| item.regions.is_empty() || known(&word.text))
        .collect();
    Example {
        id: item.index.clone(),
        words: SampleWords::new(&words),
        targets: Vec::new(),
        known: None,
        prepared,
    }
}

/// The word maps of each sample (mean over heads and layers) measured, with regions where words have them.
///
/// # Errors
/// GPU errors.
pub fn word_maps(
    gpu: &Gpu,
    student: &Student,
    items: &[&Item],
    examples: &[&Example],
) -> Result<Vec<Score>> {
    let maps = raw_maps(gpu, student, examples)?;
    let mut maps = maps.chunks_exact(SIDE * SIDE);
    let scores = items.iter().zip(examples).map(|(item, example)| {
        let words = example.words.words.iter().zip(maps.by_ref());
        let score = |(word, map): (&String, &[f32])| {
            let region = item.regions.iter().find(|(text, _)| text == word);
            let region = region.map(|(_, cells)| cells.as_slice());
            let inside = |cells: &[bool]| cells.iter().filter(|&&c| c).count();
            WordScore {
                word: word.clone(),
                entropy: f64::from(entropy(map)),
                hit: region.map(|cells| points_inside(map, cells)),
                iou: region.map(|cells| f64::from(best_iou(map, cells))),
                area: region.map(|cells| inside(cells) as f64 / cells.len() as f64),
            }
        };
        Score::Attention(words.map(score).collect())
    });
    Ok(scores.collect())
}
