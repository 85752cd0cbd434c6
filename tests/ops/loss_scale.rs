use lavender_wgpu::ops::loss_scale::unscale;
use lavender_wgpu::tensor::Tensor;

use crate::support::*;

/// The true norm, the scale it had, the factor, and the state afterwards.
fn step(norm: f32, scale: &Tensor, max_norm: f32) -> ([f32; 2], f32, Vec<f32>) {
    let norm = Tensor::from_f32(gpu(), &[norm], &[1]);
    let (truth, factor) = unscale(&norm, scale, max_norm, 3);
    let truth = truth.to_f32().unwrap();
    let factor = factor.to_f32().unwrap()[0];
    ([truth[0], truth[1]], factor, scale.to_f32().unwrap())
}

#[test]
fn a_good_norm_is_unscaled_and_clipped_and_three_of_them_double_the_scale() {
    let scale = Tensor::from_f32(gpu(), &[1024.0, 0.0], &[2]);
    let (truth, factor, state) = step(2048.0, &scale, f32::MAX);
    assert_eq!((truth, factor), ([2.0, 1024.0], 1.0 / 1024.0));
    assert_eq!(state, [1024.0, 1.0]);
    let (truth, factor, state) = step(4096.0, &scale, 0.5);
    assert_eq!(truth, [4.0, 1024.0]);
    assert!((factor * 1024.0 - 0.5 / 4.000001).abs() < 1e-7, "{factor}");
    assert_eq!(state, [1024.0, 2.0]);
    assert_eq!(step(1.0, &scale, f32::MAX).2, [2048.0, 0.0]);
    let most = Tensor::from_f32(gpu(), &[16_777_216.0, 2.0], &[2]);
    assert_eq!(step(1.0, &most, f32::MAX).2, [16_777_216.0, 0.0]);
}

#[test]
fn an_overflow_halves_the_scale_and_gives_nothing_to_multiply_by() {
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let scale = Tensor::from_f32(gpu(), &[4.0, 2.0], &[2]);
        let mut states = Vec::new();
        for _ in 0..3 {
            let (truth, factor, state) = step(bad, &scale, 1.0);
            assert!(truth[0].is_nan() && factor.is_nan(), "{bad}");
            states.push(state[0]);
        }
        // Never below 1: from there on the gradients themselves are at fault.
        assert_eq!(states, [2.0, 1.0, 1.0]);
        assert_eq!(scale.to_f32().unwrap()[1], 0.0);
    }
}
