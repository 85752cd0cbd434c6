//! The mirror of a self-attention student's word maps: how the picture's tokens attend to the words.

use crate::autograd::{Var, attention_tapped};
use crate::gpu::Gpu;
use crate::ops::attention::{AttentionMask, AttentionShape};
use crate::ops::attention_tap::AttentionTap;
use crate::tensor::Tensor;

/// One sample of a batch: the query rows of its words, its image columns, and its tokens without padding.
pub struct MirroredSample<'a> {
    /// Query rows that are tapped.
    pub rows: &'a [usize],
    /// Key columns that are tapped.
    pub columns: &'a [u32],
    /// Tokens.
    pub tokens: usize,
}

/// The image→text block of a layer's attention, transposed to the text→image block's shape and added to it.
///
/// The causal mask hides text from the picture's tokens, which come before it. Here these rows' probabilities are those
/// without a mask, p(i, t) = exp(s(i, t)) / Σ exp(s(i, ·)) over all tokens of the sample, from the layer's own queries and
/// keys; nothing is predicted from them. The causal block is detached: the mirror alone is taught.
#[derive(Clone)]
pub struct Mirror {
    tap: AttentionTap,
    mask: AttentionMask,
    /// u32 `[R]`: where each tapped text row lies in [batch · most rows of a sample].
    places: Tensor,
}

impl Mirror {
    /// The mirror of a batch padded to `length` tokens, whose tap has the samples' rows one after the other and their
    /// columns padded to the most, [batch, C], by any.
    pub fn new(gpu: &Gpu, samples: &[MirroredSample<'_>], length: usize) -> Mirror {
        let batch = samples.len();
        let most = |of: fn(&MirroredSample<'_>) -> usize| samples.iter().map(of).max().unwrap_or(0);
        let (widest, longest) = (most(|s| s.columns.len()), most(|s| s.rows.len()));
        let nowhere = (batch * length) as u32;
        let mut queries = vec![nowhere; batch * widest];
        let mut keys = vec![nowhere; batch * longest];
        let mut bits = vec![0; batch * length];
        let mut places = Vec::new();
        for (b, sample) in samples.iter().enumerate() {
            for (c, &column) in sample.columns.iter().enumerate() {
                queries[b * widest + c] = (b * length) as u32 + column;
            }
            for (r, &row) in sample.rows.iter().enumerate() {
                keys[b * longest + r] = row as u32;
                places.push((b * longest + r) as u32);
            }
            bits[b * length..b * length + sample.tokens].fill(1);
        }
        let tensor = |values: &[u32], shape: &[usize]| Tensor::from_u32(gpu, values, shape);
        Mirror {
            tap: AttentionTap {
                query_rows: tensor(&queries, &[queries.len()]),
                key_columns: tensor(&keys, &[batch, longest]),
            },
            mask: AttentionMask {
                key_bits: Some(tensor(&bits, &[batch, length])),
                ..AttentionMask::default()
            },
            places: tensor(&places, &[places.len()]),
        }
    }

    /// The detached probabilities `own` [R, heads, C] of the causal block, plus the mirror of the layer's queries and
    /// keys.
    pub fn add_to(&self, own: &Var, q: &Var, k: &Var, shape: AttentionShape) -> Var {
        // The attention's output has no reader: keys stand for the values.
        let (_, probs) = attention_tapped(q, k, k, shape, &self.mask, &self.tap);
        let [batch, longest] = [0, 1].map(|i| self.tap.key_columns.dim(i));
        let widest = self.tap.query_rows.elements() / batch;
        let mirrored = probs
            .reshape(&[batch, widest, shape.heads, longest])
            .permute(&[0, 3, 2, 1])
            .reshape(&[batch * longest, shape.heads, widest])
            .gather_rows(&self.places);
        own.detach().add(&mirrored)
    }
}
