//! Elementwise functions of one tensor.

use super::{THREADS, dispatch, is_f16, linear_groups};
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
    elements: u32,
    function: u32,
    a: f32,
    b: f32,
}

fn kernel(backward: bool, f16: bool) -> Kernel {
    Kernel::new("unary")
        .flag("BACKWARD", backward)
        .flag("F16", f16)
}

fn params(x: &Tensor, function: Unary) -> Params {
    let (code, [a, b]) = function.code();
    Params {
        elements: x.elements() as u32,
        function: code as u32,
        a,
        b,
    }
}

/// f(x), elementwise; same shape and dtype as `x`.
pub fn unary(x: &Tensor, function: Unary) -> Tensor {
    let y = Tensor::empty(x.gpu(), x.dtype(), x.shape());
    dispatch(
        &kernel(false, is_f16("unary", x)),
        &[x, &y],
        &params(x, function),
        linear_groups(x.elements().div_ceil(4), THREADS),
    );
    y
}

/// dy·f′(x), elementwise.
pub fn unary_backward(x: &Tensor, dy: &Tensor, function: Unary) -> Tensor {
    assert_eq!(x.shape(), dy.shape(), "unary_backward");
    let dx = Tensor::empty(x.gpu(), x.dtype(), x.shape());
    dispatch(
        &kernel(true, is_f16("unary_backward", x)),
        &[x, &dx, dy],
        &params(x, function),
        linear_groups(x.elements().div_ceil(4), THREADS),
    );
    dx
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    [false, true]
        .into_iter()
        .flat_map(|backward| [kernel(backward, false), kernel(backward, true)])
        .collect()
}
