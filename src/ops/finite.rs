//! Finding the first tensor that holds a NaN or an infinity.

use super::{LINE_THREADS, dispatch, is_f16, line};
use crate::error::Result;
use crate::gpu::{Gpu, Kernel};
use crate::tensor::{DType, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    vectors: u32,
    chunk: u32,
    elements: u32,
    tag: u32,
}

fn kernel(f16: bool, threads: u32) -> Kernel {
    Kernel::new("finite")
        .flag("F16", f16)
        .def("WG", threads as i32)
}

/// A flag on the device that keeps the lowest tag of the tensors found not to be finite.
pub struct FiniteFlag(Tensor);

impl FiniteFlag {
    /// A flag with nothing found yet.
    pub fn new(gpu: &Gpu) -> FiniteFlag {
        FiniteFlag(Tensor::from_u32(gpu, &[u32::MAX], &[1]))
    }

    /// Forgets what was found.
    pub fn reset(&self) {
        self.0.write_u32(&[u32::MAX]);
    }

    /// Notes `tag` if any element of `x` is NaN or infinite.
    pub fn check(&self, x: &Tensor, tag: u32) {
        let vectors = x.elements().div_ceil(4);
        let line = line(x.gpu(), vectors);
        let params = Params {
            vectors: vectors as u32,
            chunk: line.chunk,
            elements: x.elements() as u32,
            tag,
        };
        dispatch(
            &kernel(is_f16("finite", x), line.threads),
            &[x, &self.0],
            &params,
            line.groups,
        );
    }

    /// The lowest tag noted, if any; waits for the device.
    ///
    /// # Errors
    /// Any GPU error reported by then.
    pub fn found(&self) -> Result<Option<u32>> {
        let tag = self.0.to_u32()?[0];
        Ok((tag != u32::MAX).then_some(tag))
    }

    /// The flag itself, u32 `[1]`, `u32::MAX` while nothing is found: for reading back later.
    pub fn tensor(&self) -> &Tensor {
        &self.0
    }
}

/// Whether every element of `x` (f32, f16) is finite; waits for the device.
///
/// # Errors
/// Any GPU error reported by then.
pub fn is_finite(x: &Tensor) -> Result<bool> {
    debug_assert!(matches!(x.dtype(), DType::F32 | DType::F16));
    let flag = FiniteFlag::new(x.gpu());
    flag.check(x, 0);
    Ok(flag.found()?.is_none())
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let both = |f16| LINE_THREADS.map(|threads| kernel(f16, threads));
    [both(false), both(true)].concat()
}
