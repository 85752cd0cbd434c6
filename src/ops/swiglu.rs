//! SwiGLU's product: silu(gate)·up (Shazeer 2020, as in Llama's MLP).

use super::{LINE_THREADS, dispatch, is_f16, line};
use crate::gpu::Kernel;
use crate::tensor::Tensor;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    vectors: u32,
    chunk: u32,
}

fn kernel(backward: bool, f16: bool, threads: u32) -> Kernel {
    Kernel::new("swiglu")
        .flag("BACKWARD", backward)
        .flag("F16", f16)
        .def("WG", threads as i32)
}

fn run(op: &str, tensors: &[&Tensor]) {
    let gate = tensors[0];
    let vectors = gate.elements().div_ceil(4);
    let line = line(gate.gpu(), vectors);
    dispatch(
        &kernel(tensors.len() == 5, is_f16(op, gate), line.threads),
        tensors,
        &Params {
            vectors: vectors as u32,
            chunk: line.chunk,
        },
        line.groups,
    );
}

/// silu(gate)·up, elementwise; shapes and dtypes alike.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Tensor {
    assert!(
        gate.shape() == up.shape() && gate.dtype() == up.dtype(),
        "swiglu: {gate:?} and {up:?}"
    );
    let y = Tensor::empty(gate.gpu(), gate.dtype(), gate.shape());
    run("swiglu", &[gate, up, &y]);
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
    run("swiglu_backward", &[gate, up, dy, &dgate, &dup]);
    (dgate, dup)
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for (backward, f16) in [(false, false), (false, true), (true, false), (true, true)] {
        all.extend(LINE_THREADS.map(|threads| kernel(backward, f16, threads)));
    }
    all
}
