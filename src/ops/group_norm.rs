//! Group norm of channels-last tensors, with f32 statistics; instance norm is one channel a group.

use super::layer_norm::{NormGradients, fold_rows};
use super::{
    COLUMN_THREADS, columns, dispatch, grid, is_f16, row_kernel, row_threads, row_variant,
};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

/// Chunks of pixels that are summed one by one, at the most.
const CHUNKS: usize = 256;

/// Pixels that a thread walks on CPU drivers, which pay for each workgroup.
const CPU_WALK: usize = 256;

/// A group norm: (x − mean)/√(variance + eps)·weight + bias, mean and biased variance over the pixels and the channels of a
/// group (Wu & He 2018; as many groups as channels make an instance norm).
#[derive(Clone, Copy, Debug, Default)]
pub struct GroupNorm<'a> {
    /// Groups of channels.
    pub groups: usize,
    /// f32 `[channels]`, or 1.
    pub weight: Option<&'a Tensor>,
    /// f32 `[channels]`, or 0.
    pub bias: Option<&'a Tensor>,
    /// Added to the variance.
    pub eps: f32,
    /// Followed by x·σ(x).
    pub silu: bool,
}

#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    batch: u32,
    pixels: u32,
    width: u32,
    groups: u32,
    chunk: u32,
    chunks: u32,
    has_weight: u32,
    has_bias: u32,
    eps: f32,
}

/// A stage whose threads walk pixels.
fn walk_kernel(stage: i32, silu: bool, f16: bool, vec4: bool, cut: (u32, u32)) -> Kernel {
    Kernel::new("group_norm")
        .def("STAGE", stage)
        .flag("WALK", stage != 0)
        .flag("SILU", silu)
        .flag("F16", f16)
        .flag("VEC4", vec4)
        .def("WG", cut.0 as i32)
        .def("LANES", cut.1 as i32)
}

/// A stage whose workgroups are groups; f32 only.
fn group_kernel(stage: i32) -> Kernel {
    Kernel::new("group_norm").def("STAGE", stage)
}

struct Plan<'a> {
    x: &'a Tensor,
    norm: GroupNorm<'a>,
    vec4: bool,
    threads: u32,
    channels: usize,
    /// Of the stages over groups; the others count channels in units of the kernel's `V`.
    params: Params,
}

impl<'a> Plan<'a> {
    fn new(x: &'a Tensor, norm: &GroupNorm<'a>) -> Plan<'a> {
        let (channels, groups) = (x.last_dim(), norm.groups);
        assert!(
            x.rank() >= 2 && groups > 0 && channels.is_multiple_of(groups),
            "group_norm: x {x:?}, {groups} groups"
        );
        for affine in [norm.weight, norm.bias].into_iter().flatten() {
            assert!(
                affine.dtype() == DType::F32 && affine.elements() == channels,
                "group_norm: x {x:?}, weight or bias {affine:?}"
            );
        }
        let batch = x.dim(0);
        let pixels = x.elements() / (batch * channels).max(1);
        let least = if x.gpu().tier().cpu { CPU_WALK } else { 16 };
        let chunk = least.max(pixels.div_ceil(CHUNKS));
        Plan {
            x,
            norm: *norm,
            vec4: channels.is_multiple_of(4),
            threads: row_threads(x.gpu()),
            channels,
            params: Params {
                batch: batch as u32,
                pixels: pixels as u32,
                width: channels as u32,
                groups: groups as u32,
                chunk: chunk as u32,
                chunks: pixels.div_ceil(chunk) as u32,
                has_weight: u32::from(norm.weight.is_some()),
                has_bias: u32::from(norm.bias.is_some()),
                eps: norm.eps,
            },
        }
    }

    /// A stage whose threads walk `chunk` pixels of a channel each; `onto` where it takes an earlier gradient.
    fn walk(&self, stage: i32, chunk: u32, tensors: &[&Tensor], onto: bool) {
        let width = self.channels / if self.vec4 { 4 } else { 1 };
        let pixels = self.params.pixels as usize;
        let cut = columns(self.x.gpu(), pixels, width, chunk as usize);
        assert!(stage != 0 || cut.chunk == chunk, "group_norm: {:?}", self.x);
        let f16 = is_f16("group_norm", self.x);
        let division = (cut.threads, cut.lanes);
        let kernel = walk_kernel(
            stage,
            self.norm.silu && stage != 0,
            f16,
            self.vec4,
            division,
        );
        let params = Params {
            width: width as u32,
            chunk: cut.chunk,
            ..self.params
        };
        let [x, y, _] = cut.groups;
        dispatch(
            &kernel.flag("ONTO", onto),
            tensors,
            &params,
            [x, y, self.params.batch],
        );
    }

    /// A stage with a workgroup for each group.
    fn by_group(&self, stage: i32, tensors: &[&Tensor]) {
        // Wider than any row that is held in registers.
        let kernel = row_kernel(self.x.gpu(), group_kernel(stage), usize::MAX, self.threads);
        let groups = grid((self.params.batch * self.params.groups) as usize);
        dispatch(&kernel, tensors, &self.params, groups);
    }

    /// f32 [batch, 2, channels].
    fn per_channel(&self) -> Tensor {
        let shape = [self.params.batch as usize, 2, self.channels];
        Tensor::empty(self.x.gpu(), DType::F32, &shape)
    }

    /// f32 [batch, chunks, 2, channels].
    fn per_chunk(&self) -> Tensor {
        let (batch, chunks) = (self.params.batch as usize, self.params.chunks as usize);
        Tensor::empty(self.x.gpu(), DType::F32, &[batch, chunks, 2, self.channels])
    }

    /// Mean and rstd of each channel's group.
    fn statistics(&self) -> Tensor {
        let (moments, statistics) = (self.per_chunk(), self.per_channel());
        self.walk(0, self.params.chunk, &[self.x, &moments], false);
        self.by_group(1, &[&moments, &statistics]);
        statistics
    }

    /// Weight and bias, or what is bound in their place and never read.
    fn affine<'b>(&self, instead: &'b Tensor) -> [&'b Tensor; 2]
    where
        'a: 'b,
    {
        [self.norm.weight, self.norm.bias].map(|t| t.unwrap_or(instead))
    }

    fn forward(&self) -> (Tensor, Tensor) {
        let y = Tensor::empty(self.x.gpu(), self.x.dtype(), self.x.shape());
        let statistics = self.statistics();
        let [w, b] = self.affine(&statistics);
        self.walk(2, self.step(), &[self.x, &statistics, w, b, &y], false);
        (y, statistics)
    }

    /// Pixels that a thread of the stages over all elements walks.
    fn step(&self) -> u32 {
        if self.x.gpu().tier().cpu {
            CPU_WALK as u32
        } else {
            4
        }
    }
}

/// The norm of `x` [batch, .., channels] f32 or f16, channels last, in its shape and dtype; and what
/// [`group_norm_backward`] needs of it, f32 [batch, 2, channels]: mean and 1/√(variance + eps) of each channel's group.
pub fn group_norm(x: &Tensor, norm: &GroupNorm) -> (Tensor, Tensor) {
    Plan::new(x, norm).forward()
}

/// [`group_norm`] with the workgroup size chosen by the caller: 8 fits CPU drivers, 128 GPUs.
pub fn group_norm_with(x: &Tensor, norm: &GroupNorm, threads: u32) -> (Tensor, Tensor) {
    Plan {
        threads,
        ..Plan::new(x, norm)
    }
    .forward()
}

/// Gradients of [`group_norm`] with its `statistics`, dx added to `onto` where given; those of the weight and bias only
/// when `affine`.
pub fn group_norm_backward(
    x: &Tensor,
    statistics: &Tensor,
    dy: &Tensor,
    onto: Option<&Tensor>,
    norm: &GroupNorm,
    affine: bool,
) -> NormGradients {
    let alike = |t: &Tensor| x.elements() == t.elements() && x.dtype() == t.dtype();
    assert!(
        alike(dy) && onto.is_none_or(alike),
        "group_norm_backward: x {x:?}, dy {dy:?}, onto {onto:?}"
    );
    let op = Plan::new(x, norm);
    let [w, b] = op.affine(statistics);
    let (partial, sums, means) = (op.per_chunk(), op.per_channel(), op.per_channel());
    let tensors = [x, statistics, w, b, dy, &partial];
    op.walk(3, op.params.chunk, &tensors, false);
    op.by_group(4, &[&partial, w, &sums, &means]);
    let dx = Tensor::empty(x.gpu(), x.dtype(), x.shape());
    let earlier = onto.unwrap_or(x);
    let tensors = [x, statistics, w, b, dy, &means, earlier, &dx];
    op.walk(5, op.step(), &tensors, onto.is_some());
    let total = affine.then(|| fold_rows(&sums));
    let row = |i: usize| {
        total
            .as_ref()
            .map(|t| t.narrow(i, 1).reshape(&[op.channels]))
    };
    NormGradients {
        dx,
        dweight: row(0),
        dbias: row(1),
    }
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for (subgroup, threads) in [(true, 8), (false, 8), (false, 128)] {
        let kernel = |stage| row_variant(group_kernel(stage), subgroup, usize::MAX, threads);
        all.extend([1, 4].map(kernel));
    }
    for (f16, vec4) in [(false, false), (false, true), (true, false), (true, true)] {
        for cut in COLUMN_THREADS {
            all.push(walk_kernel(0, false, f16, vec4, cut));
            for stage in [2, 3, 5] {
                let kernel = |silu| walk_kernel(stage, silu, f16, vec4, cut);
                all.extend([kernel(false), kernel(true).flag("ONTO", stage == 5)]);
            }
        }
    }
    all
}
