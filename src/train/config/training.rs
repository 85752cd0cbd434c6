//! Keys of the recipe itself: what is trained, the course of the learning rate, evaluation on the way.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Config, range};
use crate::gpu::Tier;
use crate::nn::MOST_RANK;
use crate::tensor::DType;
use crate::train::schedule::Schedule;
use crate::{Error, Result};

/// `[optimizer]` (AdamW)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Optimizer {
    /// Learning rate; default 1e-4.
    pub lr: f64,
    /// Default 0.9 and 0.999.
    pub betas: [f64; 2],
    /// Default 1e-8.
    pub eps: f64,
    /// Default 0.
    pub weight_decay: f64,
    /// The aligner's learning rate; default `lr`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aligner_lr: Option<f64>,
    /// How the learning rates change: `step` (γ after each epoch), `constant`, `cosine` or `linear`; default `step`.
    pub schedule: Schedule,
    /// First steps, in which the learning rates rise from 0; default 0.
    pub warmup_steps: u64,
    /// The learning rate's factor after each epoch under `step`, 1 for none; default 0.85.
    pub gamma: f64,
    /// Largest global gradient norm, 0 for no clipping; default 0.
    pub grad_clip: f64,
}

/// `[train]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Train {
    /// What is trained: `lora`, or `full` for the model's own weights; default `lora`.
    pub mode: Mode,
    /// Parts that stay as they are: `vision`, `connector`, `language`, `layers.0-11` (of the language model),
    /// `vision.layers.0-5`, or any part of a tensor's name between dots; default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub freeze: Vec<String>,
    /// Samples that are computed at once; default 4.
    pub batch: usize,
    /// Batches whose gradients make one step's update; default 1.
    pub accumulate: usize,
    /// Whether layers are computed again in the backward instead of keeping their activations; default false.
    pub checkpoint_activations: bool,
    /// Sequences are padded to a multiple of so many tokens, to have few lengths; 0 for the batch's longest, or where
    /// steps are replayed for a multiple of 32. Default 0.
    pub bucket: usize,
    /// Steps in all; instead of `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u64>,
    /// Passes over the data; default 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epochs: Option<u64>,
    /// Seed of the order, of dropout and of new weights; default 0.
    pub seed: u64,
    /// Type of the activations, `f32` or `f16`; default `f32`.
    pub precision: Precision,
    /// Steps between checkpoints, 0 for one at the end only; default 100.
    pub checkpoint_every: u64,
    /// Checkpoints that are kept beside the best one by evaluation, 0 for all; default 0.
    pub keep: usize,
    /// Evaluations in a row without improvement that end the run, 0 for none; default 0.
    pub early_stop: u64,
}

/// Type of the activations: `train.precision` and `--precision`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit floats; sums, norms, softmax, losses and optimizer state stay 32-bit.
    F16,
}

impl Precision {
    /// The tensor type. Errors: f16 on an adapter without it.
    pub fn dtype(self, tier: &Tier) -> Result<DType> {
        match self {
            Self::F32 => Ok(DType::F32),
            Self::F16 if tier.f16 => Ok(DType::F16),
            Self::F16 => Err(Error::NoAdapter(format!(
                "adapter {} [{}] has no 16-bit floats (SHADER_F16): use `--precision f32`, \
                 or another adapter of `lavender-wgpu devices` by `--adapter`",
                tier.name, tier.driver
            ))),
        }
    }
}

/// `train.mode`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Low-rank factors beside frozen weights.
    #[default]
    Lora,
    /// The model's own weights.
    Full,
}

/// `[eval]`: losses on samples that are not trained on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Eval {
    /// Data set to evaluate on; default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Folder that its image paths are relative to; default the data set's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images: Option<PathBuf>,
    /// Its target store; default none: the language loss alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<PathBuf>,
    /// Share of the training images held out instead, with all their samples; default 0.
    pub share: f64,
    /// Steps between evaluations, 0 for one at the end only; default 0.
    pub every: u64,
}

impl Eval {
    /// Whether there is anything to evaluate on.
    pub fn on(&self) -> bool {
        self.path.is_some() || self.share > 0.0
    }
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            lr: 1e-4,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            aligner_lr: None,
            schedule: Schedule::default(),
            warmup_steps: 0,
            gamma: 0.85,
            grad_clip: 0.0,
        }
    }
}

impl Default for Train {
    fn default() -> Self {
        Self {
            mode: Mode::default(),
            freeze: Vec::new(),
            batch: 4,
            accumulate: 1,
            checkpoint_activations: false,
            bucket: 0,
            steps: None,
            epochs: None,
            seed: 0,
            precision: Precision::default(),
            checkpoint_every: 100,
            keep: 0,
            early_stop: 0,
        }
    }
}

/// Tokens that sequences are padded to a multiple of where steps are replayed: each length has its own plans.
const REPLAYED_BUCKET: usize = 32;

impl Config {
    /// The same, with few lengths of sequences where steps are replayed.
    pub fn for_plans(&self, replays: bool) -> Config {
        let mut config = self.clone();
        if replays && config.train.bucket == 0 {
            config.train.bucket = REPLAYED_BUCKET;
        }
        config
    }

    /// Samples of an update: `train.batch` × `train.accumulate`.
    pub fn effective_batch(&self) -> usize {
        self.train.batch * self.train.accumulate
    }

    /// The learning rate at `step` of `total`, in `epoch` (from 0).
    pub fn learning_rate(&self, step: u64, epoch: u64, total: u64) -> f64 {
        let o = &self.optimizer;
        let decay = match o.schedule {
            Schedule::Step => o.gamma.powf(epoch as f64),
            _ => 1.0,
        };
        o.lr * decay * o.schedule.factor(step, o.warmup_steps, total)
    }

    /// The aligner's learning rate over the rest's.
    pub fn aligner_rate(&self) -> f64 {
        let o = &self.optimizer;
        o.aligner_lr.map_or(1.0, |lr| lr / o.lr)
    }

    /// What the types of these keys cannot say.
    pub(super) fn check_training(&self) -> std::result::Result<(), (&'static str, String)> {
        let (train, eval) = (&self.train, &self.eval);
        let some = train.accumulate as f64;
        range("train.accumulate", some, some >= 1.0, "at least 1")?;
        let tokens = self.data.max_tokens.unwrap_or(1) as f64;
        range("data.max_tokens", tokens, tokens >= 1.0, "at least 1")?;
        // What is beyond is a slip of the hand, and would overflow.
        let steps = train.steps.or(train.epochs).unwrap_or(0);
        for (key, value, most) in [
            ("train.batch", train.batch as u64, 1 << 16),
            ("train.accumulate", train.accumulate as u64, 1 << 16),
            ("train.bucket", train.bucket as u64, 1 << 20),
            ("train.steps", steps, 1 << 40),
            ("data.workers", self.data.workers.unwrap_or(0) as u64, 1024),
            ("aligner.hidden", self.aligner.hidden as u64, 4096),
            ("lora.r", self.lora.r as u64, MOST_RANK as u64),
        ] {
            if value > most {
                let key = match key {
                    "train.steps" if train.steps.is_none() => "train.epochs",
                    key => key,
                };
                return Err((key, format!("found {value}, expected at most {most}")));
            }
        }
        let rate = self.optimizer.aligner_lr.unwrap_or(0.0);
        range("optimizer.aligner_lr", rate, rate >= 0.0, "a number from 0")?;
        let part = (0.0..1.0).contains(&eval.share);
        range("eval.share", eval.share, part, "a number from 0 to below 1")?;
        let wrong = |key, message: &str| Err((key, message.to_owned()));
        if eval.path.is_some() && eval.share > 0.0 {
            return wrong(
                "eval.share",
                "found beside `eval.path`, expected one of the two",
            );
        }
        if eval.path.is_none() && (eval.images.is_some() || eval.targets.is_some()) {
            return wrong(
                "eval.path",
                "found none, expected the data set that `eval.images` and `eval.targets` belong to",
            );
        }
        if !eval.on() && eval.every > 0 {
            return wrong(
                "eval.every",
                "found without samples to evaluate on, expected `eval.path` or `eval.share` too",
            );
        }
        if train.early_stop > 0 && eval.every == 0 {
            return wrong(
                "train.early_stop",
                "found without evaluations, expected `eval.every` and `eval.path` or `eval.share` too",
            );
        }
        if train.mode == Mode::Full && self.init.lora.is_some() {
            return wrong(
                "init.lora",
                "found with `train.mode = \"full\"`, expected none: merge it into the model first (`lavender-wgpu merge`)",
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn f16_is_refused_on_an_adapter_without_it() {
        let tier = |f16| Tier {
            f16,
            ..Tier::default()
        };
        assert_eq!(Precision::F16.dtype(&tier(true)).unwrap(), DType::F16);
        assert_eq!(Precision::F32.dtype(&tier(false)).unwrap(), DType::F32);
        let error = Precision::F16.dtype(&tier(false)).unwrap_err().to_string();
        assert!(
            error.contains("SHADER_F16") && error.contains("--precision f32"),
            "{error}"
        );
    }
}
