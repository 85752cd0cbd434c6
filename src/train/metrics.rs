//! `metrics.jsonl`: one line a step, with figures from before the step's update.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, files};

/// The figures of one step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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

/// The open log of a run.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Starts a log that is to go on at `step`: lines of that step and later ones, and a torn last line, are dropped.
    ///
    /// 0 starts a new log. Errors: a line that is no step's figures.
    pub fn open(path: impl AsRef<Path>, step: u64) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let kept: String = if step > 0 && path.exists() {
            // The lines as they are: a number read and written again may differ in its last digit.
            let text = files::read_text(&path)?;
            let steps = read(&path)?;
            let kept = text.lines().zip(steps).filter(|(_, m)| m.step < step);
            kept.map(|(line, _)| format!("{line}\n")).collect()
        } else {
            String::new()
        };
        files::write_bytes(&path, kept.as_bytes())?;
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .map_err(|e| Error::io(&path, e))?;
        Ok(Self { path, file })
    }

    /// Adds a step's line; it is with the operating system when this returns.
    pub fn append(&mut self, metrics: &StepMetrics) -> Result<()> {
        let line = line(&self.path, metrics)?;
        self.file
            .write_all(line.as_bytes())
            .map_err(|e| Error::io(&self.path, e))
    }
}

fn line(path: &Path, metrics: &StepMetrics) -> Result<String> {
    let mut line = serde_json::to_string(metrics).map_err(|e| Error::file(path, e.to_string()))?;
    line.push('\n');
    Ok(line)
}

/// All steps of a log; a torn last line is left out.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<StepMetrics>> {
    let path = path.as_ref();
    let text = files::read_text(path)?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .enumerate()
        .map(|(number, line)| {
            serde_json::from_str(line).map_err(|e| {
                Error::file(
                    path,
                    format!("line {}: not a step's metrics: {e}", number + 1),
                )
            })
        })
        .collect()
}
