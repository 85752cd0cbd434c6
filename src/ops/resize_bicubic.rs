//! Bicubic resizing with half-pixel centres, channels last; as PyTorch's `interpolate` with
//! `mode="bicubic", align_corners=False, antialias=False`.

use super::{THREADS, dispatch, is_f16, linear_groups};
use crate::gpu::Kernel;
use crate::tensor::Tensor;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    threads: u32,
    channels: u32,
    in_height: u32,
    in_width: u32,
    out_height: u32,
    out_width: u32,
    /// Input pixels per output pixel.
    scale_y: f32,
    scale_x: f32,
}

fn kernel(f16: bool) -> Kernel {
    Kernel::new("resize_bicubic").flag("F16", f16)
}

/// x [batch, height, width, channels] → [batch, `height`, `width`, channels]; Keys' kernel with a = −0.75, so values
/// can leave the input's range.
pub fn resize_bicubic(x: &Tensor, height: usize, width: usize) -> Tensor {
    let &[b, h, w, c] = x.shape() else {
        panic!(
            "resize_bicubic: {:?} is not [batch, height, width, channels]",
            x.shape()
        )
    };
    if (h, w) == (height, width) {
        return x.clone();
    }
    let y = Tensor::empty(x.gpu(), x.dtype(), &[b, height, width, c]);
    let params = Params {
        threads: y.elements() as u32,
        channels: c as u32,
        in_height: h as u32,
        in_width: w as u32,
        out_height: height as u32,
        out_width: width as u32,
        scale_y: h as f32 / height as f32,
        scale_x: w as f32 / width as f32,
    };
    dispatch(
        &kernel(is_f16("resize_bicubic", x)),
        &[x, &y],
        &params,
        linear_groups(y.elements(), THREADS),
    );
    y
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    vec![kernel(false), kernel(true)]
}
