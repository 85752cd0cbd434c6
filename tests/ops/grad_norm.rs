use lavender_wgpu::ops::grad_norm::{clip_scale, grad_norm};
use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::*;

#[test]
fn the_norm_spans_all_tensors_and_repeats_bit_for_bit() {
    let mut rng = rng(131);
    for dtype in float_types() {
        let sizes = [1, 3, 64, 65, 1031, 300_007];
        let uploads: Vec<_> = sizes
            .iter()
            .map(|&n| upload(&uniform(&mut rng, n), dtype, &[n]))
            .collect();
        for count in 1..=sizes.len() {
            let tensors: Vec<&Tensor> = uploads[..count].iter().map(|(t, _)| t).collect();
            let squares: f64 = uploads[..count]
                .iter()
                .flat_map(|(_, h)| h)
                .map(|v| v * v)
                .sum();
            let norm = grad_norm(&tensors);
            assert_eq!((norm.shape(), norm.dtype()), ([1].as_slice(), DType::F32));
            assert_close(&format!("{count} tensors"), &norm, &[squares.sqrt()]);
            let again = grad_norm(&tensors).to_f32().unwrap();
            assert_eq!(norm.to_f32().unwrap()[0].to_bits(), again[0].to_bits());
        }
    }
}

#[test]
fn clipping_scales_only_what_is_too_long() {
    let norm = Tensor::from_f32(gpu(), &[4.0], &[1]);
    let at = |max: f32| clip_scale(&norm, max).to_f32().unwrap()[0];
    assert!((at(1.0) - 1.0 / 4.000001).abs() < 1e-7);
    assert_eq!(at(8.0), 1.0);
    // As in PyTorch, a norm exactly at the limit is scaled by a hair, through the 1e-6.
    assert!(at(4.0) <= 1.0);
    let zero = Tensor::from_f32(gpu(), &[0.0], &[1]);
    assert_eq!(clip_scale(&zero, 1.0).to_f32().unwrap(), [1.0]);
}
