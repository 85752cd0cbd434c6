//! Convolution on drivers that run on the CPU: the zero padding is written out, after which every
//! product of a convolution is a strided product of `matmul_rows`.

use super::conv2d::{Geometry, Mode};
use super::dispatch_work;
use super::matmul::{limit, window};
use super::rows::{self, RowsParams, Strided};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct PadParams {
    start: u32,
    src_h: i32,
    src_w: i32,
    channels: u32,
    dilation: i32,
    top: i32,
    left: i32,
    quads: u32,
    row: u32,
    rows: u32,
}

fn pad_kernel(f16: bool) -> Kernel {
    Kernel::new("conv2d_pad").flag("F16", f16)
}

/// Rows, columns and channels of the padded image that `mode` reads.
fn padded(mode: Mode, g: &Geometry) -> [usize; 3] {
    let [kh, kw] = g.kernel;
    let quads = |c: usize| c.next_multiple_of(4);
    match mode {
        Mode::Input => [g.input[0] + kh - 1, g.input[1] + kw - 1, quads(g.output[2])],
        _ => [
            (g.output[0].max(1) - 1) * g.stride + kh,
            (g.output[1].max(1) - 1) * g.stride + kw,
            quads(g.input[2]),
        ],
    }
}

/// Bytes of the largest temporary that [`launch`] makes for this band.
pub(super) fn temporary_bytes(mode: Mode, g: &Geometry) -> usize {
    let image = g.batch * padded(mode, g).iter().product::<usize>() * 4;
    let (lines, line) = (g.batch * g.output[0], g.output[1].next_multiple_of(4));
    match mode {
        Mode::Weight => image
            .max(rows::panel_bytes(lines, g.output[1], g.output[2]))
            .max(4 * lines * line * g.input[2]),
        _ => image,
    }
}

/// Parts that each band's sum over pixels is cut into for a weight gradient.
pub(super) fn splits(g: &Geometry) -> usize {
    let groups = g.input[2].div_ceil(rows::TILE[0]) * g.output[2].div_ceil(rows::TILE[1]);
    let lines = g.batch * g.output[0];
    rows::splits(groups, lines * g.output[1]).min(lines).max(1)
}

/// An image ready for vec4 reads: its tensor, first element, and [rows, columns, channels].
fn image(mode: Mode, g: &Geometry, x: &Tensor) -> (Tensor, usize, [usize; 3]) {
    let size = padded(mode, g);
    let (src, start, dilation, top, left) = match mode {
        Mode::Input => (
            g.output,
            g.y_start,
            g.stride,
            g.kernel[0] as isize - 1 - g.pad_top,
            g.kernel[1] as isize - 1 - g.pad_left,
        ),
        _ => (g.input, g.x_start, 1, g.pad_top, g.pad_left),
    };
    let span = g.batch * src.iter().product::<usize>();
    let (x, start) = window(x, start, span);
    let fits = size[0] <= src[0] && size[1] <= src[1] && size[2] == src[2];
    let plain = dilation == 1 && top == 0 && left == 0 && x.dtype() == DType::F32;
    if fits && plain && start.is_multiple_of(4) {
        return (x, start, src);
    }
    let out = Tensor::empty(x.gpu(), DType::F32, &[g.batch, size[0], size[1], size[2]]);
    let row = size[1] * size[2] / 4;
    let params = PadParams {
        start: start as u32,
        src_h: src[0] as i32,
        src_w: src[1] as i32,
        channels: src[2] as u32,
        dilation: dilation as i32,
        top: top as i32,
        left: left as i32,
        quads: (size[2] / 4) as u32,
        row: row as u32,
        rows: size[0] as u32,
    };
    dispatch_work(
        &pad_kernel(x.dtype() == DType::F16),
        &[&x, &out],
        &params,
        [row.div_ceil(64) as u32, size[0] as u32, g.batch as u32],
        4 * out.elements() as u64,
    );
    (out, 0, size)
}

/// `w` [taps, in, out] as panels of `b`, or itself where it already reads as whole vec4s and few pixels read it:
/// the tensor, its row and its panel stride.
fn weight(mode: Mode, g: &Geometry, w: &Tensor) -> (Tensor, usize, usize) {
    let (ci, co) = (g.input[2], g.output[2]);
    let ready = w.dtype() == DType::F32 && ci.is_multiple_of(4) && co.is_multiple_of(4);
    let pixels = g.batch * g.output[0] * g.output[1];
    let packed = rows::panel_bytes(g.taps(), ci, co) as u64;
    let packs = pixels >= rows::PACKED_ROWS && packed <= limit(w);
    if mode == Mode::Forward && ready && !packs {
        return (w.clone(), co, rows::TILE[1]);
    }
    // The input gradient correlates dy with the weight turned round and its channels exchanged.
    let turned = mode == Mode::Input;
    let (height, columns) = if turned { (co, ci) } else { (ci, co) };
    let (row_stride, column_stride) = if turned { (1, co) } else { (co, 1) };
    let panels = rows::panels(
        w,
        &Strided {
            batch: 1,
            blocks: g.taps(),
            rows: height,
            columns,
            reversed: turned,
            start: 0,
            batch_stride: 0,
            block_stride: ci * co,
            row_stride,
            column_stride,
        },
    );
    let k = panels.dim(2);
    (panels, rows::TILE[1], k * rows::TILE[1])
}

/// Records one band of the forward pass or the input gradient.
pub(super) fn launch(mode: Mode, g: &Geometry, [x, w, y]: [&Tensor; 3], bias: Option<&Tensor>) {
    let (source, start, [height, width, channels]) = image(mode, g, x);
    let (b, b_row, b_panel) = weight(mode, g, w);
    let (target, step, c_start) = match mode {
        Mode::Input => (g.input, 1, g.x_start),
        _ => (g.output, g.stride, g.y_start),
    };
    let m = g.batch * target[0] * target[1];
    let (c, c_start) = window(y, c_start, m * target[2]);
    let quads = channels / 4;
    let params = RowsParams {
        m: m as u32,
        n: target[2] as u32,
        k: (g.taps() * channels) as u32,
        splits: 1,
        a_start: (start / 4) as u32,
        size_x: target[1] as u32,
        size_y: target[0] as u32,
        stride_x: (step * quads) as u32,
        stride_y: (step * width * quads) as u32,
        stride_image: (height * width * quads) as u32,
        // The taps of one kernel row read consecutive elements.
        segments: g.kernel[0] as u32,
        segment: (g.kernel[1] * channels) as u32,
        segment_stride: (width * quads) as u32,
        b_row: (b_row / 4) as u32,
        b_panel: (b_panel / 4) as u32,
        ldc: target[2] as u32,
        c_start: c_start as u32,
        ..RowsParams::default()
    };
    let tiles = m.div_ceil(rows::TILE[0]);
    rows::product(false, [&source, &b, &c], bias, None, &params, tiles, 1);
}

/// Records one band of the weight gradient: `splits` partial sums into `sums` from element `at`.
///
/// A tap's part of the weight is a product over the pixels: the image as that tap sees it, transposed so that a channel's
/// pixels lie side by side, by dy.
pub(super) fn launch_weight(g: &Geometry, [x, dy, sums]: [&Tensor; 3], splits: usize, at: usize) {
    let (source, start, [height, width, channels]) = image(Mode::Weight, g, x);
    let [oh, ow, co] = g.output;
    let (lines, ci) = (g.batch * oh, g.input[2]);
    let (dy, dy_start) = window(dy, g.y_start, lines * ow * co);
    let line = ow.next_multiple_of(4);
    let b = rows::panels(
        &dy,
        &Strided {
            batch: 1,
            blocks: lines,
            rows: ow,
            columns: co,
            reversed: false,
            start: dy_start,
            batch_stride: 0,
            block_stride: ow * co,
            row_stride: co,
            column_stride: 1,
        },
    );
    for tap in 0..g.taps() {
        let (i, j) = (tap / g.kernel[1], tap % g.kernel[1]);
        let seen = rows::padded_rows(
            &source,
            &Strided {
                batch: g.batch,
                blocks: oh,
                rows: ci,
                columns: ow,
                reversed: false,
                start: start + (i * width + j) * channels,
                batch_stride: height * width * channels,
                block_stride: g.stride * width * channels,
                row_stride: 1,
                column_stride: g.stride * channels,
            },
        );
        let params = RowsParams {
            m: ci as u32,
            n: co as u32,
            k: (lines * line) as u32,
            splits: splits as u32,
            size_x: ci as u32,
            size_y: 1,
            stride_x: (line / 4) as u32,
            segments: lines as u32,
            segment: line as u32,
            segment_stride: (ci * line / 4) as u32,
            b_row: (rows::TILE[1] / 4) as u32,
            b_panel: (lines * line * rows::TILE[1] / 4) as u32,
            ldc: co as u32,
            c_start: (at + tap * ci * co) as u32,
            c_batch: (g.taps() * ci * co) as u32,
            ..RowsParams::default()
        };
        let tiles = ci.div_ceil(rows::TILE[0]);
        rows::product(false, [&seen, &b, sums], None, None, &params, tiles, 1);
    }
}

/// All kernels of this file.
pub(super) fn variants() -> Vec<Kernel> {
    vec![pad_kernel(false), pad_kernel(true)]
}
