//! A range of one dimension, and its backward: the range set into zeros.

use super::{THREADS, dispatch, linear_groups, two_bytes};
use crate::gpu::Kernel;
use crate::tensor::{Tensor, elements};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    threads: u32,
    width: u32,
    x_pitch: u32,
    x_start: u32,
    y_pitch: u32,
    y_start: u32,
}

fn kernel(pad: bool, vec4: bool, half: bool) -> Kernel {
    Kernel::new("slice")
        .flag("PAD", pad)
        .flag("VEC4", vec4)
        .flag("F16", half)
}

/// Rows of `width` elements copied from `x` (pitch, start) to `y` (pitch, start).
pub(crate) fn copy_columns(
    x: &Tensor,
    y: &Tensor,
    rows: usize,
    width: usize,
    [x_pitch, x_start]: [usize; 2],
    [y_pitch, y_start]: [usize; 2],
    pad: bool,
) {
    let sizes = [width, x_pitch, x_start, y_pitch, y_start];
    let vec4 = sizes.iter().all(|n| n.is_multiple_of(4));
    let unit = if vec4 { 4 } else { 1 };
    let [width, x_pitch, x_start, y_pitch, y_start] = sizes.map(|n| (n / unit) as u32);
    let threads = rows * if pad { y_pitch } else { width } as usize;
    let params = Params {
        threads: threads as u32,
        width,
        x_pitch,
        x_start,
        y_pitch,
        y_start,
    };
    dispatch(
        &kernel(pad, vec4, two_bytes(x)),
        &[x, y],
        &params,
        linear_groups(threads, THREADS),
    );
}

/// Elements `start .. start + len` of dimension `axis`; any dtype.
pub fn slice(x: &Tensor, axis: usize, start: usize, len: usize) -> Tensor {
    assert!(
        axis < x.rank() && start + len <= x.dim(axis),
        "slice: {start}..{} of axis {axis} of {:?}",
        start + len,
        x.shape()
    );
    if len == x.dim(axis) {
        return x.clone();
    }
    let mut shape = x.shape().to_vec();
    shape[axis] = len;
    let y = Tensor::empty(x.gpu(), x.dtype(), &shape);
    let (outer, inner) = (elements(&shape[..axis]), elements(&shape[axis + 1..]));
    let source = [x.dim(axis) * inner, start * inner];
    copy_columns(x, &y, outer, len * inner, source, [len * inner, 0], false);
    y
}

/// The backward of [`slice()`]: `dy` at `start` of dimension `axis` of size `size`, zeros elsewhere.
pub fn pad_slice(dy: &Tensor, axis: usize, start: usize, size: usize) -> Tensor {
    let len = dy.dim(axis);
    assert!(
        start + len <= size,
        "pad_slice: {:?} at {start} of {size} on axis {axis}",
        dy.shape()
    );
    if len == size {
        return dy.clone();
    }
    let mut shape = dy.shape().to_vec();
    shape[axis] = size;
    let dx = Tensor::empty(dy.gpu(), dy.dtype(), &shape);
    let (outer, inner) = (elements(&shape[..axis]), elements(&shape[axis + 1..]));
    let target = [size * inner, start * inner];
    copy_columns(dy, &dx, outer, len * inner, [len * inner, 0], target, true);
    dx
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    [(false, false), (true, false), (false, true), (true, true)]
        .into_iter()
        .flat_map(|(vec4, half)| [kernel(false, vec4, half), kernel(true, vec4, half)])
        .collect()
}
