//! A question of a benchmark, whatever file it comes from.

use std::path::Path;

use image::imageops::{FilterType, resize};
use serde::{Deserialize, Serialize};

use super::{Benchmark, multiple_choice, tsv};
use crate::align::store::SIDE;
use crate::data::drawn::CAPTION_PROMPT;
use crate::data::scenes::{SceneSet, Split};
use crate::data::{DataSet, ImageRef, Part, Role, Sample, Turn};
use crate::error::{Error, Result};

/// Seed of the drawn scenes that `mini` stands for, those that the embedded training is measured on.
const SCENES_SEED: u64 = 20;
/// How many.
const SCENES: usize = 48;

/// One question about one image, with its answers.
#[derive(Clone, Debug)]
pub struct Item {
    /// Its name in the data set.
    pub index: String,
    /// Its place there, from 0.
    pub number: usize,
    /// The image.
    pub image: ImageRef,
    /// The conversation up to the reply.
    pub turns: Vec<Turn>,
    /// The question as the data set has it.
    pub question: String,
    /// Answers that count as right; several where several people were asked.
    pub answers: Vec<String>,
    /// Options of a multiple-choice question.
    pub options: Vec<(char, String)>,
    /// What it is reported by.
    pub category: Option<String>,
    /// Part of the benchmark.
    pub split: Option<String>,
    /// Words whose place in the image is known: cells of the R×R map, row by row.
    pub regions: Vec<(String, Vec<bool>)>,
}

/// A sample that could not be used, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Its name in the data set.
    pub index: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Item {
    /// The last turn of a sample as the answer, all before as the conversation.
    pub fn from_sample(sample: &Sample, number: usize) -> Item {
        let answer = sample.turns.last().map(Turn::text).unwrap_or_default();
        let turns = sample.turns[..sample.turns.len().saturating_sub(1)].to_vec();
        let asked = turns.iter().rev().find(|turn| turn.role == Role::User);
        let question = asked.map(Turn::text).unwrap_or_default();
        Item {
            index: sample.id.clone(),
            number,
            image: sample.image.clone(),
            options: multiple_choice::options_in(&question),
            answers: tsv::answers(&answer),
            turns,
            question,
            category: None,
            split: None,
            regions: Vec::new(),
        }
    }

    /// The conversation with the first answer as its end, for teacher-forced figures.
    pub fn sample(&self) -> Sample {
        let mut turns = self.turns.clone();
        turns.push(Turn {
            role: Role::Assistant,
            parts: vec![Part::Text(
                self.answers.first().cloned().unwrap_or_default(),
            )],
        });
        Sample {
            id: self.index.clone(),
            image: self.image.clone(),
            turns,
        }
    }

    /// Adds `text` to the end of the question that is asked.
    pub fn instruct(&mut self, text: &str) {
        let asked = self.turns.iter_mut().rev().find(|t| t.role == Role::User);
        if let Some(turn) = asked {
            match turn
                .parts
                .iter_mut()
                .rev()
                .find(|part| matches!(part, Part::Text(_)))
            {
                Some(Part::Text(question)) => *question = format!("{question}\n{text}"),
                _ => turn.parts.push(Part::Text(text.to_owned())),
            }
        }
    }

    /// Regions of words from `masks/<index>/<word>.png`: bright pixels are inside.
    ///
    /// # Errors
    /// A picture that cannot be read.
    pub fn read_regions(&mut self, masks: &Path) -> Result<()> {
        // A name with separators could point out of the folder.
        if self.index.contains(['/', '\\']) || self.index == ".." {
            return Ok(());
        }
        let folder = masks.join(&self.index);
        let Ok(entries) = std::fs::read_dir(&folder) else {
            return Ok(());
        };
        let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        files.retain(|path| {
            path.extension()
                .is_some_and(|e| e.eq_ignore_ascii_case("png"))
        });
        files.sort();
        for path in files {
            let word = path.file_stem().unwrap_or_default().to_string_lossy();
            let picture = ImageRef::Path(path.clone()).open()?;
            let side = SIDE as u32;
            let small = resize(&picture, side, side, FilterType::Triangle);
            let inside = small.pixels().map(|p| p.0[0] >= 128).collect();
            self.regions.push((word.to_lowercase(), inside));
        }
        Ok(())
    }
}

/// Reads a benchmark: VLMEvalKit's TSV, or any data set that can be trained on. Also gives the samples that have no
/// usable image.
///
/// # Errors
/// As [`tsv::load`] and [`DataSet::load`].
pub fn load(path: &Path, images: Option<&Path>) -> Result<(Vec<Item>, Vec<Skipped>)> {
    if path
        .extension()
        .is_some_and(|e| e.eq_ignore_ascii_case("tsv"))
    {
        return tsv::load(path, images);
    }
    let data = DataSet::load(path, images)?;
    let samples = data.samples.iter().enumerate();
    let items = samples.map(|(number, sample)| Item::from_sample(sample, number));
    Ok((items.collect(), Vec::new()))
}

/// The embedded held-out scenes: captions with the words' regions where captions or attention are measured, else
/// the questions.
///
/// # Errors
/// The picture encoder's.
pub fn drawn(benchmark: Option<Benchmark>) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    for (number, scene) in SceneSet::new(SCENES_SEED, Split::HeldOut, SCENES)
        .iter()
        .enumerate()
    {
        let image = scene.embedded(&format!("scene-{number:05}.png"))?;
        let mut add = |id: String, question: &str, answer: &str| {
            let sample = Sample::question(id, image.clone(), question, answer);
            items.push(Item::from_sample(&sample, items.len()));
        };
        match benchmark {
            Some(Benchmark::Caption | Benchmark::Attention) => {
                add(format!("scene-{number:05}"), CAPTION_PROMPT, &scene.caption);
                let regions = scene.word_masks().into_iter();
                let cells = |mask: &crate::data::scenes::Mask| mask.resized(SIDE).inside();
                let regions = regions.map(|(word, mask)| (word, cells(&mask))).collect();
                items.last_mut().expect("just added").regions = regions;
            }
            _ => {
                for (n, (question, answer)) in scene.questions.iter().enumerate() {
                    add(format!("scene-{number:05}-q{n}"), question, answer);
                }
            }
        }
    }
    Ok(items)
}

/// An error where there is nothing to measure.
pub fn none_left(path: &Path, skipped: &[Skipped]) -> Error {
    let first = match skipped.first() {
        Some(first) => format!(
            "none of its {} samples can be used; the first, `{}`: {}",
            skipped.len(),
            first.index,
            first.reason
        ),
        None => "holds no samples".into(),
    };
    Error::file(path, first)
}
