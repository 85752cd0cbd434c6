use lavender_wgpu::ops::rms_norm::{rms_norm_backward, rms_norm_with};
use lavender_wgpu::tensor::DType;

use super::layer_norm::{SHAPES, reference};
use crate::support::*;

#[test]
fn forward_matches_f64() {
    let mut rng = rng(5);
    for dtype in float_types() {
        for (rows, columns) in SHAPES {
            let (x, held) = upload(&uniform(&mut rng, rows * columns), dtype, &[rows, columns]);
            let (w, w_held) = upload(&uniform(&mut rng, columns), DType::F32, &[columns]);
            let zeros = vec![0.0; columns];
            for threads in [8, 128] {
                let what = format!("rms_norm {rows}×{columns}, {threads} threads");
                let y = rms_norm_with(&x, Some(&w), 1e-6, threads);
                assert_close(&what, &y, &reference(&held, &w_held, &zeros, 1e-6, true));
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let mut rng = rng(6);
    for dtype in float_types() {
        for (rows, columns) in [(3, 7), (67, 4), (2, 33), (65, 36), (2, 205)] {
            let n = rows * columns;
            let (x, x64) = upload(&uniform(&mut rng, n), dtype, &[rows, columns]);
            let (w, w64) = upload(&uniform(&mut rng, columns), DType::F32, &[columns]);
            let (dy, dy64) = upload(&uniform(&mut rng, n), dtype, &[rows, columns]);
            let zeros = vec![0.0; columns];
            let loss = |x: &[f64], w: &[f64]| dot(&reference(x, w, &zeros, 1e-3, true), &dy64);
            let gradients = rms_norm_backward(&x, Some(&w), &dy, None, 1e-3, true);
            let dx = numeric_gradient(&x64, |x| loss(x, &w64));
            assert_close(&format!("dx {rows}×{columns}"), &gradients.dx, &dx);
            // The same on top of an earlier gradient, and without those of the weights.
            let (onto, onto64) = upload(&uniform(&mut rng, n), dtype, &[rows, columns]);
            let sum: Vec<f64> = dx.iter().zip(&onto64).map(|(d, o)| d + o).collect();
            for affine in [false, true] {
                let again = rms_norm_backward(&x, Some(&w), &dy, Some(&onto), 1e-3, affine);
                assert_close("dx onto another", &again.dx, &sum);
            }
            let dw = numeric_gradient(&w64, |w| loss(&x64, w));
            assert_close("dweight", &gradients.dweight.expect("asked for"), &dw);
            assert!(gradients.dbias.is_none());
        }
    }
}
