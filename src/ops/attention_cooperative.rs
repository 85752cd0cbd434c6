//! Attention on matrix units, through cooperative matrices: two passes over the keys forward, so that no sum is rescaled.

use super::attention::{AttentionMask, Forward, Sizes, bits};
use super::dispatch_work;
use super::matmul::Cooperative;
use crate::gpu::{Gpu, Kernel};
use crate::tensor::Tensor;

/// What a kernel makes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Pass {
    /// The log-sum-exp of each query row's scores.
    LogSumExp,
    /// The output, from the log-sum-exps.
    Out,
    Dq,
    Dk,
    Dv,
}

/// The passes of the forward, and of the backward.
pub(super) const FORWARD: [Pass; 2] = [Pass::LogSumExp, Pass::Out];
pub(super) const BACKWARD: [Pass; 3] = [Pass::Dq, Pass::Dk, Pass::Dv];

/// Keys, or query rows, of a tile.
const OTHERS: u32 = 32;

/// Heads up to this fit the registers, and with a tile of keys 32 KiB of shared memory.
const WIDEST_HEAD: usize = 160;

/// Fewer query rows a key head than this are bound by reading the keys, which the other division does once.
const FEWEST_ROWS: usize = 32;

fn shape(size: u32) -> Cooperative {
    Cooperative {
        size,
        fragments: OTHERS / size,
    }
}

/// Side of the largest matrices on which `gpu` can do these passes; `None` where other kernels are likely faster.
pub(super) fn choose(gpu: &Gpu, sizes: &Sizes, passes: &[Pass]) -> Option<u32> {
    let worth = sizes.rows() >= FEWEST_ROWS;
    let mut each = [16, 8].into_iter();
    each.find(|&size| worth && serves(gpu, size, sizes, passes))
}

/// Whether `gpu` can do these passes in matrices of `size`².
pub(super) fn serves(gpu: &Gpu, size: u32, sizes: &Sizes, passes: &[Pass]) -> bool {
    let threads = shape(size).threads(gpu.tier());
    let compiles = |&pass: &Pass| gpu.compiles(&kernel(size, threads, sizes.head_dim, pass));
    sizes.f16
        && sizes.head_dim.is_multiple_of(4)
        && sizes.head_dim <= WIDEST_HEAD
        && shape(size).serves(gpu.tier(), true)
        && passes.iter().all(compiles)
}

/// Two powers of two, the first not the smaller, that make the least sum from `columns` on.
fn halves(columns: usize) -> (usize, usize) {
    let high = columns.max(2).next_power_of_two() / 2;
    (high, (columns.max(2) - high).next_power_of_two())
}

fn kernel(size: u32, threads: u32, head_dim: usize, pass: Pass) -> Kernel {
    let file = match pass {
        Pass::LogSumExp => "attention_lse_cooperative",
        _ => "attention_cooperative",
    };
    let (high, low) = halves(head_dim.div_ceil(size as usize));
    let kernel = Kernel::new(file).flag("F16", true);
    shape(size)
        .units(kernel, threads, true)
        .def("D", head_dim as i32)
        .def("HIGH", high as i32)
        .def("LOW", low as i32)
        .flag("BACKWARD", BACKWARD.contains(&pass))
        .flag("DSCORES", matches!(pass, Pass::Dq | Pass::Dk))
        .flag("OF_KEYS", matches!(pass, Pass::Dk | Pass::Dv))
}

/// Records one pass; `products` are how many it does of all queries with all keys.
fn launch(
    size: u32,
    sizes: &Sizes,
    mask: &AttentionMask,
    pass: Pass,
    tensors: &[&Tensor],
    products: u64,
) {
    let rows = match pass {
        Pass::Dk | Pass::Dv => sizes.keys,
        _ => sizes.rows(),
    };
    let threads = shape(size).threads(tensors[0].gpu().tier());
    dispatch_work(
        &kernel(size, threads, sizes.head_dim, pass),
        tensors,
        &sizes.params(mask),
        sizes.grid(rows, 4 * size as usize),
        products * sizes.product(),
    );
}

/// Fills `out` and `lse`.
pub(super) fn forward(
    size: u32,
    sizes: &Sizes,
    mask: &AttentionMask,
    [q, k, v]: [&Tensor; 3],
    [out, lse]: [&Tensor; 2],
) {
    let scored = [
        q,
        k,
        bits(&mask.query_bits, q),
        bits(&mask.key_bits, q),
        lse,
    ];
    launch(size, sizes, mask, Pass::LogSumExp, &scored, 1);
    let summed = [&scored[..], &[v, out]].concat();
    launch(size, sizes, mask, Pass::Out, &summed, 2);
}

/// Fills `gradients`, those of q, k and v, from dout and delta.
pub(super) fn backward(
    size: u32,
    sizes: &Sizes,
    mask: &AttentionMask,
    forward: Forward<'_>,
    [dout, delta]: [&Tensor; 2],
    gradients: [&Tensor; 3],
) {
    let Forward { q, k, v, lse, .. } = forward;
    let (query_bits, key_bits) = (bits(&mask.query_bits, q), bits(&mask.key_bits, q));
    for ((pass, gradient), products) in BACKWARD.into_iter().zip(gradients).zip([3, 3, 2]) {
        let tensors = [q, k, query_bits, key_bits, lse, v, gradient, dout, delta];
        launch(size, sizes, mask, pass, &tensors, products);
    }
}

/// Kernels for matrices of both sides and heads that fill their last one or do not.
pub(super) fn variants() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for (size, threads, head_dim) in [
        (8, 32, 20),
        (8, 128, 64),
        (8, 256, 160),
        (16, 64, 8),
        (16, 128, 80),
        (16, 256, 160),
    ] {
        for pass in [&FORWARD[..], &BACKWARD[..]].concat() {
            kernels.push(kernel(size, threads, head_dim, pass));
        }
    }
    kernels
}

#[cfg(test)]
mod tests {
    use super::halves;

    #[test]
    fn heads_are_padded_little() {
        for (columns, expected) in [
            (1, (1, 1)),
            (2, (1, 1)),
            (3, (2, 1)),
            (4, (2, 2)),
            (5, (4, 1)),
            (7, (4, 4)),
            (8, (4, 4)),
            (9, (8, 1)),
            (10, (8, 2)),
            (16, (8, 8)),
            (20, (16, 4)),
        ] {
            assert_eq!(halves(columns), expected, "{columns}");
        }
    }
}
