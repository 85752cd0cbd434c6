//! Embedding: rows of a table by id.

use super::{THREADS, dispatch, grid, is_f16, linear_groups, row_ranges, row_threads};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    ids: u32,
    width: u32,
    first_row: u32,
    rows: u32,
    all_rows: u32,
}

fn backward_kernel(f16: bool, threads: u32) -> Kernel {
    kernel(true, f16, 0).def("WG", threads as i32)
}

fn kernel(backward: bool, f16: bool, table: i32) -> Kernel {
    Kernel::new("embedding")
        .flag("BACKWARD", backward)
        .flag("F16", f16)
        .def("TABLE", table)
}

/// Rows `ids` of `table`: [..ids' shape, D] in `dtype` (f32 or f16).
///
/// `table` [V, D] f32, f16 or bf16; `ids` u32. An id ≥ V gives zeros. A table over the adapter's
/// binding limit is read in ranges of rows.
pub fn embedding(table: &Tensor, ids: &Tensor, dtype: DType) -> Tensor {
    embedding_in(
        table,
        ids,
        dtype,
        &row_ranges(table.gpu(), table.dim(0), row_bytes(table)),
    )
}

fn row_bytes(table: &Tensor) -> usize {
    table.last_dim() * table.dtype().bytes()
}

/// [`embedding`] with the ranges of table rows, one dispatch each, chosen by the caller.
///
/// The start of each range is a multiple of the adapter's binding alignment.
pub fn embedding_in(
    table: &Tensor,
    ids: &Tensor,
    dtype: DType,
    ranges: &[(usize, usize)],
) -> Tensor {
    assert!(
        table.rank() == 2 && ids.dtype() == DType::U32,
        "embedding: table {table:?}, ids {ids:?}"
    );
    let stored = match table.dtype() {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Bf16 => 2,
        other => panic!("embedding: {other:?} table"),
    };
    let width = table.dim(1);
    let mut shape = ids.shape().to_vec();
    shape.push(width);
    let y = Tensor::empty(table.gpu(), dtype, &shape);
    let kernel = kernel(false, is_f16("embedding", &y), stored);
    for &(start, rows) in ranges {
        dispatch(
            &kernel,
            &[&table.narrow(start, rows), ids, &y],
            &Params {
                ids: ids.elements() as u32,
                width: width as u32,
                first_row: start as u32,
                rows: rows as u32,
                all_rows: table.dim(0) as u32,
            },
            linear_groups(y.elements(), THREADS),
        );
    }
    y
}

/// Gradient of [`embedding`] with respect to the table: f32 [rows, D], each row the sum of `dy`
/// over the positions that hold its id, in order (no atomics, so the same bits every time).
pub fn embedding_backward(dy: &Tensor, ids: &Tensor, rows: usize) -> Tensor {
    let width = dy.last_dim();
    assert!(
        ids.dtype() == DType::U32 && ids.elements() * width == dy.elements(),
        "embedding_backward: dy {dy:?}, ids {ids:?}"
    );
    let dtable = Tensor::zeros(dy.gpu(), DType::F32, &[rows, width]);
    for (start, len) in row_ranges(dy.gpu(), rows, width * 4) {
        dispatch(
            &backward_kernel(is_f16("embedding_backward", dy), row_threads(dy.gpu())),
            &[dy, ids, &dtable.narrow(start, len)],
            &Params {
                ids: ids.elements() as u32,
                width: width as u32,
                first_row: start as u32,
                rows: len as u32,
                all_rows: rows as u32,
            },
            grid(ids.elements()),
        );
    }
    dtable
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for f16 in [false, true] {
        all.push(backward_kernel(f16, 8));
        all.extend((0..3).map(|table| kernel(false, f16, table)));
    }
    all
}
