//! Aggregation over layers and heads, and the attention loss.

use super::aligner::Aligner;
use super::maps::min_max;
use super::options::Aggregate;
use crate::autograd::Var;

/// Channels that an aggregation leaves for the aligner, of a model with `heads` heads.
pub fn channels(aggregate: Aggregate, heads: usize) -> usize {
    match aggregate {
        Aggregate::Learned | Aggregate::MeanLayer | Aggregate::MaxLayer => heads,
        Aggregate::MaxMax | Aggregate::MeanMean => 1,
    }
}

/// One map per word [words, R, R, 1] from word maps [words, R, R, heads] of each hooked layer, not
/// normalised.
///
/// Panics without a layer.
pub fn aggregated(layers: &[Var], aggregate: Aggregate, aligner: &Aligner) -> Var {
    let [words, height, width, heads] = *layers[0].shape() else {
        panic!("word maps have four dimensions: {:?}", layers[0])
    };
    let stacked = || Var::concat(layers, 0).reshape(&[layers.len(), words, height * width, heads]);
    let maps = |v: Var, channels: usize| v.reshape(&[words, height, width, channels]);
    match aggregate {
        Aggregate::Learned => {
            // All layers go through the aligner in one batch: its norm is per map.
            let each = aligner.forward(&Var::concat(layers, 0));
            let each = each.reshape(&[layers.len(), words, height, width, 1]);
            each.mean(&[0], false)
        }
        Aggregate::MeanLayer => aligner.forward(&maps(stacked().mean(&[0], false), heads)),
        Aggregate::MaxLayer => aligner.forward(&maps(stacked().max(&[0], false), heads)),
        Aggregate::MaxMax => {
            let over_heads = stacked().max(&[3], true);
            aligner.forward(&maps(over_heads.max(&[0], false), 1))
        }
        Aggregate::MeanMean => aligner.forward(&mean_mean(layers)),
    }
}

/// [`aggregated`] maps with each word's minimum and maximum moved to 0 and 1: [words, R·R].
pub fn aligned(layers: &[Var], aggregate: Aggregate, aligner: &Aligner) -> Var {
    min_max(&aggregated(layers, aggregate, aligner))
}

/// Mean over heads and layers of word maps [words, R, R, heads]: [words, R, R, 1], not normalised.
///
/// Panics without a layer.
pub fn mean_mean(layers: &[Var]) -> Var {
    let [words, height, width, heads] = *layers[0].shape() else {
        panic!("word maps have four dimensions: {:?}", layers[0])
    };
    Var::concat(layers, 0)
        .reshape(&[layers.len(), words, height * width, heads])
        .mean(&[0, 3], false)
        .reshape(&[words, height, width, 1])
}

/// Mean over words of the mean squared error between maps and targets, both [words, R·R]: a scalar `[1]`.
pub fn attention_loss(maps: &Var, targets: &Var) -> Var {
    maps.sub(targets).square().mean_all()
}
