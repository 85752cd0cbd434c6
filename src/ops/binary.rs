//! Elementwise arithmetic of two tensors with numpy broadcasting.

use super::reduce::sum_to;
use super::unary::{Unary, unary};
use super::{COLUMN_THREADS, LINE_THREADS, WIDEST_ROW, columns, dispatch, is_f16, line};
use crate::gpu::Kernel;
use crate::tensor::{Tensor, elements};

/// Most dimensions left after merging those that broadcast alike.
pub const MAX_RANK: usize = 6;

/// An elementwise function of two tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binary {
    /// a + b.
    Add,
    /// a − b.
    Sub,
    /// a·b.
    Mul,
    /// a / b.
    Div,
    /// max(a, b).
    Max,
    /// min(a, b).
    Min,
    /// 1 where a > b, ½ where a = b, else 0: the slope of max(a, b) in a.
    Step,
    /// a, broadcast to the common shape.
    First,
}

impl Binary {
    const ALL: [Binary; 8] = [
        Binary::Add,
        Binary::Sub,
        Binary::Mul,
        Binary::Div,
        Binary::Max,
        Binary::Min,
        Binary::Step,
        Binary::First,
    ];

    fn code(self) -> i32 {
        self as i32
    }
}

/// Sizes, innermost first, and the strides of both operands (0 where broadcast).
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    vectors: u32,
    chunk: u32,
    dims: [u32; MAX_RANK],
    a: [u32; MAX_RANK],
    b: [u32; MAX_RANK],
}

/// One dimension: its size and the strides of `a` and `b` in it.
type Axis = (usize, [usize; 2]);

/// Shape that `a` and `b` broadcast to.
///
/// Panics when a dimension differs and neither side is 1.
pub fn broadcast_shape(a: &[usize], b: &[usize]) -> Vec<usize> {
    let rank = a.len().max(b.len());
    let dim =
        |shape: &[usize], i: usize| (i + shape.len()).checked_sub(rank).map_or(1, |k| shape[k]);
    (0..rank)
        .map(|i| match (dim(a, i), dim(b, i)) {
            (x, y) if x == y => x,
            (1, y) => y,
            (x, 1) => x,
            _ => panic!("binary: {a:?} and {b:?} do not broadcast"),
        })
        .collect()
}

fn strides_in(shape: &[usize], out: &[usize]) -> Vec<usize> {
    let missing = out.len() - shape.len();
    (0..out.len())
        .map(|i| match i.checked_sub(missing) {
            Some(k) if shape[k] != 1 => elements(&shape[k + 1..]),
            _ => 0,
        })
        .collect()
}

/// Dimensions innermost first, with neighbours that both operands walk alike merged into one.
fn merged(a: &[usize], b: &[usize], out: &[usize]) -> Vec<Axis> {
    let (sa, sb) = (strides_in(a, out), strides_in(b, out));
    let mut axes: Vec<Axis> = Vec::new();
    for i in (0..out.len()).rev().filter(|&i| out[i] != 1) {
        let strides = [sa[i], sb[i]];
        match axes.last_mut() {
            Some((size, inner)) if (0..2).all(|k| strides[k] == inner[k] * *size) => {
                *size *= out[i]
            }
            _ => axes.push((out[i], strides)),
        }
    }
    axes
}

fn kernel(op: Binary, rank: usize, vec4: bool, a16: bool, b16: bool) -> Kernel {
    Kernel::new("binary")
        .def("OP", op.code())
        .def("RANK", rank as i32)
        .flag("VEC4", vec4)
        .flag("F16", a16 || b16)
        .flag("A16", a16)
        .flag("B16", b16)
}

/// `kernel` for threads along a line of vectors.
fn by_line(kernel: Kernel, threads: u32) -> Kernel {
    kernel.def("WG", threads as i32)
}

/// `kernel`, of rank 2, for threads that walk down columns.
fn by_columns(kernel: Kernel, (threads, lanes): (u32, u32)) -> Kernel {
    kernel
        .flag("COLUMNS", true)
        .def("WG", threads as i32)
        .def("LANES", lanes as i32)
}

/// `op(a, b)` with numpy broadcasting up to rank 6; the dtype of `a`.
pub fn binary(a: &Tensor, b: &Tensor, op: Binary) -> Tensor {
    let shape = broadcast_shape(a.shape(), b.shape());
    binary_in(a, b, op, &shape)
}

/// Repeats `x` along its dimensions of size 1 to fill `shape`.
pub fn broadcast_to(x: &Tensor, shape: &[usize]) -> Tensor {
    if x.shape() == shape {
        return x.clone();
    }
    assert_eq!(
        broadcast_shape(x.shape(), shape),
        shape,
        "broadcast_to: {:?}",
        x.shape()
    );
    binary_in(x, x, Binary::First, shape)
}

fn binary_in(a: &Tensor, b: &Tensor, op: Binary, shape: &[usize]) -> Tensor {
    let y = Tensor::empty(a.gpu(), a.dtype(), shape);
    let mut axes = merged(a.shape(), b.shape(), shape);
    assert!(
        axes.len() <= MAX_RANK,
        "binary: {:?} and {:?} broadcast over more than {MAX_RANK} dimensions",
        a.shape(),
        b.shape()
    );
    if axes.is_empty() {
        axes.push((1, [0, 0]));
    }
    let rank = match axes.len() {
        n @ 1..=3 => n,
        _ => MAX_RANK,
    };
    let vec4 = rank == 1 || axes[0].0.is_multiple_of(4);
    let unit = if vec4 { 4 } else { 1 };
    let vectors = elements(shape).div_ceil(unit);
    let [a0, b0] = axes[0].1;
    let kernel = kernel(op, rank, vec4, is_f16("binary", a), is_f16("binary", b))
        .flag("A_REPEATS", a0 == 0)
        .flag("B_REPEATS", b0 == 0);
    let width = axes[0].0 / unit;
    let (kernel, chunk, groups) = if rank == 2 && (16..=WIDEST_ROW).contains(&width) {
        let cut = columns(a.gpu(), axes[1].0, width, 8);
        let [a1, b1] = axes[1].1;
        let kernel = by_columns(kernel, (cut.threads, cut.lanes))
            .flag("A_STAYS", a1 == 0)
            .flag("B_STAYS", b1 == 0);
        (kernel, cut.chunk, cut.groups)
    } else {
        let cut = line(a.gpu(), vectors);
        (by_line(kernel, cut.threads), cut.chunk, cut.groups)
    };
    let mut params = Params {
        vectors: vectors as u32,
        chunk,
        dims: [1; MAX_RANK],
        a: [0; MAX_RANK],
        b: [0; MAX_RANK],
    };
    for (i, (size, strides)) in axes.iter().enumerate() {
        params.dims[i] = *size as u32;
        params.a[i] = strides[0] as u32;
        params.b[i] = strides[1] as u32;
    }
    dispatch(&kernel, &[a, b, &y], &params, groups);
    y
}

/// Gradients of `binary(a, b, op)` towards each wanted operand, in that operand's shape; where
/// max or min ties, each side gets half, as in PyTorch.
pub fn binary_backward(
    a: &Tensor,
    b: &Tensor,
    dy: &Tensor,
    op: Binary,
    wanted: [bool; 2],
) -> [Option<Tensor>; 2] {
    let negative = |x: &Tensor| unary(x, Unary::Affine(-1.0, 0.0));
    let da = wanted[0].then(|| {
        let d = match op {
            Binary::Add | Binary::Sub | Binary::First => dy.clone(),
            Binary::Mul => binary(dy, b, Binary::Mul),
            Binary::Div => binary(dy, b, Binary::Div),
            Binary::Max => binary(dy, &binary(a, b, Binary::Step), Binary::Mul),
            Binary::Min => binary(dy, &binary(b, a, Binary::Step), Binary::Mul),
            Binary::Step => Tensor::zeros(dy.gpu(), dy.dtype(), dy.shape()),
        };
        sum_to(&d, a.shape(), a.dtype())
    });
    let db = wanted[1].then(|| {
        let d = match op {
            Binary::Add => dy.clone(),
            Binary::Sub => negative(dy),
            Binary::Mul => binary(dy, a, Binary::Mul),
            Binary::Div => {
                let slope = binary(&binary(a, b, Binary::Div), b, Binary::Div);
                negative(&binary(dy, &slope, Binary::Mul))
            }
            Binary::Max => binary(dy, &binary(b, a, Binary::Step), Binary::Mul),
            Binary::Min => binary(dy, &binary(a, b, Binary::Step), Binary::Mul),
            Binary::Step | Binary::First => Tensor::zeros(dy.gpu(), dy.dtype(), dy.shape()),
        };
        sum_to(&d, b.shape(), b.dtype())
    });
    [da, db]
}

/// All kernels of this op: every function, and one function over every rank and dtype.
pub fn variants() -> Vec<Kernel> {
    let mut all: Vec<Kernel> = Binary::ALL
        .into_iter()
        .map(|op| by_line(kernel(op, 1, true, false, false), 8))
        .collect();
    for rank in [1, 2, 3, MAX_RANK] {
        for vec4 in [false, true] {
            for (a16, b16) in [(false, false), (true, true), (true, false), (false, true)] {
                let kernel = kernel(Binary::Mul, rank, vec4, a16, b16).flag("B_REPEATS", a16);
                if rank == 2 {
                    let kernels = COLUMN_THREADS.map(|cut| by_columns(kernel.clone(), cut));
                    all.extend(kernels.clone().map(|kernel| kernel.flag("A_STAYS", true)));
                    all.extend(kernels.map(|kernel| kernel.flag("B_STAYS", true)));
                }
                all.extend(LINE_THREADS.map(|threads| by_line(kernel.clone(), threads)));
            }
        }
    }
    all
}
