//! The adaptive loss scale of mixed-precision training (Micikevicius et al., 2018), kept on the device.

use super::dispatch;
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    max_norm: f32,
    interval: f32,
}

fn kernel() -> Kernel {
    Kernel::new("loss_scale")
}

/// From the `norm` f32 `[1]` of gradients that carry the factor in `scale`: f32 `[2]` of their true norm and that
/// factor, and f32 `[1]` to multiply them by, so that they lose the factor and their norm is at most `max_norm`.
///
/// `scale` f32 `[2]` holds the factor, a power of two, and the good updates since it last changed. A norm that is NaN
/// or infinite gives NaN twice and halves the factor, down to 1; `interval` good ones in a row double it, up to 2²⁴.
pub fn unscale(norm: &Tensor, scale: &Tensor, max_norm: f32, interval: u32) -> (Tensor, Tensor) {
    assert!(
        norm.elements() == 1 && scale.elements() == 2,
        "unscale: {norm:?} and {scale:?}"
    );
    let truth = Tensor::empty(norm.gpu(), DType::F32, &[2]);
    let factor = Tensor::empty(norm.gpu(), DType::F32, &[1]);
    let params = Params {
        max_norm,
        interval: interval as f32,
    };
    dispatch(
        &kernel(),
        &[norm, scale, &truth, &factor],
        &params,
        [1, 1, 1],
    );
    (truth, factor)
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    vec![kernel()]
}
