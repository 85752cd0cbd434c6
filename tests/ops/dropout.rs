use lavender_wgpu::ops::dropout::dropout;
use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::*;

/// The published PCG hash on the host.
fn pcg(input: u32) -> u32 {
    let state = input.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    let word = ((state >> ((state >> 28) + 4)) ^ state).wrapping_mul(277_803_737);
    (word >> 22) ^ word
}

/// A seed as the kernel takes it.
fn on_device(seed: u64) -> Tensor {
    Tensor::from_u32(gpu(), &[seed as u32, (seed >> 32) as u32], &[2])
}

#[test]
fn the_mask_is_the_hash_of_seed_and_index() {
    let mut rng = rng(151);
    for dtype in float_types() {
        for (n, p, seed) in [
            (1, 0.5f32, 1u64),
            (1031, 0.1, 0x1_0000_0007),
            (4096, 0.75, u64::MAX),
        ] {
            let (x, held) = upload(&uniform(&mut rng, n), dtype, &[n]);
            let threshold = (f64::from(p) * 4_294_967_296.0) as u32;
            let expected: Vec<f64> = (0..n)
                .map(|i| {
                    let bits = pcg(pcg(pcg(i as u32) ^ seed as u32) ^ (seed >> 32) as u32);
                    if bits >= threshold {
                        held[i] / (1.0 - f64::from(p))
                    } else {
                        0.0
                    }
                })
                .collect();
            // Of seed and stream together.
            for stream in [0, 0x1234_5678_9abc_def0] {
                let y = dropout(&x, p, &on_device(seed ^ stream), stream);
                assert_close("dropout", &y, &expected);
            }
        }
    }
}

#[test]
fn the_share_dropped_is_p_and_seeds_differ() {
    let n = 1 << 18;
    let ones = Tensor::from_f32(gpu(), &vec![1.0; n], &[n]);
    let p = 0.3;
    let first = dropout(&ones, p, &on_device(7), 0).to_f32().unwrap();
    let second = dropout(&ones, p, &on_device(7), 15).to_f32().unwrap();
    let dropped = |y: &[f32]| y.iter().filter(|&&v| v == 0.0).count() as f64 / n as f64;
    // Five standard deviations of a binomial share.
    let bound = 5.0 * (0.3f64 * 0.7 / n as f64).sqrt();
    assert!((dropped(&first) - 0.3).abs() < bound, "{}", dropped(&first));
    let both = first
        .iter()
        .zip(&second)
        .filter(|&(&a, &b)| a == 0.0 && b == 0.0)
        .count();
    let joint = both as f64 / n as f64;
    assert!(
        (joint - 0.09).abs() < bound,
        "masks of two seeds are independent: {joint}"
    );
}

#[test]
fn nothing_is_dropped_at_zero() {
    let (x, held) = upload(&uniform(&mut rng(152), 9), DType::F32, &[9]);
    assert_close("p = 0", &dropout(&x, 0.0, &on_device(3), 0), &held);
}
