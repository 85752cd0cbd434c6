//! Nearest-neighbour upsampling by two, channels last (the U-Net's and VAE's).

use super::{THREADS, dispatch, is_f16, linear_groups};
use crate::gpu::Kernel;
use crate::tensor::Tensor;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    threads: u32,
    /// Width of the smaller image.
    width: u32,
    /// Channels (or vec4s of them).
    channels: u32,
}

fn kernel(backward: bool, vec4: bool, f16: bool) -> Kernel {
    Kernel::new("upsample_nearest2x")
        .flag("BACKWARD", backward)
        .flag("VEC4", vec4)
        .flag("F16", f16)
}

fn run(op: &str, x: &Tensor, shape: &[usize], width: usize, backward: bool) -> Tensor {
    let y = Tensor::empty(x.gpu(), x.dtype(), shape);
    let channels = x.last_dim();
    let vec4 = channels.is_multiple_of(4);
    let unit = if vec4 { 4 } else { 1 };
    let threads = y.elements() / unit;
    let params = Params {
        threads: threads as u32,
        width: width as u32,
        channels: (channels / unit) as u32,
    };
    dispatch(
        &kernel(backward, vec4, is_f16(op, x)),
        &[x, &y],
        &params,
        linear_groups(threads, THREADS),
    );
    y
}

/// x [batch, height, width, channels] → [batch, 2·height, 2·width, channels], each pixel four times.
pub fn upsample_nearest2x(x: &Tensor) -> Tensor {
    let &[b, h, w, c] = x.shape() else {
        panic!(
            "upsample_nearest2x: {:?} is not [batch, height, width, channels]",
            x.shape()
        )
    };
    run("upsample_nearest2x", x, &[b, 2 * h, 2 * w, c], w, false)
}

/// Its gradient: the sum of the four upstream pixels.
pub fn upsample_nearest2x_backward(dy: &Tensor) -> Tensor {
    let &[b, h, w, c] = dy.shape() else {
        panic!("upsample_nearest2x_backward: {:?}", dy.shape())
    };
    assert!(
        h % 2 == 0 && w % 2 == 0,
        "upsample_nearest2x_backward: {:?}",
        dy.shape()
    );
    let shape = [b, h / 2, w / 2, c];
    run("upsample_nearest2x_backward", dy, &shape, w / 2, true)
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    [(false, false), (true, false), (false, true), (true, true)]
        .into_iter()
        .flat_map(|(vec4, f16)| [kernel(false, vec4, f16), kernel(true, vec4, f16)])
        .collect()
}
