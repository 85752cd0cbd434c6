//! Bilinear resizing with half-pixel centres, channels last; as PyTorch's `interpolate` with
//! `mode="bilinear", align_corners=False, antialias=False`.

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

fn kernel(backward: bool, f16: bool) -> Kernel {
    Kernel::new("resize_bilinear")
        .flag("BACKWARD", backward)
        .flag("F16", f16)
}

fn run(
    x: &Tensor,
    y: &Tensor,
    [in_height, in_width]: [usize; 2],
    [out_height, out_width]: [usize; 2],
    backward: bool,
) {
    let params = Params {
        threads: y.elements() as u32,
        channels: y.last_dim() as u32,
        in_height: in_height as u32,
        in_width: in_width as u32,
        out_height: out_height as u32,
        out_width: out_width as u32,
        scale_y: in_height as f32 / out_height as f32,
        scale_x: in_width as f32 / out_width as f32,
    };
    dispatch(
        &kernel(backward, is_f16("resize_bilinear", x)),
        &[x, y],
        &params,
        linear_groups(y.elements(), THREADS),
    );
}

/// x [batch, height, width, channels] → [batch, `height`, `width`, channels].
pub fn resize_bilinear(x: &Tensor, height: usize, width: usize) -> Tensor {
    let &[b, h, w, c] = x.shape() else {
        panic!(
            "resize_bilinear: {:?} is not [batch, height, width, channels]",
            x.shape()
        )
    };
    if (h, w) == (height, width) {
        return x.clone();
    }
    let y = Tensor::empty(x.gpu(), x.dtype(), &[b, height, width, c]);
    run(x, &y, [h, w], [height, width], false);
    y
}

/// Its gradient for an input of `height` × `width`: each input pixel sums the output pixels that
/// read it, in a fixed order.
pub fn resize_bilinear_backward(dy: &Tensor, height: usize, width: usize) -> Tensor {
    let &[b, h, w, c] = dy.shape() else {
        panic!("resize_bilinear_backward: {:?}", dy.shape())
    };
    if (h, w) == (height, width) {
        return dy.clone();
    }
    let dx = Tensor::empty(dy.gpu(), dy.dtype(), &[b, height, width, c]);
    run(dy, &dx, [height, width], [h, w], true);
    dx
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    [false, true]
        .into_iter()
        .flat_map(|backward| [kernel(backward, false), kernel(backward, true)])
        .collect()
}
