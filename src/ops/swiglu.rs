//! SwiGLU's product: silu(gate)·up (Shazeer 2020, as in Llama's MLP).

use super::{THREADS, dispatch, is_f16, linear_groups};
use crate::gpu::Kernel;
use crate::tensor::Tensor;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    vectors: u32,
}

fn kernel(backward: bool, f16: bool) -> Kernel {
    Kernel::new("swiglu")
        .flag("BACKWARD", backward)
        .flag("F16", f16)
}

/// silu(gate)·up, elementwise; shapes and dtypes alike.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    assert!(
        gate.shape() == up.shape() && gate.dtype() == up.dtype(),
        "swiglu: {gate:?} and {up:?}"
    );
    let y = Tensor::empty(gate.gpu(), gate.dtype(), gate.shape());
    let vectors = y.elements().div_ceil(4);
    let params = Params {
        vectors: vectors as u32,
    };
    dispatch(
        &kernel(false, is_f16("swiglu", gate)),
        &[gate, up, &y],
        &params,
        linear_groups(vectors, THREADS),
    );
    y
}

/// Gradients of [`swiglu`] towards gate and up.
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> (Tensor, Tensor) {
    let alike = |t: &Tensor| t.shape() == gate.shape() && t.dtype() == gate.dtype();
    assert!(
        alike(up) && alike(dy),
        "swiglu_backward: {gate:?}, {up:?} and {dy:?}"
    );
    let dgate = Tensor::empty(gate.gpu(), gate.dtype(), gate.shape());
    let dup = Tensor::empty(gate.gpu(), gate.dtype(), gate.shape());
    let vectors = gate.elements().div_ceil(4);
    let params = Params {
        vectors: vectors as u32,
    };
    dispatch(
        &kernel(true, is_f16("swiglu_backward", gate)),
        &[gate, up, dy, &dgate, &dup],
        &params,
        linear_groups(vectors, THREADS),
    );
    (dgate, dup)
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    [false, true]
        .into_iter()
        .flat_map(|backward| [kernel(backward, false), kernel(backward, true)])
        .collect()
}
