//! Matrix product with transposed or broadcast operands and a fused epilogue.

use super::rows::{self, RowsParams, Strided};
use super::unary::Unary;
use super::{THREADS, dispatch, dispatch_work, grid, is_f16, linear_groups};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

/// How [`matmul`] reads its operands and what it does to the product.
#[derive(Clone, Copy, Debug, Default)]
pub struct MatmulOptions<'a> {
    /// `a` is stored [.., K, M].
    pub trans_a: bool,
    /// `b` is stored [.., N, K], as checkpoints store linear weights.
    pub trans_b: bool,
    /// Added to every row: f32 `[N]`.
    pub bias: Option<&'a Tensor>,
    /// Applied after the bias.
    pub activation: Option<Unary>,
    /// Added last: shape and dtype of the result.
    pub residual: Option<&'a Tensor>,
    /// Dtype of the result (F32 or F16); that of `a` when `None`.
    pub output: Option<DType>,
}

/// Kernel families of [`matmul`]; the tier chooses unless a test forces one.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// Shared-memory tile of 16·PER squared, for GPUs.
    Tile(u32),
    /// Register tile without shared memory, for drivers that run on the CPU.
    Rows,
    /// At most eight rows of `a` by a transposed `b`; threads that share a row of `b`.
    Vector(u32),
}

/// One product of matrices inside larger storages, all in elements.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    lda: usize,
    ldb: usize,
    ldc: usize,
    a_batch: usize,
    b_batch: usize,
    c_batch: usize,
    a_start: usize,
    b_start: usize,
    c_start: usize,
    bias_start: usize,
    splits: usize,
}

/// Operands and what does not change when a product is cut into smaller ones.
#[derive(Clone, Copy)]
struct Operands<'a> {
    a: &'a Tensor,
    b: &'a Tensor,
    c: &'a Tensor,
    options: MatmulOptions<'a>,
    variant: Variant,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
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

/// The tail of every kernel's parameters that ends in an epilogue.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Epilogue {
    has_bias: u32,
    has_residual: u32,
    function: u32,
    a: f32,
    b: f32,
}

impl Epilogue {
    fn of(options: &MatmulOptions<'_>) -> Epilogue {
        let (code, [a, b]) = options.activation.map_or((0, [0.0; 2]), Unary::code);
        Epilogue {
            has_bias: options.bias.is_some().into(),
            has_residual: options.residual.is_some().into(),
            function: code as u32,
            a,
            b,
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct ReduceParams {
    elements: u32,
    matrix: u32,
    n: u32,
    splits: u32,
    sums_start: u32,
    c_start: u32,
    epilogue: Epilogue,
}

/// FLOPs of one dispatch at the most on a GPU: 0.1 s at 2 TFLOP/s, far below any watchdog.
const DISPATCH_FLOPS: usize = 200_000_000_000;

/// activation(a·b + bias) + residual.
///
/// `a` is [.., M, K] (F32 or F16), `b` [.., K, N] (F32, F16 or Bf16), either transposed by its flag;
/// leading dimensions are equal, or one operand has none and is used for all. The result is [.., M, N]
/// in `a`'s dtype unless `options.output` says otherwise; sums are f32.
pub fn matmul(a: &Tensor, b: &Tensor, options: &MatmulOptions<'_>) -> Tensor {
    matmul_with(None, a, b, options)
}

/// [`matmul`] by a given kernel family, for tests and benches.
#[doc(hidden)]
pub fn matmul_with(
    variant: Option<Variant>,
    a: &Tensor,
    b: &Tensor,
    options: &MatmulOptions<'_>,
) -> Tensor {
    let (g, shape) = geometry(a, b, options);
    let dtype = options.output.unwrap_or(a.dtype());
    let c = Tensor::empty(a.gpu(), dtype, &shape);
    is_f16("matmul", a);
    is_f16("matmul", &c);
    if let Some(bias) = options.bias {
        assert!(
            bias.dtype() == DType::F32 && bias.shape() == [g.n],
            "matmul: bias {bias:?} for {shape:?}"
        );
    }
    if let Some(residual) = options.residual {
        assert!(
            residual.dtype() == dtype && residual.elements() == c.elements(),
            "matmul: residual {residual:?} for {shape:?}"
        );
    }
    let variant = match variant {
        // A forced family that cannot do the product gives way to the usual choice.
        Some(Variant::Vector(_)) | None if !is_vector(a, b, &g, options) => {
            choose(a, b, &g, options)
        }
        Some(variant) => variant,
        None => choose(a, b, &g, options),
    };
    let operands = Operands {
        a,
        b,
        c: &c,
        options: *options,
        variant,
    };
    let parts = k_parts(&operands, &g);
    // The CPU kernel has no activation: 64 inlined copies of it would take seconds to compile.
    let whole = variant != Variant::Rows || options.activation.is_none();
    if parts == 1 && whole {
        cut(&operands, &g);
        return c;
    }
    // Partial sums of equal ranges of k, then one ordered sum: deterministic, unlike atomics.
    let sums = Tensor::empty(a.gpu(), DType::F32, &[g.batch, parts, g.m, g.n]);
    let split = Operands {
        c: &sums,
        options: plain(options),
        ..operands
    };
    let over = |t: &Tensor| t.bytes() > limit(t);
    if over(a) || over(b) {
        let step = g.k.div_ceil(parts);
        for part in 0..parts {
            let from = (part * step).min(g.k);
            cut(
                &split,
                &Geometry {
                    k: step.min(g.k - from),
                    a_start: from * if options.trans_a { g.lda } else { 1 },
                    b_start: from * if options.trans_b { 1 } else { g.ldb },
                    c_start: part * g.m * g.n,
                    c_batch: parts * g.m * g.n,
                    ..g
                },
            );
        }
    } else {
        cut(&split, &Geometry { splits: parts, ..g });
    }
    reduce(&sums, &c, parts, options);
    c
}

fn plain<'a>(options: &MatmulOptions<'a>) -> MatmulOptions<'a> {
    MatmulOptions {
        trans_a: options.trans_a,
        trans_b: options.trans_b,
        ..MatmulOptions::default()
    }
}

pub(crate) fn limit(t: &Tensor) -> u64 {
    t.gpu().tier().max_binding
}

/// c = epilogue(Σ parts) for `sums` f32 [batch, parts, M, N] and `c` [batch.., M, N].
pub(crate) fn reduce(sums: &Tensor, c: &Tensor, parts: usize, options: &MatmulOptions<'_>) {
    let (m, n) = (sums.dim(sums.rank() - 2), sums.last_dim());
    let rows = c.elements() / n;
    // A single part may be cut anywhere; several are only ever made for small results.
    let per_dispatch = match parts {
        1 => (limit(c) as usize - 512) / (4 * n),
        _ => rows,
    };
    for from in (0..rows).step_by(per_dispatch.max(1)) {
        let elements = per_dispatch.min(rows - from) * n;
        let (part, c_start) = window(c, from * n, elements);
        let residual = options.residual.map(|r| window(r, from * n, elements).0);
        let (sums, sums_start) = match parts {
            1 => window(sums, from * n, elements),
            _ => (sums.clone(), 0),
        };
        let params = ReduceParams {
            elements: elements as u32,
            matrix: if parts == 1 { elements } else { m * n } as u32,
            n: n as u32,
            splits: parts as u32,
            sums_start: sums_start as u32,
            c_start: c_start as u32,
            epilogue: Epilogue::of(options),
        };
        let bias = options.bias.unwrap_or(&sums);
        dispatch(
            &Kernel::new("matmul_reduce").flag("F16", c.dtype() == DType::F16),
            &[&sums, &part, bias, residual.as_ref().unwrap_or(&sums)],
            &params,
            linear_groups(elements, THREADS),
        );
    }
}

fn geometry(a: &Tensor, b: &Tensor, options: &MatmulOptions<'_>) -> (Geometry, Vec<usize>) {
    let (sa, sb) = (a.shape(), b.shape());
    assert!(sa.len() >= 2 && sb.len() >= 2, "matmul: {sa:?} by {sb:?}");
    let (a_lead, a_tail) = sa.split_at(sa.len() - 2);
    let (b_lead, b_tail) = sb.split_at(sb.len() - 2);
    let (m, k) = if options.trans_a {
        (a_tail[1], a_tail[0])
    } else {
        (a_tail[0], a_tail[1])
    };
    let (bk, n) = if options.trans_b {
        (b_tail[1], b_tail[0])
    } else {
        (b_tail[0], b_tail[1])
    };
    assert!(
        k == bk && (a_lead == b_lead || a_lead.is_empty() || b_lead.is_empty()),
        "matmul: {sa:?} by {sb:?} (trans_a {}, trans_b {})",
        options.trans_a,
        options.trans_b
    );
    let lead = if a_lead.is_empty() { b_lead } else { a_lead };
    let shape = [lead, &[m, n]].concat();
    let mut g = Geometry {
        batch: lead.iter().product(),
        m,
        n,
        k,
        lda: a_tail[1],
        ldb: b_tail[1],
        ldc: n,
        a_batch: if a_lead.is_empty() { 0 } else { m * k },
        b_batch: if b_lead.is_empty() { 0 } else { n * k },
        c_batch: m * n,
        a_start: 0,
        b_start: 0,
        c_start: 0,
        bias_start: 0,
        splits: 1,
    };
    if b_lead.is_empty() && !options.trans_a {
        // One matrix b for all: the batch is just more rows.
        (g.m, g.batch) = (g.m * g.batch, 1);
        (g.a_batch, g.c_batch) = (0, g.m * n);
    }
    (g, shape)
}

fn choose(a: &Tensor, b: &Tensor, g: &Geometry, options: &MatmulOptions<'_>) -> Variant {
    let cpu = a.gpu().tier().cpu;
    if is_vector(a, b, g, options) {
        return Variant::Vector(if cpu { 1 } else { 32 });
    }
    if cpu {
        return Variant::Rows;
    }
    let groups = g.m.div_ceil(128) * g.n.div_ceil(128) * g.batch;
    Variant::Tile(if groups >= 128 { 8 } else { 4 })
}

/// Whether [`Variant::Vector`] can do the product.
fn is_vector(_a: &Tensor, _b: &Tensor, g: &Geometry, options: &MatmulOptions<'_>) -> bool {
    g.m <= 8
        && g.batch == 1
        && !options.trans_a
        && options.trans_b
        && g.k > 0
        && g.k.is_multiple_of(4)
}

/// Parts that k is cut into: so that an operand that can only be cut there fits a binding, and so
/// that a small result of a long sum still occupies the device.
fn k_parts(o: &Operands<'_>, g: &Geometry) -> usize {
    let needed = |t: &Tensor, by_k: bool| {
        if by_k && g.batch == 1 {
            t.bytes().div_ceil(limit(t) / 2) as usize
        } else {
            1
        }
    };
    let over = |t: &Tensor| t.bytes() > limit(t);
    let mut parts = 1;
    if over(o.a) && o.options.trans_a {
        parts = parts.max(needed(o.a, true));
    }
    if over(o.b) && !o.options.trans_b {
        parts = parts.max(needed(o.b, true));
    }
    if parts > 1 || over(o.a) || over(o.b) {
        return parts;
    }
    let wanted = match o.variant {
        Variant::Tile(per) => {
            let tile = 16 * per as usize;
            let groups = g.m.div_ceil(tile) * g.n.div_ceil(tile) * g.batch;
            (256 / groups.max(1)).min(g.k / 256).min(64)
        }
        Variant::Rows => {
            let groups = g.m.div_ceil(rows::TILE[0]) * g.n.div_ceil(rows::TILE[1]) * g.batch;
            rows::splits(groups, g.k)
        }
        Variant::Vector(_) => 1,
    };
    let fits = (limit(o.a) / 4) as usize / (g.batch * g.m * g.n).max(1);
    wanted.min(fits).max(1)
}

/// Elements from the first to the last that a strided matrix spans.
fn span(rows: usize, columns: usize, ld: usize, batch: usize, stride: usize) -> usize {
    (batch - 1) * stride + (rows - 1) * ld + columns
}

/// A view of `len` elements from `start`, begun early enough to be aligned; and the start within it.
pub(crate) fn window(t: &Tensor, start: usize, len: usize) -> (Tensor, usize) {
    let unit = t.gpu().tier().offset_alignment as usize / t.dtype().bytes();
    let begin = start / unit * unit;
    let flat = t.reshape(&[t.elements()]);
    (flat.narrow(begin, start + len - begin), start - begin)
}

/// Halves of `n`, the first a multiple of 64 where possible.
fn half(n: usize) -> usize {
    if n > 64 {
        (n / 2).next_multiple_of(64)
    } else {
        n / 2
    }
}

/// Cuts the product until each piece fits the binding limit and a dispatch, and launches the pieces.
fn cut(o: &Operands<'_>, g: &Geometry) {
    if g.batch * g.m * g.n == 0 {
        return;
    }
    let cpu = o.a.gpu().tier().cpu;
    let bytes = |t: &Tensor, elements: usize| (elements * t.dtype().bytes()) as u64;
    let (a_rows, a_cols) = if o.options.trans_a {
        (g.k, g.m)
    } else {
        (g.m, g.k)
    };
    let (b_rows, b_cols) = if o.options.trans_b {
        (g.n, g.k)
    } else {
        (g.k, g.n)
    };
    let a_span = span(a_rows.max(1), a_cols, g.lda, g.batch, g.a_batch);
    let b_span = span(b_rows.max(1), b_cols, g.ldb, g.batch, g.b_batch);
    let c_span = span(g.m, g.n, g.ldc, g.batch * g.splits, g.c_batch);
    let a_over = bytes(o.a, a_span) > limit(o.a) - 512;
    let b_over = bytes(o.b, b_span) > limit(o.a) - 512
        || packs_b(o, g) && g.batch_of_b() * rows::panel_bytes(1, g.k, g.n) > rows::pack_limit(o.b);
    let c_over = bytes(o.c, c_span) > limit(o.a) - 512;
    let long = !cpu && 2 * g.batch * g.m * g.n * g.k > DISPATCH_FLOPS && g.m * g.n > 256;
    if g.batch > 1 && (a_over || b_over || c_over || long || g.batch * g.splits > 65_535) {
        let first = g.batch / 2;
        cut(o, &Geometry { batch: first, ..*g });
        let rest = Geometry {
            batch: g.batch - first,
            a_start: g.a_start + first * g.a_batch,
            b_start: g.b_start + first * g.b_batch,
            c_start: g.c_start + first * g.splits * g.c_batch,
            ..*g
        };
        return cut(o, &rest);
    }
    let by_n = (b_over && (o.options.trans_b || packs_b(o, g))) || (long && g.n >= g.m);
    if by_n && g.n > 1 {
        let first = half(g.n);
        cut(o, &Geometry { n: first, ..*g });
        let rest = Geometry {
            n: g.n - first,
            b_start: g.b_start + first * if o.options.trans_b { g.ldb } else { 1 },
            c_start: g.c_start + first,
            bias_start: g.bias_start + first,
            ..*g
        };
        return cut(o, &rest);
    }
    if ((a_over && !o.options.trans_a) || c_over || long) && g.m > 1 {
        let first = half(g.m);
        cut(o, &Geometry { m: first, ..*g });
        let rest = Geometry {
            m: g.m - first,
            a_start: g.a_start + first * if o.options.trans_a { 1 } else { g.lda },
            c_start: g.c_start + first * g.ldc,
            ..*g
        };
        return cut(o, &rest);
    }
    let (a, a_start) = window(o.a, g.a_start, a_span);
    let (b, b_start) = window(o.b, g.b_start, b_span);
    let (c, c_start) = window(o.c, g.c_start, c_span);
    let residual = o.options.residual.map(|r| window(r, g.c_start, c_span).0);
    let inner = Operands {
        a: &a,
        b: &b,
        c: &c,
        options: MatmulOptions {
            residual: residual.as_ref(),
            ..o.options
        },
        ..*o
    };
    launch(
        &inner,
        &Geometry {
            a_start,
            b_start,
            c_start,
            ..*g
        },
    );
}

impl Geometry {
    fn batch_of_b(&self) -> usize {
        if self.b_batch == 0 { 1 } else { self.batch }
    }
}

/// Whether the CPU kernel needs `b` in panels: it reads f32 rows along n in whole vec4s.
fn packs_b(o: &Operands<'_>, g: &Geometry) -> bool {
    o.variant == Variant::Rows
        && (o.options.trans_b
            || o.b.dtype() != DType::F32
            || ![g.ldb, g.b_start, g.b_batch]
                .iter()
                .all(|v| v.is_multiple_of(4))
            || !(o.options.trans_a || g.k.is_multiple_of(4)))
}

/// Whether it needs `a` in padded f32 rows (kept in column form when transposed).
fn packs_a(o: &Operands<'_>, g: &Geometry) -> bool {
    o.a.dtype() != DType::F32
        || ![g.lda, g.a_start, g.a_batch]
            .iter()
            .all(|v| v.is_multiple_of(4))
        || !(o.options.trans_a || g.k.is_multiple_of(4))
}

/// The product by `matmul_rows`, operands packed where they must be.
fn launch_rows(o: &Operands<'_>, g: &Geometry) {
    let (ta, tb) = (o.options.trans_a, o.options.trans_b);
    let strided = |start, batch_stride| Strided {
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
    };
    let padded_k = if ta { g.k } else { g.k.next_multiple_of(4) };
    let (mut a, mut a_start, mut a_batch, mut lda) = (o.a.clone(), g.a_start, g.a_batch, g.lda);
    if packs_a(o, g) {
        let (rows, columns) = if ta { (g.k, g.m) } else { (g.m, g.k) };
        let source = Strided {
            rows,
            columns,
            row_stride: g.lda,
            ..strided(g.a_start, g.a_batch)
        };
        a = rows::padded_rows(o.a, &source);
        (a_start, lda) = (0, columns.next_multiple_of(4));
        a_batch = if a_batch == 0 { 0 } else { rows * lda };
    }
    let (mut b, mut b_start, mut b_batch) = (o.b.clone(), g.b_start, g.b_batch);
    let (mut b_row, mut b_panel) = (g.ldb, rows::TILE[1]);
    if packs_b(o, g) {
        let (row_stride, column_stride) = if tb { (1, g.ldb) } else { (g.ldb, 1) };
        let source = Strided {
            rows: g.k,
            columns: g.n,
            row_stride,
            column_stride,
            ..strided(g.b_start, g.b_batch)
        };
        b = rows::panels(o.b, &source);
        (b_start, b_row, b_panel) = (0, rows::TILE[1], g.k.next_multiple_of(4) * rows::TILE[1]);
        b_batch = if b_batch == 0 {
            0
        } else {
            b_panel * g.n.div_ceil(rows::TILE[1])
        };
    }
    // Parts of k are segments; those of row form start at a vec4.
    let segment = padded_k.div_ceil(g.splits).next_multiple_of(4).max(4);
    let tiles = g.m.div_ceil(rows::TILE[0]);
    let params = RowsParams {
        m: g.m as u32,
        n: g.n as u32,
        k: padded_k as u32,
        splits: g.splits as u32,
        a_start: (a_start / 4) as u32,
        a_batch: (a_batch / 4) as u32,
        size_x: if ta { 1 } else { g.m as u32 },
        size_y: g.splits as u32,
        stride_x: (lda / 4) as u32,
        stride_y: if ta { (segment * lda / 4) as u32 } else { 0 },
        stride_image: 0,
        segments: g.splits as u32,
        segment: segment as u32,
        segment_stride: (segment / 4) as u32,
        run: g.m as u32,
        run_tiles: tiles as u32,
        run_stride: 0,
        padded: g.m as u32,
        channels: g.m as u32,
        b_start: (b_start / 4) as u32,
        b_batch: (b_batch / 4) as u32,
        b_row: (b_row / 4) as u32,
        b_panel: (b_panel / 4) as u32,
        ldc: g.ldc as u32,
        c_start: g.c_start as u32,
        c_batch: g.c_batch as u32,
        bias_start: g.bias_start as u32,
        ..RowsParams::default()
    };
    let (bias, residual) = (o.options.bias, o.options.residual);
    rows::product(ta, [&a, &b, o.c], bias, residual, &params, tiles, g.batch);
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct VectorParams {
    m: u32,
    n: u32,
    k: u32,
    a_start: u32,
    b_start: u32,
    ldc: u32,
    c_start: u32,
    bias_start: u32,
    epilogue: Epilogue,
}

fn vector(rows: usize, lanes: u32, [a, b, c]: [DType; 3]) -> Kernel {
    Kernel::new("matmul_vector")
        .def("ROWS", rows as i32)
        .def("LANES", lanes as i32)
        .def("THREADS", 8 * lanes as i32)
        .flag("F16", [a, b, c].contains(&DType::F16))
        .flag("A_F16", a == DType::F16)
        .flag("B_F16", b == DType::F16)
        .flag("B_BF16", b == DType::Bf16)
        .flag("C_F16", c == DType::F16)
}

fn launch_vector(o: &Operands<'_>, g: &Geometry, lanes: u32, work: u64) {
    let params = VectorParams {
        m: g.m as u32,
        n: g.n as u32,
        k: (g.k / 4) as u32,
        a_start: (g.a_start / 4) as u32,
        b_start: (g.b_start / 4) as u32,
        ldc: g.ldc as u32,
        c_start: g.c_start as u32,
        bias_start: g.bias_start as u32,
        epilogue: Epilogue::of(&o.options),
    };
    dispatch_work(
        &vector(
            g.m.next_power_of_two(),
            lanes,
            [o.a.dtype(), o.b.dtype(), o.c.dtype()],
        ),
        &[
            o.a,
            o.b,
            o.c,
            o.options.bias.unwrap_or(o.a),
            o.options.residual.unwrap_or(o.a),
        ],
        &params,
        grid(g.n.div_ceil(8)),
        work,
    );
}

fn params(o: &Operands<'_>, g: &Geometry, step: usize) -> Params {
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

fn tile(per: u32, trans: [bool; 2], dtypes: [DType; 3]) -> Kernel {
    let [a, b, c] = dtypes;
    Kernel::new("matmul_tile")
        .def("PER", per as i32)
        .flag("TRANS_A", trans[0])
        .flag("TRANS_B", trans[1])
        .flag("F16", dtypes.contains(&DType::F16))
        .flag("A_F16", a == DType::F16)
        .flag("B_F16", b == DType::F16)
        .flag("B_BF16", b == DType::Bf16)
        .flag("C_F16", c == DType::F16)
}

fn launch(o: &Operands<'_>, g: &Geometry) {
    let work = 2 * g.batch as u64 * (g.m * g.n) as u64 * g.k as u64;
    let per = match o.variant {
        Variant::Tile(per) => per,
        Variant::Rows => return launch_rows(o, g),
        Variant::Vector(lanes) => return launch_vector(o, g, lanes, work),
    };
    let side = 16 * per as usize;
    // Absent operands are bound to something of the same element type; the flags keep them unread.
    dispatch_work(
        &tile(
            per,
            [o.options.trans_a, o.options.trans_b],
            [o.a.dtype(), o.b.dtype(), o.c.dtype()],
        ),
        &[
            o.a,
            o.b,
            o.c,
            o.options.bias.unwrap_or(o.a),
            o.options.residual.unwrap_or(o.a),
        ],
        &params(o, g, 16),
        [
            g.n.div_ceil(side) as u32,
            g.m.div_ceil(side) as u32,
            (g.batch * g.splits) as u32,
        ],
        work,
    );
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut kernels = vec![
        Kernel::new("matmul_reduce"),
        Kernel::new("matmul_reduce").flag("F16", true),
    ];
    let float = [DType::F32, DType::F16];
    for per in [4, 8] {
        for trans in [[false, false], [false, true], [true, false], [true, true]] {
            for b in [DType::F32, DType::F16, DType::Bf16] {
                for a in float {
                    kernels.push(tile(per, trans, [a, b, a]));
                }
            }
        }
    }
    for b in [DType::F32, DType::F16, DType::Bf16] {
        for a in float {
            for (rows, lanes) in [(1, 1), (8, 1), (1, 32), (8, 32)] {
                kernels.push(vector(rows, lanes, [a, b, a]));
            }
        }
    }
    kernels.extend(rows::variants());
    kernels.push(tile(4, [true, false], [DType::F16, DType::F16, DType::F32]));
    kernels
}
