use lavender_wgpu::ops::group_norm::{GroupNorm, group_norm, group_norm_backward, group_norm_with};
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
        (1, 35, 19, 12, 3),
    ];
    for dtype in float_types() {
        for (batch, h, width, c, groups) in shapes {
            let n = batch * h * width * c;
            let values: Vec<f32> = uniform(&mut rng, n).iter().map(|v| v + 6.0).collect();
            let (x, held) = upload(&values, dtype, &[batch, h, width, c]);
            let (w, w64) = upload(&uniform(&mut rng, c), DType::F32, &[c]);
            let (b, b64) = upload(&uniform(&mut rng, c), DType::F32, &[c]);
            let plain = GroupNorm {
                groups,
                eps: 1e-5,
                ..Default::default()
            };
            let norm = GroupNorm {
                weight: Some(&w),
                bias: Some(&b),
                ..plain
            };
            for threads in [8, 128] {
                let what =
                    format!("group_norm {batch}×{h}×{width}×{c}/{groups}, {threads} threads");
                let (y, _) = group_norm_with(&x, &norm, threads);
                assert_close(
                    &what,
                    &y,
                    &reference(&held, h * width, groups, &w64, &b64, 1e-5),
                );
                let followed = GroupNorm { silu: true, ..norm };
                let (y, _) = group_norm_with(&x, &followed, threads);
                let expected: Vec<f64> = reference(&held, h * width, groups, &w64, &b64, 1e-5)
                    .into_iter()
                    .map(silu)
                    .collect();
                assert_close(&what, &y, &expected);
                let (y, _) = group_norm_with(&x, &plain, threads);
                let expected =
                    reference(&held, h * width, groups, &vec![1.0; c], &vec![0.0; c], 1e-5);
                assert_close(&what, &y, &expected);
            }
        }
    }
}

fn silu(z: f64) -> f64 {
    z / (1.0 + (-z).exp())
}

#[test]
fn gradients_match_finite_differences() {
    let mut rng = rng(8);
    for dtype in float_types() {
        for (batch, pixels, c, groups, affine, followed) in [
            (2, 5, 6, 3, true, false),
            (1, 261, 4, 2, true, true),
            (2, 9, 8, 8, false, false),
            (2, 3, 6, 2, true, true),
        ] {
            let n = batch * pixels * c;
            let shape = [batch, pixels, c];
            let (x, x64) = upload(&uniform(&mut rng, n), dtype, &shape);
            let (w, w64) = upload(&uniform(&mut rng, c), DType::F32, &[c]);
            let (b, b64) = upload(&uniform(&mut rng, c), DType::F32, &[c]);
            let (dy, dy64) = upload(&uniform(&mut rng, n), dtype, &shape);
            let (onto, onto64) = upload(&uniform(&mut rng, n), dtype, &shape);
            let w64 = if affine { w64 } else { vec![1.0; c] };
            let b64 = if affine { b64 } else { vec![0.0; c] };
            let loss = |x: &[f64], w: &[f64], b: &[f64]| {
                let mut y = reference(x, pixels, groups, w, b, 1e-3);
                if followed {
                    y.iter_mut().for_each(|z| *z = silu(*z));
                }
                dot(&y, &dy64)
            };
            let norm = GroupNorm {
                groups,
                weight: affine.then_some(&w),
                bias: affine.then_some(&b),
                eps: 1e-3,
                silu: followed,
            };
            let dx = numeric_gradient(&x64, |x| loss(x, &w64, &b64));
            let (_, statistics) = group_norm(&x, &norm);
            for onto in [None, Some((&onto, &onto64))] {
                let earlier = onto.map(|(tensor, _)| tensor);
                let gradients = group_norm_backward(&x, &statistics, &dy, earlier, &norm, affine);
                let mut expected = dx.clone();
                for (sum, earlier) in expected.iter_mut().zip(onto.iter().flat_map(|o| o.1)) {
                    *sum += earlier;
                }
                assert_close(&format!("dx {shape:?}"), &gradients.dx, &expected);
                assert_eq!(gradients.dweight.is_some(), affine);
                if let (Some(dweight), Some(dbias)) = (gradients.dweight, gradients.dbias) {
                    let expected = numeric_gradient(&w64, |w| loss(&x64, w, &b64));
                    assert_close("dweight", &dweight, &expected);
                    let expected = numeric_gradient(&b64, |b| loss(&x64, &w64, b));
                    assert_close("dbias", &dbias, &expected);
                }
            }
        }
    }
}
