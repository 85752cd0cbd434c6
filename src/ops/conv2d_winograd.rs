//! 3×3 convolution of stride 1 by Winograd's minimal algorithm F(4×4, 3×3): a quarter of the multiplications, as 36 matrix
//! products between two changes of basis. In f32 its error is some ten times a direct sum's, still 1e-6 of the largest value.

use super::conv2d::{Geometry, Mode};
use super::matmul::{MatmulOptions, matmul, window};
use super::rows::{self, Form, RowsParams};
use super::{dispatch_work, linear_groups};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

/// Products of a pair of channels that replace the 144 of an output tile, and the tile's side.
const POINTS: usize = 36;
const SIDE: usize = 4;

/// Tiles from which it pays: the weight is taken to the points anew each time, 36 values for 9.
const LEAST_TILES: usize = 16;

/// Channels of the image read from which it pays: those of fewer are short, and summed directly more exactly.
const LEAST_CHANNELS: usize = 64;

/// Bytes of the weight at its points at a time on CPU drivers: what a product reads should not have gone to memory.
const CPU_SLICE: usize = 16 << 20;

#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    count: u32,
    quads: u32,
    source_start: u32,
    target_start: u32,
    tiles_x: u32,
    tiles_y: u32,
    tiles: u32,
    height: i32,
    width: i32,
    pixel: u32,
    pad_top: i32,
    pad_left: i32,
    rows: u32,
    panel: u32,
    ci: u32,
    co: u32,
    turned: u32,
    first: u32,
    has_bias: u32,
}

/// What is read and written, seen from the tiles.
struct Tiles {
    /// Height, width and channels of the image read, and of the image written.
    from: [usize; 3],
    to: [usize; 3],
    /// First elements of both.
    starts: [usize; 2],
    pad: [isize; 2],
    across: usize,
    down: usize,
    all: usize,
}

impl Tiles {
    fn new(mode: Mode, g: &Geometry) -> Tiles {
        let turned = mode == Mode::Input;
        let (from, to, starts, pad) = match turned {
            true => (
                g.output,
                g.input,
                [g.y_start, g.x_start],
                [2 - g.pad_top, 2 - g.pad_left],
            ),
            false => (
                g.input,
                g.output,
                [g.x_start, g.y_start],
                [g.pad_top, g.pad_left],
            ),
        };
        let (across, down) = (to[1].div_ceil(SIDE), to[0].div_ceil(SIDE));
        Tiles {
            from,
            to,
            starts,
            pad,
            across,
            down,
            all: g.batch * across * down,
        }
    }
}

/// Whether the convolution is of the kind at all.
pub(super) fn serves(mode: Mode, g: &Geometry) -> bool {
    mode != Mode::Weight
        && g.kernel == [3, 3]
        && g.stride == 1
        && [g.input[2], g.output[2]]
            .iter()
            .all(|c| c.is_multiple_of(4) && *c > 0)
}

/// Whether it may stand in for the direct sum.
pub(super) fn replaces(mode: Mode, g: &Geometry) -> bool {
    serves(mode, g) && Tiles::new(mode, g).from[2] >= LEAST_CHANNELS
}

/// Whether it should be faster than the direct sum. Matrix units multiply f16 faster than this saves.
pub(super) fn pays(mode: Mode, g: &Geometry, x: &Tensor) -> bool {
    replaces(mode, g)
        && (x.gpu().tier().cpu || x.dtype() == DType::F32)
        && Tiles::new(mode, g).all >= LEAST_TILES
}

/// Bytes of the largest temporary that grows with the band: either image at its points.
pub(super) fn temporary_bytes(mode: Mode, g: &Geometry) -> usize {
    let t = Tiles::new(mode, g);
    POINTS * t.all * t.from[2].max(t.to[2]) * 4
}

/// The kernel of a stage; types of what it reads and writes.
fn kernel(stage: i32, cpu: bool, from: DType, to: DType) -> Kernel {
    Kernel::new("conv2d_winograd")
        .def("STAGE", stage)
        .def("WG", if cpu { 8 } else { 64 })
        .flag("F16", [from, to].contains(&DType::F16))
        .flag("S_F16", from == DType::F16)
        .flag("S_BF16", from == DType::Bf16)
        .flag("T_F16", to == DType::F16)
}

/// Records one band of the forward pass or the input gradient: `[image, weight, result]`.
pub(super) fn launch(mode: Mode, g: &Geometry, [x, w, y]: [&Tensor; 3], bias: Option<&Tensor>) {
    let t = Tiles::new(mode, g);
    let (gpu, cpu) = (x.gpu(), x.gpu().tier().cpu);
    let span = |side: &[usize; 3]| g.batch * side.iter().product::<usize>();
    let (x, x_start) = window(x, t.starts[0], span(&t.from));
    let (y, y_start) = window(y, t.starts[1], span(&t.to));
    let [k, n] = [t.from[2], t.to[2]];
    let turned = mode == Mode::Input;
    let run = |stage: i32, [from, to]: [&Tensor; 2], params: Params| {
        let kernel = kernel(stage, cpu, from.dtype(), to.dtype());
        let wg = if cpu { 8 } else { 64 };
        let params = Params {
            tiles_x: t.across as u32,
            tiles_y: t.down as u32,
            tiles: t.all as u32,
            has_bias: bias.is_some().into(),
            ..params
        };
        let work = 16 * POINTS as u64 * u64::from(params.count);
        let groups = linear_groups(params.count as usize, wg);
        dispatch_work(
            &kernel,
            &[from, to, bias.unwrap_or(from)],
            &params,
            groups,
            work,
        );
    };
    let image = Tensor::empty(gpu, DType::F32, &[POINTS, t.all, k]);
    run(
        0,
        [&x, &image],
        Params {
            count: (t.all * k / 4) as u32,
            quads: (k / 4) as u32,
            source_start: (x_start / 4) as u32,
            height: t.from[0] as i32,
            width: t.from[1] as i32,
            pixel: (k / 4) as u32,
            pad_top: t.pad[0] as i32,
            pad_left: t.pad[1] as i32,
            ..Params::default()
        },
    );
    // As many columns at a time as the weight at its points has room for.
    let limit = rows::pack_limit(&x).min(if cpu { CPU_SLICE } else { usize::MAX });
    let room = (limit / (POINTS * k * 4)).max(1);
    let chunks = n.div_ceil(room);
    let chunk = n.div_ceil(chunks).next_multiple_of(rows::TILE[1]);
    for first in (0..n).step_by(chunk) {
        let columns = chunk.min(n - first);
        let width = if cpu { rows::TILE[1] } else { columns };
        let panels = columns.div_ceil(width);
        let weight = Tensor::empty(gpu, DType::F32, &[POINTS, panels * k, width]);
        run(
            1,
            [w, &weight],
            Params {
                // Rows in eights where they lie side by side.
                count: (k.next_multiple_of(if turned { 8 } else { 1 }) * columns / 4) as u32,
                quads: (columns / 4) as u32,
                rows: k as u32,
                panel: (width / 4) as u32,
                ci: g.input[2] as u32,
                co: g.output[2] as u32,
                turned: turned.into(),
                first: first as u32,
                ..Params::default()
            },
        );
        let sums = match cpu {
            true => products(&image, &weight, columns),
            false => matmul(&image, &weight, &MatmulOptions::default()),
        };
        run(
            2,
            [&sums, &y],
            Params {
                count: (t.all * columns / 4) as u32,
                quads: (columns / 4) as u32,
                target_start: (y_start / 4) as u32,
                height: t.to[0] as i32,
                width: t.to[1] as i32,
                pixel: (n / 4) as u32,
                first: first as u32,
                ..Params::default()
            },
        );
    }
}

/// `image` [36, tiles, k] by the panels of `weight` [36, panels · k, 32]: [36, tiles, columns].
fn products(image: &Tensor, weight: &Tensor, columns: usize) -> Tensor {
    let [tiles, k] = [image.dim(1), image.dim(2)];
    let sums = Tensor::empty(image.gpu(), DType::F32, &[POINTS, tiles, columns]);
    let params = RowsParams {
        m: tiles as u32,
        n: columns as u32,
        k: k as u32,
        splits: 1,
        a_batch: (tiles * k / 4) as u32,
        stride_x: (k / 4) as u32,
        segments: 1,
        segment: k as u32,
        b_batch: (weight.dim(1) * rows::TILE[1] / 4) as u32,
        b_row: (rows::TILE[1] / 4) as u32,
        b_panel: (k * rows::TILE[1] / 4) as u32,
        ldc: columns as u32,
        c_batch: (tiles * columns) as u32,
        ..RowsParams::default()
    };
    rows::product(
        Form::Plain,
        [image, weight, &sums],
        None,
        None,
        &params,
        POINTS,
    );
    sums
}

/// All kernels of this file.
pub(super) fn variants() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for cpu in [true, false] {
        for dtype in [DType::F32, DType::F16] {
            kernels.push(kernel(0, cpu, dtype, DType::F32));
            kernels.push(kernel(1, cpu, dtype, DType::F32));
            kernels.push(kernel(2, cpu, DType::F32, dtype));
        }
        kernels.push(kernel(1, cpu, DType::Bf16, DType::F32));
    }
    kernels
}
