//! The aligner network: VLM word maps of one layer → one map per word.

use std::path::Path;

use super::options::{AlignerActivation, AlignerKind, AlignerNorm};
use crate::autograd::Var;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::{Conv2d, LoadOptions, Loader, Parameters};
use crate::ops::unary::Unary;
use crate::tensor::Checkpoint;

/// What an aligner is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AlignerShape {
    /// Number of blocks, or none at all.
    pub kind: AlignerKind,
    /// Channels of its input: heads, or 1 after an aggregation over heads.
    pub channels: usize,
    /// Hidden channels.
    pub hidden: usize,
    /// Norm of each block.
    pub norm: AlignerNorm,
    /// Activation of each block.
    pub activation: AlignerActivation,
}

/// [Conv3×3 without bias → norm → activation] × 3 (`light`: × 2), the last back to the input's
/// channels, then Conv1×1 with bias to one channel.
///
/// Tensors: `conv1.weight` … `convN.weight`, `out.weight`, `out.bias`.
pub struct Aligner {
    shape: AlignerShape,
    blocks: Vec<Conv2d>,
    out: Option<Conv2d>,
    parameters: Parameters,
}

/// Epsilon of the instance norm.
const NORM_EPS: f32 = 1e-5;

impl Aligner {
    /// An aligner with new weights.
    ///
    /// # Errors
    /// None in practice: random weights cannot be missing.
    pub fn new(gpu: &Gpu, shape: AlignerShape, seed: u64) -> Result<Aligner> {
        let options = LoadOptions {
            trainable: true,
            seed,
            ..LoadOptions::default()
        };
        Aligner::load(&Loader::random(gpu, options), shape)
    }

    /// An aligner with the weights of a safetensors file.
    ///
    /// # Errors
    /// A missing file or tensor, or channels that do not fit the model.
    pub fn open(gpu: &Gpu, file: &Path, shape: AlignerShape) -> Result<Aligner> {
        if !file.is_file() {
            return Err(Error::file(
                file,
                "no such file; expected an aligner's safetensors file",
            ));
        }
        let options = LoadOptions {
            trainable: true,
            ..LoadOptions::default()
        };
        let checkpoint = Checkpoint::open(file, "aligner")?;
        Aligner::load(&Loader::new(gpu, checkpoint, options), shape)
    }

    fn load(loader: &Loader, shape: AlignerShape) -> Result<Aligner> {
        let (c, h) = (shape.channels, shape.hidden);
        let widths = match shape.kind {
            AlignerKind::Conv => vec![(c, h), (h, h), (h, c)],
            AlignerKind::Light => vec![(c, h), (h, c)],
            AlignerKind::None => Vec::new(),
        };
        let block = |(i, (inputs, outputs)): (usize, (usize, usize))| {
            let name = format!("conv{}", i + 1);
            Conv2d::load(&loader.sub(name), [inputs, outputs, 3], 1, [1; 4], false)
        };
        let out = match shape.kind {
            AlignerKind::None => None,
            _ => Some(Conv2d::load(
                &loader.sub("out"),
                [c, 1, 1],
                1,
                [0; 4],
                true,
            )?),
        };
        Ok(Aligner {
            shape,
            blocks: widths
                .into_iter()
                .enumerate()
                .map(block)
                .collect::<Result<_>>()?,
            out,
            parameters: loader.parameters(),
        })
    }

    /// Word maps [n, R, R, channels] → [n, R, R, 1].
    pub fn forward(&self, maps: &Var) -> Var {
        let mut x = maps.clone();
        for conv in &self.blocks {
            x = conv.forward(&x);
            if self.shape.norm == AlignerNorm::Instance {
                x = x.instance_norm(NORM_EPS);
            }
            x = x.unary(match self.shape.activation {
                AlignerActivation::Relu6 => Unary::Relu6,
                AlignerActivation::LeakyRelu => Unary::LeakyRelu(0.1),
            });
        }
        match &self.out {
            Some(out) => out.forward(&x),
            None => x,
        }
    }

    /// Its trainable tensors.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }
}
