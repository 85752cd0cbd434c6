//! Cross-entropy of a linear layer's outputs, whose [rows, vocabulary] logits are never all stored.

use super::binary::{Binary, binary};
use super::concat::concat;
use super::cross_entropy::{CrossEntropy, cross_entropy, cross_entropy_backward};
use super::in_place::{add_in_place, fill};
use super::matmul::{MatmulOptions, matmul};
use super::reduce::{Reduce, reduce};
use super::unary::{Unary, unary};
use crate::tensor::{DType, Tensor};

/// Bytes of the logits that are there at once; as much again for their gradient.
pub const LOGITS: usize = 64 << 20;

/// What [`linear_cross_entropy`] gives.
pub struct LinearCrossEntropy {
    /// f32 `[1]`: `factor` × the sum over the rows of −log p(label).
    pub loss: Tensor,
    /// f32 [N, D]: its gradient in `x`, where asked for.
    pub dx: Option<Tensor>,
    /// f32 [V, D]: its gradient in `w`, where asked for.
    pub dw: Option<Tensor>,
}

/// `factor` × the sum of [`cross_entropy`] of x · wᵀ, with its gradients in x and w where `needs` says so.
///
/// `x` [N, D] f32 or f16, `w` [V, D] f32, f16 or bf16, `labels` u32 `[N]`. The rows go through in chunks: each chunk's
/// logits, f32 in every precision, give its loss and at once its gradients, as in Hsu et al., *Liger Kernel* (2024), so
/// that they are computed once and soon forgotten.
pub fn linear_cross_entropy(
    x: &Tensor,
    w: &Tensor,
    labels: &Tensor,
    factor: f32,
    needs: [bool; 2],
) -> LinearCrossEntropy {
    linear_cross_entropy_with(x, w, labels, factor, needs, LOGITS)
}

/// [`linear_cross_entropy`] with at most `bytes` of logits at once (but 64 rows), for tests.
#[doc(hidden)]
pub fn linear_cross_entropy_with(
    x: &Tensor,
    w: &Tensor,
    labels: &Tensor,
    factor: f32,
    needs: [bool; 2],
    bytes: usize,
) -> LinearCrossEntropy {
    assert!(
        x.rank() == 2 && w.rank() == 2 && x.dim(1) == w.dim(1) && labels.elements() == x.dim(0),
        "linear_cross_entropy: {x:?} by {w:?}, labels {labels:?}"
    );
    let (gpu, rows) = (x.gpu(), x.dim(0));
    let mut losses = Vec::new();
    let mut dx = Vec::new();
    let mut dw: Option<Tensor> = None;
    for (start, len) in chunks(rows, 4 * w.dim(0), bytes) {
        let (x, labels) = (x.narrow(start, len), labels.narrow(start, len));
        let forward = MatmulOptions {
            trans_b: true,
            output: Some(DType::F32),
            ..Default::default()
        };
        let logits = matmul(&x, w, &forward);
        let CrossEntropy { loss, lse } = cross_entropy(&logits, &labels);
        losses.push(reduce(&loss, &[0], Reduce::Sum, true));
        if needs == [false; 2] {
            continue;
        }
        let upstream = Tensor::empty(gpu, DType::F32, &[len]);
        fill(&upstream, factor);
        let dlogits = cross_entropy_backward(&logits, &labels, &lse, &upstream);
        drop(logits);
        if needs[0] {
            dx.push(matmul(&dlogits, w, &MatmulOptions::default()));
        }
        if needs[1] {
            let backward = MatmulOptions {
                trans_a: true,
                ..Default::default()
            };
            let part = matmul(&dlogits, &x, &backward);
            match &dw {
                Some(sum) => add_in_place(sum, &part, 1.0),
                None => dw = Some(part),
            }
        }
    }
    let total = losses
        .into_iter()
        .reduce(|a, b| binary(&a, &b, Binary::Add));
    let total = total.unwrap_or_else(|| Tensor::zeros(gpu, DType::F32, &[1]));
    LinearCrossEntropy {
        loss: unary(&total, Unary::Affine(factor, 0.0)),
        dx: needs[0].then(|| match dx.is_empty() {
            true => Tensor::zeros(gpu, DType::F32, x.shape()),
            false => concat(&dx.iter().collect::<Vec<_>>(), 0),
        }),
        dw: match needs[1] {
            true => dw.or_else(|| Some(Tensor::zeros(gpu, DType::F32, w.shape()))),
            false => None,
        },
    }
}

/// Ranges (start, len) of rows of `row_bytes` each that take at most `bytes`; each starts where a view may start, which
/// a multiple of 64 rows always is.
fn chunks(rows: usize, row_bytes: usize, bytes: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = (bytes / row_bytes.max(1) / 64 * 64).max(64);
    (0..rows)
        .step_by(step)
        .map(move |start| (start, step.min(rows - start)))
}
