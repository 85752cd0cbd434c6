//! The matrix product for drivers that run on the CPU, shared by matmul and conv2d: operands are
//! brought into f32 vec4 form where they are not, then `matmul_rows` multiplies them, or `matmul_short` where sums are short.

use super::{dispatch_work, matmul::limit, shared_loads, shares_loads};
use crate::gpu::Kernel;
use crate::tensor::{DType, Quantization, QuantizedMatrix, Tensor};

/// Rows and columns of `c` that a workgroup of `matmul_rows` computes, at the least.
pub(crate) const TILE: [usize; 2] = [16, 32];

/// Rows where `c` has many and loads are shared: they use what is loaded of `b` more often. Where each thread loads all of `a`
/// itself, the driver does not unroll loops over so many.
const TALL: usize = 32;

/// Rows where `c` has no more than these: a 3×3 kernel's taps for four channels.
const NARROW: usize = 36;

/// Vectors along k up to which `matmul_short` does a product, and rows that one of its workgroups goes down.
const SHORT: usize = 24;
const RUN: usize = 128;

/// Rows of `a` from which packing `b` pays: its own rows lie pages apart, or a power of two, and share a cache's few places.
pub(crate) const PACKED_ROWS: usize = 256;

/// Parameters of `wgsl/common/rows_product.wgsl`, described in `wgsl/matmul_rows.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct RowsParams {
    pub m: u32,
    pub n: u32,
    pub k: u32,
    pub splits: u32,
    pub a_start: u32,
    pub a_batch: u32,
    /// This and the next, and strides but `stride_x`: of [`Form::Image`].
    pub size_x: u32,
    pub size_y: u32,
    pub stride_x: u32,
    pub stride_y: u32,
    pub stride_image: u32,
    pub segments: u32,
    pub segment: u32,
    pub segment_stride: u32,
    /// All segments when 0.
    pub run: u32,
    pub run_stride: u32,
    pub b_start: u32,
    pub b_batch: u32,
    pub b_row: u32,
    pub b_panel: u32,
    pub ldc: u32,
    pub c_start: u32,
    pub c_batch: u32,
    pub bias_start: u32,
    pub has_bias: u32,
    pub has_residual: u32,
}

/// How the operands lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `a`'s rows are contiguous along k, `b`'s along n.
    Plain,
    /// The same, and `a`'s rows are the pixels of images.
    Image,
    /// Both are contiguous along k.
    Along,
    /// `a` is contiguous along m, `b` along n.
    Column,
    /// As [`Form::Along`], and `c` is stored transposed, without bias and residual.
    AlongTurned,
    /// As [`Form::Column`], and `c` is stored transposed, without bias and residual.
    ColumnTurned,
}

impl Form {
    fn column(self) -> bool {
        matches!(self, Form::Column | Form::ColumnTurned)
    }

    fn turned(self) -> bool {
        matches!(self, Form::AlongTurned | Form::ColumnTurned)
    }
}

/// Rows of a workgroup whose loads `lanes` threads share, for `m` in all: [`TALL`] unless their last tile is much emptier, and
/// [`NARROW`] where one tile of them holds all.
fn tile_rows(form: Form, lanes: u32, m: usize) -> usize {
    if form.column() || lanes == 1 {
        return TILE[0];
    }
    let [tall, short] = [TALL, TILE[0]].map(|rows| m.next_multiple_of(rows));
    match m {
        _ if 10 * tall <= 11 * short => TALL,
        TALL..=NARROW => NARROW,
        _ => TILE[0],
    }
}

/// The kernel of `rows` a workgroup, whose loads `lanes` threads share; `quads`: lines of `c` are whole vec4s.
pub(crate) fn kernel(form: Form, rows: usize, lanes: u32, quads: bool, c: DType) -> Kernel {
    let f16 = c == DType::F16;
    Kernel::new("matmul_rows")
        .def("ROWS", rows as i32)
        .flag("COLUMN", form.column())
        .flag("ALONG", matches!(form, Form::Along | Form::AlongTurned))
        .flag("TURNED", form.turned())
        .flag("IMAGE", form == Form::Image)
        .def("LANES", lanes as i32)
        .flag("QUADS", quads)
        .flag("F16", f16)
        .flag("C_F16", f16)
}

/// The kernel for sums of `vectors` · 4 terms, whose loads 8 threads share, where lines of `c` are whole vec4s.
fn short_kernel(form: Form, vectors: usize, residual: bool, c: DType) -> Kernel {
    let f16 = c == DType::F16;
    Kernel::new("matmul_short")
        .def("VECTORS", vectors as i32)
        .def("RUN", RUN as i32)
        .flag("ALONG", form == Form::Along)
        .flag("IMAGE", form == Form::Image)
        .def("LANES", 8)
        .flag("RESIDUAL", residual)
        .flag("F16", f16)
        .flag("C_F16", f16)
}

/// Whether sums of `k` terms over rows so formed are few enough, and `m` many enough, for `matmul_short`.
pub(crate) fn short(form: Form, m: usize, k: usize) -> bool {
    !form.column()
        && !form.turned()
        && m >= TALL
        && k.is_multiple_of(4)
        && (1..=SHORT).contains(&(k / 4))
}

/// Records the product of `batch` pairs of matrices.
pub(crate) fn product(
    form: Form,
    [a, b, c]: [&Tensor; 3],
    bias: Option<&Tensor>,
    residual: Option<&Tensor>,
    params: &RowsParams,
    batch: usize,
) {
    let m = params.m as usize;
    let quads = [
        if form.turned() { params.m } else { params.n },
        params.ldc,
        params.c_start,
        params.c_batch,
        params.bias_start,
    ]
    .iter()
    .all(|v| v.is_multiple_of(4));
    let gpu = a.gpu();
    let long_lines = form != Form::Image || params.size_x >= 8;
    let few_terms = short(form, m, params.k as usize) && params.splits == 1;
    let short = (few_terms && quads && long_lines && shares_loads(gpu))
        .then(|| short_kernel(form, params.k as usize / 4, residual.is_some(), c.dtype()))
        .filter(|kernel| gpu.compiles(kernel));
    let (kernel, rows) = match short {
        Some(kernel) => (kernel, RUN),
        None => {
            let rows = |lanes| tile_rows(form, lanes, m);
            let (kernel, lanes) = shared_loads(gpu, |lanes| {
                kernel(form, rows(lanes), lanes, quads, c.dtype())
            });
            (kernel, rows(lanes))
        }
    };
    let groups = [
        m.div_ceil(rows) as u32,
        (params.n as usize).div_ceil(TILE[1]) as u32,
        batch as u32 * params.splits,
    ];
    let work = 2 * (m * batch) as u64 * u64::from(params.n) * u64::from(params.k);
    let params = RowsParams {
        run: if params.run == 0 {
            params.segments.max(1)
        } else {
            params.run
        },
        has_bias: bias.is_some().into(),
        has_residual: residual.is_some().into(),
        ..*params
    };
    // Absent operands are bound to something; the flags keep them unread.
    let tensors = [a, b, c, bias.unwrap_or(a), residual.unwrap_or(a)];
    dispatch_work(&kernel, &tensors, &params, groups, work);
}

/// Parts to cut a sum of `k` terms into so that `groups` workgroups become enough for many cores.
pub(crate) fn splits(groups: usize, k: usize) -> usize {
    (32 / groups.max(1)).min(k / 256).max(1)
}

/// A strided matrix to pack: `blocks` of `rows` rows, all in elements.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Strided {
    pub batch: usize,
    pub blocks: usize,
    pub rows: usize,
    pub columns: usize,
    pub reversed: bool,
    pub start: usize,
    pub batch_stride: usize,
    pub block_stride: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct PackParams {
    blocks: u32,
    rows: u32,
    padded_rows: u32,
    columns: u32,
    reversed: u32,
    start: u32,
    batch: u32,
    block_stride: u32,
    row_stride: u32,
    column_stride: u32,
    width: u32,
    packed_row: u32,
    packed_panel: u32,
    packed_batch: u32,
}

/// Rows that a workgroup of `matmul_pack` goes down.
const PACK_STEP: usize = 128;

fn pack_kernel(source: DType, lines: bool) -> Kernel {
    Kernel::new("matmul_pack")
        .def("STEP", PACK_STEP as i32)
        .flag("LINES", lines)
        .flag("F16", source == DType::F16)
        .flag("S_F16", source == DType::F16)
        .flag("S_BF16", source == DType::Bf16)
}

/// Bytes that [`panels`] takes.
pub(crate) fn panel_bytes(blocks: usize, rows: usize, columns: usize) -> usize {
    blocks * rows.next_multiple_of(4) * columns.next_multiple_of(TILE[1]) * 4
}

/// `s` as f32 [batch, panels, blocks · padded rows, 32], zeros past the edges.
pub(crate) fn panels(source: &Tensor, s: &Strided) -> Tensor {
    let padded = s.rows.next_multiple_of(4);
    let (count, rows) = (s.columns.div_ceil(TILE[1]), s.blocks * padded);
    let shape = [s.batch, count, rows, TILE[1]];
    pack(
        source,
        s,
        padded,
        &shape,
        [count * TILE[1], TILE[1], rows * TILE[1]],
    )
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct UnpackParams {
    rows: u32,
    padded_rows: u32,
    columns: u32,
    start: u32,
    ld: u32,
    packed_panel: u32,
}

fn unpack_kernel(trans: bool, kind: Quantization) -> Kernel {
    Kernel::new("matmul_unpack")
        .flag("TRANS", trans)
        .flag("Q4", kind == Quantization::Q4)
}

/// [`panels`] of one quantised matrix, dequantised.
pub(crate) fn unpacked_panels(source: &QuantizedMatrix, s: &Strided) -> Tensor {
    let padded = s.rows.next_multiple_of(4);
    let count = s.columns.div_ceil(TILE[1]);
    let packed = Tensor::empty(source.gpu(), DType::F32, &[1, count, padded, TILE[1]]);
    let trans = s.row_stride == 1;
    let params = UnpackParams {
        rows: s.rows as u32,
        padded_rows: padded as u32,
        columns: s.columns as u32,
        start: s.start as u32,
        ld: s.row_stride.max(s.column_stride) as u32,
        packed_panel: (padded * TILE[1]) as u32,
    };
    dispatch_work(
        &unpack_kernel(trans, source.kind()),
        &[source.words(), source.scales(), &packed],
        &params,
        [padded.div_ceil(32) as u32, count as u32, 1],
        8 * packed.elements() as u64,
    );
    packed
}

/// `s` as f32 [batch, blocks · rows, `width`], `width` a multiple of 4 that the columns fit in; zeros past the edges.
pub(crate) fn padded_rows(source: &Tensor, s: &Strided, width: usize) -> Tensor {
    pack(
        source,
        s,
        s.rows,
        &[s.batch, s.blocks * s.rows, width],
        [width, width, TILE[1]],
    )
}

fn pack(
    source: &Tensor,
    s: &Strided,
    padded: usize,
    shape: &[usize],
    [width, packed_row, packed_panel]: [usize; 3],
) -> Tensor {
    let packed = Tensor::empty(source.gpu(), DType::F32, shape);
    let params = PackParams {
        blocks: s.blocks as u32,
        rows: s.rows as u32,
        padded_rows: padded as u32,
        columns: s.columns as u32,
        reversed: s.reversed.into(),
        start: s.start as u32,
        batch: s.batch_stride as u32,
        block_stride: s.block_stride as u32,
        row_stride: s.row_stride as u32,
        column_stride: s.column_stride as u32,
        width: width as u32,
        packed_row: packed_row as u32,
        packed_panel: packed_panel as u32,
        packed_batch: shape[1..].iter().product::<usize>() as u32,
    };
    let groups = [
        padded.div_ceil(PACK_STEP) as u32,
        s.columns.div_ceil(TILE[1]) as u32,
        (s.batch * s.blocks) as u32,
    ];
    let work = 8 * packed.elements() as u64;
    let quads = [
        s.columns,
        s.start,
        s.batch_stride,
        s.block_stride,
        s.row_stride,
    ];
    let lines = source.dtype() == DType::F32
        && s.column_stride == 1
        && quads.iter().all(|v| v.is_multiple_of(4));
    dispatch_work(
        &pack_kernel(source.dtype(), lines),
        &[source, &packed],
        &params,
        groups,
        work,
    );
    packed
}

/// Bytes that a packed operand may take before the product is cut: bounded memory, and a binding.
pub(crate) fn pack_limit(t: &Tensor) -> usize {
    (limit(t) as usize / 2).min(64 << 20)
}

/// All kernels of this file.
pub(crate) fn variants() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for dtype in [DType::F32, DType::F16] {
        for form in [
            Form::Plain,
            Form::Image,
            Form::Along,
            Form::Column,
            Form::AlongTurned,
            Form::ColumnTurned,
        ] {
            let mut tiles = vec![(TILE[0], 1), (TILE[0], 8)];
            if !form.column() && !form.turned() {
                tiles.extend([(TALL, 8), (NARROW, 8)]);
            }
            for (rows, lanes) in tiles {
                kernels.extend([false, true].map(|quads| kernel(form, rows, lanes, quads, dtype)));
            }
        }
    }
    for form in [Form::Plain, Form::Image, Form::Along] {
        for (vectors, residual, dtype) in [
            (1, false, DType::F32),
            (9, true, DType::F32),
            (SHORT, true, DType::F16),
        ] {
            kernels.push(short_kernel(form, vectors, residual, dtype));
        }
    }
    kernels.extend([DType::F32, DType::F16, DType::Bf16].map(|d| pack_kernel(d, false)));
    kernels.push(pack_kernel(DType::F32, true));
    for kind in [Quantization::Q8, Quantization::Q4] {
        kernels.extend([true, false].map(|trans| unpack_kernel(trans, kind)));
    }
    kernels
}
