//! The right operand: a float tensor or a quantised matrix.

use super::window;
use crate::gpu::Kernel;
use crate::tensor::{DType, Quantization, QuantizedMatrix, Tensor};

/// How the elements of the right operand are stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Storage {
    Float(DType),
    Quantized(Quantization),
}

impl Storage {
    pub fn is_quantized(self) -> bool {
        matches!(self, Self::Quantized(_))
    }

    /// `kernel` for operands and a result of these types.
    pub fn flags(self, kernel: Kernel, a: DType, c: DType) -> Kernel {
        let is = |dtype| self == Self::Float(dtype);
        let half = is(DType::F16) || [a, c].contains(&DType::F16);
        kernel
            .flag("F16", half)
            .flag("A_F16", a == DType::F16)
            .flag("B_F16", is(DType::F16))
            .flag("B_BF16", is(DType::Bf16))
            .flag("QUANTIZED", self.is_quantized())
            .flag("Q4", self == Self::Quantized(Quantization::Q4))
            .flag("C_F16", c == DType::F16)
    }
}

/// The right operand of a product.
#[derive(Clone)]
pub(super) enum Right {
    Float(Tensor),
    /// [outputs, inputs] in rows of [`QuantizedMatrix::pitch`] elements.
    Quantized(QuantizedMatrix),
}

impl Right {
    pub fn storage(&self) -> Storage {
        match self {
            Self::Float(t) => Storage::Float(t.dtype()),
            Self::Quantized(q) => Storage::Quantized(q.kind()),
        }
    }

    /// What is bound as the kernels' `b`.
    pub fn tensor(&self) -> &Tensor {
        match self {
            Self::Float(t) => t,
            Self::Quantized(q) => q.words(),
        }
    }

    /// What is bound beside it.
    pub fn scales(&self) -> Option<&Tensor> {
        match self {
            Self::Float(_) => None,
            Self::Quantized(q) => Some(q.scales()),
        }
    }

    /// Bytes bound for `elements` at the most, without scales.
    pub fn bytes(&self, elements: usize) -> u64 {
        match self {
            Self::Float(t) => (elements * t.dtype().bytes()) as u64,
            Self::Quantized(q) => {
                // A window may begin this much earlier.
                let before = 32 * q.gpu().tier().offset_alignment;
                4 * elements.div_ceil(q.kind().per_word()) as u64 + before
            }
        }
    }

    /// As [`window`] of a tensor.
    pub fn window(&self, start: usize, len: usize) -> (Right, usize) {
        match self {
            Self::Float(t) => {
                let (t, start) = window(t, start, len);
                (Self::Float(t), start)
            }
            Self::Quantized(q) => {
                let (q, start) = q.window(start, len);
                (Self::Quantized(q), start)
            }
        }
    }
}
