//! Group norm of channels-last tensors, with f32 statistics; instance norm is one channel a group.

use super::layer_norm::{NormGradients, fold_rows};
use super::{THREADS, dispatch, grid, is_f16, linear_groups, row_threads};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

/// Pixels that one thread sums, at the least.
const CHUNK: usize = 64;

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

fn kernel(stage: i32, f16: bool, vec4: bool, threads: u32) -> Kernel {
    Kernel::new("group_norm")
        .def("STAGE", stage)
        .flag("F16", f16)
        .flag("VEC4", vec4)
        .def("WG", threads as i32)
}

struct GroupNorm<'a> {
    x: &'a Tensor,
    weight: Option<&'a Tensor>,
    f16: bool,
    vec4: bool,
    threads: u32,
    channels: usize,
    /// Of the stages over groups; the others count channels in units of the kernel's `V`.
    params: Params,
}

impl<'a> GroupNorm<'a> {
    fn new(
        x: &'a Tensor,
        groups: usize,
        weight: Option<&'a Tensor>,
        bias: Option<&Tensor>,
        eps: f32,
    ) -> GroupNorm<'a> {
        let channels = x.last_dim();
        assert!(
            x.rank() >= 2 && groups > 0 && channels.is_multiple_of(groups),
            "group_norm: x {x:?}, {groups} groups"
        );
        for affine in [weight, bias].into_iter().flatten() {
            assert!(
                affine.dtype() == DType::F32 && affine.elements() == channels,
                "group_norm: x {x:?}, weight or bias {affine:?}"
            );
        }
        let batch = x.dim(0);
        let pixels = x.elements() / (batch * channels).max(1);
        let chunk = CHUNK.max(pixels.div_ceil(256));
        GroupNorm {
            x,
            weight,
            f16: is_f16("group_norm", x),
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
                has_weight: u32::from(weight.is_some()),
                has_bias: u32::from(bias.is_some()),
                eps,
            },
        }
    }

    /// Channels in units of the kernel's `V`.
    fn units(&self) -> u32 {
        (self.channels / if self.vec4 { 4 } else { 1 }) as u32
    }

    /// A stage with a thread for each channel and chunk of pixels.
    fn by_chunk(&self, stage: i32, tensors: &[&Tensor]) {
        let params = Params {
            width: self.units(),
            ..self.params
        };
        dispatch(
            &kernel(stage, self.f16, self.vec4, self.threads),
            tensors,
            &params,
            [self.units().div_ceil(64), params.chunks, params.batch],
        );
    }

    /// A stage with a workgroup for each group; f32 only.
    fn by_group(&self, stage: i32, tensors: &[&Tensor]) {
        dispatch(
            &kernel(stage, false, false, self.threads),
            tensors,
            &self.params,
            grid((self.params.batch * self.params.groups) as usize),
        );
    }

    /// A stage with a thread for each element.
    fn by_element(&self, stage: i32, tensors: &[&Tensor]) {
        let params = Params {
            width: self.units(),
            ..self.params
        };
        let threads = self.x.elements() / if self.vec4 { 4 } else { 1 };
        dispatch(
            &kernel(stage, self.f16, self.vec4, self.threads),
            tensors,
            &params,
            linear_groups(threads, THREADS),
        );
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
        self.by_chunk(0, &[self.x, &moments]);
        self.by_group(1, &[&moments, &statistics]);
        statistics
    }

    fn forward(&self, bias: Option<&Tensor>) -> Tensor {
        let y = Tensor::empty(self.x.gpu(), self.x.dtype(), self.x.shape());
        let statistics = self.statistics();
        // A missing weight or bias binds the statistics in its place and is never read.
        let (w, b) = (
            self.weight.unwrap_or(&statistics),
            bias.unwrap_or(&statistics),
        );
        self.by_element(2, &[self.x, &statistics, w, b, &y]);
        y
    }
}

/// (x − mean)/√(variance + eps)·weight + bias, mean and biased variance over the pixels and the
/// channels of a group.
///
/// `x` [batch, .., channels] f32 or f16, channels last; `weight` and `bias` f32 `[channels]`, either
/// may be missing. Same shape and dtype as `x` (Wu & He 2018; `groups` = channels is instance norm).
pub fn group_norm(
    x: &Tensor,
    groups: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f32,
) -> Tensor {
    GroupNorm::new(x, groups, weight, bias, eps).forward(bias)
}

/// [`group_norm`] with the workgroup size chosen by the caller: 8 fits CPU drivers, 128 GPUs.
pub fn group_norm_with(
    x: &Tensor,
    groups: usize,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    eps: f32,
    threads: u32,
) -> Tensor {
    GroupNorm {
        threads,
        ..GroupNorm::new(x, groups, weight, bias, eps)
    }
    .forward(bias)
}

/// Gradients of [`group_norm`]; those of the weight and bias only when `affine`.
pub fn group_norm_backward(
    x: &Tensor,
    groups: usize,
    weight: Option<&Tensor>,
    dy: &Tensor,
    eps: f32,
    affine: bool,
) -> NormGradients {
    assert!(
        x.shape() == dy.shape() && x.dtype() == dy.dtype(),
        "group_norm_backward: x {x:?}, dy {dy:?}"
    );
    let op = GroupNorm::new(x, groups, weight, None, eps);
    let statistics = op.statistics();
    let (partial, sums, means) = (op.per_chunk(), op.per_channel(), op.per_channel());
    op.by_chunk(3, &[x, dy, &statistics, &partial]);
    op.by_group(4, &[&partial, weight.unwrap_or(&statistics), &sums, &means]);
    let dx = Tensor::empty(x.gpu(), x.dtype(), x.shape());
    let w = weight.unwrap_or(&statistics);
    op.by_element(5, &[x, dy, &statistics, w, &means, &dx]);
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
    for threads in [8, 128] {
        all.extend([1, 4].map(|stage| kernel(stage, false, false, threads)));
    }
    for stage in [0, 2, 3, 5] {
        for (f16, vec4) in [(false, false), (false, true), (true, false), (true, true)] {
            all.push(kernel(stage, f16, vec4, 8));
        }
    }
    all
}
