//! The aligner network: VLM word maps of one layer → one map per word.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::autograd::Var;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::{Conv2d, LoadOptions, Loader, Parameters};
use crate::ops::unary::Unary;
use crate::tensor::{Checkpoint, DType};

/// Architecture of the aligner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlignerKind {
    /// Three 3×3 blocks and a 1×1 projection ("sim" in the paper's code).
    #[default]
    Conv,
}

/// [Conv3×3 without bias → instance norm → ReLU6] × 3, then Conv1×1 with bias to one channel.
///
/// Tensors: `conv1.weight` … `conv3.weight`, `out.weight`, `out.bias`.
pub struct Aligner {
    blocks: Vec<Conv2d>,
    out: Conv2d,
    parameters: Parameters,
}

/// Epsilon of the instance norm.
const NORM_EPS: f32 = 1e-5;

impl Aligner {
    /// A new aligner for maps of `channels` heads.
    ///
    /// # Errors
    /// None in practice: random weights cannot be missing.
    pub fn new(gpu: &Gpu, channels: usize, hidden: usize, seed: u64) -> Result<Aligner> {
        let options = LoadOptions {
            trainable: true,
            seed,
            ..LoadOptions::default()
        };
        Aligner::load(&Loader::random(gpu, options), channels, hidden)
    }

    /// Reads the weights from a safetensors file.
    ///
    /// # Errors
    /// A missing tensor, or channels that do not fit the model.
    pub fn open(gpu: &Gpu, file: &Path, channels: usize, hidden: usize) -> Result<Aligner> {
        if !file.is_file() {
            return Err(Error::file(file, "no such file; `init.aligner` names a safetensors file"));
        }
        let options = LoadOptions {
            trainable: true,
            activations: DType::F32,
            ..LoadOptions::default()
        };
        let checkpoint = Checkpoint::open(file, "aligner")?;
        Aligner::load(&Loader::new(gpu, checkpoint, options), channels, hidden)
    }

    fn load(loader: &Loader, channels: usize, hidden: usize) -> Result<Aligner> {
        let widths = [(channels, hidden), (hidden, hidden), (hidden, channels)];
        let block = |(i, (inputs, outputs)): (usize, (usize, usize))| {
            let name = format!("conv{}", i + 1);
            Conv2d::load(&loader.sub(name), [inputs, outputs, 3], 1, [1; 4], false)
        };
        Ok(Aligner {
            blocks: widths.into_iter().enumerate().map(block).collect::<Result<_>>()?,
            out: Conv2d::load(&loader.sub("out"), [channels, 1, 1], 1, [0; 4], true)?,
            parameters: loader.parameters(),
        })
    }

    /// Word maps [n, R, R, channels] → [n, R, R, 1].
    pub fn forward(&self, maps: &Var) -> Var {
        let mut x = maps.clone();
        for conv in &self.blocks {
            x = conv.forward(&x).instance_norm(NORM_EPS).unary(Unary::Relu6);
        }
        self.out.forward(&x)
    }

    /// Its trainable tensors.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }
}
