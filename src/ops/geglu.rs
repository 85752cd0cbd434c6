//! GEGLU's product of a projection's two halves (Shazeer 2020, as in Stable Diffusion's transformer blocks).

use super::{COLUMN_THREADS, columns, dispatch, is_f16};
use crate::gpu::Kernel;
use crate::tensor::Tensor;

/// Rows that a thread walks.
const CHUNK: usize = 4;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    rows: u32,
    /// Elements (or vec4s) of a row of the product.
    width: u32,
    chunk: u32,
}

fn kernel(backward: bool, vec4: bool, f16: bool, (threads, lanes): (u32, u32)) -> Kernel {
    Kernel::new("geglu")
        .flag("BACKWARD", backward)
        .flag("VEC4", vec4)
        .flag("F16", f16)
        .def("WG", threads as i32)
        .def("LANES", lanes as i32)
}

fn run(op: &str, tensors: &[&Tensor]) {
    let (x, n) = (tensors[0], tensors[0].last_dim() / 2);
    let vec4 = n.is_multiple_of(4);
    let width = n / if vec4 { 4 } else { 1 };
    let rows = x.elements() / (2 * n).max(1);
    let cut = columns(x.gpu(), rows, width, CHUNK);
    dispatch(
        &kernel(
            tensors.len() == 3,
            vec4,
            is_f16(op, x),
            (cut.threads, cut.lanes),
        ),
        tensors,
        &Params {
            rows: rows as u32,
            width: width as u32,
            chunk: cut.chunk,
        },
        cut.groups,
    );
}

/// x[.., ..N]·GELU(x[.., N..]) of `x` [.., 2·N] (exact GELU): [.., N] in its dtype.
pub fn geglu(x: &Tensor) -> Tensor {
    assert!(x.last_dim().is_multiple_of(2), "geglu: {x:?}");
    let mut shape = x.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last /= 2;
    }
    let y = Tensor::empty(x.gpu(), x.dtype(), &shape);
    run("geglu", &[x, &y]);
    y
}

/// Gradient of [`geglu`], in the shape of `x`.
pub fn geglu_backward(x: &Tensor, dy: &Tensor) -> Tensor {
    assert!(
        x.elements() == 2 * dy.elements() && x.dtype() == dy.dtype(),
        "geglu_backward: {x:?} and {dy:?}"
    );
    let dx = Tensor::empty(x.gpu(), x.dtype(), x.shape());
    run("geglu_backward", &[x, dy, &dx]);
    dx
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for (vec4, f16) in [(false, false), (true, false), (false, true), (true, true)] {
        for division in COLUMN_THREADS {
            all.extend([false, true].map(|backward| kernel(backward, vec4, f16, division)));
        }
    }
    all
}
