//! Rows of a matrix overwritten by another's (image features put in the place of image tokens).

use super::gather_rows::gather_rows;
use super::{THREADS, dispatch, linear_groups, two_bytes};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor, elements};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    threads: u32,
    width: u32,
    limit: u32,
}

fn kernel(zero: bool, vec4: bool, half: bool) -> Kernel {
    Kernel::new("replace_rows")
        .flag("ZERO", zero)
        .flag("VEC4", vec4)
        .flag("F16", half)
}

/// Overwrites in place; the caller gives a tensor of its own.
fn overwrite(y: &Tensor, rows: &Tensor, source: Option<&Tensor>) {
    assert_eq!(
        rows.dtype(),
        DType::U32,
        "replace_rows: dtype of the row indices"
    );
    let width = elements(&y.shape()[1..]);
    let vec4 = width.is_multiple_of(4);
    let unit = if vec4 { 4 } else { 1 };
    let threads = rows.elements() * width / unit;
    let params = Params {
        threads: threads as u32,
        width: (width / unit) as u32,
        limit: y.dim(0) as u32,
    };
    let mut tensors = vec![y, rows];
    tensors.extend(source);
    dispatch(
        &kernel(source.is_none(), vec4, two_bytes(y)),
        &tensors,
        &params,
        linear_groups(threads, THREADS),
    );
}

/// x [N, …] with rows u32 `[R]` (distinct; an index ≥ N is skipped) taken from source [R, …].
pub fn replace_rows(x: &Tensor, rows: &Tensor, source: &Tensor) -> Tensor {
    let agrees = source.dtype() == x.dtype()
        && source.dim(0) == rows.elements()
        && source.shape()[1..] == x.shape()[1..];
    assert!(agrees, "replace_rows: {x:?} at {rows:?} by {source:?}");
    let y = x.duplicate();
    overwrite(&y, rows, Some(source));
    y
}

/// Gradients of [`replace_rows`]: dy with those rows zeroed towards `x`, those rows towards `source`.
pub fn replace_rows_backward(dy: &Tensor, rows: &Tensor) -> (Tensor, Tensor) {
    let dx = dy.duplicate();
    overwrite(&dx, rows, None);
    (dx, gather_rows(dy, rows))
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    [(false, false), (true, false), (false, true), (true, true)]
        .into_iter()
        .flat_map(|(vec4, half)| [kernel(false, vec4, half), kernel(true, vec4, half)])
        .collect()
}
