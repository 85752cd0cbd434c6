//! Rows of a matrix by index, and the deterministic sum back.

use super::{THREADS, dispatch, is_f16, linear_groups, two_bytes};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor, elements};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    threads: u32,
    /// Elements (or vec4s) of a row.
    width: u32,
    /// Rows of the indexed side.
    limit: u32,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ListParams {
    rows: u32,
    limit: u32,
}

fn gather_kernel(vec4: bool, half: bool) -> Kernel {
    Kernel::new("gather_rows")
        .flag("VEC4", vec4)
        .flag("F16", half)
}

fn scatter_kernel(vec4: bool, f16: bool) -> Kernel {
    Kernel::new("scatter_add_rows")
        .flag("VEC4", vec4)
        .flag("F16", f16)
}

fn list_kernel() -> Kernel {
    Kernel::new("row_lists")
}

fn check_rows(op: &str, rows: &Tensor) {
    assert_eq!(rows.dtype(), DType::U32, "{op}: dtype of the row indices");
}

/// x [N, …] with rows u32 `[R]` → [R, …]; any dtype. A row index ≥ N gives zeros.
pub fn gather_rows(x: &Tensor, rows: &Tensor) -> Tensor {
    check_rows("gather_rows", rows);
    let mut shape = x.shape().to_vec();
    shape[0] = rows.elements();
    let width = elements(&shape[1..]);
    // Pairs of two bytes are moved as words, which adapters without f16 can.
    let pairs = two_bytes(x) && width.is_multiple_of(2);
    let width = if pairs { width / 2 } else { width };
    let vec4 = width.is_multiple_of(4);
    let unit = if vec4 { 4 } else { 1 };
    let y = Tensor::empty(x.gpu(), x.dtype(), &shape);
    let threads = rows.elements() * width / unit;
    let params = Params {
        threads: threads as u32,
        width: (width / unit) as u32,
        limit: x.dim(0) as u32,
    };
    dispatch(
        &gather_kernel(vec4, two_bytes(x) && !pairs),
        &[x, rows, &y],
        &params,
        linear_groups(threads, THREADS),
    );
    y
}

/// Sums dy [R, …] into [n, …] by rows u32 `[R]`, in order of R: the backward of [`gather_rows`].
///
/// Rows that repeat add up, an index ≥ n is left out; no atomics, so equal runs give equal bits.
pub fn scatter_add_rows(dy: &Tensor, rows: &Tensor, n: usize) -> Tensor {
    check_rows("scatter_add_rows", rows);
    assert_eq!(rows.elements(), dy.dim(0), "scatter_add_rows: {dy:?}");
    let gpu = dy.gpu();
    // For every output row, the list of its sources: first[row], then next[source].
    let first = Tensor::empty(gpu, DType::U32, &[n]);
    let next = Tensor::empty(gpu, DType::U32, &[rows.elements()]);
    let lists = ListParams {
        rows: rows.elements() as u32,
        limit: n as u32,
    };
    dispatch(
        &list_kernel(),
        &[rows, &first, &next],
        &lists,
        linear_groups(n, THREADS),
    );
    let mut shape = dy.shape().to_vec();
    shape[0] = n;
    let width = elements(&shape[1..]);
    let vec4 = width.is_multiple_of(4);
    let unit = if vec4 { 4 } else { 1 };
    let dx = Tensor::empty(gpu, dy.dtype(), &shape);
    let threads = dx.elements() / unit;
    let params = Params {
        threads: threads as u32,
        width: (width / unit) as u32,
        limit: rows.elements() as u32,
    };
    dispatch(
        &scatter_kernel(vec4, is_f16("scatter_add_rows", dy)),
        &[dy, &first, &next, &dx],
        &params,
        linear_groups(threads, THREADS),
    );
    dx
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = vec![list_kernel()];
    for (vec4, half) in [(false, false), (true, false), (false, true), (true, true)] {
        all.extend([gather_kernel(vec4, half), scatter_kernel(vec4, half)]);
    }
    all
}
