//! Aggregation over layers and heads, and the attention loss.

use super::aligner::Aligner;
use super::maps::min_max;
use super::options::{Aggregate, Aggregation, LossKind, OverLayers};
use crate::autograd::Var;
use crate::ops::unary::Unary;
use crate::tensor::Tensor;

/// Added to what is divided by or taken the logarithm of.
const EPS: f32 = 1e-6;

/// Less than any two layers' maximum, for maps that are zero.
const TINY: f32 = 1e-20;

/// One map per word [words, R, R, 1] from word maps [words, R, R, heads] of each hooked layer, not
/// normalised. `words` says how many of the words belong to each sample, in order.
///
/// Panics without a layer.
pub fn aggregated(
    layers: &[Var],
    words: &[usize],
    aggregation: &Aggregation,
    aligner: &Aligner,
) -> Var {
    let [all, height, width, heads] = *layers[0].shape() else {
        panic!("word maps have four dimensions: {:?}", layers[0])
    };
    let stacked = || Var::concat(layers, 0).reshape(&[layers.len(), all, height * width, heads]);
    let maps = |v: Var, channels: usize| v.reshape(&[all, height, width, channels]);
    match aggregation.rule {
        Aggregate::Learned => {
            // All layers go through the aligner in one batch: its norm is per map.
            let each = aligner.forward(&Var::concat(layers, 0));
            let each = each.reshape(&[layers.len(), all, height, width, 1]);
            match aggregation.over_layers {
                OverLayers::Mean => each.mean(&[0], false),
                OverLayers::Max => each.max(&[0], false),
            }
        }
        Aggregate::MeanLayer => aligner.forward(&maps(stacked().mean(&[0], false), heads)),
        Aggregate::MaxLayer => aligner.forward(&maps(stacked().max(&[0], false), heads)),
        Aggregate::MaxMax => {
            let over_heads = stacked().max(&[3], true);
            aligner.forward(&maps(over_heads.max(&[0], false), 1))
        }
        Aggregate::MeanMean => aligner.forward(&mean_mean(layers)),
        Aggregate::Flow => {
            let flow = flow(layers, words, aggregation);
            match aligner.is_none() {
                true => flow.mean(&[3], true),
                false => aligner.forward(&flow),
            }
        }
    }
}

/// [`aggregated`] maps with each word's minimum and maximum moved to 0 and 1: [words, R·R].
pub fn aligned(
    layers: &[Var],
    words: &[usize],
    aggregation: &Aggregation,
    aligner: &Aligner,
) -> Var {
    min_max(&aggregated(layers, words, aggregation, aligner))
}

/// Attention flow: layers multiplied or summed, [words, R, R, heads], or one channel with head weights.
///
/// A product of thirty layers' probabilities is less than f32 can hold, and already of a few less than the epsilons of
/// norm and min-max, which would flatten it. So each word's product is divided by its maximum, from layer to layer: a constant,
/// which the min-max takes away again.
fn flow(layers: &[Var], words: &[usize], aggregation: &Aggregation) -> Var {
    let options = &aggregation.flow;
    let weighted = layers.iter().map(|layer| match options.head_weights {
        true => head_weighted(layer, words),
        false => layer.clone(),
    });
    let joined = weighted.reduce(|a, b| match options.sum {
        true => a.add(&b),
        false => rescaled(a).mul(&b),
    });
    let joined = joined.expect("at least one layer is hooked");
    let joined = match options.sum {
        true => joined,
        false => rescaled(joined),
    };
    if !options.token_weight {
        return joined;
    }
    let places: Vec<f32> = words
        .iter()
        .flat_map(|&count| (0..count).map(move |j| (j + 1) as f32 / count as f32))
        .collect();
    let places = Tensor::from_f32(joined.value().gpu(), &places, &[places.len(), 1, 1, 1]);
    joined.mul(&Var::constant(places))
}

/// Maps [words, R, R, heads] divided by each word's maximum.
fn rescaled(maps: Var) -> Var {
    let most = maps.detach().max(&[1, 2, 3], true).add_scalar(TINY);
    maps.div(&most)
}

/// Heads weighted by the mean over patches of the maximum over a sample's words, then their mean: [words, R, R, 1].
fn head_weighted(layer: &Var, words: &[usize]) -> Var {
    let mut first = 0;
    let mut samples = Vec::new();
    for &count in words.iter().filter(|&&count| count > 0) {
        let maps = layer.narrow(0, first, count);
        let weights = maps.max(&[0], true).mean(&[1, 2], true);
        samples.push(maps.mul(&weights).mean(&[3], true));
        first += count;
    }
    Var::concat(&samples, 0)
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

/// Mean over words of the distance between maps and targets, both [words, R·R] in 0…1: a scalar `[1]`.
pub fn attention_loss(maps: &Var, targets: &Var, kind: LossKind) -> Var {
    match kind {
        LossKind::Mse => maps.sub(targets).square().mean_all(),
        LossKind::Kl => {
            let share = |x: &Var| {
                let x = x.add_scalar(EPS);
                x.div(&x.sum(&[1], true))
            };
            let (p, q) = (share(targets), share(maps));
            let logs = p.unary(Unary::Log).sub(&q.unary(Unary::Log));
            p.mul(&logs).sum(&[1], false).mean_all()
        }
        LossKind::Cosine => {
            let length = |x: &Var| {
                x.square()
                    .sum(&[1], false)
                    .add_scalar(EPS)
                    .unary(Unary::Sqrt)
            };
            let product = maps.mul(targets).sum(&[1], false);
            let similarity = product.div(&length(maps).mul(&length(targets)));
            similarity.mean_all().scale(-1.0).add_scalar(1.0)
        }
    }
}
