//! Sums, means and extrema over axes; the inverse of broadcasting.

use super::binary::broadcast_to;
use super::cast::cast;
use super::permute::permute;
use super::unary::{Unary, unary};
use super::{THREADS, dispatch, is_f16, linear_groups};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor, elements};

/// A reduction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduce {
    /// Σx.
    Sum,
    /// Σx / count.
    Mean,
    /// Largest element.
    Max,
    /// Smallest element.
    Min,
}

impl Reduce {
    fn code(self) -> i32 {
        match self {
            Reduce::Sum | Reduce::Mean => 0,
            Reduce::Max => 1,
            Reduce::Min => 2,
        }
    }
}

/// Threads that fill a large GPU; below that a long reduction is split into partial ones.
const ENOUGH_THREADS: usize = 16_384;
/// Elements a thread reduces before splitting is worth another dispatch.
const MIN_CHUNK: usize = 32;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    threads: u32,
    /// Elements (or vec4s) along the reduced axis.
    length: u32,
    /// Elements (or vec4s) from one step of the reduced axis to the next.
    inner: u32,
    splits: u32,
    scale: f32,
}

/// How a thread reads: single elements, four neighbours that stay apart, or four of one row.
#[derive(Clone, Copy, PartialEq)]
enum Lanes {
    Scalar,
    Inner,
    Row,
}

fn kernel(op: Reduce, lanes: Lanes, in16: bool, out16: bool) -> Kernel {
    Kernel::new("reduce")
        .def("OP", op.code())
        .flag("VEC4", lanes != Lanes::Scalar)
        .flag("ROW", lanes == Lanes::Row)
        .flag("F16", in16 || out16)
        .flag("IN16", in16)
        .flag("OUT16", out16)
}

/// Shape after reducing `axes`, kept as 1 or dropped.
pub fn reduced_shape(shape: &[usize], axes: &[usize], keep: bool) -> Vec<usize> {
    let sizes = shape.iter().enumerate();
    sizes
        .filter(|(i, _)| keep || !axes.contains(i))
        .map(|(i, &n)| if axes.contains(&i) { 1 } else { n })
        .collect()
}

/// [outer, length, inner] → [outer, inner], in `dtype`.
fn reduce_middle(
    x: &Tensor,
    [outer, length, inner]: [usize; 3],
    op: Reduce,
    scale: f32,
    dtype: DType,
) -> Tensor {
    let lanes = match (
        inner.is_multiple_of(4),
        inner == 1 && length.is_multiple_of(4),
    ) {
        (true, _) => Lanes::Inner,
        (_, true) => Lanes::Row,
        _ => Lanes::Scalar,
    };
    let (steps, columns) = match lanes {
        Lanes::Scalar => (length, inner),
        Lanes::Inner => (length, inner / 4),
        Lanes::Row => (length / 4, 1),
    };
    let alone = outer * columns;
    let splits = if steps < 2 * MIN_CHUNK || (columns > 1 && alone >= ENOUGH_THREADS) {
        1
    } else {
        // With one column, neighbouring threads take neighbouring elements of a row.
        let wanted = (ENOUGH_THREADS / alone.max(1)).max(if columns == 1 { 32 } else { 1 });
        wanted.min(steps / MIN_CHUNK).max(1)
    };
    let last = splits == 1;
    let out = if last { dtype } else { DType::F32 };
    let y = Tensor::empty(x.gpu(), out, &[outer, splits, inner]);
    let threads = alone * splits;
    let params = Params {
        threads: threads as u32,
        length: steps as u32,
        inner: columns as u32,
        splits: splits as u32,
        scale: if last { scale } else { 1.0 },
    };
    dispatch(
        &kernel(op, lanes, is_f16("reduce", x), out == DType::F16),
        &[x, &y],
        &params,
        linear_groups(threads, THREADS),
    );
    if last {
        y
    } else {
        reduce_middle(&y, [outer, splits, inner], op, scale, dtype)
    }
}

/// Reduces `x` over `axes`, which stay as size 1 with `keep`; the dtype of `x`.
pub fn reduce(x: &Tensor, axes: &[usize], op: Reduce, keep: bool) -> Tensor {
    reduce_as(x, axes, op, keep, x.dtype())
}

/// [`reduce`] with the result stored as `dtype` (f32 or f16), accumulated in f32 all the way.
pub fn reduce_as(x: &Tensor, axes: &[usize], op: Reduce, keep: bool, dtype: DType) -> Tensor {
    assert!(
        axes.iter().all(|&a| a < x.rank()),
        "reduce: axes {axes:?} of {:?}",
        x.shape()
    );
    let shape = reduced_shape(x.shape(), axes, keep);
    let count: usize = (0..x.rank())
        .filter(|i| axes.contains(i))
        .map(|i| x.dim(i))
        .product();
    let scale = match op {
        Reduce::Mean => 1.0 / count as f32,
        _ => 1.0,
    };
    // Neighbouring reduced axes go together, the innermost group first.
    let mut groups: Vec<std::ops::Range<usize>> = Vec::new();
    for axis in (0..x.rank()).filter(|i| axes.contains(i)) {
        match groups.last_mut() {
            Some(group) if group.end == axis => group.end += 1,
            _ => groups.push(axis..axis + 1),
        }
    }
    groups.retain(|g| elements(&x.shape()[g.clone()]) != 1);
    let mut y = x.clone();
    let mut sizes = x.shape().to_vec();
    for (i, group) in groups.iter().enumerate().rev() {
        let view = [
            elements(&sizes[..group.start]),
            elements(&sizes[group.clone()]),
            elements(&sizes[group.end..]),
        ];
        let (scale, out) = if i == 0 {
            (scale, dtype)
        } else {
            (1.0, DType::F32)
        };
        y = reduce_middle(&y, view, op, scale, out);
        sizes[group.clone()].fill(1);
    }
    if y.dtype() != dtype {
        y = cast(&y, dtype);
    }
    y.reshape(&shape)
}

/// Undoes broadcasting: sums `x` down to `shape`, stored as `dtype`.
pub fn sum_to(x: &Tensor, shape: &[usize], dtype: DType) -> Tensor {
    let missing = x.rank().checked_sub(shape.len());
    let missing = missing.unwrap_or_else(|| panic!("sum_to: {:?} to {shape:?}", x.shape()));
    let axes: Vec<usize> = (0..x.rank())
        .filter(|&i| i < missing || (shape[i - missing] == 1 && x.dim(i) != 1))
        .collect();
    reduce_as(x, &axes, Reduce::Sum, true, dtype).reshape(shape)
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct IndexParams {
    threads: u32,
    length: u32,
    inner: u32,
}

fn index_kernel(op: Reduce, f16: bool) -> Kernel {
    Kernel::new("reduce_index")
        .def("OP", op.code())
        .flag("F16", f16)
}

fn spread_kernel(f16: bool) -> Kernel {
    Kernel::new("reduce_spread").flag("F16", f16)
}

/// Position of the first largest (or smallest) element along `axis`, u32, the axis dropped.
pub fn arg_extremum(x: &Tensor, axis: usize, op: Reduce) -> Tensor {
    assert!(
        axis < x.rank() && matches!(op, Reduce::Max | Reduce::Min),
        "arg_extremum: {op:?} over axis {axis} of {:?}",
        x.shape()
    );
    let shape = reduced_shape(x.shape(), &[axis], false);
    let index = Tensor::empty(x.gpu(), DType::U32, &shape);
    let params = IndexParams {
        threads: index.elements() as u32,
        length: x.dim(axis) as u32,
        inner: elements(&x.shape()[axis + 1..]) as u32,
    };
    dispatch(
        &index_kernel(op, is_f16("arg_extremum", x)),
        &[x, &index],
        &params,
        linear_groups(index.elements(), THREADS),
    );
    index
}

/// Gradient of [`reduce`] towards `x` of the given upstream `dy` (kept or dropped axes alike); a
/// maximum or minimum sends it to its first occurrence.
pub fn reduce_backward(x: &Tensor, dy: &Tensor, axes: &[usize], op: Reduce) -> Tensor {
    let kept = reduced_shape(x.shape(), axes, true);
    let dy = cast(&dy.reshape(&kept), x.dtype());
    match op {
        Reduce::Sum => broadcast_to(&dy, x.shape()),
        Reduce::Mean => {
            let count = x.elements() / elements(&kept).max(1);
            let scaled = unary(&dy, Unary::Affine(1.0 / count as f32, 0.0));
            broadcast_to(&scaled, x.shape())
        }
        Reduce::Max | Reduce::Min => extremum_backward(x, &dy, axes, op),
    }
}

fn extremum_backward(x: &Tensor, dy: &Tensor, axes: &[usize], op: Reduce) -> Tensor {
    let (kept, reduced): (Vec<usize>, Vec<usize>) = (0..x.rank()).partition(|i| !axes.contains(i));
    let contiguous = reduced.windows(2).all(|w| w[1] == w[0] + 1);
    if !contiguous {
        // Bring the reduced axes together at the end, and back.
        let order = [kept.as_slice(), reduced.as_slice()].concat();
        let moved = permute(x, &order);
        let last: Vec<usize> = (kept.len()..x.rank()).collect();
        let mut back = vec![0; x.rank()];
        for (to, &from) in order.iter().enumerate() {
            back[from] = to;
        }
        return permute(&extremum_backward(&moved, dy, &last, op), &back);
    }
    let Some((&first, &last)) = reduced.first().zip(reduced.last()) else {
        return dy.reshape(x.shape());
    };
    let outer = elements(&x.shape()[..first]);
    let length = elements(&x.shape()[first..=last]);
    let inner = elements(&x.shape()[last + 1..]);
    let index = arg_extremum(&x.reshape(&[outer, length, inner]), 1, op);
    let dx = Tensor::empty(x.gpu(), x.dtype(), x.shape());
    let params = IndexParams {
        threads: x.elements() as u32,
        length: length as u32,
        inner: inner as u32,
    };
    dispatch(
        &spread_kernel(is_f16("reduce_backward", x)),
        &[dy, &index, &dx],
        &params,
        linear_groups(x.elements(), THREADS),
    );
    dx
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = vec![spread_kernel(false), spread_kernel(true)];
    for op in [Reduce::Sum, Reduce::Max, Reduce::Min] {
        for lanes in [Lanes::Scalar, Lanes::Inner, Lanes::Row] {
            for (in16, out16) in [(false, false), (true, true), (true, false), (false, true)] {
                all.push(kernel(op, lanes, in16, out16));
            }
        }
        if op != Reduce::Sum {
            all.extend([index_kernel(op, false), index_kernel(op, true)]);
        }
    }
    all
}
