//! Rotary position embedding, half rotation (as Llama's `rotate_half`).

use super::{dispatch, grid, is_f16};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    rows: u32,
    tokens: u32,
    q_heads: u32,
    k_heads: u32,
    shared_angles: u32,
    direction: f32,
    chunk: u32,
}

fn kernel(pair: bool, f16: bool, half: usize, threads: u32) -> Kernel {
    let vec4 = half.is_multiple_of(4);
    Kernel::new("rotary")
        .flag("PAIR", pair)
        .flag("F16", f16)
        .flag("VEC4", vec4)
        .def("HALF", (half / if vec4 { 4 } else { 1 }) as i32)
        .def("WG", threads as i32)
}

/// Cosines and sines of the angles, f32 [B or 1, T, D/2] each.
pub type Angles<'a> = [&'a Tensor; 2];

/// Turns each of `x` [B, T, heads·D] with its number of heads: one tensor, or queries and keys.
fn turn<const N: usize>(
    x: [&Tensor; N],
    heads: [usize; N],
    [cosine, sine]: Angles,
    direction: f32,
) -> [Tensor; N] {
    let (first, half) = (x[0], x[0].last_dim() / heads[0].max(1) / 2);
    let fits = |t: &Tensor| {
        t.dtype() == DType::F32
            && t.rank() == 3
            && (t.dim(0) == 1 || t.dim(0) == first.dim(0))
            && t.shape()[1..] == [first.dim(1), half]
            && t.shape() == cosine.shape()
    };
    let alike = |(t, heads): (&&Tensor, usize)| {
        t.rank() == 3
            && t.dtype() == first.dtype()
            && t.shape()[..2] == first.shape()[..2]
            && t.last_dim() == 2 * half * heads
    };
    assert!(
        x.iter().zip(heads).all(alike) && fits(cosine) && fits(sine),
        "rotary: {x:?} of {heads:?} heads, cos {cosine:?}, sin {sine:?}"
    );
    let (gpu, rows) = (first.gpu(), first.dim(0) * first.dim(1));
    let y = x.map(|x| Tensor::empty(gpu, x.dtype(), x.shape()));
    // CPU drivers pay for each workgroup and run one SIMD register of it at a time.
    let (threads, chunk) = match gpu.tier().cpu {
        true => (8, rows.div_ceil(128).clamp(1, 8)),
        false => (32, 1),
    };
    let mut tensors = vec![cosine, sine];
    tensors.extend(x.iter().zip(&y).flat_map(|(x, y)| [*x, y]));
    dispatch(
        &kernel(N == 2, is_f16("rotary", first), half, threads),
        &tensors,
        &Params {
            rows: rows as u32,
            tokens: first.dim(1) as u32,
            q_heads: heads[0] as u32,
            k_heads: heads[N - 1] as u32,
            shared_angles: u32::from(cosine.dim(0) == 1),
            direction,
            chunk: chunk as u32,
        },
        grid(rows.div_ceil(chunk)),
    );
    y
}

/// Turns each head's pairs (i, i + D/2) of `x` [B, T, heads·D] by their angles.
///
/// Su et al. 2021, in the layout of Hugging Face's Llama.
pub fn rotary(x: &Tensor, angles: Angles, heads: usize) -> Tensor {
    let [y] = turn([x], [heads], angles, 1.0);
    y
}

/// Gradient of [`rotary`]: the same turn backwards.
pub fn rotary_backward(dy: &Tensor, angles: Angles, heads: usize) -> Tensor {
    let [dx] = turn([dy], [heads], angles, -1.0);
    dx
}

/// [`rotary`] of queries and keys, each with its number of heads, in one dispatch.
pub fn rotary_pair(x: [&Tensor; 2], angles: Angles, heads: [usize; 2]) -> [Tensor; 2] {
    turn(x, heads, angles, 1.0)
}

/// Gradients of [`rotary_pair`].
pub fn rotary_pair_backward(dy: [&Tensor; 2], angles: Angles, heads: [usize; 2]) -> [Tensor; 2] {
    turn(dy, heads, angles, -1.0)
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for (pair, f16) in [(false, false), (false, true), (true, false), (true, true)] {
        all.extend([(32, 8), (32, 32), (3, 8)].map(|(half, wg)| kernel(pair, f16, half, wg)));
    }
    all
}
