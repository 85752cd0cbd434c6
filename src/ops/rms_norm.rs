//! RMS norm over the last dimension (`wgsl/layer_norm.wgsl` without the mean).

use super::layer_norm::{NormGradients, RowNorm};
use super::row_threads;
use crate::tensor::Tensor;

fn rms_norm_op(x: &Tensor, eps: f32) -> RowNorm {
    RowNorm {
        op: "rms_norm",
        rms: true,
        eps,
        threads: row_threads(x.gpu()),
    }
}

/// x/√(mean(x²) + eps)·weight over the last dimension (Zhang & Sennrich 2019).
///
/// `x` [.., C] f32 or f16; `weight` f32 `[C]` or none. Same shape and dtype as `x`.
pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, eps: f32) -> Tensor {
    rms_norm_op(x, eps).forward(x, weight, None)
}

/// [`rms_norm`] with the workgroup size chosen by the caller: 8 fits CPU drivers, 128 GPUs.
pub fn rms_norm_with(x: &Tensor, weight: Option<&Tensor>, eps: f32, threads: u32) -> Tensor {
    RowNorm {
        threads,
        ..rms_norm_op(x, eps)
    }
    .forward(x, weight, None)
}

/// Gradients of [`rms_norm`], dx added to `onto` where given; that of the weight only when `affine`, no bias.
pub fn rms_norm_backward(
    x: &Tensor,
    weight: Option<&Tensor>,
    dy: &Tensor,
    onto: Option<&Tensor>,
    eps: f32,
    affine: bool,
) -> NormGradients {
    let (dx, sums) = rms_norm_op(x, eps).backward(x, weight, dy, onto, affine);
    NormGradients {
        dx,
        dweight: sums.map(|s| s.narrow(0, 1).reshape(&[x.last_dim()])),
        dbias: None,
    }
}
