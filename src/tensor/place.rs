//! Where a plan finds its inputs and leaves its results.

use super::{DType, Tensor, elements};
use crate::gpu::Gpu;

/// The bytes of a tensor in a plan's arena, which hold it until the next plan of the arena is made or replayed.
pub struct Place {
    gpu: Gpu,
    raw: wgpu::Buffer,
    offset: u64,
    shape: Vec<usize>,
    dtype: DType,
}

impl Tensor {
    /// Where it lies, without keeping its buffer from being used again.
    pub fn place(&self) -> Place {
        Place {
            gpu: self.gpu.clone(),
            raw: self.buffer.raw().clone(),
            offset: self.offset,
            shape: self.shape.clone(),
            dtype: self.dtype,
        }
    }
}

impl Place {
    fn bytes(&self) -> u64 {
        ((elements(&self.shape) * self.dtype.bytes()) as u64).next_multiple_of(4)
    }

    /// Puts a copy of `tensor`, of the same dtype and element count, there.
    pub fn fill(&self, tensor: &Tensor) {
        assert!(
            self.dtype == tensor.dtype && elements(&self.shape) == tensor.elements(),
            "{tensor:?} into a place of {:?} {:?}",
            self.shape,
            self.dtype
        );
        let (from, at) = (tensor.buffer.raw(), tensor.offset);
        self.gpu
            .copy_raw(from, at, &self.raw, self.offset, self.bytes());
    }

    /// Puts zeros there.
    pub fn clear(&self) {
        self.gpu.clear_raw(&self.raw, self.offset, self.bytes());
    }

    /// A copy of what is there.
    pub fn copy(&self) -> Tensor {
        let copy = Tensor::empty(&self.gpu, self.dtype, &self.shape);
        self.gpu
            .copy_raw(&self.raw, self.offset, copy.buffer.raw(), 0, self.bytes());
        copy
    }
}
