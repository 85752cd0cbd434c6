//! Floor 2: tensors on the GPU, host transfer, checkpoints. Knows nothing of kernels.

mod checkpoint;
mod dtype;
mod place;
mod quantized;
mod save;

use std::sync::Arc;

pub use checkpoint::{Checkpoint, Stored};
pub use dtype::DType;
pub use place::Place;
pub use quantized::{GROUP, Quantization, QuantizedMatrix};
pub use save::{HostTensor, save_safetensors};

use crate::error::Result;
use crate::gpu::{Binding, Buffer, Gpu, ReadBack};

/// A contiguous row-major tensor on the GPU; clones share the storage.
#[derive(Clone)]
pub struct Tensor {
    gpu: Gpu,
    buffer: Arc<Buffer>,
    /// First byte within the buffer; a multiple of the adapter's offset alignment.
    offset: u64,
    shape: Vec<usize>,
    dtype: DType,
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor{:?} {:?}", self.shape, self.dtype)
    }
}

/// Number of elements of `shape`.
pub fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}

impl Tensor {
    /// A tensor with undefined content.
    pub fn empty(gpu: &Gpu, dtype: DType, shape: &[usize]) -> Tensor {
        let bytes = (elements(shape) * dtype.bytes()) as u64;
        Tensor {
            buffer: Arc::new(gpu.allocate(bytes)),
            gpu: gpu.clone(),
            offset: 0,
            shape: shape.to_vec(),
            dtype,
        }
    }

    /// A tensor of zeros.
    pub fn zeros(gpu: &Gpu, dtype: DType, shape: &[usize]) -> Tensor {
        let tensor = Tensor::empty(gpu, dtype, shape);
        gpu.clear(&tensor.buffer, 0, tensor.bytes());
        tensor
    }

    /// Uploads raw little-endian `bytes` of `dtype`.
    ///
    /// Panics when the byte count does not match the shape.
    pub fn from_bytes(gpu: &Gpu, bytes: &[u8], dtype: DType, shape: &[usize]) -> Tensor {
        assert_eq!(
            bytes.len(),
            elements(shape) * dtype.bytes(),
            "from_bytes: {shape:?} of {dtype:?}"
        );
        let tensor = Tensor::empty(gpu, dtype, shape);
        gpu.upload(&tensor.buffer, 0, bytes);
        tensor
    }

    /// Uploads `f32` values.
    pub fn from_f32(gpu: &Gpu, values: &[f32], shape: &[usize]) -> Tensor {
        Tensor::from_bytes(gpu, bytemuck::cast_slice(values), DType::F32, shape)
    }

    /// Uploads `u32` values (ids, rows, masks).
    pub fn from_u32(gpu: &Gpu, values: &[u32], shape: &[usize]) -> Tensor {
        Tensor::from_bytes(gpu, bytemuck::cast_slice(values), DType::U32, shape)
    }

    /// Uploads `i32` values.
    pub fn from_i32(gpu: &Gpu, values: &[i32], shape: &[usize]) -> Tensor {
        Tensor::from_bytes(gpu, bytemuck::cast_slice(values), DType::I32, shape)
    }

    /// Sizes of the dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Size of dimension `i`.
    pub fn dim(&self, i: usize) -> usize {
        self.shape[i]
    }

    /// Size of the last dimension (1 for a scalar).
    pub fn last_dim(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape.len()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        elements(&self.shape)
    }

    /// Bytes of the elements.
    pub fn bytes(&self) -> u64 {
        (self.elements() * self.dtype.bytes()) as u64
    }

    /// The GPU that holds it.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The range a kernel binds.
    pub fn binding(&self) -> Binding<'_> {
        Binding {
            buffer: &self.buffer,
            offset: self.offset,
            bytes: self.bytes(),
        }
    }

    /// Whether two tensors share one storage.
    pub fn shares_storage(&self, other: &Tensor) -> bool {
        Arc::ptr_eq(&self.buffer, &other.buffer)
    }

    /// The same elements under another shape (a view).
    ///
    /// Panics when the element counts differ.
    pub fn reshape(&self, shape: &[usize]) -> Tensor {
        assert_eq!(
            elements(shape),
            self.elements(),
            "reshape: {:?} to {shape:?}",
            self.shape
        );
        Tensor {
            shape: shape.to_vec(),
            ..self.clone()
        }
    }

    /// Rows `start .. start + len` of the leading dimension: a view, or a copy where the adapter's
    /// binding alignment does not allow one.
    ///
    /// Panics when the range is outside the dimension.
    pub fn narrow(&self, start: usize, len: usize) -> Tensor {
        assert!(
            self.rank() > 0 && start + len <= self.shape[0],
            "narrow: rows {start}..{} of {:?}",
            start + len,
            self.shape
        );
        let mut shape = self.shape.clone();
        shape[0] = len;
        let row = elements(&self.shape[1..]) * self.dtype.bytes();
        let offset = self.offset + (start * row) as u64;
        if offset.is_multiple_of(self.gpu.tier().offset_alignment) {
            return Tensor {
                offset,
                shape,
                ..self.clone()
            };
        }
        assert!(
            offset.is_multiple_of(4),
            "narrow: rows of {:?} {:?} are not aligned to 4 bytes; use ops::slice",
            self.shape,
            self.dtype
        );
        let copy = Tensor::empty(&self.gpu, self.dtype, &shape);
        self.gpu
            .copy(&self.buffer, offset, &copy.buffer, 0, copy.bytes());
        copy
    }

    /// A copy with storage of its own.
    pub fn duplicate(&self) -> Tensor {
        let copy = Tensor::empty(&self.gpu, self.dtype, &self.shape);
        copy.copy_from(self);
        copy
    }

    /// Overwrites the content with `source`'s, of the same dtype and element count.
    pub fn copy_from(&self, source: &Tensor) {
        assert!(
            self.dtype == source.dtype && self.elements() == source.elements(),
            "copy_from: {self:?} from {source:?}"
        );
        self.gpu.copy(
            &source.buffer,
            source.offset,
            &self.buffer,
            self.offset,
            self.bytes(),
        );
    }

    /// Overwrites the content with `values` (f32 tensors), ordered with dispatches.
    pub fn write_f32(&self, values: &[f32]) {
        assert!(
            self.dtype == DType::F32 && self.elements() == values.len(),
            "write_f32: {} values into {self:?}",
            values.len()
        );
        self.gpu
            .upload(&self.buffer, self.offset, bytemuck::cast_slice(values));
    }

    /// Overwrites the content with `values` (u32 tensors), ordered with dispatches.
    pub fn write_u32(&self, values: &[u32]) {
        assert!(
            self.dtype == DType::U32 && self.elements() == values.len(),
            "write_u32: {} values into {self:?}",
            values.len()
        );
        self.gpu
            .upload(&self.buffer, self.offset, bytemuck::cast_slice(values));
    }

    /// Starts reading the content back; the stream goes on meanwhile.
    pub fn read_later(&self) -> PendingRead {
        PendingRead {
            read: self.gpu.read_later(&self.buffer, self.offset, self.bytes()),
            dtype: self.dtype,
        }
    }

    /// The content as `f32`, 16-bit floats widened; waits for the device.
    ///
    /// # Errors
    /// Any GPU error reported by then.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        self.read_later().wait()
    }

    /// The content of a `u32` tensor; waits for the device.
    ///
    /// # Errors
    /// Any GPU error reported by then.
    pub fn to_u32(&self) -> Result<Vec<u32>> {
        assert_eq!(self.dtype, DType::U32, "to_u32 of {self:?}");
        let bytes = self
            .gpu
            .read_later(&self.buffer, self.offset, self.bytes())
            .wait()?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }
}

/// A read-back under way; see [`Tensor::read_later`].
pub struct PendingRead {
    read: ReadBack,
    dtype: DType,
}

impl PendingRead {
    /// Waits for the values, widened to `f32`.
    ///
    /// # Errors
    /// Any GPU error reported by then.
    pub fn wait(self) -> Result<Vec<f32>> {
        Ok(self.dtype.widen(&self.read.wait()?))
    }
}
