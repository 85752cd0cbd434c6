//! How much GPU memory a run will take, by part, from shapes alone, before any weight is loaded.

use std::fmt;

use super::config::{Config, Mode};
use super::loader::Loader;
use super::trained::lora_of;
use crate::align::options::{Aggregate, AlignerKind, Parallel};
use crate::error::{Error, Result};
use crate::gpu::{Gpu, size_class};
use crate::nn::LoraConfig;
use crate::ops::linear_cross_entropy::LOGITS;
use crate::tensor::DType;

mod compute;
mod shape;
mod student;

pub use compute::operations;
pub use shape::Shape;
pub(crate) use shape::TEXT;
pub use student::{Outline, Role, Tower, Weight};

/// Samples that are looked at for the shape of a batch.
const LOOKED_AT: usize = 4;
/// Pixels of a word map.
const MAP: usize = 1024;

/// Bytes of a run's parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// The model's weights, trained ones in f32.
    pub weights: u64,
    /// LoRA factors and aligner.
    pub added: u64,
    /// Moments and gradients of everything trained.
    pub optimizer: u64,
    /// What the backward of one micro-batch needs of the student's forward, logits included.
    pub activations: u64,
    /// What it needs of the word maps and the aligner.
    pub maps: u64,
    /// Samples of that micro-batch.
    pub batch: usize,
    /// The memory there is: `--max-memory` or the adapter's; `None` where neither is known.
    pub room: Option<u64>,
    /// Trained elements of the student: LoRA factors, or its own weights.
    pub trained: u64,
    /// The aligner's elements.
    pub aligner: u64,
    /// The activations with `train.checkpoint_activations`.
    recomputed: u64,
    /// Whether the student's own weights are trained.
    full: bool,
}

/// The shape of the first batches of `loader`.
///
/// # Errors
/// A sample that cannot be read or prepared.
pub fn first_shape(config: &Config, loader: &Loader) -> Result<Shape> {
    let (_, order) = loader.order(0);
    let looked_at = &order[..order.len().min(LOOKED_AT)];
    Shape::of(&loader.examples(looked_at)?, config)
}

impl Estimate {
    /// What the run of `config` needs on `gpu`, by the first samples of its data.
    ///
    /// # Errors
    /// Files that cannot be read; weights and optimizer alone that do not fit, with what would make them.
    pub fn new(gpu: &Gpu, config: &Config, loader: &Loader) -> Result<Estimate> {
        let dtype = config.train.precision.dtype(gpu.tier())?;
        let shape = first_shape(config, loader)?;
        let student = Outline::open(&config.model.path, &shape)?;
        let estimate = Self::of(config, &student, &shape, dtype, gpu.room())?;
        estimate.check()?;
        Ok(estimate)
    }

    /// What it needs with a student and batches of these sizes and activations of type `dtype`, where there are `room`
    /// bytes: no GPU, no weights, no data.
    ///
    /// # Errors
    /// A configuration that trains nothing, or freezes what there is not.
    pub fn of(
        config: &Config,
        student: &Outline,
        shape: &Shape,
        dtype: DType,
        room: Option<u64>,
    ) -> Result<Estimate> {
        let lora = lora_of(config)?.rename(student.rename);
        let element = dtype.bytes() as u64;
        let mut estimate = Estimate {
            batch: shape.samples,
            room,
            full: config.train.mode == Mode::Full,
            ..Estimate::default()
        };
        let roles = student.roles(config)?;
        let (mut beside, mut vision_trained) = (0u64, false);
        for (weight, role) in student.weights.iter().zip(&roles) {
            let (elements, own) = (weight.elements(), *role == Role::Own);
            let held = match weight.shape.len() {
                _ if own => 4,
                0 | 1 => 4,
                _ => weight.bytes.min(if dtype == DType::F16 { 2 } else { 4 }) as u64,
            };
            // Tables and the output projection stay as they are.
            let linear = !weight.name.contains("embed") && !weight.name.contains("lm_head");
            estimate.weights += match (config.model.quantize.kind(), &weight.shape[..]) {
                (Some(kind), [outputs, inputs]) if linear && !own => kind.bytes(*outputs, *inputs),
                _ => size_class(elements * held),
            };
            vision_trained |= weight.in_vision() && *role != Role::Frozen;
            match (role, &weight.shape[..]) {
                (Role::Own, _) => estimate.trained += elements,
                (Role::Adapted(rank), [outputs, inputs]) => {
                    let factors = rank * (inputs + outputs) + usize::from(lora.use_dora) * outputs;
                    estimate.trained += factors as u64;
                    estimate.added += 4 * factors as u64;
                    beside += factors_kept(&lora, *inputs, *outputs, *rank) as u64
                        * student.tower(weight.in_vision()).tokens as u64;
                }
                _ => {}
            }
        }
        let (aligner, maps) = aligner(config, student, shape.words);
        estimate.aligner = (aligner + parallel(config, student)) as u64;
        estimate.added += 4 * estimate.aligner;
        estimate.optimizer = 12 * (estimate.trained + estimate.aligner);
        estimate.maps = 4 * maps as u64;

        // Logits in f32, as many rows as are there at once, and their gradient; that of the hidden states.
        let row = 4 * student.vocabulary;
        let rows = (LOGITS / row).max(64).min(shape.labels);
        let logits = (2 * rows * row + 4 * shape.labels * student.text.hidden) as u64;
        let towers = [(&student.text, true), (&student.vision, vision_trained)];
        let mut all = beside + student.pictures as u64;
        let mut recomputed = student.pictures as u64;
        for (tower, taped) in towers {
            // A gradient flows back through one layer at a time.
            let one = tower.layer() as u64;
            let layers = if taped { tower.layers as u64 } else { 0 };
            all += layers * one + one;
            recomputed += layers * (tower.tokens * tower.hidden) as u64 + 2 * one;
        }
        estimate.recomputed = logits + element * recomputed;
        estimate.activations = match config.train.checkpoint_activations {
            true => estimate.recomputed,
            false => logits + element * all,
        };
        Ok(estimate)
    }

    /// That what does not depend on the batch fits.
    ///
    /// # Errors
    /// It does not; with what would make it.
    pub fn check(&self) -> Result<()> {
        match self.room {
            Some(room) if self.fixed() > room => Err(Error::Config(format!(
                "out of GPU memory before it began: {self}; {}",
                match self.full {
                    true => "use train.mode = \"lora\", or freeze more by train.freeze",
                    false =>
                        "use model.quantize = \"q8\" or \"q4\", `--precision f16`, or a smaller model",
                }
            ))),
            _ => Ok(()),
        }
    }

    /// The most that is held at once.
    pub fn peak(&self) -> u64 {
        self.fixed() + self.activations + self.maps
    }

    /// What does not depend on the batch.
    fn fixed(&self) -> u64 {
        self.weights + self.added + self.optimizer
    }

    /// Which setting would make it fit; `None` where it does, or where the room is not known.
    pub fn advice(&self) -> Option<String> {
        let room = self.room?;
        if self.peak() <= room {
            return None;
        }
        let left = room.saturating_sub(self.fixed());
        let batch = |bytes: u64| (left * self.batch as u64 / bytes.max(1)) as usize;
        let (smaller, recomputed) = (
            batch(self.activations + self.maps),
            batch(self.recomputed + self.maps),
        );
        let less = |batch: usize| match batch {
            b if b >= self.batch => String::new(),
            b => format!(
                "train.batch = {b} with train.accumulate = {} times as large",
                self.batch.div_ceil(b)
            ),
        };
        Some(match (smaller, recomputed) {
            (1.., _) => format!("it would with {}", less(smaller)),
            (0, 1..) => {
                let smaller = less(recomputed);
                let and = if smaller.is_empty() { "" } else { " and " };
                format!("it would with train.checkpoint_activations = true{and}{smaller}")
            }
            _ => {
                "not even one sample at a time with train.checkpoint_activations = true would; use \
                  model.quantize = \"q4\", `--precision f16`, a smaller picture or model"
                    .into()
            }
        })
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "about {} of GPU memory: weights {}, LoRA and aligner {}, optimizer {}, activations of {} sample(s) {}, \
             word maps {}",
            mib(self.peak()),
            mib(self.weights),
            mib(self.added),
            mib(self.optimizer),
            self.batch,
            mib(self.activations),
            mib(self.maps)
        )?;
        match self.room {
            Some(room) => write!(f, "; there are {}", mib(room)),
            None => Ok(()),
        }
    }
}

/// Bytes as a person reads them.
pub fn mib(bytes: u64) -> String {
    let mib = bytes as f64 / (1u64 << 20) as f64;
    match mib {
        0.0..10_240.0 => format!("{mib:.1} MiB"),
        _ => format!("{:.1} GiB", mib / 1024.0),
    }
}

/// Elements a token that a pair of factors keeps: its input with dropout, the inner product, and the two outputs.
fn factors_kept(lora: &LoraConfig, inputs: usize, outputs: usize, rank: usize) -> usize {
    let dropped = if lora.dropout > 0.0 { inputs } else { 0 };
    dropped + rank + 2 * outputs
}

/// Elements of the weights of `attention.parallel`, in all hooked layers.
fn parallel(config: &Config, student: &Outline) -> usize {
    let Tower {
        hidden,
        queries,
        keys,
        ..
    } = student.text;
    let width = match config.attention.parallel {
        Parallel::None => 0,
        Parallel::Map | Parallel::Diff => queries + keys,
        Parallel::DiffOutput => queries + 2 * keys,
    };
    student.hooked * hidden * width
}

/// Elements of the aligner's weights, and of what the backward needs of the maps of `words` words.
fn aligner(config: &Config, student: &Outline, words: usize) -> (usize, usize) {
    let (hidden, channels) = (
        config.aligner.hidden,
        config.aggregation().channels(student.heads),
    );
    let layers = tapped(config, student);
    // Convolutions hidden to hidden, and what stands around them.
    let weights = match config.aligner.kind {
        AlignerKind::None => 0,
        AlignerKind::Mlp => (channels + 1) * hidden + (hidden + 1) * hidden + hidden + 1,
        AlignerKind::Light => 9 * 2 * channels * hidden + channels + 1,
        AlignerKind::Conv => 9 * (2 * channels + hidden) * hidden + channels + 1,
        AlignerKind::Deep => 9 * (2 * channels + 3 * hidden) * hidden + channels + 1,
    };
    let inner = match config.aligner.kind {
        AlignerKind::None => 0,
        AlignerKind::Mlp | AlignerKind::Light => 1,
        AlignerKind::Conv => 2,
        AlignerKind::Deep => 4,
    };
    // Each layer's words are resized and joined; then convolution, norm and activation of each block.
    let given = 2 * layers * words * MAP * student.heads;
    let blocks = 3 * (inner * hidden + channels);
    // As much again while the widest block's gradient flows.
    let through = aligned(config, layers) * words;
    (weights, given + through * MAP * (blocks + 2 * hidden))
}

/// Number of hooked layers that are tapped.
fn tapped(config: &Config, student: &Outline) -> usize {
    let all: Vec<usize> = (0..student.hooked).collect();
    let layers = config.attention.layers.choose(&all);
    layers.map_or(student.hooked, |chosen| chosen.len())
}

/// How many maps of a word pass through the aligner.
fn aligned(config: &Config, layers: usize) -> usize {
    match config.attention.aggregate {
        Aggregate::Learned => layers,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_the_setting_that_makes_it_fit() {
        let advice = |room| {
            let estimate = Estimate {
                weights: 100,
                activations: 400,
                recomputed: 100,
                batch: 4,
                room: Some(room),
                ..Estimate::default()
            };
            estimate.advice()
        };
        assert_eq!(advice(500), None);
        let said = advice(300).expect("advice");
        assert!(
            said.contains("train.batch = 2 with train.accumulate = 2 times"),
            "{said}"
        );
        let said = advice(150).expect("advice");
        assert!(
            said.contains("checkpoint_activations = true and train.batch = 2"),
            "{said}"
        );
        assert!(advice(110).expect("advice").contains("not even one"));
    }
}
