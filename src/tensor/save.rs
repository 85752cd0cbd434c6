//! Writing safetensors, all or nothing.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::TensorView;

use super::DType;
use crate::error::{Error, Result};

/// A tensor on the host, ready to be written.
#[derive(Clone, Debug)]
pub struct HostTensor {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl HostTensor {
    /// `f32` values stored as f32.
    pub fn f32(shape: &[usize], values: &[f32]) -> HostTensor {
        HostTensor::float(DType::F32, shape, values)
    }

    /// `f32` values stored as f16.
    pub fn f16(shape: &[usize], values: &[f32]) -> HostTensor {
        HostTensor::float(DType::F16, shape, values)
    }

    /// `f32` values stored as `dtype`.
    pub fn float(dtype: DType, shape: &[usize], values: &[f32]) -> HostTensor {
        HostTensor {
            dtype: match dtype {
                DType::F32 => safetensors::Dtype::F32,
                DType::F16 => safetensors::Dtype::F16,
                DType::Bf16 => safetensors::Dtype::BF16,
                DType::U32 => safetensors::Dtype::U32,
                DType::I32 => safetensors::Dtype::I32,
            },
            shape: shape.to_vec(),
            bytes: dtype.narrow(values),
        }
    }

    /// `u32` values.
    pub fn u32(shape: &[usize], values: &[u32]) -> HostTensor {
        HostTensor {
            dtype: safetensors::Dtype::U32,
            shape: shape.to_vec(),
            bytes: bytemuck::cast_slice(values).to_vec(),
        }
    }

    /// `u8` values.
    pub fn u8(shape: &[usize], values: &[u8]) -> HostTensor {
        HostTensor {
            dtype: safetensors::Dtype::U8,
            shape: shape.to_vec(),
            bytes: values.to_vec(),
        }
    }
}

/// Writes `tensors` to `path`: a temporary file beside it, synced, then renamed over it.
///
/// # Errors
/// [`Error::Io`] when the disk is full or the path cannot be written; an existing file stays whole.
pub fn save_safetensors(
    path: &Path,
    tensors: &[(String, HostTensor)],
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    let views = tensors
        .iter()
        .map(|(name, t)| {
            let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes);
            view.map(|view| (name.as_str(), view))
                .map_err(|e| Error::tensor(path, name, e.to_string()))
        })
        .collect::<Result<Vec<_>>>()?;
    let bytes = safetensors::serialize(views, metadata)
        .map_err(|e| Error::file(path, format!("cannot be serialised: {e}")))?;
    crate::files::write_bytes(path, &bytes)
}
