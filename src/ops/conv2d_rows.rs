//! Convolution on drivers that run on the CPU: the zero padding is written out, after which every
//! product of a convolution is a strided product of `matmul_rows`.

use super::conv2d::{Geometry, Mode};
use super::matmul::{limit, window};
use super::rows::{self, Form, RowsParams, Strided};
use super::{MAX_GROUPS, dispatch_work};
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

/// Bytes of the largest temporary that [`launch`] or [`launch_weight`] makes for this band.
pub(super) fn temporary_bytes(mode: Mode, g: &Geometry) -> usize {
    if mode != Mode::Weight {
        return g.batch * padded(mode, g).iter().product::<usize>() * 4;
    }
    let (mode, [lines, across, columns]) = match WeightProduct::new(g).swapped {
        true => (Mode::Input, g.input),
        false => (Mode::Weight, g.output),
    };
    let [height, width, channels] = padded(mode, g);
    let views = g.kernel[1] * across.next_multiple_of(4);
    let image = 4 * g.batch * height * channels * views.max(width);
    image.max(rows::panel_bytes(g.batch * lines, across, columns))
}

/// Whether a dispatch has a workgroup for each line that is written out.
pub(super) fn within_a_dispatch(mode: Mode, g: &Geometry) -> bool {
    if mode != Mode::Weight {
        return true;
    }
    let mode = match WeightProduct::new(g).swapped {
        true => Mode::Input,
        false => Mode::Weight,
    };
    g.kernel[1] * g.batch * padded(mode, g)[0] <= MAX_GROUPS as usize
}

/// Pixels that a weight gradient adds up in one sum: a chain of many thousand rounds more than the sum of its parts.
const LONGEST_SUM: usize = 1024;

/// Parts that each band's sum over pixels is cut into for a weight gradient.
pub(super) fn splits(g: &Geometry) -> usize {
    let product = WeightProduct::new(g);
    let groups = product.rows.div_ceil(rows::TILE[0]) * product.columns.div_ceil(rows::TILE[1]);
    let lines = g.batch
        * if product.swapped {
            g.input[0]
        } else {
            g.output[0]
        };
    let pixels = lines * g.output[1];
    rows::splits(groups, pixels)
        .max(pixels.div_ceil(LONGEST_SUM))
        .min(lines)
        .max(1)
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
    rows::product(Form::Image, [&source, &b, &c], bias, None, &params, 1);
}

/// A weight gradient as one product over the pixels that the band's lines have: [taps · channels, pixels] of one image as
/// each tap sees it, by [pixels, channels] of the other. It is transposed once for each tap of a kernel row, so that a
/// channel's pixels lie side by side; the taps of a column are lines apart.
pub(super) struct WeightProduct {
    /// Rows are those of dy and columns those of x: with few output channels a tile of columns would be mostly empty.
    pub swapped: bool,
    pub rows: usize,
    pub columns: usize,
}

impl WeightProduct {
    pub fn new(g: &Geometry) -> WeightProduct {
        let (ci, co) = (g.input[2], g.output[2]);
        let [row_tile, column_tile] = rows::TILE;
        let tiles = |m: usize, n: usize| m.div_ceil(row_tile) * n.div_ceil(column_tile);
        let taps = g.taps();
        let swapped = g.stride == 1 && 2 * tiles(taps * co, ci) < tiles(taps * ci, co);
        let (rows, columns) = if swapped { (co, ci) } else { (ci, co) };
        WeightProduct {
            swapped,
            rows: taps * rows,
            columns,
        }
    }
}

/// Records one band of the weight gradient: `splits` partial sums of its [`WeightProduct`] into `sums` from element `at`.
pub(super) fn launch_weight(g: &Geometry, [x, dy, sums]: [&Tensor; 3], splits: usize, at: usize) {
    let product = WeightProduct::new(g);
    let (mode, from, other, other_start, [lines, across, columns]) = match product.swapped {
        true => (Mode::Input, dy, x, g.x_start, g.input),
        false => (Mode::Weight, x, dy, g.y_start, g.output),
    };
    let (source, start, [height, width, padded_channels]) = image(mode, g, from);
    let [kh, kw] = g.kernel;
    let channels = product.rows / g.taps();
    let line = across.next_multiple_of(4);
    // One row of an image, of one view, in vec4s.
    let row = channels * line / 4;
    let seen = rows::padded_rows(
        &source,
        &Strided {
            batch: kw,
            blocks: g.batch * height,
            rows: channels,
            columns: across,
            reversed: false,
            start,
            batch_stride: padded_channels,
            block_stride: width * padded_channels,
            row_stride: 1,
            column_stride: g.stride * padded_channels,
        },
        line,
    );
    let pixels = g.batch * lines * across;
    let (other, other_start) = window(other, other_start, pixels * columns);
    let ready = other.dtype() == DType::F32
        && [columns, other_start, across]
            .iter()
            .all(|v| v.is_multiple_of(4));
    let packs = !ready || product.rows >= rows::PACKED_ROWS && columns > rows::TILE[1];
    let (b, b_start, b_row, b_panel) = match packs {
        false => (other, other_start, columns, rows::TILE[1]),
        true => {
            let panels = rows::panels(
                &other,
                &Strided {
                    batch: 1,
                    blocks: g.batch * lines,
                    rows: across,
                    columns,
                    reversed: false,
                    start: other_start,
                    batch_stride: 0,
                    block_stride: across * columns,
                    row_stride: columns,
                    column_stride: 1,
                },
            );
            let panel = panels.dim(2) * rows::TILE[1];
            (panels, 0, rows::TILE[1], panel)
        }
    };
    let (tap_x, tap_y) = ((g.batch * height * row) as u32, row as u32);
    // dy's pixels, seen from x's, lie the other way: the last tap first.
    let (a_start, stride_y, stride_image) = match product.swapped {
        true => (
            (kw - 1) as u32 * tap_x + (kh - 1) as u32 * tap_y,
            tap_x.wrapping_neg(),
            tap_y.wrapping_neg(),
        ),
        false => (0, tap_x, tap_y),
    };
    let params = RowsParams {
        m: product.rows as u32,
        n: columns as u32,
        k: (g.batch * lines * line) as u32,
        splits: splits as u32,
        a_start,
        size_x: channels as u32,
        size_y: kw as u32,
        stride_x: (line / 4) as u32,
        stride_y,
        stride_image,
        segments: (g.batch * lines) as u32,
        segment: line as u32,
        segment_stride: (g.stride * row) as u32,
        run: lines as u32,
        run_stride: (height * row) as u32,
        b_start: (b_start / 4) as u32,
        b_row: (b_row / 4) as u32,
        b_panel: (b_panel / 4) as u32,
        ldc: columns as u32,
        c_start: at as u32,
        c_batch: (product.rows * columns) as u32,
        ..RowsParams::default()
    };
    rows::product(Form::Image, [&seen, &b, sums], None, None, &params, 1);
}

/// All kernels of this file.
pub(super) fn variants() -> Vec<Kernel> {
    vec![pad_kernel(false), pad_kernel(true)]
}
