//! What a run will be, from its configuration and the files that are there: no GPU, and neither weights nor data needed.

use std::fmt;
use std::sync::Arc;

use super::config::{Config, Mode};
use super::evaluation::loaders;
use super::memory::{Estimate, Outline, Role, Shape, TEXT, first_shape, mib, operations};
use super::trained::lora_of;
use crate::tensor::DType;
use crate::vlm::{Processor, shapes};
use crate::{Error, Result};

/// A run before anything of it is loaded.
pub struct Plan {
    /// The model, as it is to be named.
    pub model: String,
    /// The data set, likewise.
    pub data: String,
    /// Memory by part.
    pub estimate: Estimate,
    /// Floating-point operations of a step, about.
    pub operations: u64,
    /// Steps of an epoch and of the run, where the data set is there or `train.steps` says.
    pub steps: (Option<u64>, Option<u64>),
    student: Outline,
    /// Modules with LoRA factors, or tensors that are trained themselves.
    trained: usize,
    mode: Mode,
    rank: usize,
    shape: Shape,
    samples: Option<usize>,
    accumulate: usize,
    /// What would keep the run from starting, or makes this an assumption.
    missing: Vec<String>,
    assumed: bool,
}

impl Plan {
    /// The plan of `config` with activations of type `dtype` where there are `room` bytes of GPU memory.
    ///
    /// Without a tokenizer, the data set or its targets, batches are assumed: a square picture and a short conversation.
    ///
    /// # Errors
    /// A model directory without `config.json`, or with one that cannot be used; weights that are not those of it; a
    /// configuration that trains nothing, or attends to layers that there are not.
    pub fn new(config: &Config, dtype: DType, room: Option<u64>) -> Result<Plan> {
        let dir = &config.model.path;
        shapes(dir)?;
        let assumption = Shape::assumed(config)?;
        let mut missing = Vec::new();
        let loader = Processor::open(dir).and_then(|p| loaders(config, &Arc::new(p)));
        let mut shape = None;
        let samples = match &loader {
            Ok((loader, _)) => {
                match first_shape(config, loader) {
                    Ok(found) => shape = Some(found),
                    Err(error) => missing.push(error.to_string()),
                }
                Some(loader.data().epoch_len())
            }
            Err(error) => {
                missing.push(error.to_string());
                config.data.load().ok().map(|data| data.epoch_len())
            }
        };
        let assumed = shape.is_none();
        let shape = shape.unwrap_or(assumption);
        let student = Outline::open(dir, &shape)?;
        if !student.stored {
            missing.push(format!("no weights in {}", dir.display()));
        }
        let hooked: Vec<usize> = (0..student.hooked).collect();
        let layers = config.attention.layers.choose(&hooked);
        layers.map_err(Error::Config)?;
        let roles = student.roles(config)?;
        let per_epoch = samples.map(|samples| config.steps_per_epoch(samples));
        let steps = match config.train.steps {
            Some(steps) => Some(steps),
            None => samples.map(|samples| config.total_steps(samples)),
        };
        Ok(Plan {
            model: dir.display().to_string(),
            data: match config.data.mixture.len() {
                0 => config.data.path.display().to_string(),
                parts => format!("a mixture of {parts}"),
            },
            estimate: Estimate::of(config, &student, &shape, dtype, room)?,
            operations: operations(config, &student, &shape)?
                .saturating_mul(config.train.accumulate as u64),
            steps: (per_epoch, steps),
            trained: roles.iter().filter(|role| **role != Role::Frozen).count(),
            mode: config.train.mode,
            rank: lora_of(config)?.r,
            student,
            shape,
            samples,
            accumulate: config.train.accumulate,
            missing,
            assumed,
        })
    }

    /// What is not there that `train` needs or the plan had to assume, a line each.
    pub fn missing(&self) -> &[String] {
        &self.missing
    }
}

/// A count as a person reads it.
fn count(n: u64) -> String {
    match n {
        0..100_000 => n.to_string(),
        100_000..1_000_000_000 => format!("{:.2} M", n as f64 / 1e6),
        _ => format!("{:.2} G", n as f64 / 1e9),
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = |name: &str, text: String| writeln!(f, "{name:14} {text}");
        let (s, e) = (&self.student, &self.estimate);
        let by = match s.stored {
            true => "as its files have them",
            false => "as config.json has them",
        };
        let (weights, tensors) = (count(s.parameters()), s.weights.len());
        line(
            "model",
            format!(
                "{}: {weights} weights in {tensors} tensors, {by}",
                self.model
            ),
        )?;
        let cross = match s.cross {
            0 => String::new(),
            n => format!(", {n} of them cross-attention"),
        };
        line(
            "language",
            format!(
                "{} layers of {}{cross}; {} heads; vocabulary {}",
                s.text.layers, s.text.hidden, s.heads, s.vocabulary
            ),
        )?;
        line(
            "vision",
            format!("{} layers of {}", s.vision.layers, s.vision.hidden),
        )?;
        let what = match self.mode {
            Mode::Lora => format!("LoRA of rank {} beside {} layers", self.rank, self.trained),
            Mode::Full => format!("{} tensors of the model", self.trained),
        };
        line(
            "trained",
            format!(
                "{what}: {}; aligner: {}",
                count(e.trained),
                count(e.aligner)
            ),
        )?;
        let (per_epoch, steps) = self.steps;
        let number = |n: Option<u64>| n.map_or("?".to_owned(), |n| n.to_string());
        line(
            "data",
            format!(
                "{}: {} samples, {} steps an epoch, {} steps in all",
                self.data,
                number(self.samples.map(|n| n as u64)),
                number(per_epoch),
                number(steps)
            ),
        )?;
        let assumed = match self.assumed {
            true => format!(" (assumed: a square picture and {TEXT} tokens of text)"),
            false => String::new(),
        };
        let each = |n: usize| n / self.shape.samples;
        line(
            "batch",
            format!(
                "{} x {} samples of at most {} tokens, {} patches, {} tokens to learn, {} words{}",
                self.accumulate,
                self.shape.samples,
                each(self.shape.tokens),
                each(self.shape.patches),
                each(self.shape.labels),
                each(self.shape.words),
                assumed
            ),
        )?;
        line(
            "compute",
            match self.operations as f64 {
                n if n < 1e12 => format!("about {:.1} GFLOP a step", n * 1e-9),
                n => format!("about {:.1} TFLOP a step", n * 1e-12),
            },
        )?;
        line("weights", mib(e.weights))?;
        line("LoRA, aligner", mib(e.added))?;
        line("optimizer", mib(e.optimizer))?;
        line("activations", mib(e.activations))?;
        line("word maps", mib(e.maps))?;
        let room = match e.room {
            Some(room) => format!("; there are {}", mib(room)),
            None => String::new(),
        };
        line("memory", format!("about {} in all{room}", mib(e.peak())))?;
        self.missing
            .iter()
            .try_for_each(|missing| line("missing", missing.clone()))
    }
}
