//! Bits of a frozen base.

use serde::{Deserialize, Serialize};

use crate::tensor::Quantization;

/// How frozen linear weights are held: `model.quantize` and `--quantize`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Quantize {
    /// As in the checkpoint.
    #[default]
    None,
    /// 8 bits and a scale for 64 weights.
    Q8,
    /// 4 bits and a scale for 64 weights.
    Q4,
}

impl Quantize {
    /// The storage, if any.
    pub fn kind(self) -> Option<Quantization> {
        match self {
            Self::None => None,
            Self::Q8 => Some(Quantization::Q8),
            Self::Q4 => Some(Quantization::Q4),
        }
    }
}
