//! Cuts a product until each piece fits the binding limit and a dispatch.

use super::launch::{launch, packs_b};
use super::{Geometry, MatmulOptions, Operands, limit, window};
use crate::ops::rows;
use crate::tensor::Tensor;

/// FLOPs of one dispatch at the most on a GPU: 0.1 s at 2 TFLOP/s, far below any watchdog.
const DISPATCH_FLOPS: usize = 200_000_000_000;

/// Elements from the first to the last that a strided matrix spans.
fn span(rows: usize, columns: usize, ld: usize, batch: usize, stride: usize) -> usize {
    (batch - 1) * stride + (rows - 1) * ld + columns
}

/// Halves of `n`, the first a multiple of 64 or at least of 4 where possible.
fn half(n: usize) -> usize {
    match n {
        65.. => (n / 2).next_multiple_of(64),
        5.. => (n / 2).next_multiple_of(4),
        _ => n / 2,
    }
}

/// Cuts the product until each piece fits the binding limit and a dispatch, and launches the pieces.
pub(super) fn cut(o: &Operands<'_>, g: &Geometry) {
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
    let packed = packs_b(o, g);
    let b_over = o.b.bytes(b_span) > limit(o.a) - 512
        || packed && g.batch_of_b() * rows::panel_bytes(1, g.k, g.n) > rows::pack_limit(o.a);
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
    let by_n = (b_over && (o.options.trans_b || packed)) || (long && g.n >= g.m);
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
    let (b, b_start) = o.b.window(g.b_start, b_span);
    let (c, c_start) = window(o.c, g.c_start, c_span);
    let ending = o.options.ending;
    let other = ending.map(|e| window(e.tensor(), g.c_start, c_span).0);
    let inner = Operands {
        a: &a,
        b: &b,
        c: &c,
        options: MatmulOptions {
            ending: ending.zip(other.as_ref()).map(|(e, other)| e.with(other)),
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
