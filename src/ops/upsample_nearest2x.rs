//! Nearest-neighbour upsampling by two, channels last (the U-Net's and VAE's).

use super::{COLUMN_THREADS, columns, dispatch, is_f16};
use crate::gpu::Kernel;
use crate::tensor::Tensor;

/// Pixels that a thread walks.
const CHUNK: usize = 8;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    pixels: u32,
    /// Of the smaller image.
    width: u32,
    /// Channels (or vec4s of them).
    channels: u32,
    chunk: u32,
}

fn kernel(backward: bool, vec4: bool, f16: bool, (threads, lanes): (u32, u32)) -> Kernel {
    Kernel::new("upsample_nearest2x")
        .flag("BACKWARD", backward)
        .flag("VEC4", vec4)
        .flag("F16", f16)
        .def("WG", threads as i32)
        .def("LANES", lanes as i32)
}

fn run(op: &str, x: &Tensor, shape: &[usize], width: usize, backward: bool) -> Tensor {
    let y = Tensor::empty(x.gpu(), x.dtype(), shape);
    let vec4 = x.last_dim().is_multiple_of(4);
    let channels = x.last_dim() / if vec4 { 4 } else { 1 };
    let pixels = x.elements().min(y.elements()) / x.last_dim().max(1);
    let columns = columns(x.gpu(), pixels, channels, CHUNK);
    let params = Params {
        pixels: pixels as u32,
        width: width as u32,
        channels: channels as u32,
        chunk: columns.chunk,
    };
    let division = (columns.threads, columns.lanes);
    dispatch(
        &kernel(backward, vec4, is_f16(op, x), division),
        &[x, &y],
        &params,
        columns.groups,
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
    let mut all = Vec::new();
    for (vec4, f16) in [(false, false), (true, false), (false, true), (true, true)] {
        for division in COLUMN_THREADS {
            all.extend([false, true].map(|backward| kernel(backward, vec4, f16, division)));
        }
    }
    all
}
