//! Losses on samples that are not trained on, the best of them, and when to stop.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::batch::{Batch, Example};
use super::config::{Config, WithoutTargets};
use super::loader::Loader;
use super::metrics::EvalMetrics;
use super::objective::{Objective, Weights};
use crate::autograd::no_grad;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::vlm::Processor;

/// What evaluations have found so far; part of a checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Updates done before the best one.
    pub step: u64,
    /// Its loss; none before the first.
    pub loss: Option<f64>,
    /// Evaluations since.
    pub since: u64,
}

impl Best {
    /// Takes in an evaluation's figures; says in them whether they are the best.
    pub fn update(&mut self, metrics: &mut EvalMetrics) {
        metrics.best = self.loss.is_none_or(|best| metrics.loss < best);
        *self = match metrics.best {
            true => Best {
                step: metrics.step,
                loss: Some(metrics.loss),
                since: 0,
            },
            false => Best {
                since: self.since + 1,
                ..*self
            },
        };
    }
}

/// The loaders of the samples that are trained on, and of those that are evaluated on.
///
/// # Errors
/// As [`Loader::new`]; a share that leaves nothing to train on.
pub fn loaders(
    config: &Config,
    processor: &Arc<Processor>,
) -> Result<(Arc<Loader>, Option<Arc<Loader>>)> {
    let mut train = Loader::new(config, processor.clone())?;
    let mut evaluated = config.clone();
    evaluated.data.shuffle = false;
    let eval = &config.eval;
    let held_out = if let Some(path) = &eval.path {
        evaluated.data.path = path.clone();
        evaluated.data.images = eval.images.clone();
        evaluated.data.targets = eval.targets.clone();
        evaluated.data.mixture = Vec::new();
        evaluated.data.without_targets = WithoutTargets::Language;
        Some(Loader::new(&evaluated, processor.clone())?)
    } else if eval.share > 0.0 {
        let held = held_out(&train, config)?;
        let mut other = Loader::new(config, processor.clone())?;
        other.keep(&held);
        train.keep(&held.iter().map(|held| !held).collect::<Vec<_>>());
        Some(other)
    } else {
        None
    };
    Ok((Arc::new(train), held_out.map(Arc::new)))
}

/// Which samples are held out: those of `eval.share` of the images, so that none is on both sides; the seed chooses.
fn held_out(loader: &Loader, config: &Config) -> Result<Vec<bool>> {
    let samples = &loader.data().samples;
    let name = |index: usize| {
        let share = loader.data().share_of(index);
        format!("{share}/{}", samples[index].image.file_name())
    };
    let names: Vec<String> = (0..samples.len()).map(name).collect();
    let images: BTreeMap<u64, &String> = names
        .iter()
        .map(|name| (hash(config.train.seed, name), name))
        .collect();
    let most = images.len().saturating_sub(1);
    let count = (config.eval.share * images.len() as f64).round() as usize;
    let Some(&last) = images.keys().nth(count.max(1) - 1).filter(|_| most > 0) else {
        return Err(Error::Config(format!(
            "eval.share = {}: the training data have {} image(s), expected at least 2 to hold one out",
            config.eval.share,
            images.len()
        )));
    };
    let last = match count > most {
        true => *images.keys().nth(most - 1).unwrap_or(&last),
        false => last,
    };
    let held = |name: &String| hash(config.train.seed, name) <= last;
    Ok(names.iter().map(held).collect())
}

/// FNV-1a of a name, begun with a seed; the same on every machine.
fn hash(seed: u64, name: &str) -> u64 {
    let bytes = seed.to_le_bytes().into_iter().chain(name.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Mean losses over all samples of `loader`, at most `micro` at once; `lambda` weighs the attention loss.
///
/// # Errors
/// Bad samples, GPU faults.
pub fn evaluate(
    gpu: &Gpu,
    objective: &Objective,
    loader: &Loader,
    micro: usize,
    lambda: f64,
) -> Result<EvalMetrics> {
    let (mut lm, mut attention) = (0.0, 0.0);
    let (mut labels, mut words) = (0, 0);
    let samples = loader.data().samples.len();
    let all: Vec<usize> = (0..samples).collect();
    // λ 0: the attention loss is measured off the tape.
    let weights = Weights {
        attention: 0.0,
        language: 1.0,
        frozen: false,
    };
    for order in all.chunks(micro) {
        let mut examples = loader.examples(order)?;
        objective.complete(gpu, &mut examples)?;
        let examples: Vec<&Example> = examples.iter().collect();
        let batch = Batch::new(gpu, &examples);
        let losses = no_grad(|| objective.losses(gpu, &examples, &batch, weights))?;
        gpu.check()?;
        lm += f64::from(losses.lm.scalar()?) * batch.label_count as f64;
        labels += batch.label_count;
        if let Some(loss) = losses.attention {
            attention += f64::from(loss.scalar()?) * batch.words as f64;
            words += batch.words;
        }
    }
    let lm_loss = lm / labels.max(1) as f64;
    let attn_loss = attention / words.max(1) as f64;
    Ok(EvalMetrics {
        eval: true,
        loss: lm_loss + lambda * attn_loss,
        lm_loss,
        attn_loss,
        matched_words: words as u64,
        samples: samples as u64,
        ..EvalMetrics::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_is_the_lowest_and_the_rest_are_counted() {
        let mut best = Best::default();
        let mut found = Vec::new();
        for (step, loss) in [(2, 3.0), (4, 2.0), (6, 2.0), (8, f64::NAN), (10, 1.5)] {
            let mut metrics = EvalMetrics {
                step,
                loss,
                ..EvalMetrics::default()
            };
            best.update(&mut metrics);
            found.push((metrics.best, best.step, best.since));
        }
        let wanted = [
            (true, 2, 0),
            (true, 4, 0),
            (false, 4, 1),
            (false, 4, 2),
            (true, 10, 0),
        ];
        assert_eq!(found, wanted);
    }
}
