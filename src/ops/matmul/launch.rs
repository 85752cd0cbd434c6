//! Launches one piece of a product by the chosen kernel family.

use super::right::{Right, Storage};
use super::{Ending, Epilogue, Geometry, Operands, Variant, cooperative};
use crate::gpu::Kernel;
use crate::ops::rows::{self, Form, RowsParams, Strided};
use crate::ops::{dispatch_work, grid};
use crate::tensor::{DType, Quantization, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Params {
    m: u32,
    n: u32,
    k: u32,
    lda: u32,
    ldb: u32,
    ldc: u32,
    a_batch: u32,
    b_batch: u32,
    c_batch: u32,
    a_start: u32,
    b_start: u32,
    c_start: u32,
    bias_start: u32,
    splits: u32,
    k_part: u32,
    epilogue: Epilogue,
}

/// Whether the CPU kernel takes `b` in panels: it reads f32 lines in whole vec4s, and packing for many rows costs little.
pub(super) fn packs_b(o: &Operands<'_>, g: &Geometry) -> bool {
    o.choice.variant == Variant::Rows
        && !turns(o, g)
        && (o.options.trans_a && o.options.trans_b
            || o.b.storage() != Storage::Float(DType::F32)
            || ![g.ldb, g.b_start, g.b_batch]
                .iter()
                .all(|v| v.is_multiple_of(4))
            || !(o.options.trans_a || g.k.is_multiple_of(4))
            || o.choice
                .packed
                .unwrap_or(g.m >= rows::PACKED_ROWS && !rows::short(Form::Along, g.m, g.k)))
}

/// Whether it needs `a` in padded f32 rows (kept in column form when transposed).
fn packs_a(o: &Operands<'_>, g: &Geometry) -> bool {
    o.a.dtype() != DType::F32
        || ![g.lda, g.a_start, g.a_batch]
            .iter()
            .all(|v| v.is_multiple_of(4))
        || !(o.options.trans_a || g.k.is_multiple_of(4))
}

/// Whether `c` has so few columns that a tile of 32 is half empty, and enough rows to be a tile's columns instead.
fn turns(o: &Operands<'_>, g: &Geometry) -> bool {
    let [rows, columns] = rows::TILE;
    let whole = [g.lda, g.a_start, g.a_batch, g.ldb, g.b_start, g.b_batch];
    g.n <= rows
        && g.m >= 2 * columns
        && o.options.bias.is_none()
        && o.options.ending.is_none()
        && !(o.options.trans_a && o.options.trans_b)
        && (o.options.trans_a || g.k.is_multiple_of(4))
        && o.a.dtype() == DType::F32
        && o.b.storage() == Storage::Float(DType::F32)
        && whole.iter().all(|v| v.is_multiple_of(4))
}

/// A matrix of each product's or one for all, begun at `start`, to be packed: its rows and columns are yet to be said.
fn strided(g: &Geometry, start: usize, batch_stride: usize) -> Strided {
    Strided {
        batch: if batch_stride == 0 { 1 } else { g.batch },
        blocks: 1,
        rows: 0,
        columns: 0,
        reversed: false,
        start,
        batch_stride,
        block_stride: 0,
        row_stride: 0,
        column_stride: 1,
    }
}

/// Parameters of a product of `k` terms, `column` where `a` is contiguous along m, of where `a` lies (start, batch, line)
/// and `b` (and panel), all in elements.
fn rows_params(
    g: &Geometry,
    (k, column): (usize, bool),
    [a_start, a_batch, lda]: [usize; 3],
    [b_start, b_batch, b_row, b_panel]: [usize; 4],
) -> RowsParams {
    // Parts of k are segments; those of row form start at a vec4.
    let segment = k.div_ceil(g.splits).next_multiple_of(4).max(4);
    RowsParams {
        m: g.m as u32,
        n: g.n as u32,
        k: k as u32,
        splits: g.splits as u32,
        a_start: (a_start / 4) as u32,
        a_batch: (a_batch / 4) as u32,
        stride_x: (lda / 4) as u32,
        segments: g.splits as u32,
        segment: segment as u32,
        segment_stride: (segment * if column { lda } else { 1 } / 4) as u32,
        b_start: (b_start / 4) as u32,
        b_batch: (b_batch / 4) as u32,
        b_row: (b_row / 4) as u32,
        b_panel: (b_panel / 4) as u32,
        ldc: g.ldc as u32,
        c_start: g.c_start as u32,
        c_batch: g.c_batch as u32,
        bias_start: g.bias_start as u32,
        ..RowsParams::default()
    }
}

/// cᵀ = bᵀ·aᵀ by `matmul_rows`, stored as c.
fn launch_turned(o: &Operands<'_>, g: &Geometry) {
    let (ta, tb) = (o.options.trans_a, o.options.trans_b);
    let (mut a, mut at) = (o.b.tensor().clone(), [g.b_start, g.b_batch, g.ldb]);
    let form = if ta {
        Form::ColumnTurned
    } else {
        Form::AlongTurned
    };
    if !(ta || tb) {
        let source = Strided {
            rows: g.n,
            columns: g.k,
            row_stride: 1,
            column_stride: g.ldb,
            ..strided(g, g.b_start, g.b_batch)
        };
        a = rows::padded_rows(&a, &source, g.k);
        at = [0, if g.b_batch == 0 { 0 } else { g.n * g.k }, g.k];
    }
    let b_at = [g.a_start, g.a_batch, g.lda, rows::TILE[1]];
    let params = RowsParams {
        m: g.n as u32,
        n: g.m as u32,
        ..rows_params(g, (g.k, ta), at, b_at)
    };
    rows::product(form, [&a, o.a, o.c], None, None, &params, g.batch);
}

/// The product by `matmul_rows`, operands packed where they must be.
fn launch_rows(o: &Operands<'_>, g: &Geometry) {
    if turns(o, g) {
        return launch_turned(o, g);
    }
    let (ta, tb) = (o.options.trans_a, o.options.trans_b);
    let padded_k = if ta { g.k } else { g.k.next_multiple_of(4) };
    let (mut a, mut a_at) = (o.a.clone(), [g.a_start, g.a_batch, g.lda]);
    if packs_a(o, g) {
        let (rows, columns) = if ta { (g.k, g.m) } else { (g.m, g.k) };
        let source = Strided {
            rows,
            columns,
            row_stride: g.lda,
            ..strided(g, g.a_start, g.a_batch)
        };
        let line = columns.next_multiple_of(4);
        a = rows::padded_rows(o.a, &source, line);
        a_at = [0, if g.a_batch == 0 { 0 } else { rows * line }, line];
    }
    let mut b = o.b.tensor().clone();
    let mut b_at = [g.b_start, g.b_batch, g.ldb, rows::TILE[1]];
    let packed = packs_b(o, g);
    let form = match (ta, tb && !packed) {
        (true, _) => Form::Column,
        (false, true) => Form::Along,
        (false, false) => Form::Plain,
    };
    if packed {
        let (row_stride, column_stride) = if tb { (1, g.ldb) } else { (g.ldb, 1) };
        let source = Strided {
            rows: g.k,
            columns: g.n,
            row_stride,
            column_stride,
            ..strided(g, g.b_start, g.b_batch)
        };
        b = match o.b {
            Right::Float(b) => rows::panels(b, &source),
            Right::Quantized(b) => rows::unpacked_panels(b, &source),
        };
        let panel = g.k.next_multiple_of(4) * rows::TILE[1];
        let all = panel * g.n.div_ceil(rows::TILE[1]);
        b_at = [
            0,
            if g.b_batch == 0 { 0 } else { all },
            rows::TILE[1],
            panel,
        ];
    }
    let params = rows_params(g, (padded_k, ta), a_at, b_at);
    let (bias, residual) = (o.options.bias, o.options.ending.map(Ending::tensor));
    rows::product(form, [&a, &b, o.c], bias, residual, &params, g.batch);
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct VectorParams {
    m: u32,
    n: u32,
    k: u32,
    ldb: u32,
    a_start: u32,
    b_start: u32,
    ldc: u32,
    c_start: u32,
    bias_start: u32,
    epilogue: Epilogue,
}

fn vector(rows: usize, lanes: u32, a: DType, b: Storage, c: DType) -> Kernel {
    let kernel = Kernel::new("matmul_vector")
        .def("ROWS", rows as i32)
        .def("LANES", lanes as i32)
        .def("THREADS", 8 * lanes as i32);
    b.flags(kernel, a, c)
}

fn launch_vector(o: &Operands<'_>, g: &Geometry, work: u64) {
    let params = VectorParams {
        m: g.m as u32,
        n: g.n as u32,
        k: (g.k / 4) as u32,
        ldb: (g.ldb / 4) as u32,
        a_start: (g.a_start / 4) as u32,
        b_start: (g.b_start / 4) as u32,
        ldc: g.ldc as u32,
        c_start: g.c_start as u32,
        bias_start: g.bias_start as u32,
        epilogue: Epilogue::of(&o.options),
    };
    dispatch_work(
        &kernel_of(o, g),
        &bound(o),
        &params,
        grid(g.n.div_ceil(8)),
        work,
    );
}

/// What the kernels bind, in order. Absent operands are bound to something of the same element type; the flags keep
/// them unread.
pub(super) fn bound<'a>(o: &Operands<'a>) -> Vec<&'a Tensor> {
    let mut tensors = vec![
        o.a,
        o.b.tensor(),
        o.c,
        o.options.bias.unwrap_or(o.a),
        o.options.ending.map_or(o.a, Ending::tensor),
    ];
    tensors.extend(o.b.scales());
    tensors
}

pub(super) fn params(o: &Operands<'_>, g: &Geometry, step: usize) -> Params {
    let options = &o.options;
    Params {
        m: g.m as u32,
        n: g.n as u32,
        k: g.k as u32,
        lda: g.lda as u32,
        ldb: g.ldb as u32,
        ldc: g.ldc as u32,
        a_batch: g.a_batch as u32,
        b_batch: g.b_batch as u32,
        c_batch: g.c_batch as u32,
        a_start: g.a_start as u32,
        b_start: g.b_start as u32,
        c_start: g.c_start as u32,
        bias_start: g.bias_start as u32,
        splits: g.splits as u32,
        k_part: g.k.div_ceil(g.splits).next_multiple_of(step) as u32,
        epilogue: Epilogue::of(options),
    }
}

/// Whether every line of a, and of b, is whole fours that start at one, so that it can be read in fours.
pub(super) fn fours(o: &Operands<'_>, g: &Geometry) -> [bool; 2] {
    let whole = |values: [usize; 4]| values.iter().all(|v| v.is_multiple_of(4));
    let along_a = if o.options.trans_a { g.m } else { g.k };
    let along_b = if o.options.trans_b { g.k } else { g.n };
    [
        whole([g.lda, g.a_start, g.a_batch, along_a]),
        o.b.storage().is_quantized() || whole([g.ldb, g.b_start, g.b_batch, along_b]),
    ]
}

fn tile(per: u32, fours: [bool; 2], trans: [bool; 2], a: DType, b: Storage, c: DType) -> Kernel {
    let kernel = Kernel::new("matmul_tile")
        .def("PER", per as i32)
        .flag("A4", fours[0])
        .flag("B4", fours[1])
        .flag("TRANS_A", trans[0])
        .flag("TRANS_B", trans[1]);
    b.flags(kernel, a, c)
}

/// Rows of a workgroup of `matmul_subgroup`, and its threads and columns where subgroups have at most `lanes`.
const SUBGROUP_ROWS: usize = 32;

fn subgroup(lanes: u32, quads: bool, trans: [bool; 2], a: DType, b: Storage, c: DType) -> Kernel {
    let kernel = Kernel::new("matmul_subgroup")
        .def("THREADS", 4 * lanes as i32)
        .def("WIDTH", 4 * lanes as i32)
        .flag("QUADS", quads)
        .flag("TRANS_A", trans[0])
        .flag("TRANS_B", trans[1]);
    b.flags(kernel, a, c)
}

/// Rows and columns that a workgroup computes.
pub(super) fn tile_of(variant: Variant, lanes: u32) -> [usize; 2] {
    match variant {
        Variant::Tile(per) => [16 * per as usize; 2],
        Variant::Cooperative(shape) => [shape.tile(); 2],
        Variant::Subgroup => [SUBGROUP_ROWS, 4 * lanes as usize],
        Variant::Rows => rows::TILE,
        Variant::Vector(_) => [8; 2],
    }
}

/// The kernel that does the product.
pub(super) fn kernel_of(o: &Operands<'_>, g: &Geometry) -> Kernel {
    let trans = [o.options.trans_a, o.options.trans_b];
    let (a, b, c) = (o.a.dtype(), o.b.storage(), o.c.dtype());
    match o.choice.variant {
        Variant::Tile(per) => tile(per, fours(o, g), trans, a, b, c),
        Variant::Subgroup => {
            let lanes = o.a.gpu().tier().subgroup_size.1;
            subgroup(lanes, fours(o, g) == [true; 2], trans, a, b, c)
        }
        Variant::Vector(lanes) => vector(g.m.next_power_of_two(), lanes, a, b, c),
        Variant::Cooperative(shape) => cooperative::kernel_of(shape, o, g),
        Variant::Rows => {
            let form = if trans[0] { Form::Column } else { Form::Plain };
            rows::kernel(form, rows::TILE[0], 1, false, c)
        }
    }
}

/// Records the product, small enough for one dispatch.
pub(super) fn launch(o: &Operands<'_>, g: &Geometry) {
    // Kernels read quantised weights four at a time.
    assert!(
        !o.b.storage().is_quantized() || g.b_start.is_multiple_of(4),
        "matmul: {g:?} starts within a quad"
    );
    let work = 2 * g.batch as u64 * (g.m * g.n) as u64 * g.k as u64;
    match o.choice.variant {
        Variant::Tile(_) | Variant::Subgroup => {}
        Variant::Cooperative(shape) => return cooperative::launch(shape, o, g, work),
        Variant::Rows => return launch_rows(o, g),
        Variant::Vector(_) => return launch_vector(o, g, work),
    }
    let [rows, columns] = tile_of(o.choice.variant, o.a.gpu().tier().subgroup_size.1);
    let groups = [
        g.n.div_ceil(columns) as u32,
        g.m.div_ceil(rows) as u32,
        (g.batch * g.splits) as u32,
    ];
    dispatch_work(&kernel_of(o, g), &bound(o), &params(o, g, 16), groups, work);
}

/// All kernels of this file.
pub(super) fn variants() -> Vec<Kernel> {
    let float = [DType::F32, DType::F16];
    let stored = [
        Storage::Float(DType::F32),
        Storage::Float(DType::F16),
        Storage::Float(DType::Bf16),
        Storage::Quantized(Quantization::Q8),
        Storage::Quantized(Quantization::Q4),
    ];
    let mut kernels = Vec::new();
    for b in stored {
        for a in float {
            for per in [4, 8] {
                for trans in [[false, false], [false, true], [true, false], [true, true]] {
                    // A quantised weight has no gradient, so nothing asks for the product of a transposed a.
                    if !(trans[0] && b.is_quantized()) {
                        let fours = if per == 4 {
                            [true; 2]
                        } else {
                            [false, b.is_quantized()]
                        };
                        kernels.push(tile(per, fours, trans, a, b, a));
                    }
                }
            }
            for (quads, trans) in [
                (true, [false, true]),
                (true, [true, false]),
                (false, [false, false]),
            ] {
                kernels.push(subgroup(32, quads, trans, a, b, a));
            }
            for (rows, lanes) in [(1, 1), (8, 1), (1, 32), (8, 32)] {
                kernels.push(vector(rows, lanes, a, b, a));
            }
        }
    }
    let gradient = Storage::Float(DType::F16);
    let whole = [true; 2];
    kernels.push(tile(
        4,
        whole,
        [true, false],
        DType::F16,
        gradient,
        DType::F32,
    ));
    kernels.extend(cooperative::variants());
    kernels
}
