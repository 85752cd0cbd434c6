//! From attention taps to word maps, and from word maps to one map per word.

use crate::align::store::SIDE;
use crate::align::words::WordTokens;
use crate::autograd::Var;
use crate::gpu::Gpu;
use crate::tensor::Tensor;
use crate::vlm::Grid;

/// The words of one sample whose attention is tapped.
#[derive(Clone, Debug)]
pub struct SampleWords {
    /// The words, in the order of their maps.
    pub words: Vec<String>,
    /// Query rows of the sample's sequence that the tap reads, ascending.
    pub rows: Vec<usize>,
    /// [words, rows]: weight of each row's map in each word's.
    pub weights: Vec<f32>,
}

impl SampleWords {
    /// Rows and weights of `words`: the row of token t is t − 1, the position that predicts it.
    ///
    /// Mean over an occurrence's tokens, then over occurrences. Token 0 has no predicting row and
    /// does not count.
    pub fn new(words: &[WordTokens]) -> SampleWords {
        let predicting = |w: &WordTokens| -> Vec<(usize, f32)> {
            let occurrences: Vec<Vec<usize>> = w
                .occurrences
                .iter()
                .map(|tokens| tokens.iter().filter(|&&t| t > 0).copied().collect())
                .filter(|tokens: &Vec<usize>| !tokens.is_empty())
                .collect();
            WordTokens {
                text: w.text.clone(),
                occurrences,
            }
            .weights()
            .into_iter()
            .map(|(token, weight)| (token - 1, weight))
            .collect()
        };
        let weighted: Vec<(&str, Vec<(usize, f32)>)> = words
            .iter()
            .map(|w| (w.text.as_str(), predicting(w)))
            .filter(|(_, rows)| !rows.is_empty())
            .collect();
        let mut rows: Vec<usize> = weighted
            .iter()
            .flat_map(|(_, r)| r.iter().map(|x| x.0))
            .collect();
        rows.sort_unstable();
        rows.dedup();
        let mut weights = vec![0.0; weighted.len() * rows.len()];
        for (w, (_, list)) in weighted.iter().enumerate() {
            for &(row, weight) in list {
                if let Ok(column) = rows.binary_search(&row) {
                    weights[w * rows.len() + column] += weight;
                }
            }
        }
        SampleWords {
            words: weighted.iter().map(|(text, _)| text.to_string()).collect(),
            rows,
            weights,
        }
    }

    /// No words at all.
    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }
}

/// Word maps of one hooked layer: probabilities [rows of all samples, heads, columns] of a tap →
/// [words of all samples, R, R, heads], resized bilinearly to R = 32.
///
/// A sample's tap rows come after the rows of the samples before it; columns beyond its grid are
/// padding. `None` when no sample has a word.
pub fn word_maps(gpu: &Gpu, probs: &Var, samples: &[(&SampleWords, Grid)]) -> Option<Var> {
    let (heads, columns) = (probs.dim(1), probs.dim(2));
    let mut maps = Vec::new();
    let mut first = 0;
    for (words, grid) in samples {
        let rows = words.rows.len();
        if rows == 0 {
            continue;
        }
        let cells = grid.height * grid.width;
        let mean = Tensor::from_f32(gpu, &words.weights, &[words.words.len(), rows]);
        let own = probs
            .narrow(0, first, rows)
            .reshape(&[rows, heads * columns]);
        let maps_of_words = Var::constant(mean)
            .matmul(&own)
            .reshape(&[words.words.len(), heads, columns])
            .narrow(2, 0, cells)
            .permute(&[0, 2, 1])
            .reshape(&[words.words.len(), grid.height, grid.width, heads])
            .resize_bilinear(SIDE, SIDE);
        maps.push(maps_of_words);
        first += rows;
    }
    match maps.len() {
        0 => None,
        1 => maps.pop(),
        _ => Some(Var::concat(&maps, 0)),
    }
}

/// Epsilon of the min-max normalisation.
const MIN_MAX_EPS: f32 = 1e-6;

/// Per-word min-max of maps [words, R, R, 1] to [words, R·R]: (x − min) / (max − min + 1e-6).
pub fn min_max(maps: &Var) -> Var {
    let words = maps.dim(0);
    let flat = maps.reshape(&[words, maps.value().elements() / words]);
    let min = flat.min(&[1], true);
    let range = flat.max(&[1], true).sub(&min).add_scalar(MIN_MAX_EPS);
    flat.sub(&min).div(&range)
}

/// [`min_max`] of one map on the host.
pub fn min_max_host(map: &[f32]) -> Vec<f32> {
    let min = map.iter().copied().fold(f32::INFINITY, f32::min);
    let max = map.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    map.iter()
        .map(|v| (v - min) / (max - min + MIN_MAX_EPS))
        .collect()
}
