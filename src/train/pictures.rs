//! Word maps of a few samples, drawn beside what they were before training.

use std::path::Path;

use super::metrics::MapMetrics;
use super::objective::WordSheet;
use super::recipe::Training;
use crate::Result;
use crate::align::picture::{WordMaps, file_stem, save_png, word_sheet};
use crate::eval::attention::entropy;
use crate::gpu::Gpu;

/// Samples that are looked at for each that is drawn: some have no word with a target.
const TRIED: usize = 4;

/// The samples that are drawn, with their maps from before.
#[derive(Default)]
pub struct Pictures {
    samples: Vec<Pictured>,
}

struct Pictured {
    index: usize,
    /// Of its file, without ending.
    name: String,
    before: WordSheet,
}

impl Pictures {
    /// The first `count` samples with matched words, and their maps as they are now.
    ///
    /// # Errors
    /// A bad sample or a GPU fault.
    pub fn new(gpu: &Gpu, training: &Training, count: usize) -> Result<Self> {
        let mut samples: Vec<Pictured> = Vec::new();
        for (index, sample) in training
            .data()
            .samples
            .iter()
            .enumerate()
            .take(count * TRIED)
        {
            if samples.len() == count {
                break;
            }
            let Some(before) = training.maps(gpu, index)? else {
                continue;
            };
            let mut name = file_stem(&sample.id);
            if samples.iter().any(|other| other.name == name) {
                name = format!("{name}-{index}");
            }
            samples.push(Pictured {
                index,
                name,
                before,
            });
        }
        Ok(Self { samples })
    }

    /// The figures of the maps before; none where there is no sample.
    pub fn before(&self) -> Option<MapMetrics> {
        figures(self.samples.iter().map(|sample| &sample.before))
    }

    /// Draws the maps of now into `dir`, a picture a sample, and gives their figures.
    ///
    /// # Errors
    /// A GPU fault, an image that is gone, a file that cannot be written.
    pub fn draw(&self, gpu: &Gpu, training: &Training, dir: &Path) -> Result<Option<MapMetrics>> {
        let mut sheets = Vec::new();
        for sample in &self.samples {
            let Some(now) = training.maps(gpu, sample.index)? else {
                continue;
            };
            let image = training.data().samples[sample.index].image.open()?;
            let sheet = word_sheet(&image, &rows(&sample.before, &now));
            save_png(dir.join(format!("{}.png", sample.name)), &sheet)?;
            sheets.push(now);
        }
        Ok(figures(sheets.iter()))
    }
}

/// The words of now with both their maps. Words that the model predicts need not be those of before.
fn rows<'a>(before: &'a WordSheet, now: &'a WordSheet) -> Vec<WordMaps<'a>> {
    let earlier = |word: &String| before.words.iter().position(|other| other == word);
    let words = now.words.iter().enumerate();
    words
        .map(|(place, word)| WordMaps {
            word,
            target: now.part(&now.targets, place),
            before: earlier(word).and_then(|place| before.part(&before.maps, place)),
            after: now.part(&now.maps, place),
        })
        .collect()
}

fn figures<'a>(sheets: impl Iterator<Item = &'a WordSheet>) -> Option<MapMetrics> {
    let mut sum = MapMetrics::default();
    for sheet in sheets {
        for place in 0..sheet.words.len() {
            let mean = |values| {
                sheet
                    .part(values, place)
                    .map_or(0.0, |map| f64::from(entropy(map)))
            };
            sum.entropy += mean(&sheet.attention);
            sum.target_entropy += mean(&sheet.targets);
            let pair = sheet
                .part(&sheet.maps, place)
                .zip(sheet.part(&sheet.targets, place));
            sum.distance += pair.map_or(0.0, |(map, target)| squared_error(map, target));
            sum.words += 1;
        }
    }
    let words = sum.words as f64;
    (sum.words > 0).then(|| MapMetrics {
        entropy: sum.entropy / words,
        target_entropy: sum.target_entropy / words,
        distance: sum.distance / words,
        ..sum
    })
}

fn squared_error(map: &[f32], target: &[f32]) -> f64 {
    let squares = map
        .iter()
        .zip(target)
        .map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum::<f64>() / map.len().max(1) as f64
}
