//! Layer norm over the last dimension, with f32 statistics.

use super::{THREADS, dispatch, grid, is_f16, linear_groups, row_threads};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

/// Rows that one thread of the weight gradient sums.
const CHUNK: usize = 32;

#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    rows: u32,
    width: u32,
    elements: f32,
    eps: f32,
    has_weight: u32,
    has_bias: u32,
    chunk: u32,
    chunks: u32,
}

fn kernel(stage: i32, rms: bool, f16: bool, vec4: bool, threads: u32) -> Kernel {
    Kernel::new("layer_norm")
        .def("STAGE", stage)
        .flag("RMS", rms)
        .flag("F16", f16)
        .flag("VEC4", vec4)
        .def("WG", threads as i32)
}

/// Gradients of a norm with an affine part.
pub struct NormGradients {
    /// With respect to the input; its shape and dtype.
    pub dx: Tensor,
    /// With respect to the weight, f32, when asked for.
    pub dweight: Option<Tensor>,
    /// With respect to the bias, f32, when asked for.
    pub dbias: Option<Tensor>,
}

/// One row norm: its name, whether it is the RMS kind, and its workgroup size.
pub(super) struct RowNorm {
    pub op: &'static str,
    pub rms: bool,
    pub eps: f32,
    pub threads: u32,
}

impl RowNorm {
    fn kernel(&self, stage: i32, x: &Tensor) -> Kernel {
        kernel(
            stage,
            self.rms,
            is_f16(self.op, x),
            vec4(x.last_dim()),
            self.threads,
        )
    }

    fn params(&self, x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Params {
        let columns = x.last_dim();
        for affine in [weight, bias].into_iter().flatten() {
            assert!(
                affine.dtype() == DType::F32 && affine.elements() == columns,
                "{}: x {x:?}, weight or bias {affine:?}",
                self.op
            );
        }
        Params {
            rows: (x.elements() / columns.max(1)) as u32,
            width: units(columns) as u32,
            elements: columns as f32,
            eps: self.eps,
            has_weight: u32::from(weight.is_some()),
            has_bias: u32::from(bias.is_some()),
            ..Params::default()
        }
    }

    pub fn forward(&self, x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Tensor {
        let y = Tensor::empty(x.gpu(), x.dtype(), x.shape());
        let params = self.params(x, weight, bias);
        // A missing weight or bias binds x in its place and is never read.
        let (w, b) = (weight.unwrap_or(x), bias.unwrap_or(x));
        dispatch(
            &self.kernel(0, x),
            &[x, w, b, &y],
            &params,
            grid(params.rows as usize),
        );
        y
    }

    /// dx and, when asked, [2, columns] f32: Σ dy·x̂ and Σ dy over the rows.
    pub fn backward(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        dy: &Tensor,
        sums: bool,
    ) -> (Tensor, Option<Tensor>) {
        assert!(
            x.shape() == dy.shape() && x.dtype() == dy.dtype(),
            "{} backward: x {x:?}, dy {dy:?}",
            self.op
        );
        let params = self.params(x, weight, None);
        let (rows, columns) = (params.rows as usize, x.last_dim());
        let dx = Tensor::empty(x.gpu(), x.dtype(), x.shape());
        let statistics = Tensor::empty(x.gpu(), DType::F32, &[rows, 2]);
        dispatch(
            &self.kernel(1, x),
            &[x, weight.unwrap_or(x), dy, &dx, &statistics],
            &params,
            grid(rows),
        );
        if !sums {
            return (dx, None);
        }
        // At most 1024 chunks, so that the second stage stays short.
        let chunk = CHUNK.max(rows.div_ceil(1024));
        let chunks = rows.div_ceil(chunk);
        let partial = Tensor::empty(x.gpu(), DType::F32, &[chunks, 2, columns]);
        dispatch(
            &self.kernel(2, x),
            &[x, dy, &statistics, &partial],
            &Params {
                chunk: chunk as u32,
                ..params
            },
            [units(columns).div_ceil(64) as u32, chunks as u32, 1],
        );
        (dx, Some(fold_rows(&partial).reshape(&[2, columns])))
    }
}

fn vec4(columns: usize) -> bool {
    columns.is_multiple_of(4)
}

/// Columns in units of the kernels' `V`.
fn units(columns: usize) -> usize {
    if vec4(columns) { columns / 4 } else { columns }
}

/// Sums of f32 `x` [rows, ..] over its leading dimension, in row order.
pub(super) fn fold_rows(x: &Tensor) -> Tensor {
    let rows = x.dim(0);
    let columns = x.elements() / rows.max(1);
    let sums = Tensor::empty(x.gpu(), DType::F32, &x.shape()[1..]);
    dispatch(
        &kernel(3, false, false, vec4(columns), 8),
        &[x, &sums],
        &Params {
            width: units(columns) as u32,
            chunks: rows as u32,
            ..Params::default()
        },
        linear_groups(units(columns), THREADS),
    );
    sums
}

fn layer_norm_op(x: &Tensor, eps: f32) -> RowNorm {
    RowNorm {
        op: "layer_norm",
        rms: false,
        eps,
        threads: row_threads(x.gpu()),
    }
}

/// (x − mean)/√(variance + eps)·weight + bias over the last dimension, biased variance.
///
/// `x` [.., C] f32 or f16; `weight` and `bias` f32 `[C]`, either may be missing. Same shape and dtype.
pub fn layer_norm(x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>, eps: f32) -> Tensor {
    layer_norm_op(x, eps).forward(x, weight, bias)
}

/// [`layer_norm`] with the workgroup size chosen by the caller: 8 fits CPU drivers, 128 GPUs.
pub fn layer_norm_with(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f32,
    threads: u32,
) -> Tensor {
    RowNorm {
        threads,
        ..layer_norm_op(x, eps)
    }
    .forward(x, weight, bias)
}

/// Gradients of [`layer_norm`]; those of the weight and bias only when `affine`.
pub fn layer_norm_backward(
    x: &Tensor,
    weight: Option<&Tensor>,
    dy: &Tensor,
    eps: f32,
    affine: bool,
) -> NormGradients {
    let (dx, sums) = layer_norm_op(x, eps).backward(x, weight, dy, affine);
    NormGradients {
        dx,
        dweight: sums
            .as_ref()
            .map(|s| s.narrow(0, 1).reshape(&[x.last_dim()])),
        dbias: sums
            .as_ref()
            .map(|s| s.narrow(1, 1).reshape(&[x.last_dim()])),
    }
}

/// All kernels of this op and of [`super::rms_norm`].
pub fn variants() -> Vec<Kernel> {
    let mut all = vec![
        kernel(3, false, false, false, 8),
        kernel(3, false, false, true, 8),
    ];
    for stage in 0..3 {
        for (rms, f16) in [(false, false), (false, true), (true, false), (true, true)] {
            for (vec4, threads) in [(false, 8), (true, 128)] {
                all.push(kernel(stage, rms, f16, vec4, threads));
            }
        }
    }
    all
}
