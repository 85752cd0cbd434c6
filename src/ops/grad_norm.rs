//! Global L2 norm of gradients and clipping by it, as `torch.nn.utils.clip_grad_norm_`.

use super::reduce::{Reduce, reduce};
use super::unary::{Unary, unary};
use super::{THREADS, dispatch, is_f16, linear_groups};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

/// Vectors of four that one thread squares and sums before a tensor gets another thread.
const VECTORS_PER_THREAD: usize = 16;
/// Most partial sums of one tensor.
const MAX_PARTS: usize = 4096;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    elements: u32,
    parts: u32,
    /// Where this tensor's partial sums begin.
    start: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ClipParams {
    max_norm: f32,
}

fn kernel(f16: bool) -> Kernel {
    Kernel::new("grad_norm").flag("F16", f16)
}

fn clip_kernel() -> Kernel {
    Kernel::new("clip_scale")
}

/// √Σ‖g‖² over all `gradients` as f32 `[1]`; the order of summation is fixed.
///
/// Panics on an empty list.
pub fn grad_norm(gradients: &[&Tensor]) -> Tensor {
    let parts_of = |t: &Tensor| {
        t.elements()
            .div_ceil(4 * VECTORS_PER_THREAD)
            .clamp(1, MAX_PARTS)
    };
    let total: usize = gradients.iter().map(|t| parts_of(t)).sum();
    let gpu = gradients.first().expect("grad_norm: no gradients").gpu();
    let partial = Tensor::empty(gpu, DType::F32, &[total]);
    let mut start = 0;
    for gradient in gradients {
        let parts = parts_of(gradient);
        let params = Params {
            elements: gradient.elements() as u32,
            parts: parts as u32,
            start: start as u32,
        };
        dispatch(
            &kernel(is_f16("grad_norm", gradient)),
            &[gradient, &partial],
            &params,
            linear_groups(parts, THREADS),
        );
        start += parts;
    }
    unary(&reduce(&partial, &[0], Reduce::Sum, true), Unary::Sqrt)
}

/// min(1, max_norm / (norm + 1e-6)) as f32 `[1]`, to scale the gradients by.
pub fn clip_scale(norm: &Tensor, max_norm: f32) -> Tensor {
    assert_eq!(norm.elements(), 1, "clip_scale: {norm:?}");
    let scale = Tensor::empty(norm.gpu(), DType::F32, &[1]);
    dispatch(
        &clip_kernel(),
        &[norm, &scale],
        &ClipParams { max_norm },
        [1, 1, 1],
    );
    scale
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    vec![kernel(false), kernel(true), clip_kernel()]
}
