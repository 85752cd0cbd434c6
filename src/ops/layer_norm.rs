//! Layer norm over the last dimension, with f32 statistics.

use super::{
    THREADS, dispatch, grid, held, is_f16, linear_groups, row_kernel, row_threads, row_variant,
};
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
    chunk: u32,
    chunks: u32,
}

fn kernel(stage: i32, rms: bool, f16: bool, vec4: bool) -> Kernel {
    Kernel::new("layer_norm")
        .def("STAGE", stage)
        .flag("RMS", rms)
        .flag("F16", f16)
        .flag("VEC4", vec4)
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
        let columns = x.last_dim();
        kernel(stage, self.rms, is_f16(self.op, x), vec4(columns))
    }

    fn row_kernel(&self, stage: i32, x: &Tensor) -> Kernel {
        let width = units(x.last_dim());
        row_kernel(x.gpu(), self.kernel(stage, x), width, self.threads)
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
            ..Params::default()
        }
    }

    pub fn forward(&self, x: &Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Tensor {
        let y = Tensor::empty(x.gpu(), x.dtype(), x.shape());
        let rows = x.elements() / x.last_dim().max(1);
        let held = held(units(x.last_dim()), self.threads).is_some();
        let kept = self.threads == 8 && held && (weight.is_some() || bias.is_some());
        let chunk = if kept { chunk_of(rows) } else { 1 };
        let params = Params {
            chunk: chunk as u32,
            ..self.params(x, weight, bias)
        };
        // A missing weight or bias binds x in its place and is never read.
        let (w, b) = (weight.unwrap_or(x), bias.unwrap_or(x));
        let kernel = self.row_kernel(0, x);
        dispatch(
            &affine(kernel, [weight.is_some(), bias.is_some()], kept).flag("SEVERAL", kept),
            &[x, w, b, &y],
            &params,
            grid(rows.div_ceil(chunk)),
        );
        y
    }

    /// dx, added to `onto` where given, and, when asked, [2, columns] f32: Σ dy·x̂ and Σ dy over the rows.
    pub fn backward(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        dy: &Tensor,
        onto: Option<&Tensor>,
        sums: bool,
    ) -> (Tensor, Option<Tensor>) {
        let alike = |t: &Tensor| x.elements() == t.elements() && x.dtype() == t.dtype();
        assert!(
            alike(dy) && onto.is_none_or(alike),
            "{} backward: x {x:?}, dy {dy:?}, onto {onto:?}",
            self.op
        );
        let (gpu, columns) = (x.gpu(), x.last_dim());
        let rows = x.elements() / columns.max(1);
        let held = held(units(columns), self.threads).is_some();
        let kept = held && weight.is_some() && self.threads == 8;
        let several = kept || sums && held;
        let chunk = match several {
            true if self.threads == 8 => chunk_of(rows),
            true => rows.div_ceil(256),
            false => 1,
        };
        let groups = rows.div_ceil(chunk);
        let dx = Tensor::empty(gpu, x.dtype(), x.shape());
        // Sums of a workgroup's rows, or what a second pass over wide rows needs.
        let extra = match (held, sums) {
            (true, true) => Some(Tensor::empty(gpu, DType::F32, &[groups, 2, columns])),
            (true, false) => None,
            (false, _) => Some(Tensor::empty(gpu, DType::F32, &[rows, 2])),
        };
        let params = Params {
            chunk: chunk as u32,
            ..self.params(x, weight, None)
        };
        let kernel = affine(self.row_kernel(1, x), [weight.is_some(), false], kept)
            .flag("ONTO", onto.is_some())
            .flag("SUMS", sums && held)
            .flag("SEVERAL", several);
        let mut tensors = vec![x, weight.unwrap_or(x), dy, onto.unwrap_or(x), &dx];
        tensors.extend(extra.as_ref());
        dispatch(&kernel, &tensors, &params, grid(groups));
        let partial = match extra {
            Some(statistics) if sums && !held => Some(self.column_sums(x, dy, &statistics)),
            extra => extra.filter(|_| sums),
        };
        let total = partial.map(|partial| fold_rows(&partial).reshape(&[2, columns]));
        (dx, total)
    }

    /// f32 [chunks, 2, columns] of the rows' `statistics`.
    fn column_sums(&self, x: &Tensor, dy: &Tensor, statistics: &Tensor) -> Tensor {
        let (rows, columns) = (statistics.dim(0), x.last_dim());
        // At most 1024 chunks, so that folding them stays short.
        let chunk = CHUNK.max(rows.div_ceil(1024));
        let chunks = rows.div_ceil(chunk);
        let partial = Tensor::empty(x.gpu(), DType::F32, &[chunks, 2, columns]);
        let params = Params {
            chunk: chunk as u32,
            ..self.params(x, None, None)
        };
        dispatch(
            &self.kernel(2, x),
            &[x, dy, statistics, &partial],
            &params,
            [units(columns).div_ceil(64) as u32, chunks as u32, 1],
        );
        partial
    }
}

/// A kernel with weight and bias, `kept` in registers over a workgroup's rows.
fn affine(kernel: Kernel, [weight, bias]: [bool; 2], kept: bool) -> Kernel {
    kernel
        .flag("WEIGHT", weight)
        .flag("BIAS", bias)
        .flag("KEPT", kept)
}

/// Rows of a workgroup that keeps something over them on a CPU driver, of which none known has more than 32 threads.
fn chunk_of(rows: usize) -> usize {
    rows.div_ceil(32).clamp(1, 32)
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
        &kernel(3, false, false, vec4(columns)),
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

/// Gradients of [`layer_norm`], dx added to `onto` where given; those of the weight and bias only when `affine`.
pub fn layer_norm_backward(
    x: &Tensor,
    weight: Option<&Tensor>,
    dy: &Tensor,
    onto: Option<&Tensor>,
    eps: f32,
    affine: bool,
) -> NormGradients {
    let (dx, sums) = layer_norm_op(x, eps).backward(x, weight, dy, onto, affine);
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
        kernel(3, false, false, false),
        kernel(3, false, false, true),
    ];
    for (rms, f16) in [(false, false), (false, true), (true, false), (true, true)] {
        // Held whole, held in part, too wide; on CPU drivers with and without subgroups, on GPUs.
        for (vec4, subgroup, width, threads) in [
            (true, true, 144, 8),
            (false, false, 77, 8),
            (true, false, 144, 128),
            (false, true, 1000, 8),
        ] {
            let row = |stage| row_variant(kernel(stage, rms, f16, vec4), subgroup, width, threads);
            let is_held = held(width, threads).is_some();
            for stage in [0, 1] {
                all.extend([row(stage), affine(row(stage), [true, stage == 0], false)]);
                if is_held {
                    let kept = affine(row(stage), [true, stage == 0], true);
                    all.push(kept.flag("SEVERAL", true));
                }
            }
            if is_held {
                let all_of_it = affine(row(1), [true, false], threads == 8).flag("ONTO", true);
                all.push(all_of_it.flag("SUMS", true).flag("SEVERAL", true));
            }
            all.push(kernel(2, rms, f16, vec4));
        }
    }
    all
}
