//! Updates of a tensor in place: fill, scale, accumulate. Never on a tensor that a tape holds.

use super::{THREADS, dispatch, is_f16, linear_groups};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    elements: u32,
    value: f32,
}

/// What the kernel does with an element, numbered as `MODE` in the WGSL file.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Fill,
    Scale,
    ScaleBy,
    Add,
}

fn kernel(mode: Mode, f16: bool, other16: bool) -> Kernel {
    Kernel::new("in_place")
        .def("MODE", mode as i32)
        .flag("F16", f16 || other16)
        .flag("X16", f16)
        .flag("OTHER16", other16)
}

fn run(op: &str, x: &Tensor, other: Option<&Tensor>, mode: Mode, value: f32) {
    let params = Params {
        elements: x.elements() as u32,
        value,
    };
    let mut tensors = vec![x];
    tensors.extend(other);
    let other16 = other.is_some_and(|t| is_f16(op, t));
    dispatch(
        &kernel(mode, is_f16(op, x), other16),
        &tensors,
        &params,
        linear_groups(x.elements().div_ceil(4), THREADS),
    );
}

/// Sets every element of `x` to `value`.
pub fn fill(x: &Tensor, value: f32) {
    run("fill", x, None, Mode::Fill, value);
}

/// x ← factor·x.
pub fn scale_in_place(x: &Tensor, factor: f32) {
    run("scale_in_place", x, None, Mode::Scale, factor);
}

/// x ← factor·x for a factor f32 `[1]` that stays on the device.
pub fn scale_in_place_by(x: &Tensor, factor: &Tensor) {
    assert!(
        factor.elements() == 1 && factor.dtype() == DType::F32,
        "scale_in_place_by: {factor:?}"
    );
    run("scale_in_place_by", x, Some(factor), Mode::ScaleBy, 1.0);
}

/// x ← x + factor·other, of one element count (gradient accumulation).
pub fn add_in_place(x: &Tensor, other: &Tensor, factor: f32) {
    assert_eq!(
        x.elements(),
        other.elements(),
        "add_in_place: {x:?} and {other:?}"
    );
    run("add_in_place", x, Some(other), Mode::Add, factor);
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for f16 in [false, true] {
        all.extend([Mode::Fill, Mode::Scale, Mode::ScaleBy].map(|mode| kernel(mode, f16, false)));
        all.extend([false, true].map(|other16| kernel(Mode::Add, f16, other16)));
    }
    all
}
