//! Attention taps: chosen rows × columns of the attention probabilities, with their gradient.

use super::attention::{
    AttentionMask, AttentionShape, Params, Sizes, VARIANT_DIMS, kernel, keys_together,
    rows_per_thread,
};
use super::{THREADS, dispatch_work, linear_groups, row_threads, shared_loads};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

/// Which attention probabilities to read: R query rows × C key columns of each head.
#[derive(Clone, Debug)]
pub struct AttentionTap {
    /// u32 `[R]`: query rows, flattened as b·T + t, in any order and with repeats; one ≥ B·T gives 0.
    pub query_rows: Tensor,
    /// u32 [B, C]: key columns of each sample; one ≥ S gives 0.
    pub key_columns: Tensor,
}

impl AttentionTap {
    fn sizes(&self, sizes: &Sizes) -> (usize, usize) {
        let (rows, columns) = (&self.query_rows, &self.key_columns);
        let fits = rows.dtype() == DType::U32
            && columns.dtype() == DType::U32
            && columns.rank() == 2
            && columns.dim(0) == sizes.batch;
        assert!(
            fits,
            "attention_tap: rows {rows:?}, columns {columns:?}, batch {}",
            sizes.batch
        );
        (rows.elements(), columns.dim(1))
    }

    fn params(&self, sizes: &Sizes, mask: &AttentionMask) -> Params {
        let (rows, columns) = self.sizes(sizes);
        sizes.params(mask).of_tap(rows, columns)
    }
}

fn tap_kernel(pass: i32, head_dim: usize, f16: bool, threads: u32) -> Kernel {
    kernel("attention_tap", head_dim, f16, threads).def("PASS", pass)
}

/// Threads of a workgroup whose lanes hold columns, rows or elements of a head.
fn threads(x: &Tensor) -> u32 {
    row_threads(x.gpu()).min(64)
}

/// The probabilities of `tap`, f32 [R, H, C]: exp(scale·q·k − lse), 0 where masked.
///
/// `q` [B, T, H·D], `k` [B, S, Hkv·D], `lse` f32 [B, H, T] of [`super::attention::attention`] with
/// the same shape and mask.
pub fn attention_tap(
    q: &Tensor,
    k: &Tensor,
    lse: &Tensor,
    tap: &AttentionTap,
    shape: AttentionShape,
    mask: &AttentionMask,
) -> Tensor {
    let sizes = Sizes::new("attention_tap", q, k, shape, mask);
    let (rows, columns) = tap.sizes(&sizes);
    let probs = Tensor::empty(q.gpu(), DType::F32, &[rows, shape.heads, columns]);
    let query_bits = mask.query_bits.as_ref().unwrap_or(q);
    let key_bits = mask.key_bits.as_ref().unwrap_or(q);
    let (query_rows, key_columns) = (&tap.query_rows, &tap.key_columns);
    dispatch_work(
        &tap_kernel(0, sizes.head_dim, sizes.f16, threads(q)),
        &[
            query_rows,
            key_columns,
            q,
            k,
            query_bits,
            key_bits,
            lse,
            &probs,
        ],
        &tap.params(&sizes, mask),
        [
            columns.div_ceil(threads(q) as usize) as u32,
            shape.heads as u32,
            sizes.batch as u32,
        ],
        2 * (probs.elements() * sizes.head_dim) as u64,
    );
    probs
}

/// Adds Σ_c dprobs·probs of each tapped row to `delta` [B, H, T].
pub(super) fn add_to_delta(
    sizes: &Sizes,
    mask: &AttentionMask,
    tap: &AttentionTap,
    probs: &Tensor,
    dprobs: &Tensor,
    delta: &Tensor,
) {
    assert!(
        probs.shape() == dprobs.shape() && dprobs.dtype() == DType::F32,
        "attention_tap: probs {probs:?}, dprobs {dprobs:?}"
    );
    let (rows, _) = tap.sizes(sizes);
    dispatch_work(
        &tap_kernel(1, sizes.head_dim, false, THREADS),
        &[&tap.query_rows, &tap.key_columns, probs, dprobs, delta],
        &tap.params(sizes, mask),
        linear_groups(delta.elements(), THREADS),
        (delta.elements() * rows + 2 * probs.elements()) as u64,
    );
}

/// Adds the sparse terms of the tap, scale·probs·dprobs times k and q, to dq and dk; `tensors` are
/// probs, dprobs, q, k, dq, dk.
pub(super) fn add_to_gradients(
    sizes: &Sizes,
    mask: &AttentionMask,
    tap: &AttentionTap,
    tensors: [&Tensor; 6],
) {
    let [probs, dprobs, q, k, dq, dk] = tensors;
    let (rows, columns) = tap.sizes(sizes);
    let work = 4 * (probs.elements() * sizes.head_dim) as u64;
    let params = tap.params(sizes, mask);
    dispatch_work(
        &tap_kernel(2, sizes.head_dim, sizes.f16, threads(q)),
        &[&tap.query_rows, &tap.key_columns, probs, dprobs, k, dq],
        &params,
        [rows as u32, sizes.shape.heads as u32, 1],
        work,
    );
    dispatch_work(
        &tap_kernel(3, sizes.head_dim, sizes.f16, threads(q)),
        &[&tap.query_rows, &tap.key_columns, probs, dprobs, q, dk],
        &params,
        [
            columns as u32,
            sizes.shape.kv_heads as u32,
            sizes.batch as u32,
        ],
        work,
    );
}

/// Mean over heads of the attention probabilities, f32 [B, T, S]; arguments as [`attention_tap`].
///
/// Stores queries × keys once, not per head: meant for few keys (a U-Net's 77 text tokens).
pub fn attention_mean_probs(
    q: &Tensor,
    k: &Tensor,
    lse: &Tensor,
    shape: AttentionShape,
    mask: &AttentionMask,
) -> Tensor {
    let sizes = Sizes::new("attention_mean_probs", q, k, shape, mask);
    let mean = Tensor::empty(
        q.gpu(),
        DType::F32,
        &[sizes.batch, sizes.queries, sizes.keys],
    );
    let query_bits = mask.query_bits.as_ref().unwrap_or(q);
    let key_bits = mask.key_bits.as_ref().unwrap_or(q);
    let threads = threads(q);
    let each = if q.gpu().tier().cpu {
        rows_per_thread(sizes.queries)
    } else {
        1
    };
    let (kernel, _) = shared_loads(q.gpu(), |lanes| {
        mean_kernel(sizes.head_dim, sizes.f16, threads, each, lanes)
    });
    dispatch_work(
        &kernel,
        &[q, k, query_bits, key_bits, lse, &mean],
        &sizes.params(mask),
        [
            sizes.queries.div_ceil(threads as usize * each) as u32,
            sizes.batch as u32,
            1,
        ],
        2 * (mean.elements() * shape.heads * sizes.head_dim) as u64,
    );
    mean
}

fn mean_kernel(head_dim: usize, f16: bool, threads: u32, rows: usize, lanes: u32) -> Kernel {
    kernel("attention_mean_probs", head_dim, f16, threads)
        .def("ROWS", rows as i32)
        .def("KEYS", keys_together(head_dim))
        .def("LANES", lanes as i32)
}

/// All kinds of kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for head_dim in VARIANT_DIMS {
        for f16 in [false, true] {
            all.extend([1, 8].map(|lanes| mean_kernel(head_dim, f16, 8, 4, lanes)));
            all.extend([0, 2, 3].map(|pass| tap_kernel(pass, head_dim, f16, 64)));
        }
    }
    all.push(tap_kernel(1, 64, false, THREADS));
    all
}
