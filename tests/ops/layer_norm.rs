use lavender_wgpu::ops::layer_norm::{layer_norm_backward, layer_norm_with};
use lavender_wgpu::tensor::DType;

use crate::support::*;

/// y in f64; `rms` leaves the mean in.
pub fn reference(x: &[f64], w: &[f64], b: &[f64], eps: f64, rms: bool) -> Vec<f64> {
    let n = w.len();
    x.chunks(n)
        .flat_map(|row| {
            let mean = if rms {
                0.0
            } else {
                row.iter().sum::<f64>() / n as f64
            };
            let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n as f64;
            let rstd = 1.0 / (variance + eps).sqrt();
            (0..n)
                .map(move |i| (row[i] - mean) * rstd * w[i] + b[i])
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Shapes [rows, columns]: 1, primes, one past a vec4 and past a workgroup, one too wide to hold in registers.
pub const SHAPES: [(usize, usize); 7] = [
    (1, 2),
    (3, 7),
    (67, 12),
    (2, 131),
    (5, 64),
    (1, 516),
    (2, 2053),
];

#[test]
fn forward_matches_f64() {
    let mut rng = rng(3);
    for dtype in float_types() {
        for (rows, columns) in SHAPES {
            // A mean far from zero: the variance must not come from a difference of squares.
            let values: Vec<f32> = uniform(&mut rng, rows * columns)
                .iter()
                .map(|v| v + 8.0)
                .collect();
            let (x, held) = upload(&values, dtype, &[rows, columns]);
            let (w, w_held) = upload(&uniform(&mut rng, columns), DType::F32, &[columns]);
            let (b, b_held) = upload(&uniform(&mut rng, columns), DType::F32, &[columns]);
            for threads in [8, 128] {
                let what = format!("layer_norm {rows}×{columns}, {threads} threads");
                let y = layer_norm_with(&x, Some(&w), Some(&b), 1e-5, threads);
                assert_close(&what, &y, &reference(&held, &w_held, &b_held, 1e-5, false));
                let y = layer_norm_with(&x, None, None, 1e-5, threads);
                let (ones, zeros) = (vec![1.0; columns], vec![0.0; columns]);
                assert_close(&what, &y, &reference(&held, &ones, &zeros, 1e-5, false));
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let mut rng = rng(4);
    for dtype in float_types() {
        for (rows, columns) in [(3, 7), (67, 4), (2, 33), (65, 36), (2, 205)] {
            let n = rows * columns;
            let (x, x64) = upload(&uniform(&mut rng, n), dtype, &[rows, columns]);
            let (w, w64) = upload(&uniform(&mut rng, columns), DType::F32, &[columns]);
            let (dy, dy64) = upload(&uniform(&mut rng, n), dtype, &[rows, columns]);
            let zeros = vec![0.0; columns];
            let loss =
                |x: &[f64], w: &[f64], b: &[f64]| dot(&reference(x, w, b, 1e-3, false), &dy64);
            let gradients = layer_norm_backward(&x, Some(&w), &dy, None, 1e-3, true);
            let dx = numeric_gradient(&x64, |x| loss(x, &w64, &zeros));
            assert_close(&format!("dx {rows}×{columns}"), &gradients.dx, &dx);
            // The same on top of an earlier gradient, and without those of the weights.
            let (onto, onto64) = upload(&uniform(&mut rng, n), dtype, &[rows, columns]);
            let sum: Vec<f64> = dx.iter().zip(&onto64).map(|(d, o)| d + o).collect();
            for affine in [false, true] {
                let again = layer_norm_backward(&x, Some(&w), &dy, Some(&onto), 1e-3, affine);
                assert_close("dx onto another", &again.dx, &sum);
            }
            let dw = numeric_gradient(&w64, |w| loss(&x64, w, &zeros));
            assert_close("dweight", &gradients.dweight.expect("asked for"), &dw);
            let db = numeric_gradient(&zeros, |b| loss(&x64, &w64, b));
            assert_close("dbias", &gradients.dbias.expect("asked for"), &db);
        }
    }
}
