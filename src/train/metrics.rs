//! `metrics.jsonl`: one line a step, with figures from before the step's update; `eval.jsonl`: one an
//! evaluation; `maps.jsonl`: one a drawing of word maps.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, files};

/// The figures of one step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepMetrics {
    /// The step, from 0.
    pub step: u64,
    /// The epoch that the step's samples belong to, from 0.
    pub epoch: u64,
    /// What was minimised: language loss (with warm-up factor) + λ · attention loss.
    pub loss: f64,
    /// Mean negative log-likelihood over the batch's label tokens, without warm-up factor.
    pub lm_loss: f64,
    /// Mean squared error over matched words, without λ; also measured at λ = 0.
    pub attn_loss: f64,
    /// Words of the batch that have targets.
    pub matched_words: u64,
    /// Learning rate of the update.
    pub lr: f64,
    /// Norm of all gradients together (LoRA adapter and aligner), before clipping.
    pub grad_norm: f64,
    /// Tokens of the batch, image tokens and prompt included, padding not.
    pub tokens: u64,
    /// Wall-clock time of the step in milliseconds.
    pub step_ms: f64,
    /// The part of it that the samples were waited for.
    #[serde(default)]
    pub data_ms: f64,
    /// Most GPU memory that was in use during the step.
    pub peak_bytes: u64,
    /// Factor of the loss in the backward, in f16 runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f64>,
    /// Whether the update was skipped because that factor was too large; `grad_norm` is 0 then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
}

/// The figures of one evaluation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalMetrics {
    /// Always true: tells these lines from a step's.
    pub eval: bool,
    /// Updates done before it.
    pub step: u64,
    /// Language loss + λ · attention loss, by which the best checkpoint is chosen; λ without its schedule.
    pub loss: f64,
    /// Mean negative log-likelihood over all label tokens.
    pub lm_loss: f64,
    /// Mean squared error over all matched words.
    pub attn_loss: f64,
    /// Words that have targets.
    pub matched_words: u64,
    /// Samples.
    pub samples: u64,
    /// Whether it is the lowest loss so far.
    pub best: bool,
}

/// The figures of the word maps of a few samples, as they are drawn.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MapMetrics {
    /// Updates done before.
    pub step: u64,
    /// Word maps that are counted.
    pub words: u64,
    /// Mean entropy in nats of the attention on the image, a mean over layers and heads.
    pub entropy: f64,
    /// Mean entropy of the targets.
    pub target_entropy: f64,
    /// Mean squared error of the aligned maps.
    pub distance: f64,
}

/// A line of a log.
pub trait Line: Serialize + DeserializeOwned {
    /// What it is called in messages.
    const NAME: &'static str;
    /// Updates that had to be done for a checkpoint to come after it.
    fn done(&self) -> u64;
}

impl Line for StepMetrics {
    const NAME: &'static str = "a step's metrics";

    fn done(&self) -> u64 {
        self.step + 1
    }
}

impl Line for EvalMetrics {
    const NAME: &'static str = "an evaluation's metrics";

    fn done(&self) -> u64 {
        self.step
    }
}

impl Line for MapMetrics {
    const NAME: &'static str = "the figures of word maps";

    fn done(&self) -> u64 {
        self.step
    }
}

impl StepMetrics {
    /// The figures that change from step to step, by name, for plots.
    pub fn scalars(&self) -> [(&'static str, f64); 10] {
        [
            ("loss", self.loss),
            ("lm_loss", self.lm_loss),
            ("attn_loss", self.attn_loss),
            ("matched_words", self.matched_words as f64),
            ("lr", self.lr),
            ("grad_norm", self.grad_norm),
            ("tokens", self.tokens as f64),
            ("step_ms", self.step_ms),
            ("data_ms", self.data_ms),
            ("peak_bytes", self.peak_bytes as f64),
        ]
    }
}

/// The open log of a run's steps or evaluations.
#[derive(Debug)]
pub struct Log<T> {
    path: PathBuf,
    file: File,
    lines: PhantomData<T>,
}

/// `metrics.jsonl`
pub type MetricsLog = Log<StepMetrics>;

impl<T: Line> Log<T> {
    /// Starts a log that is to go on after `step` updates: lines of later ones, and a torn last line, are dropped.
    ///
    /// 0 starts a new log. Errors: a line that holds other figures.
    pub fn open(path: impl AsRef<Path>, step: u64) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let kept: String = if step > 0 && path.exists() {
            // The lines as they are: a number read and written again may differ in its last digit.
            let text = files::read_text(&path)?;
            let read: Vec<T> = read_lines(&path)?;
            let kept = text.lines().zip(read).filter(|(_, m)| m.done() <= step);
            kept.map(|(line, _)| format!("{line}\n")).collect()
        } else {
            String::new()
        };
        files::write_bytes(&path, kept.as_bytes())?;
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(|e| Error::io(&path, e))?;
        Ok(Self {
            path,
            file,
            lines: PhantomData,
        })
    }

    /// Adds a line; it is with the operating system when this returns.
    pub fn append(&mut self, metrics: &T) -> Result<()> {
        let wrong = |e: serde_json::Error| Error::file(&self.path, e.to_string());
        let line = serde_json::to_string(metrics).map_err(wrong)? + "\n";
        self.file
            .write_all(line.as_bytes())
            .map_err(|e| Error::io(&self.path, e))
    }
}

/// All steps of a log; a torn last line is left out.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<StepMetrics>> {
    read_lines(path)
}

/// All lines of a log; a torn last one is left out.
pub fn read_lines<T: Line>(path: impl AsRef<Path>) -> Result<Vec<T>> {
    let path = path.as_ref();
    let text = files::read_text(path)?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .enumerate()
        .map(|(number, line)| {
            serde_json::from_str(line).map_err(|e| {
                let message = format!("line {}: not {}: {e}", number + 1, T::NAME);
                Error::file(path, message)
            })
        })
        .collect()
}
