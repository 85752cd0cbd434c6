//! Updates of a tensor in place: fill, scale, accumulate. Never on a tensor that a tape holds.

use super::{LINE_THREADS, dispatch, is_f16, line};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    vectors: u32,
    chunk: u32,
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

fn kernel(mode: Mode, f16: bool, other16: bool, threads: u32) -> Kernel {
    Kernel::new("in_place")
        .def("MODE", mode as i32)
        .flag("F16", f16 || other16)
        .flag("X16", f16)
        .flag("OTHER16", other16)
        .def("WG", threads as i32)
}

fn run(op: &str, x: &Tensor, other: Option<&Tensor>, mode: Mode, value: f32) {
    let vectors = x.elements().div_ceil(4);
    let line = line(x.gpu(), vectors);
    let params = Params {
        vectors: vectors as u32,
        chunk: line.chunk,
        elements: x.elements() as u32,
        value,
    };
    let mut tensors = vec![x];
    tensors.extend(other);
    let other16 = other.is_some_and(|t| is_f16(op, t));
    dispatch(
        &kernel(mode, is_f16(op, x), other16, line.threads),
        &tensors,
        &params,
        line.groups,
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
    for (f16, threads) in [false, true].into_iter().zip(LINE_THREADS) {
        let alone = [Mode::Fill, Mode::Scale, Mode::ScaleBy];
        all.extend(alone.map(|mode| kernel(mode, f16, false, threads)));
        all.extend([false, true].map(|other16| kernel(Mode::Add, f16, other16, threads)));
    }
    all
}
