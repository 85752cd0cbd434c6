//! 2-D convolution, channels last, as an implicit matrix product.

use super::matmul::{Cooperative, MatmulOptions, matmul, reduce, window};
use super::permute::permute;
use super::{
    conv2d_cooperative, conv2d_narrow, conv2d_phases, conv2d_rows, conv2d_winograd, dispatch_work,
    is_f16, rows,
};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

/// Stride and zero padding of a convolution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2dOptions {
    /// Step between output pixels, both ways.
    pub stride: usize,
    /// Zeros around the image: top, bottom, left, right. Stable Diffusion's VAE pads (0, 1, 0, 1).
    pub padding: [usize; 4],
}

impl Default for Conv2dOptions {
    fn default() -> Conv2dOptions {
        Conv2dOptions {
            stride: 1,
            padding: [0; 4],
        }
    }
}

impl Conv2dOptions {
    /// Stride `stride` and the same padding on all four sides.
    pub fn new(stride: usize, padding: usize) -> Conv2dOptions {
        Conv2dOptions {
            stride,
            padding: [padding; 4],
        }
    }
}

/// Kernel families of the convolutions; the tier chooses unless a test forces one.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Shared-memory tile of 16·PER squared, for GPUs.
    Tile(u32),
    /// Padded image and register tiles, for drivers that run on the CPU.
    Rows,
    /// Matrix units; the tile where they cannot.
    Cooperative(Cooperative),
    /// The tier's own of the three above.
    Direct,
    /// A quarter of the multiplications, for 3×3 at stride 1; else the tier's own.
    Winograd,
    /// One product of all taps, for few output channels at stride 1; else the tier's own.
    Narrow,
}

/// What a test may force: the kernel family, and the bytes from which images are cut into bands.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Force {
    /// Kernel family; the tier chooses when `None`.
    pub variant: Option<Variant>,
    /// Bytes of a band of either side at the most.
    pub band_bytes: Option<usize>,
}

impl Force {
    pub(super) fn any(&self) -> bool {
        self.variant.is_some() || self.band_bytes.is_some()
    }
}

/// Which of the three products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Forward = 0,
    Input = 1,
    Weight = 2,
}

/// Sizes of one convolution, or of a band of its rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Geometry {
    pub batch: usize,
    /// Input rows, columns, channels.
    pub input: [usize; 3],
    /// Output rows, columns, channels.
    pub output: [usize; 3],
    pub kernel: [usize; 2],
    pub stride: usize,
    pub pad_top: isize,
    pub pad_left: isize,
    /// First elements of the input, and of the output.
    pub x_start: usize,
    pub y_start: usize,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    m: u32,
    n: u32,
    k: u32,
    src_h: i32,
    src_w: i32,
    dst_h: u32,
    dst_w: u32,
    channels: u32,
    kernel_w: u32,
    stride: i32,
    pad_top: i32,
    pad_left: i32,
    x_start: u32,
    b_start: u32,
    y_start: u32,
    splits: u32,
    k_part: u32,
    ci: u32,
    co: u32,
    has_bias: u32,
}

/// FLOPs of one dispatch at the most on a GPU, far below any watchdog.
const DISPATCH_FLOPS: usize = 200_000_000_000;

/// Bytes that the partial sums of a weight gradient may take.
const PARTS_BYTES: usize = 64 << 20;

impl Geometry {
    fn new(x: &[usize], kernel: [usize; 4], o: &Conv2dOptions) -> Geometry {
        let [batch, h, w, ci] = *x else {
            panic!("conv2d: input {x:?} is not [batch, height, width, channels]")
        };
        let [kh, kw, kernel_ci, co] = kernel;
        let [top, bottom, left, right] = o.padding;
        assert!(
            ci == kernel_ci && h + top + bottom >= kh && w + left + right >= kw && o.stride > 0,
            "conv2d: input {x:?}, weight {kernel:?}, {o:?}"
        );
        Geometry {
            batch,
            input: [h, w, ci],
            output: [
                (h + top + bottom - kh) / o.stride + 1,
                (w + left + right - kw) / o.stride + 1,
                co,
            ],
            kernel: [kh, kw],
            stride: o.stride,
            pad_top: top as isize,
            pad_left: left as isize,
            x_start: 0,
            y_start: 0,
        }
    }

    fn output_shape(&self) -> [usize; 4] {
        let [h, w, c] = self.output;
        [self.batch, h, w, c]
    }

    pub fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    pub(super) fn flops(&self) -> usize {
        2 * self.batch * self.output.iter().product::<usize>() * self.taps() * self.input[2]
    }

    /// A 1×1 convolution of every pixel is a plain matrix product.
    fn is_product(&self) -> bool {
        self.kernel == [1, 1] && self.stride == 1 && self.input[..2] == self.output[..2]
    }

    /// Images `first .. first + count`.
    pub(super) fn images(&self, first: usize, count: usize) -> Geometry {
        Geometry {
            batch: count,
            x_start: self.x_start + first * self.input.iter().product::<usize>(),
            y_start: self.y_start + first * self.output.iter().product::<usize>(),
            ..*self
        }
    }

    /// Rows `first .. first + count` of a single image's result, with the rows of the other side
    /// that they touch: result is the input for [`Mode::Input`], else the output.
    pub(super) fn rows(&self, mode: Mode, first: usize, count: usize) -> Geometry {
        let (s, k) = (self.stride as isize, self.kernel[0] as isize);
        let (lo, hi) = (first as isize, (first + count) as isize);
        let x_row = self.input[1] * self.input[2];
        let y_row = self.output[1] * self.output[2];
        let clip = |v: isize, end: usize| v.clamp(0, end as isize);
        let (x_lo, x_hi, y_lo, y_hi) = if mode == Mode::Input {
            let from = (lo + self.pad_top - (k - 1) + s - 1).div_euclid(s);
            let to = (hi - 1 + self.pad_top).div_euclid(s) + 1;
            let (from, to) = (clip(from, self.output[0]), clip(to, self.output[0]));
            (lo, hi, from, to.max(from))
        } else {
            let from = clip(lo * s - self.pad_top, self.input[0]);
            let to = clip((hi - 1) * s - self.pad_top + k, self.input[0]);
            (from, to.max(from), lo, hi)
        };
        Geometry {
            input: [(x_hi - x_lo) as usize, self.input[1], self.input[2]],
            output: [(y_hi - y_lo) as usize, self.output[1], self.output[2]],
            // In the band y = oy·stride + ky − pad still holds, both counted from their first rows.
            pad_top: self.pad_top + x_lo - y_lo * s,
            x_start: self.x_start + x_lo as usize * x_row,
            y_start: self.y_start + y_lo as usize * y_row,
            ..*self
        }
    }
}

/// Cuts the convolution into whole images or bands of rows that fit a binding and a dispatch.
fn pieces(mode: Mode, g: Geometry, x: &Tensor, y: &Tensor, force: &Force) -> Vec<Geometry> {
    let tier = x.gpu().tier();
    let limit = force.band_bytes.unwrap_or(tier.max_binding as usize - 512);
    let over = |t: &Tensor, side: &[usize; 3]| {
        g.batch * side.iter().product::<usize>() * t.dtype().bytes() > limit
    };
    let long = !tier.cpu && g.flops() > DISPATCH_FLOPS;
    let variant = force.variant(mode, &g, x);
    let many = variant == Some(Variant::Rows) && !conv2d_rows::within_a_dispatch(mode, &g);
    let temporary = match variant {
        Some(Variant::Rows) => conv2d_rows::temporary_bytes(mode, &g),
        Some(Variant::Winograd) => conv2d_winograd::temporary_bytes(mode, &g),
        Some(Variant::Narrow) => conv2d_narrow::temporary_bytes(&g),
        _ => 0,
    };
    let packed = temporary > rows::pack_limit(x).min(limit);
    let height = if mode == Mode::Input {
        g.input[0]
    } else {
        g.output[0]
    };
    let fits = !(over(x, &g.input) || over(y, &g.output) || long || packed || many);
    if fits || g.batch * height <= 1 {
        return vec![g];
    }
    let (first, second) = if g.batch > 1 {
        let first = g.batch / 2;
        (g.images(0, first), g.images(first, g.batch - first))
    } else {
        let first = height / 2;
        (g.rows(mode, 0, first), g.rows(mode, first, height - first))
    };
    let mut cut = pieces(mode, first, x, y, force);
    cut.extend(pieces(mode, second, x, y, force));
    cut
}

fn weight_shape(w: &Tensor) -> [usize; 4] {
    match *w.shape() {
        [kh, kw, ci, co] => [kh, kw, ci, co],
        ref other => panic!("conv2d: weight {other:?} is not [kh, kw, in, out]"),
    }
}

/// Convolution of `x` [batch, height, width, in] (F32 or F16) with `w` [kh, kw, in, out] (F32, F16
/// or Bf16), plus `bias` f32 `[out]`: [batch, rows, columns, out] in `x`'s dtype; sums are f32.
pub fn conv2d(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, options: &Conv2dOptions) -> Tensor {
    conv2d_with(&Force::default(), x, w, bias, options)
}

/// [`conv2d`] by a given kernel family.
#[doc(hidden)]
pub fn conv2d_with(
    force: &Force,
    x: &Tensor,
    w: &Tensor,
    bias: Option<&Tensor>,
    options: &Conv2dOptions,
) -> Tensor {
    let g = Geometry::new(x.shape(), weight_shape(w), options);
    is_f16("conv2d", x);
    if let Some(bias) = bias {
        assert!(
            bias.dtype() == DType::F32 && bias.shape() == [g.output[2]],
            "conv2d: bias {bias:?} for weight {w:?}"
        );
    }
    if g.is_product() && !force.any() {
        let w = w.reshape(&[g.input[2], g.output[2]]);
        let product = MatmulOptions {
            bias,
            ..MatmulOptions::default()
        };
        return matmul(x, &w, &product);
    }
    let y = Tensor::empty(x.gpu(), x.dtype(), &g.output_shape());
    run(force, Mode::Forward, g, [x, w, &y], bias);
    y
}

/// Records the forward pass or the input gradient, `[unfolded, weight, result]`, in as many bands as it takes.
pub(super) fn run(
    force: &Force,
    mode: Mode,
    g: Geometry,
    [x, w, y]: [&Tensor; 3],
    bias: Option<&Tensor>,
) {
    let (input, output) = match mode {
        Mode::Input => (y, x),
        _ => (x, y),
    };
    let record = |force: &Force, g: &Geometry| {
        for band in &pieces(mode, *g, input, output, force) {
            launch(force, mode, band, [x, w, y], bias, 1, 0);
        }
    };
    record(&force.measured(mode, &g, x, &record), &g);
}

/// Gradient of [`conv2d`] in its input, of shape `x_shape` and `dy`'s dtype.
pub fn conv2d_grad_input(
    dy: &Tensor,
    w: &Tensor,
    x_shape: &[usize],
    options: &Conv2dOptions,
) -> Tensor {
    conv2d_grad_input_with(&Force::default(), dy, w, x_shape, options)
}

/// [`conv2d_grad_input`] by a given kernel family.
#[doc(hidden)]
pub fn conv2d_grad_input_with(
    force: &Force,
    dy: &Tensor,
    w: &Tensor,
    x_shape: &[usize],
    options: &Conv2dOptions,
) -> Tensor {
    let g = Geometry::new(x_shape, weight_shape(w), options);
    assert_eq!(
        dy.shape(),
        g.output_shape(),
        "conv2d_grad_input: dy for input {x_shape:?}"
    );
    is_f16("conv2d_grad_input", dy);
    if g.is_product() && !force.any() {
        let w = w.reshape(&[g.input[2], g.output[2]]);
        let product = MatmulOptions {
            trans_b: true,
            ..MatmulOptions::default()
        };
        return matmul(dy, &w, &product);
    }
    if let Some(dx) = conv2d_phases::grad_input(force, dy, w, &g, options) {
        return dx;
    }
    let dx = Tensor::empty(dy.gpu(), dy.dtype(), x_shape);
    run(force, Mode::Input, g, [dy, w, &dx], None);
    dx
}

/// Gradient of [`conv2d`] in its weight: f32 [kh, kw, in, out].
///
/// The sum over pixels is cut into parts that are added in order: the same bits every time.
pub fn conv2d_grad_weight(
    x: &Tensor,
    dy: &Tensor,
    kh: usize,
    kw: usize,
    options: &Conv2dOptions,
) -> Tensor {
    conv2d_grad_weight_with(&Force::default(), x, dy, kh, kw, options)
}

/// [`conv2d_grad_weight`] by a given kernel family.
#[doc(hidden)]
pub fn conv2d_grad_weight_with(
    force: &Force,
    x: &Tensor,
    dy: &Tensor,
    kh: usize,
    kw: usize,
    options: &Conv2dOptions,
) -> Tensor {
    let shape = [kh, kw, x.last_dim(), dy.last_dim()];
    let g = Geometry::new(x.shape(), shape, options);
    assert_eq!(
        dy.shape(),
        g.output_shape(),
        "conv2d_grad_weight: dy for input {x:?}"
    );
    is_f16("conv2d_grad_weight", x);
    is_f16("conv2d_grad_weight", dy);
    let [rows, columns] = [g.taps() * g.input[2], g.output[2]];
    if g.is_product() && !force.any() {
        let pixels = x.elements() / g.input[2];
        let product = MatmulOptions {
            trans_a: true,
            output: Some(DType::F32),
            ..MatmulOptions::default()
        };
        let x = x.reshape(&[pixels, g.input[2]]);
        let dw = matmul(&x, &dy.reshape(&[pixels, columns]), &product);
        return dw.reshape(&shape);
    }
    let bands = pieces(Mode::Weight, g, x, dy, force);
    let variant = force.variant(Mode::Weight, &g, x);
    // Channels of dy before those of x where that product fills its tiles better.
    let swapped = variant == Some(Variant::Rows) && conv2d_rows::WeightProduct::new(&g).swapped;
    let shape = match swapped {
        true => [kh, kw, dy.last_dim(), x.last_dim()],
        false => shape,
    };
    let dw = Tensor::empty(x.gpu(), DType::F32, &shape);
    let splits = splits(variant, &bands, rows, columns);
    if bands.len() == 1 && splits == 1 {
        launch(force, Mode::Weight, &bands[0], [x, dy, &dw], None, 1, 0);
    } else {
        let parts = bands.len() * splits;
        let sums = Tensor::empty(x.gpu(), DType::F32, &[parts, rows, columns]);
        for (i, band) in bands.iter().enumerate() {
            let at = i * splits * rows * columns;
            launch(force, Mode::Weight, band, [x, dy, &sums], None, splits, at);
        }
        reduce(&sums, &dw, parts, &MatmulOptions::default());
    }
    match swapped {
        true => permute(&dw, &[0, 1, 3, 2]),
        false => dw,
    }
}

/// Parts that each band's sum over pixels is cut into, to occupy the device.
fn splits(variant: Option<Variant>, bands: &[Geometry], rows: usize, columns: usize) -> usize {
    let room = PARTS_BYTES / (4 * rows * columns * bands.len());
    let wanted = if variant == Some(Variant::Rows) {
        conv2d_rows::splits(&bands[0])
    } else {
        let groups = rows.div_ceil(64) * columns.div_ceil(64);
        let pixels = bands[0].batch * bands[0].output[0] * bands[0].output[1];
        (256 / groups).min(pixels / 256).min(64)
    };
    wanted.min(room).max(1)
}

fn tile(per: u32, mode: Mode, [x, b, y]: [DType; 3]) -> Kernel {
    Kernel::new("conv2d_tile")
        .def("PER", per as i32)
        .def("MODE", mode as i32)
        .flag("F16", [x, b, y].contains(&DType::F16))
        .flag("X_F16", x == DType::F16)
        .flag("B_F16", b == DType::F16)
        .flag("B_BF16", b == DType::Bf16)
        .flag("Y_F16", y == DType::F16)
}

/// Records one band: `[unfolded, weight or dy, result]`, the result from element `at` for partial sums.
fn launch(
    force: &Force,
    mode: Mode,
    g: &Geometry,
    [x, b, y]: [&Tensor; 3],
    bias: Option<&Tensor>,
    splits: usize,
    at: usize,
) {
    let pixels = |side: &[usize; 3]| g.batch * side[0] * side[1];
    let [x_span, y_span] = [&g.input, &g.output].map(|s| g.batch * s.iter().product::<usize>());
    let (m, n, k) = match mode {
        Mode::Forward => (pixels(&g.output), g.output[2], g.taps() * g.input[2]),
        Mode::Input => (pixels(&g.input), g.input[2], g.taps() * g.output[2]),
        Mode::Weight => (g.taps() * g.input[2], g.output[2], pixels(&g.output)),
    };
    if m * n == 0 {
        return;
    }
    let variant = force.variant(mode, g, x);
    match variant {
        Some(Variant::Rows) if mode == Mode::Weight => {
            return conv2d_rows::launch_weight(g, [x, b, y], splits, at);
        }
        Some(Variant::Rows) => return conv2d_rows::launch(mode, g, [x, b, y], bias),
        Some(Variant::Winograd) => return conv2d_winograd::launch(mode, g, [x, b, y], bias),
        Some(Variant::Narrow) => return conv2d_narrow::launch(g, [x, b, y], bias),
        _ => {}
    }
    let ((x, x_start), (b, b_start), (y, y_start)) = match mode {
        Mode::Forward => (
            window(x, g.x_start, x_span),
            (b.clone(), 0),
            window(y, g.y_start, y_span),
        ),
        Mode::Input => (
            window(x, g.y_start, y_span),
            (b.clone(), 0),
            window(y, g.x_start, x_span),
        ),
        Mode::Weight => (
            window(x, g.x_start, x_span),
            window(b, g.y_start, y_span),
            (y.clone(), at),
        ),
    };
    let (src, dst) = match mode {
        Mode::Input => (g.output, g.input),
        _ => (g.input, g.output),
    };
    let (channels, dtypes) = ([g.input[2], g.output[2]], [x.dtype(), b.dtype(), y.dtype()]);
    let cooperative = match variant {
        Some(Variant::Cooperative(shape)) => {
            conv2d_cooperative::serves(shape, x.gpu(), mode, channels, dtypes).then_some(shape)
        }
        Some(_) => None,
        None => conv2d_cooperative::choose(x.gpu(), mode, channels, dtypes, [m, n, splits]),
    };
    let groups = m.div_ceil(128) * n.div_ceil(128) * splits;
    let per = match variant {
        Some(Variant::Tile(per)) => per,
        _ if groups >= 128 => 8,
        _ => 4,
    };
    let (kernel, side, step) = match cooperative {
        Some(shape) => (
            conv2d_cooperative::kernel(shape, x.gpu().tier(), mode, dtypes),
            shape.tile(),
            shape.step(),
        ),
        None => (tile(per, mode, dtypes), 16 * per as usize, 16),
    };
    let params = Params {
        m: m as u32,
        n: n as u32,
        k: k as u32,
        src_h: src[0] as i32,
        src_w: src[1] as i32,
        dst_h: dst[0] as u32,
        dst_w: dst[1] as u32,
        channels: src[2] as u32,
        kernel_w: g.kernel[1] as u32,
        stride: g.stride as i32,
        pad_top: g.pad_top as i32,
        pad_left: g.pad_left as i32,
        x_start: x_start as u32,
        b_start: b_start as u32,
        y_start: y_start as u32,
        splits: splits as u32,
        k_part: k.div_ceil(splits).next_multiple_of(step) as u32,
        ci: g.input[2] as u32,
        co: g.output[2] as u32,
        has_bias: bias.is_some().into(),
    };
    dispatch_work(
        &kernel,
        &[&x, &b, &y, bias.unwrap_or(&x)],
        &params,
        [
            n.div_ceil(side) as u32,
            m.div_ceil(side) as u32,
            splits as u32,
        ],
        g.flops() as u64,
    );
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut kernels = conv2d_rows::variants();
    kernels.extend(conv2d_cooperative::variants());
    kernels.extend(conv2d_winograd::variants());
    kernels.extend(conv2d_narrow::variants());
    let float = [DType::F32, DType::F16];
    for per in [4, 8] {
        for x in float {
            for b in [DType::F32, DType::F16, DType::Bf16] {
                for mode in [Mode::Forward, Mode::Input] {
                    kernels.push(tile(per, mode, [x, b, x]));
                }
                if b != DType::Bf16 {
                    kernels.push(tile(per, Mode::Weight, [x, b, DType::F32]));
                }
            }
        }
    }
    kernels
}
