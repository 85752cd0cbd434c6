//! Softmax over the last dimension.

use super::{dispatch, grid, is_f16, row_kernel, row_threads, row_variant};
use crate::gpu::Kernel;
use crate::tensor::Tensor;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    rows: u32,
    width: u32,
}

fn kernel(backward: bool, f16: bool, vec4: bool) -> Kernel {
    Kernel::new("softmax")
        .flag("BACKWARD", backward)
        .flag("F16", f16)
        .flag("VEC4", vec4)
}

fn launch(op: &str, backward: bool, tensors: &[&Tensor], threads: u32) {
    let (x, columns) = (tensors[0], tensors[0].last_dim());
    let vec4 = columns.is_multiple_of(4);
    let (rows, width) = (
        x.elements() / columns.max(1),
        columns / if vec4 { 4 } else { 1 },
    );
    let kernel = kernel(backward, is_f16(op, x), vec4);
    dispatch(
        &row_kernel(x.gpu(), kernel, width, threads),
        tensors,
        &Params {
            rows: rows as u32,
            width: width as u32,
        },
        grid(rows),
    );
}

/// softmax(x) over the last dimension; same shape and dtype as `x`, sums in f32.
pub fn softmax(x: &Tensor) -> Tensor {
    softmax_with(x, row_threads(x.gpu()))
}

/// [`softmax`] with the workgroup size chosen by the caller: 8 fits CPU drivers, 128 GPUs.
pub fn softmax_with(x: &Tensor, threads: u32) -> Tensor {
    let y = Tensor::empty(x.gpu(), x.dtype(), x.shape());
    launch("softmax", false, &[x, &y], threads);
    y
}

/// Gradient of [`softmax`] from its output `y` and `dy`: y·(dy − Σ y·dy).
pub fn softmax_backward(y: &Tensor, dy: &Tensor) -> Tensor {
    assert!(
        y.shape() == dy.shape() && y.dtype() == dy.dtype(),
        "softmax_backward: y {y:?}, dy {dy:?}"
    );
    let dx = Tensor::empty(y.gpu(), y.dtype(), y.shape());
    launch(
        "softmax_backward",
        true,
        &[y, dy, &dx],
        row_threads(y.gpu()),
    );
    dx
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for (backward, f16) in [(false, false), (false, true), (true, false), (true, true)] {
        for (vec4, subgroup, width, threads) in [
            (false, true, 77, 8),
            (true, false, 1000, 8),
            (true, false, 256, 128),
        ] {
            let kernel = kernel(backward, f16, vec4);
            all.push(row_variant(kernel, subgroup, width, threads));
        }
    }
    all
}
