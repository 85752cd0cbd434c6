//! Convolution to few output channels on drivers that run on the CPU, whose product has tiles of 32 columns: one product of
//! all taps' weights, as rows, by the pixels, as columns; then each output pixel sums what its taps gave elsewhere.

use super::conv2d::{Geometry, Mode};
use super::matmul::{MatmulOptions, matmul, window};
use super::rows::{self, Strided};
use super::{THREADS, dispatch};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

/// Output channels up to which it is faster than a quarter of the multiplications in tiles that are an eighth full.
const MOST_OUTPUTS: usize = 4;

/// Input channels from which the product outweighs writing and reading its result.
const LEAST_INPUTS: usize = 64;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    pixels: u32,
    height: i32,
    width: i32,
    rows: u32,
    row: u32,
    channels: u32,
    kernel_h: u32,
    kernel_w: u32,
    pad_top: i32,
    pad_left: i32,
    start: u32,
    has_bias: u32,
}

/// Whether the convolution is of the kind at all.
pub(super) fn serves(mode: Mode, g: &Geometry) -> bool {
    mode == Mode::Forward && g.stride == 1 && g.input[2].is_multiple_of(4)
}

/// Whether it should be faster than the other ways.
pub(super) fn pays(mode: Mode, g: &Geometry, x: &Tensor) -> bool {
    serves(mode, g)
        && x.gpu().tier().cpu
        && g.output[2] <= MOST_OUTPUTS
        && g.input[2] >= LEAST_INPUTS
}

/// Bytes of the largest temporary: the product.
pub(super) fn temporary_bytes(g: &Geometry) -> usize {
    4 * g.taps() * g.output[2] * g.batch * g.input[0] * g.input[1]
}

fn kernel(y: DType) -> Kernel {
    Kernel::new("conv2d_narrow").flag("F16", y == DType::F16)
}

/// Records one band of the forward pass: `[image, weight, result]`.
pub(super) fn launch(g: &Geometry, [x, w, y]: [&Tensor; 3], bias: Option<&Tensor>) {
    let ([height, width, ci], [rows, columns, co]) = (g.input, g.output);
    let pixels = g.batch * height * width;
    let taps = rows::padded_rows(
        w,
        &Strided {
            batch: 1,
            blocks: g.taps(),
            rows: co,
            columns: ci,
            reversed: false,
            start: 0,
            batch_stride: 0,
            block_stride: ci * co,
            row_stride: 1,
            column_stride: co,
        },
        ci.next_multiple_of(4),
    );
    let image = x.reshape(&[x.elements() / ci, ci]);
    let image = image.narrow(g.x_start / ci, pixels);
    let options = MatmulOptions {
        trans_b: true,
        ..MatmulOptions::default()
    };
    let products = matmul(&taps.reshape(&[g.taps() * co, ci]), &image, &options);
    let (y, start) = window(y, g.y_start, g.batch * rows * columns * co);
    let params = Params {
        pixels: pixels as u32,
        height: height as i32,
        width: width as i32,
        rows: rows as u32,
        row: (columns * co) as u32,
        channels: co as u32,
        kernel_h: g.kernel[0] as u32,
        kernel_w: g.kernel[1] as u32,
        pad_top: g.pad_top as i32,
        pad_left: g.pad_left as i32,
        start: start as u32,
        has_bias: bias.is_some().into(),
    };
    let groups = [
        (columns * co).div_ceil(THREADS as usize) as u32,
        rows as u32,
        g.batch as u32,
    ];
    dispatch(
        &kernel(y.dtype()),
        &[&products, &y, bias.unwrap_or(&products)],
        &params,
        groups,
    );
}

/// All kernels of this file.
pub(super) fn variants() -> Vec<Kernel> {
    [DType::F32, DType::F16].map(kernel).to_vec()
}
