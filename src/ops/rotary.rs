//! Rotary position embedding, half rotation (as Llama's `rotate_half`).

use super::{THREADS, dispatch, is_f16, linear_groups};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    pairs: u32,
    tokens: u32,
    heads: u32,
    half_dim: u32,
    shared_angles: u32,
    direction: f32,
}

fn kernel(f16: bool) -> Kernel {
    Kernel::new("rotary").flag("F16", f16)
}

fn turn(x: &Tensor, cosine: &Tensor, sine: &Tensor, heads: usize, direction: f32) -> Tensor {
    let half = x.last_dim() / heads.max(1) / 2;
    let fits = |t: &Tensor| {
        t.dtype() == DType::F32
            && t.rank() == 3
            && (t.dim(0) == 1 || t.dim(0) == x.dim(0))
            && t.shape()[1..] == [x.dim(1), half]
            && t.shape() == cosine.shape()
    };
    assert!(
        x.rank() == 3 && half * 2 * heads == x.last_dim() && fits(cosine) && fits(sine),
        "rotary: x {x:?} of {heads} heads, cos {cosine:?}, sin {sine:?}"
    );
    let y = Tensor::empty(x.gpu(), x.dtype(), x.shape());
    let pairs = x.elements() / 2;
    dispatch(
        &kernel(is_f16("rotary", x)),
        &[x, cosine, sine, &y],
        &Params {
            pairs: pairs as u32,
            tokens: x.dim(1) as u32,
            heads: heads as u32,
            half_dim: half as u32,
            shared_angles: u32::from(cosine.dim(0) == 1),
            direction,
        },
        linear_groups(pairs, THREADS),
    );
    y
}

/// Turns each head's pairs (i, i + D/2) of `x` [B, T, heads·D] by their angles.
///
/// `cosine`, `sine`: f32 [B or 1, T, D/2]. Su et al. 2021, in the layout of Hugging Face's Llama.
pub fn rotary(x: &Tensor, cosine: &Tensor, sine: &Tensor, heads: usize) -> Tensor {
    turn(x, cosine, sine, heads, 1.0)
}

/// Gradient of [`rotary`]: the same turn backwards.
pub fn rotary_backward(dy: &Tensor, cosine: &Tensor, sine: &Tensor, heads: usize) -> Tensor {
    turn(dy, cosine, sine, heads, -1.0)
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    vec![kernel(false), kernel(true)]
}
