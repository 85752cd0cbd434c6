//! Flash attention, forward and backward: the queries × keys matrix is never stored.

use super::attention_cooperative::{self, BACKWARD, FORWARD, Pass};
use super::attention_tap::{self, AttentionTap};
use super::permute::permute;
use super::ways::{self, Question, near};
use super::{THREADS, dispatch, dispatch_work, is_f16, linear_groups, shared_loads};
use crate::gpu::{Gpu, Kernel};
use crate::tensor::{DType, Tensor};

/// Heads and the factor on the scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads H.
    pub heads: usize,
    /// Key/value heads Hkv, a divisor of `heads` (grouped-query attention: head h reads h·Hkv/H).
    pub kv_heads: usize,
    /// Factor on q·k, usually 1/√head_dim.
    pub scale: f32,
}

/// Which keys a query sees: all that pass both tests.
#[derive(Clone, Debug, Default)]
pub struct AttentionMask {
    /// Query t sees keys s ≤ t + `query_offset` only.
    pub causal: bool,
    /// Keys before the first query: the length of a cache.
    pub query_offset: usize,
    /// u32 [B, T]: a query sees keys with which it shares a bit; missing: all bits set.
    pub query_bits: Option<Tensor>,
    /// u32 [B, S], for keys.
    pub key_bits: Option<Tensor>,
}

impl AttentionMask {
    /// Query t sees keys up to t.
    pub fn causal() -> AttentionMask {
        AttentionMask {
            causal: true,
            ..AttentionMask::default()
        }
    }
}

/// What [`attention`] read and gave, for its backward.
#[derive(Clone, Copy)]
pub struct Forward<'a> {
    /// [B, T, H·D].
    pub q: &'a Tensor,
    /// [B, S, Hkv·D].
    pub k: &'a Tensor,
    /// [B, S, Hkv·D].
    pub v: &'a Tensor,
    /// [B, T, H·D].
    pub out: &'a Tensor,
    /// f32 [B, H, T].
    pub lse: &'a Tensor,
}

/// `Params` of `wgsl/common/attention_mask.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Params {
    queries: u32,
    keys: u32,
    heads: u32,
    kv_heads: u32,
    causal: u32,
    query_offset: u32,
    has_query_bits: u32,
    has_key_bits: u32,
    scale: f32,
    rows: u32,
    columns: u32,
    batch: u32,
}

impl Params {
    /// The same with the sizes of a tap.
    pub fn of_tap(self, rows: usize, columns: usize) -> Params {
        Params {
            rows: rows as u32,
            columns: columns as u32,
            ..self
        }
    }
}

/// Sizes of one call, checked.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub head_dim: usize,
    pub shape: AttentionShape,
    pub f16: bool,
}

impl Sizes {
    pub fn new(
        op: &str,
        q: &Tensor,
        k: &Tensor,
        shape: AttentionShape,
        mask: &AttentionMask,
    ) -> Sizes {
        let AttentionShape {
            heads, kv_heads, ..
        } = shape;
        let fits = q.rank() == 3
            && k.rank() == 3
            && q.dim(0) == k.dim(0)
            && heads > 0
            && kv_heads > 0
            && heads.is_multiple_of(kv_heads)
            && q.dim(2).is_multiple_of(heads)
            && k.dim(2) == q.dim(2) / heads * kv_heads
            && k.dim(1) > 0
            && k.dtype() == q.dtype();
        assert!(fits, "{op}: q {q:?}, k {k:?}, {shape:?}");
        let bits = |name: &str, bits: &Option<Tensor>, tokens: usize| {
            if let Some(bits) = bits {
                assert!(
                    bits.dtype() == DType::U32 && bits.elements() == q.dim(0) * tokens,
                    "{op}: {name} {bits:?}, q {q:?}, k {k:?}"
                );
            }
        };
        bits("query_bits", &mask.query_bits, q.dim(1));
        bits("key_bits", &mask.key_bits, k.dim(1));
        Sizes {
            batch: q.dim(0),
            queries: q.dim(1),
            keys: k.dim(1),
            head_dim: q.dim(2) / heads,
            shape,
            f16: is_f16(op, q),
        }
    }

    pub fn params(&self, mask: &AttentionMask) -> Params {
        Params {
            queries: self.queries as u32,
            keys: self.keys as u32,
            heads: self.shape.heads as u32,
            kv_heads: self.shape.kv_heads as u32,
            causal: u32::from(mask.causal),
            query_offset: mask.query_offset as u32,
            has_query_bits: u32::from(mask.query_bits.is_some()),
            has_key_bits: u32::from(mask.key_bits.is_some()),
            scale: self.shape.scale,
            rows: 0,
            columns: 0,
            batch: self.batch as u32,
        }
    }

    /// Query rows that share one key/value head.
    pub fn rows(&self) -> usize {
        self.queries * self.shape.heads / self.shape.kv_heads
    }

    /// FLOPs of one product over all pairs of query and key.
    pub fn product(&self) -> u64 {
        2 * (self.batch * self.shape.heads * self.queries * self.keys * self.head_dim) as u64
    }
}

/// A kernel for heads of `head_dim`, cut into blocks that drivers unroll.
pub(super) fn kernel(file: &'static str, head_dim: usize, f16: bool, threads: u32) -> Kernel {
    let vectors = head_dim.div_ceil(4);
    // Mesa unrolls up to 32 iterations, and only unrolled loops keep a head in registers.
    let blocks = vectors.div_ceil(32);
    Kernel::new(file)
        .flag("F16", f16)
        .flag("VEC4", head_dim.is_multiple_of(4))
        .def("D", head_dim as i32)
        .def("BLOCKS", blocks as i32)
        .def("BLOCK", vectors.div_ceil(blocks) as i32)
        .def("WG", threads as i32)
}

/// How the kernels divide the work.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Division {
    /// Rows in the lanes of small workgroups, the same keys for all of them, no shared memory: CPU drivers.
    Lanes,
    /// Tiles in shared memory: GPUs.
    Tiles,
    /// f16 on matrix units: cooperative matrices of this side, 8 or 16.
    Cooperative(u32),
}

impl Division {
    fn name(&self) -> &'static str {
        match self {
            Division::Lanes => "lanes",
            Division::Tiles => "tiles",
            Division::Cooperative(8) => "cooperative 8",
            Division::Cooperative(_) => "cooperative 16",
        }
    }
}

/// Marks the keys of this op among those that are decided.
const OP: u32 = 1 << 31;

/// Attention of fewer FLOPs is not worth a measurement.
const SMALL: usize = 20_000_000;

/// Lanes of a workgroup of the [`Division::Lanes`] kernels.
const LANES: usize = 8;

/// Bytes of keys above which the [`Division::Lanes`] forward takes them one head after another.
const HEADS_APART: u64 = 1 << 20;

/// Rows or keys of a workgroup of the [`Division::Tiles`] kernel.
const TILE: usize = 32;

/// Rows, or keys, that a thread of the [`Division::Lanes`] kernels holds where there are `rows`.
pub(super) fn rows_per_thread(rows: usize) -> usize {
    match rows.div_ceil(LANES) {
        0 | 1 => 1,
        2 => 2,
        _ => 4,
    }
}

pub(super) fn bits<'a>(bits: &'a Option<Tensor>, other: &'a Tensor) -> &'a Tensor {
    // A missing mask binds another tensor in its place and is never read.
    bits.as_ref().unwrap_or(other)
}

/// softmax(scale·q·kᵀ + mask)·v for each head, and the log-sum-exp of each row's scores.
///
/// `q` [B, T, H·D], `k` and `v` [B, S, Hkv·D], f32 or f16, any D up to 256. Returns the output
/// [B, T, H·D] and f32 [B, H, T]. A row that sees no key gives zeros. (Dao et al. 2022.)
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: AttentionShape,
    mask: &AttentionMask,
) -> (Tensor, Tensor) {
    let run = |division| attention_with(q, k, v, shape, mask, division);
    let sizes = Sizes::new("attention", q, k, shape, mask);
    let once = |division| drop(run(Some(division)));
    run(sizes.measured(q.gpu(), "forward", &FORWARD, &once))
}

/// [`attention`] with the division of the work chosen by the caller, where there is one.
pub fn attention_with(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    shape: AttentionShape,
    mask: &AttentionMask,
    division: Option<Division>,
) -> (Tensor, Tensor) {
    let sizes = Sizes::new("attention", q, k, shape, mask);
    assert!(
        v.shape() == k.shape() && v.dtype() == k.dtype(),
        "attention: k {k:?}, v {v:?}"
    );
    let out = Tensor::empty(q.gpu(), q.dtype(), q.shape());
    let lse = Tensor::empty(
        q.gpu(),
        DType::F32,
        &[sizes.batch, shape.heads, sizes.queries],
    );
    let division = sizes.division(q.gpu(), division, &FORWARD);
    if let Division::Cooperative(size) = division {
        attention_cooperative::forward(size, &sizes, mask, [q, k, v], [&out, &lse]);
        return (out, lse);
    }
    let (kernel, each) = sizes.division_kernel(q.gpu(), division, 0);
    // A head's keys lie apart by all heads' channels: long ones would be spread over more pages than a CPU remembers.
    let apart = division == Division::Lanes && shape.kv_heads > 1 && k.bytes() > HEADS_APART;
    let by_head = |t: &Tensor| {
        let heads = [sizes.batch, sizes.keys, shape.kv_heads, sizes.head_dim];
        permute(&t.reshape(&heads), &[0, 2, 1, 3])
    };
    let laid = apart.then(|| [by_head(k), by_head(v)]);
    let [k, v] = laid.as_ref().map_or([k, v], |[k, v]| [k, v]);
    let kernel = kernel.flag("HEADS_APART", apart);
    let tensors = [
        q,
        k,
        v,
        bits(&mask.query_bits, q),
        bits(&mask.key_bits, q),
        &out,
        &lse,
    ];
    let (params, work) = (sizes.params(mask), 2 * sizes.product());
    dispatch_work(
        &kernel,
        &tensors,
        &params,
        sizes.grid(sizes.rows(), each),
        work,
    );
    (out, lse)
}

/// Gradients (dq, dk, dv) of [`attention`] and of its taps.
///
/// `dout`: gradient of the output, if any. `taps`: each tap with its probabilities and their
/// gradient, both f32 [R, H, C]. With dS = P·(dP − Σ dP·P), the taps' dP enters the row sums and
/// adds sparse terms to dq and dk. No atomics: the same bits every time.
pub fn attention_backward(
    forward: Forward<'_>,
    dout: Option<&Tensor>,
    taps: &[(&AttentionTap, &Tensor, &Tensor)],
    shape: AttentionShape,
    mask: &AttentionMask,
) -> (Tensor, Tensor, Tensor) {
    let run = |division| attention_backward_with(forward, dout, taps, shape, mask, division);
    let sizes = Sizes::new("attention_backward", forward.q, forward.k, shape, mask);
    let once = |division| drop(run(Some(division)));
    run(sizes.measured(forward.q.gpu(), "backward", &BACKWARD, &once))
}

/// [`attention_backward`] with the division of the work chosen by the caller, where there is one.
pub fn attention_backward_with(
    forward: Forward<'_>,
    dout: Option<&Tensor>,
    taps: &[(&AttentionTap, &Tensor, &Tensor)],
    shape: AttentionShape,
    mask: &AttentionMask,
    division: Option<Division>,
) -> (Tensor, Tensor, Tensor) {
    let Forward { q, k, v, out, lse } = forward;
    let sizes = Sizes::new("attention_backward", q, k, shape, mask);
    let zeros = dout
        .is_none()
        .then(|| Tensor::zeros(q.gpu(), q.dtype(), q.shape()));
    let dout = dout.or(zeros.as_ref()).unwrap_or(out);
    assert!(
        dout.shape() == q.shape() && dout.dtype() == q.dtype() && out.shape() == q.shape(),
        "attention_backward: q {q:?}, out {out:?}, dout {dout:?}"
    );
    let delta = Tensor::empty(q.gpu(), DType::F32, lse.shape());
    dispatch(
        &delta_kernel(sizes.head_dim, sizes.f16),
        &[out, dout, &delta],
        &sizes.params(mask),
        linear_groups(delta.elements(), THREADS),
    );
    for (tap, probs, dprobs) in taps {
        attention_tap::add_to_delta(&sizes, mask, tap, probs, dprobs, &delta);
    }

    let dq = Tensor::empty(q.gpu(), q.dtype(), q.shape());
    let [dk, dv] = [k, v].map(|t| Tensor::empty(q.gpu(), t.dtype(), t.shape()));
    let (deltas, gradients) = ([dout, &delta], [&dq, &dk, &dv]);
    match sizes.division(q.gpu(), division, &BACKWARD) {
        Division::Cooperative(size) => {
            attention_cooperative::backward(size, &sizes, mask, forward, deltas, gradients);
        }
        division => sizes.gradients(division, mask, forward, deltas, gradients),
    }
    for (tap, probs, dprobs) in taps {
        attention_tap::add_to_gradients(&sizes, mask, tap, [probs, dprobs, q, k, &dq, &dk]);
    }
    (dq, dk, dv)
}

impl Sizes {
    /// The division that is asked for, with tiles in the place of matrix units that cannot do the work, or the likely best.
    fn division(&self, gpu: &Gpu, asked: Option<Division>, passes: &[Pass]) -> Division {
        let size = match asked {
            Some(Division::Cooperative(size)) => {
                attention_cooperative::serves(gpu, size, self, passes).then_some(size)
            }
            Some(division) => return division,
            None if gpu.tier().cpu => return Division::Lanes,
            None => attention_cooperative::choose(gpu, self, passes),
        };
        size.map_or(Division::Tiles, Division::Cooperative)
    }

    /// The division that was measured to be the fastest; `None` for the usual one.
    fn measured(
        &self,
        gpu: &Gpu,
        what: &str,
        passes: &[Pass],
        run: &dyn Fn(Division),
    ) -> Option<Division> {
        let products = self.product() as usize * (passes.len() + 2);
        if !(SMALL..=ways::per_run(gpu.tier(), 2)).contains(&products) {
            return None;
        }
        let usual = self.division(gpu, None, passes);
        let ways: &[Division] = match usual {
            Division::Tiles => &[usual],
            _ => &[usual, Division::Tiles],
        };
        let names: Vec<&'static str> = ways.iter().map(Division::name).collect();
        let sizes = |size: &dyn Fn(usize) -> usize| {
            format!(
                "attention {what} of {} rows to {} keys, {} heads of {}, {}",
                size(self.rows()),
                size(self.keys),
                size(self.batch * self.shape.kv_heads),
                self.head_dim,
                if self.f16 { "f16" } else { "f32" }
            )
        };
        let heads = (self.batch * self.shape.kv_heads) as u32;
        let kind = u32::from(self.f16) | (passes.len() as u32) << 1;
        let [rows, keys, channels] = [self.rows(), self.keys, self.head_dim].map(|n| n as u32);
        let question = Question {
            key: [rows, keys, heads, channels, OP | kind],
            ways: &names,
            class: &|| sizes(&near),
            shape: &|| sizes(&|size| size),
        };
        let way = ways::fastest(gpu, &question, &|way| run(ways[way]));
        (way > 0).then_some(ways[way])
    }

    /// Fills the gradients of q, k and v, from dout and delta, in tiles or lanes.
    fn gradients(
        &self,
        division: Division,
        mask: &AttentionMask,
        forward: Forward<'_>,
        [dout, delta]: [&Tensor; 2],
        [dq, dk, dv]: [&Tensor; 3],
    ) {
        let Forward { q, k, v, lse, .. } = forward;
        let (query_bits, key_bits) = (bits(&mask.query_bits, q), bits(&mask.key_bits, q));
        let inputs = [q, k, v, query_bits, key_bits, dout, lse, delta];
        let params = self.params(mask);
        let (kernel, each) = self.division_kernel(q.gpu(), division, 1);
        let (grid, work) = (self.grid(self.rows(), each), 3 * self.product());
        let tensors = [&inputs[..], &[dq]].concat();
        dispatch_work(&kernel, &tensors, &params, grid, work);
        let (kernel, each) = self.division_kernel(q.gpu(), division, 2);
        let (grid, work) = (self.grid(self.keys, each), 4 * self.product());
        let tensors = [&inputs[..], &[dk, dv]].concat();
        dispatch_work(&kernel, &tensors, &params, grid, work);
    }

    /// The kernel of a pass (0 forward, 1 dq, 2 dk and dv), and the rows or keys of a workgroup.
    fn division_kernel(&self, gpu: &Gpu, division: Division, pass: i32) -> (Kernel, usize) {
        if division != Division::Lanes {
            return (tiles_kernel(self.head_dim, self.f16, pass), TILE);
        }
        let each = rows_per_thread(if pass < 2 { self.rows() } else { self.keys });
        let (kernel, _) = shared_loads(gpu, |lanes| {
            lanes_kernel(self.head_dim, self.f16, pass, each, lanes)
        });
        (kernel, each * LANES)
    }

    /// A grid of workgroups of `each` rows or keys.
    pub fn grid(&self, rows: usize, each: usize) -> [u32; 3] {
        let groups = rows.div_ceil(each) as u32;
        [groups, self.shape.kv_heads as u32, self.batch as u32]
    }
}

/// Keys of one step of the [`Division::Lanes`] forward. Few in large heads: compiling the unrolled code would take seconds.
pub(super) fn keys_together(head_dim: usize) -> i32 {
    if head_dim > 96 { 2 } else { 4 }
}

fn lanes_kernel(head_dim: usize, f16: bool, pass: i32, rows: usize, lanes: u32) -> Kernel {
    let file = if pass == 0 {
        "attention"
    } else {
        "attention_backward"
    };
    let together = keys_together(head_dim) / if pass == 0 { 1 } else { 2 };
    kernel(file, head_dim, f16, LANES as u32)
        .def("PASS", pass)
        .def("ROWS", rows as i32)
        .def("KEYS", together)
        .def("LANES", lanes as i32)
}

fn tiles_kernel(head_dim: usize, f16: bool, pass: i32) -> Kernel {
    kernel("attention_tiles", head_dim, f16, 64).def("PASS", pass)
}

fn delta_kernel(head_dim: usize, f16: bool) -> Kernel {
    kernel("attention_delta", head_dim, f16, THREADS)
}

/// Head dimensions of the variants: not a multiple of 4, one block, more than one block.
pub(super) const VARIANT_DIMS: [usize; 3] = [10, 64, 160];

/// All kinds of kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for head_dim in VARIANT_DIMS {
        for f16 in [false, true] {
            all.push(delta_kernel(head_dim, f16));
            all.push(lanes_kernel(head_dim, f16, 0, 2, 1).flag("HEADS_APART", true));
            for pass in 0..3 {
                all.extend([1, 8].map(|lanes| lanes_kernel(head_dim, f16, pass, 2, lanes)));
                all.push(tiles_kernel(head_dim, f16, pass));
            }
        }
    }
    all
}
