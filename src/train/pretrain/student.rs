//! The mini student: next-token loss on answers about drawn scenes.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::schedule::{Schedule, Trainer};
use super::{Figure, Losses, Scenes, Watch, copy_layout};
use crate::autograd::no_grad;
use crate::data::scenes::{DESCRIBE, Dice, Scene, Split};
use crate::gpu::Gpu;
use crate::nn::{LoadOptions, Loader};
use crate::ops::cross_entropy::IGNORE;
use crate::tensor::{DType, Tensor};
use crate::vlm::processor::template::Message;
use crate::vlm::{Prepared, Student};
use crate::{Error, Result};

/// A recipe of `kind = "student"`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudentRecipe {
    /// Directory with the configuration files, in transformers layout.
    pub layout: PathBuf,
    /// Seed of initial weights, order and questions.
    pub seed: u64,
    /// The data.
    pub scenes: Scenes,
    /// The training.
    pub student: StudentPart,
}

/// `[student]`
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StudentPart {
    /// Length and learning rate.
    pub schedule: Schedule,
    /// Questions asked of a scene in one conversation, beside its caption.
    pub questions: usize,
    /// Standard deviation of the initial matrices and embeddings.
    pub init_std: f64,
}

/// Samples measured at once.
const MEASURED_AT_ONCE: usize = 25;
/// Questions of a held-out scene that are measured.
const MEASURED_QUESTIONS: usize = 4;

impl StudentRecipe {
    pub(super) fn run(&self, gpu: &Gpu, out: &Path, watch: &mut dyn Watch) -> Result<Vec<Figure>> {
        let options = LoadOptions {
            trainable: true,
            seed: self.seed,
            ..LoadOptions::default()
        };
        let loader = Loader::random(gpu, options);
        let student = Student::load(&self.layout, &loader)?;
        let mut dice = Dice::new(self.seed, Split::Train, 4 << 32);
        for parameter in loader.parameters().all() {
            let value = parameter.var.value();
            if value.rank() >= 2 {
                let std = self.student.init_std as f32;
                let values: Vec<f32> = (0..value.elements()).map(|_| std * dice.normal()).collect();
                value.write_f32(&values);
            }
        }
        let scenes: Vec<Scene> = self.scenes.training().iter().collect();
        let schedule = &self.student.schedule;
        let mut trainer = Trainer::new(schedule, loader.parameters().all());
        let mut losses = Losses::new("student", schedule.steps, watch);
        for step in 0..schedule.steps {
            let samples: Vec<Prepared> = (0..schedule.batch)
                .map(|place| {
                    let scene = &scenes[dice.below(scenes.len())];
                    let variant = (step * schedule.batch + place) as u64;
                    let turns = self.conversation(scene, variant, &mut dice);
                    student.prepare(&scene.image, &turns)
                })
                .collect::<Result<_>>()?;
            let samples: Vec<&Prepared> = samples.iter().collect();
            let (rows, labels) = learned(&samples);
            let hidden = student.forward(&samples, None)?.hidden;
            let (tokens, width) = (hidden.dim(0) * hidden.dim(1), hidden.dim(2));
            let rows = Tensor::from_u32(gpu, &rows, &[rows.len()]);
            let hidden = hidden.reshape(&[tokens, width]).gather_rows(&rows);
            let count = labels.len();
            let labels = Tensor::from_u32(gpu, &labels, &[count]);
            let loss = student.next_token_loss(&hidden, &labels, count);
            trainer.step(&loss.backward());
            losses.push(gpu, step as u64, loss.value().read_later())?;
        }
        losses.finish()?;
        drop(student);

        copy_layout(&self.layout, out)?;
        loader
            .parameters()
            .save(&out.join("model.safetensors"), DType::F16)?;
        self.measure(gpu, out)
    }

    /// Opens the written model and asks it about held-out scenes.
    pub(super) fn measure(&self, gpu: &Gpu, dir: &Path) -> Result<Vec<Figure>> {
        let student = Student::open(dir, gpu, LoadOptions::default())?;
        let held_out: Vec<Scene> = self.scenes.held_out().iter().collect();
        answers(&student, &held_out)
    }

    /// A caption and some questions about a scene, in a random order; the picture comes first.
    fn conversation(&self, scene: &Scene, variant: u64, dice: &mut Dice) -> Vec<Message> {
        let (caption, questions) = scene.described_again(self.seed, variant);
        let mut turns = vec![(DESCRIBE.to_owned(), caption)];
        turns.extend(questions.into_iter().take(self.student.questions));
        let order: Vec<usize> = (0..turns.len()).collect();
        let mut messages = Vec::new();
        for (place, i) in dice.shuffled(&order).into_iter().enumerate() {
            let (question, answer) = turns[i].clone();
            messages.push(match place {
                0 => Message::image_and_text(question),
                _ => Message::text("user", question),
            });
            messages.push(Message::text("assistant", answer));
        }
        messages
    }
}

/// Rows (sample · longest + position) that a token is learned at, and the tokens.
fn learned(samples: &[&Prepared]) -> (Vec<u32>, Vec<u32>) {
    let longest = samples.iter().map(|s| s.tokens()).max().unwrap_or(0);
    let mut rows = Vec::new();
    let mut labels = Vec::new();
    for (number, sample) in samples.iter().enumerate() {
        for (position, &label) in sample.labels.iter().enumerate() {
            if label != IGNORE {
                rows.push((number * longest + position) as u32);
                labels.push(label);
            }
        }
    }
    (rows, labels)
}

/// Share of questions whose one-word answer is the likeliest token, in all and by kind, and the mean loss of that
/// token.
pub fn answers(student: &Student, scenes: &[Scene]) -> Result<Vec<Figure>> {
    let mut asked: Vec<(&'static str, Prepared)> = Vec::new();
    for scene in scenes {
        for (question, answer) in scene.questions.iter().take(MEASURED_QUESTIONS) {
            let kind = match question.split(' ').nth(1) {
                Some("colour") => "colour",
                Some("shape") => "shape",
                Some("many") => "number",
                _ => "yes or no",
            };
            let turns = [
                Message::image_and_text(question.clone()),
                Message::text("assistant", answer.clone()),
            ];
            asked.push((kind, student.prepare(&scene.image, &turns)?));
        }
    }
    let vocabulary = student.vocabulary();
    let mut hits: Vec<(&str, bool)> = Vec::new();
    let mut loss = 0.0;
    for chunk in asked.chunks(MEASURED_AT_ONCE) {
        let samples: Vec<&Prepared> = chunk.iter().map(|(_, sample)| sample).collect();
        let longest = samples.iter().map(|s| s.tokens()).max().unwrap_or(0);
        let mut rows = Vec::new();
        let mut labels = Vec::new();
        for (number, sample) in samples.iter().enumerate() {
            let first = sample.labels.iter().position(|&label| label != IGNORE);
            let first = first.ok_or_else(|| Error::Input("a question without answer".into()))?;
            rows.push((number * longest + first) as u32);
            labels.push(sample.labels[first] as usize);
        }
        let logits = no_grad(|| -> Result<Vec<f32>> {
            let hidden = student.forward(&samples, None)?.hidden;
            let (tokens, width) = (hidden.dim(0) * hidden.dim(1), hidden.dim(2));
            let rows = Tensor::from_u32(student.gpu(), &rows, &[rows.len()]);
            let rows = hidden.reshape(&[tokens, width]).gather_rows(&rows);
            student.logits(&rows).value().to_f32()
        })?;
        for (((kind, _), row), &label) in chunk.iter().zip(logits.chunks(vocabulary)).zip(&labels) {
            let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = row.iter().map(|v| (v - top).exp()).sum();
            loss += f64::from(top + sum.ln() - row[label]);
            hits.push((kind, row[label] == top));
        }
    }
    let share = |kind: Option<&str>| {
        let of: Vec<bool> = hits
            .iter()
            .filter(|(k, _)| kind.is_none_or(|kind| kind == *k))
            .map(|(_, hit)| *hit)
            .collect();
        of.iter().filter(|&&hit| hit).count() as f64 / of.len().max(1) as f64
    };
    let mut figures = vec![Figure::new("answer accuracy", share(None))];
    for kind in ["colour", "shape", "number", "yes or no"] {
        figures.push(Figure::new(
            format!("answer accuracy, {kind}"),
            share(Some(kind)),
        ));
    }
    figures.push(Figure::new("answer loss", loss / hits.len().max(1) as f64));
    figures.push(Figure::new("questions", hits.len() as f64));
    Ok(figures)
}
