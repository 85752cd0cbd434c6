//! Matrix product with transposed or broadcast operands and a fused epilogue.

use super::swiglu::swiglu;
use super::unary::Unary;
use super::{THREADS, dispatch, is_f16, linear_groups, rows};
use crate::gpu::Kernel;
use crate::tensor::{DType, QuantizedMatrix, Tensor};
#[doc(hidden)]
pub use choose::Choice;
#[doc(hidden)]
pub use cooperative::Cooperative;
use cut::cut;
use launch::tile_of;
use right::Right;
#[doc(hidden)]
pub use shape::Shape;
#[doc(hidden)]
pub use tune::tune;

mod choose;
mod cooperative;
mod cut;
mod launch;
mod right;
mod shape;
mod tune;

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
    /// What is done last.
    pub ending: Option<Ending<'a>>,
    /// Dtype of the result (F32 or F16); that of `a` when `None`.
    pub output: Option<DType>,
}

/// What a product ends with: a tensor of the result's shape and dtype.
#[derive(Clone, Copy, Debug)]
pub enum Ending<'a> {
    /// It is added.
    Residual(&'a Tensor),
    /// Its SiLU is a factor: the product is the other half of a SwiGLU.
    Gate(&'a Tensor),
}

impl<'a> Ending<'a> {
    fn tensor(self) -> &'a Tensor {
        let (Ending::Residual(tensor) | Ending::Gate(tensor)) = self;
        tensor
    }

    /// The same with another tensor.
    fn with(self, tensor: &Tensor) -> Ending<'_> {
        match self {
            Ending::Residual(_) => Ending::Residual(tensor),
            Ending::Gate(_) => Ending::Gate(tensor),
        }
    }
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
    /// Matrix units, through cooperative matrices.
    Cooperative(Cooperative),
    /// Registers alone, a's elements handed round in subgroups of 8 to 64.
    Subgroup,
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
    b: &'a Right,
    c: &'a Tensor,
    options: MatmulOptions<'a>,
    choice: Choice,
}

impl Operands<'_> {
    /// The same product done otherwise.
    fn with(&self, choice: Choice) -> Self {
        Operands { choice, ..*self }
    }
}

/// The tail of every kernel's parameters that ends in an epilogue.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Epilogue {
    has_bias: u32,
    ending: u32,
    function: u32,
    a: f32,
    b: f32,
}

impl Epilogue {
    fn of(options: &MatmulOptions<'_>) -> Epilogue {
        let (code, [a, b]) = options.activation.map_or((0, [0.0; 2]), Unary::code);
        Epilogue {
            has_bias: options.bias.is_some().into(),
            ending: match options.ending {
                None => 0,
                Some(Ending::Residual(_)) => 1,
                Some(Ending::Gate(_)) => 2,
            },
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

/// activation(a·b + bias) + residual, or silu(gate) · activation(a·b + bias).
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
    matmul_as(variant.map(Choice::from), a, b, options)
}

fn matmul_as(
    choice: Option<Choice>,
    a: &Tensor,
    b: &Tensor,
    options: &MatmulOptions<'_>,
) -> Tensor {
    let (g, shape) = geometry(a.shape(), b.shape(), options);
    product(choice, a, &Right::Float(b.clone()), g, &shape, options)
}

/// [`matmul`] by a quantised `w` [outputs, inputs], dequantised in the kernel's registers: a · wᵀ with `trans_b`, as a
/// linear layer computes it, and a · w without, the gradient of that layer's input. `a` is not transposed.
pub fn matmul_quantized(a: &Tensor, w: &QuantizedMatrix, options: &MatmulOptions<'_>) -> Tensor {
    matmul_quantized_with(None, a, w, options)
}

/// [`matmul_quantized`] by a given kernel family, for tests and benches.
#[doc(hidden)]
pub fn matmul_quantized_with(
    variant: Option<Variant>,
    a: &Tensor,
    w: &QuantizedMatrix,
    options: &MatmulOptions<'_>,
) -> Tensor {
    matmul_quantized_as(variant.map(Choice::from), a, w, options)
}

fn matmul_quantized_as(
    choice: Option<Choice>,
    a: &Tensor,
    w: &QuantizedMatrix,
    options: &MatmulOptions<'_>,
) -> Tensor {
    assert!(!options.trans_a, "matmul: a transposed {a:?} by {w:?}");
    let (g, shape) = geometry(a.shape(), &w.shape(), options);
    let g = Geometry {
        ldb: w.pitch(),
        ..g
    };
    product(choice, a, &Right::Quantized(w.clone()), g, &shape, options)
}

fn product(
    choice: Option<Choice>,
    a: &Tensor,
    b: &Right,
    g: Geometry,
    shape: &[usize],
    options: &MatmulOptions<'_>,
) -> Tensor {
    let dtype = options.output.unwrap_or(a.dtype());
    let c = Tensor::empty(a.gpu(), dtype, shape);
    is_f16("matmul", a);
    is_f16("matmul", &c);
    if let Some(bias) = options.bias {
        assert!(
            bias.dtype() == DType::F32 && bias.shape() == [g.n],
            "matmul: bias {bias:?} for {shape:?}"
        );
    }
    if let Some(ending) = options.ending {
        let tensor = ending.tensor();
        assert!(
            tensor.dtype() == dtype && tensor.elements() == c.elements(),
            "matmul: {ending:?} for {shape:?}"
        );
    }
    let operands = Operands {
        a,
        b,
        c: &c,
        options: *options,
        choice: Variant::Rows.into(),
    };
    let operands = operands.with(choose::choice(&operands, &g, choice));
    let parts = k_parts(&operands, &g);
    // The CPU kernel has no activation: 64 inlined copies of it would take seconds to compile.
    let rows = operands.choice.variant == Variant::Rows;
    if parts == 1 && !(rows && options.activation.is_some()) {
        let Some(Ending::Gate(gate)) = options.ending.filter(|_| rows) else {
            cut(&operands, &g);
            return c;
        };
        // For the same reason no gate; elements are multiplied faster four at a time than in the sum of parts.
        let options = MatmulOptions {
            ending: None,
            ..*options
        };
        cut(
            &Operands {
                options,
                ..operands
            },
            &g,
        );
        return swiglu(&gate.reshape(shape), &c);
    }
    // Partial sums of equal ranges of k, then one ordered sum: deterministic, unlike atomics.
    let sums = Tensor::empty(a.gpu(), DType::F32, &[g.batch, parts, g.m, g.n]);
    let split = Operands {
        c: &sums,
        options: plain(options),
        ..operands
    };
    let over = |t: &Tensor| t.bytes() > limit(t);
    if over(a) || over(b.tensor()) {
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
        let other = options
            .ending
            .map(|e| window(e.tensor(), from * n, elements).0);
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
            &[&sums, &part, bias, other.as_ref().unwrap_or(&sums)],
            &params,
            linear_groups(elements, THREADS),
        );
    }
}

fn geometry(sa: &[usize], sb: &[usize], options: &MatmulOptions<'_>) -> (Geometry, Vec<usize>) {
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
    let b = o.b.tensor();
    let mut parts = 1;
    if over(o.a) && o.options.trans_a {
        parts = parts.max(needed(o.a, true));
    }
    if over(b) && !o.options.trans_b {
        parts = parts.max(needed(b, true));
    }
    if parts > 1 || over(o.a) || over(b) {
        return parts;
    }
    let [rows, columns] = tile_of(o.choice.variant, o.a.gpu().tier().subgroup_size.1);
    let groups = (g.m.div_ceil(rows) * g.n.div_ceil(columns) * g.batch).max(1);
    let wanted = match (o.choice.variant, o.choice.splits) {
        (Variant::Vector(_), _) => 1,
        (_, Some(splits)) => splits.min(g.k / 64),
        (Variant::Rows, None) => rows::splits(groups, g.k),
        _ => (256 / groups).min(g.k / 256).min(64),
    };
    let fits = (limit(o.a) / 4) as usize / (g.batch * g.m * g.n).max(1);
    wanted.min(fits).max(1)
}

/// A view of `len` elements from `start`, begun early enough to be aligned; and the start within it.
pub(crate) fn window(t: &Tensor, start: usize, len: usize) -> (Tensor, usize) {
    let unit = t.gpu().tier().offset_alignment as usize / t.dtype().bytes();
    let begin = start / unit * unit;
    let flat = t.reshape(&[t.elements()]);
    (flat.narrow(begin, start + len - begin), start - begin)
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut kernels = vec![
        Kernel::new("matmul_reduce"),
        Kernel::new("matmul_reduce").flag("F16", true),
    ];
    kernels.extend(launch::variants());
    kernels.extend(rows::variants());
    kernels
}
