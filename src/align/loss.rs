//! Aggregation over layers and heads, and the attention loss.

use serde::{Deserialize, Serialize};

use super::aligner::Aligner;
use super::maps::min_max;
use crate::autograd::Var;

/// How hooked layers and heads become one map per word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregate {
    /// Heads are the aligner's channels; the aligner runs on each layer, then the mean over layers.
    #[default]
    Learned,
    /// Mean over heads and layers, no learned part (for looking).
    MeanMean,
}

/// Aligned maps [words, R·R] in [0, 1] from word maps [words, R, R, heads] of each hooked layer,
/// by the `learned` rule.
///
/// Panics without a layer.
pub fn aligned(layers: &[Var], aligner: &Aligner) -> Var {
    let [words, height, width, _] = *layers[0].shape() else {
        panic!("word maps have four dimensions: {:?}", layers[0])
    };
    // All layers go through the aligner in one batch: its norm is per sample.
    let maps = aligner.forward(&Var::concat(layers, 0));
    let mean = maps
        .reshape(&[layers.len(), words * height * width])
        .mean(&[0], false)
        .reshape(&[words, height, width, 1]);
    min_max(&mean)
}

/// Mean over heads and layers of word maps [words, R, R, heads]: [words, R, R, 1], not normalised.
///
/// Panics without a layer.
pub fn mean_mean(layers: &[Var]) -> Var {
    let [words, height, width, heads] = *layers[0].shape() else {
        panic!("word maps have four dimensions: {:?}", layers[0])
    };
    Var::concat(layers, 0)
        .reshape(&[layers.len(), words * height * width, heads])
        .mean(&[0, 2], false)
        .reshape(&[words, height, width, 1])
}

/// Mean over words of the mean squared error between maps and targets, both [words, R·R]: a scalar [1].
pub fn attention_loss(maps: &Var, targets: &Var) -> Var {
    maps.sub(targets).square().mean_all()
}
