//! The aligner network: VLM word maps of one layer → one map per word.

use std::path::Path;

use super::options::{AlignerActivation, AlignerKind, AlignerNorm};
use crate::autograd::Var;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::{Conv2d, LoadOptions, Loader, Parameters};
use crate::ops::unary::Unary;
use crate::tensor::{Checkpoint, Tensor};

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

/// [Conv3×3 without bias → norm → activation] × 3 (`light`: × 2; `deep`: × 5, the middle two without norm), the last
/// back to the input's channels, then Conv1×1 with bias to one channel. `mlp`: Conv1×1 with bias in place of the
/// blocks' convolution and norm, twice.
///
/// Tensors: `conv1.weight` … `convN.weight` (`mlp`: and `.bias`), `out.weight`, `out.bias`.
pub struct Aligner {
    shape: AlignerShape,
    blocks: Vec<Block>,
    out: Option<Conv2d>,
    parameters: Parameters,
}

/// A convolution, and whether a norm follows.
struct Block {
    conv: Conv2d,
    norm: bool,
}

/// Epsilon of the norms.
const NORM_EPS: f32 = 1e-5;

/// Most groups of the group norm.
const MOST_GROUPS: usize = 8;

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
            AlignerKind::Deep => vec![(c, h), (h, h), (h, h), (h, h), (h, c)],
            AlignerKind::Mlp => vec![(c, h), (h, h)],
            AlignerKind::None => Vec::new(),
        };
        let mlp = shape.kind == AlignerKind::Mlp;
        let blocks = widths.len();
        let block = |(i, (inputs, outputs)): (usize, (usize, usize))| -> Result<Block> {
            let (side, padding) = if mlp { (1, 0) } else { (3, 1) };
            let place = loader.sub(format!("conv{}", i + 1));
            Ok(Block {
                conv: Conv2d::load(&place, [inputs, outputs, side], 1, [padding; 4], mlp)?,
                norm: !mlp && (i < 2 || i + 1 == blocks),
            })
        };
        let out = match shape.kind {
            AlignerKind::None => None,
            kind => Some(Conv2d::load(
                &loader.sub("out"),
                [if kind == AlignerKind::Mlp { h } else { c }, 1, 1],
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
        for block in &self.blocks {
            x = block.conv.forward(&x);
            if block.norm {
                x = normed(&x, self.shape.norm);
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

    /// Whether it leaves maps as they are.
    pub fn is_none(&self) -> bool {
        self.shape.kind == AlignerKind::None
    }

    /// Its trainable tensors.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }
}

/// The norm of `x` [n, R, R, channels].
fn normed(x: &Var, norm: AlignerNorm) -> Var {
    let [n, height, width, channels] = *x.shape() else {
        panic!("word maps have four dimensions: {x:?}")
    };
    match norm {
        AlignerNorm::Instance => x.instance_norm(NORM_EPS),
        // One instance that holds the whole batch.
        AlignerNorm::Batch => x
            .reshape(&[1, n * height, width, channels])
            .instance_norm(NORM_EPS)
            .reshape(x.shape()),
        AlignerNorm::Group => {
            let groups = (1..=MOST_GROUPS.min(channels)).rev();
            let groups = groups.into_iter().find(|g| channels.is_multiple_of(*g));
            let constant = |value: f32| {
                let values = vec![value; channels];
                Var::constant(Tensor::from_f32(x.value().gpu(), &values, &[channels]))
            };
            x.group_norm(
                groups.unwrap_or(1),
                &constant(1.0),
                &constant(0.0),
                NORM_EPS,
            )
        }
        AlignerNorm::None => x.clone(),
    }
}
