use lavender_wgpu::ops::group_norm::{group_norm_backward, group_norm_with};
use lavender_wgpu::tensor::DType;

use crate::support::*;

/// y [batch, pixels, channels] in f64.
fn reference(x: &[f64], pixels: usize, groups: usize, w: &[f64], b: &[f64], eps: f64) -> Vec<f64> {
    let channels = w.len();
    let size = channels / groups;
    let mut y = vec![0.0; x.len()];
    for image in 0..x.len() / (pixels * channels) {
        for group in 0..groups {
            let places: Vec<usize> = (0..pixels * size)
                .map(|i| (image * pixels + i / size) * channels + group * size + i % size)
                .collect();
            let n = places.len() as f64;
            let mean = places.iter().map(|&i| x[i]).sum::<f64>() / n;
            let variance = places.iter().map(|&i| (x[i] - mean).powi(2)).sum::<f64>() / n;
            for &i in &places {
                let c = i % channels;
                y[i] = (x[i] - mean) / (variance + eps).sqrt() * w[c] + b[c];
            }
        }
    }
    y
}

#[test]
fn forward_matches_f64() {
    let mut rng = rng(7);
    // (batch, height, width, channels, groups); the last two are instance norm.
    let shapes = [
        (1, 1, 3, 2, 1),
        (2, 5, 13, 12, 3),
        (1, 9, 15, 10, 2),
        (3, 7, 7, 64, 32),
        (2, 11, 6, 5, 5),
        (1, 33, 9, 8, 8),
    ];
    for dtype in float_types() {
        for (batch, h, width, c, groups) in shapes {
            let n = batch * h * width * c;
            let values: Vec<f32> = uniform(&mut rng, n).iter().map(|v| v + 6.0).collect();
            let (x, held) = upload(&values, dtype, &[batch, h, width, c]);
            let (w, w64) = upload(&uniform(&mut rng, c), DType::F32, &[c]);
            let (b, b64) = upload(&uniform(&mut rng, c), DType::F32, &[c]);
            for threads in [8, 128] {
                let what =
                    format!("group_norm {batch}×{h}×{width}×{c}/{groups}, {threads} threads");
                let y = group_norm_with(&x, groups, Some(&w), Some(&b), 1e-5, threads);
                assert_close(
                    &what,
                    &y,
                    &reference(&held, h * width, groups, &w64, &b64, 1e-5),
                );
                let y = group_norm_with(&x, groups, None, None, 1e-5, threads);
                let plain = reference(&held, h * width, groups, &vec![1.0; c], &vec![0.0; c], 1e-5);
                assert_close(&what, &y, &plain);
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let mut rng = rng(8);
    for dtype in float_types() {
        for (batch, pixels, c, groups, affine) in
            [(2, 5, 6, 3, true), (1, 67, 4, 2, true), (2, 9, 8, 8, false)]
        {
            let n = batch * pixels * c;
            let shape = [batch, pixels, c];
            let (x, x64) = upload(&uniform(&mut rng, n), dtype, &shape);
            let (w, w64) = upload(&uniform(&mut rng, c), DType::F32, &[c]);
            let (dy, dy64) = upload(&uniform(&mut rng, n), dtype, &shape);
            let w64 = if affine { w64 } else { vec![1.0; c] };
            let zeros = vec![0.0; c];
            let loss = |x: &[f64], w: &[f64], b: &[f64]| {
                dot(&reference(x, pixels, groups, w, b, 1e-3), &dy64)
            };
            let weight = affine.then_some(&w);
            let gradients = group_norm_backward(&x, groups, weight, &dy, 1e-3, affine);
            let dx = numeric_gradient(&x64, |x| loss(x, &w64, &zeros));
            assert_close(&format!("dx {shape:?}"), &gradients.dx, &dx);
            assert_eq!(gradients.dweight.is_some(), affine);
            if let (Some(dweight), Some(dbias)) = (gradients.dweight, gradients.dbias) {
                assert_close(
                    "dweight",
                    &dweight,
                    &numeric_gradient(&w64, |w| loss(&x64, w, &zeros)),
                );
                assert_close(
                    "dbias",
                    &dbias,
                    &numeric_gradient(&zeros, |b| loss(&x64, &w64, b)),
                );
            }
        }
    }
}
