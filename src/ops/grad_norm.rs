//! Global L2 norm of gradients and clipping by it, as `torch.nn.utils.clip_grad_norm_`.

use super::reduce::{Reduce, reduce};
use super::sets::{SETS, ends, filled, sets};
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
    elements: [u32; SETS],
    /// Part behind each tensor's last.
    ends: [u32; SETS],
    /// Where the first tensor's partial sums begin.
    start: u32,
    /// To the multiple of 16 bytes that the kernel takes.
    unused: [u32; 3],
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ClipParams {
    max_norm: f32,
}

fn kernel(sets: usize, f16: bool, threads: u32) -> Kernel {
    Kernel::new("grad_norm")
        .def("SETS", sets as i32)
        .flag("F16", f16)
        .def("WG", threads as i32)
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
    let threads = if gpu.tier().cpu { 8 } else { THREADS };
    let mut start = 0;
    for alike in gradients.chunk_by(|a, b| a.dtype() == b.dtype()) {
        for set in alike.chunks(sets(gpu, 1, 1)) {
            let ends = ends(set.iter().map(|t| parts_of(t)));
            let params = Params {
                elements: filled(set.iter().map(|t| t.elements() as u32), 0),
                ends,
                start: start as u32,
                unused: [0; 3],
            };
            let mut tensors = vec![&partial];
            tensors.extend(set);
            let parts = ends[SETS - 1] as usize;
            dispatch(
                &kernel(set.len(), is_f16("grad_norm", set[0]), threads),
                &tensors,
                &params,
                linear_groups(parts, threads),
            );
            start += parts;
        }
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
    let mut all = vec![clip_kernel()];
    for sets in 1..=SETS {
        all.extend([kernel(sets, false, 8), kernel(sets, true, THREADS)]);
    }
    all
}
