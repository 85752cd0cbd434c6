//! Elementwise functions of one tensor.

use super::{LINE_THREADS, dispatch, is_f16, line};
use crate::gpu::Kernel;
use crate::tensor::Tensor;

/// An elementwise function.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Unary {
    /// x·σ(x).
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
    /// GELU, exact (error function).
    GeluErf,
    /// x·σ(1.702 x), CLIP's.
    QuickGelu,
    /// max(x, 0).
    Relu,
    /// min(max(x, 0), 6).
    Relu6,
    /// x for x > 0, else slope·x.
    LeakyRelu(f32),
    /// Hyperbolic tangent.
    Tanh,
    /// Logistic function.
    Sigmoid,
    /// eˣ.
    Exp,
    /// Natural logarithm.
    Log,
    /// x².
    Square,
    /// √x.
    Sqrt,
    /// scale·x + shift.
    Affine(f32, f32),
}

impl Unary {
    const ALL: [Unary; 14] = [
        Unary::Silu,
        Unary::GeluTanh,
        Unary::GeluErf,
        Unary::QuickGelu,
        Unary::Relu,
        Unary::Relu6,
        Unary::LeakyRelu(0.1),
        Unary::Tanh,
        Unary::Sigmoid,
        Unary::Exp,
        Unary::Log,
        Unary::Square,
        Unary::Sqrt,
        Unary::Affine(1.0, 0.0),
    ];

    /// Number of the function in `wgsl/common/activation.wgsl` and its two parameters.
    pub(crate) fn code(self) -> (i32, [f32; 2]) {
        match self {
            Unary::Silu => (1, [0.0; 2]),
            Unary::GeluTanh => (2, [0.0; 2]),
            Unary::GeluErf => (3, [0.0; 2]),
            Unary::QuickGelu => (4, [0.0; 2]),
            Unary::Relu => (5, [0.0; 2]),
            Unary::Relu6 => (6, [0.0; 2]),
            Unary::LeakyRelu(slope) => (7, [slope, 0.0]),
            Unary::Tanh => (8, [0.0; 2]),
            Unary::Sigmoid => (9, [0.0; 2]),
            Unary::Exp => (10, [0.0; 2]),
            Unary::Log => (11, [0.0; 2]),
            Unary::Square => (12, [0.0; 2]),
            Unary::Sqrt => (13, [0.0; 2]),
            Unary::Affine(scale, shift) => (14, [scale, shift]),
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    vectors: u32,
    chunk: u32,
    a: f32,
    b: f32,
}

fn kernel(function: Unary, backward: bool, f16: bool, threads: u32) -> Kernel {
    Kernel::new("unary")
        .def("FUNCTION", function.code().0)
        .flag("BACKWARD", backward)
        .flag("F16", f16)
        .def("WG", threads as i32)
}

fn run(op: &str, function: Unary, tensors: &[&Tensor]) {
    let x = tensors[0];
    let vectors = x.elements().div_ceil(4);
    let line = line(x.gpu(), vectors);
    let [a, b] = function.code().1;
    dispatch(
        &kernel(function, tensors.len() == 3, is_f16(op, x), line.threads),
        tensors,
        &Params {
            vectors: vectors as u32,
            chunk: line.chunk,
            a,
            b,
        },
        line.groups,
    );
}

/// f(x), elementwise; same shape and dtype as `x`.
pub fn unary(x: &Tensor, function: Unary) -> Tensor {
    let y = Tensor::empty(x.gpu(), x.dtype(), x.shape());
    run("unary", function, &[x, &y]);
    y
}

/// dy·f′(x), elementwise.
pub fn unary_backward(x: &Tensor, dy: &Tensor, function: Unary) -> Tensor {
    assert!(
        x.shape() == dy.shape() && x.dtype() == dy.dtype(),
        "unary_backward: {x:?} and {dy:?}"
    );
    let dx = Tensor::empty(x.gpu(), x.dtype(), x.shape());
    run("unary_backward", function, &[x, &dx, dy]);
    dx
}

/// All kernels of this op: every function, and one over every dtype and workgroup size.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for backward in [false, true] {
        all.extend(Unary::ALL.map(|function| kernel(function, backward, false, 8)));
        for threads in LINE_THREADS {
            all.extend([false, true].map(|f16| kernel(Unary::Silu, backward, f16, threads)));
        }
    }
    all
}
