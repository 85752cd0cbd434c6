use lavender_wgpu::ops::geglu::{geglu, geglu_backward};

use crate::support::*;

/// Φ(x) by its series: exact to f64 for the arguments here.
fn normal_cdf(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for k in 1..200 {
        term *= x * x / f64::from(2 * k + 1);
        sum += term;
    }
    0.5 + sum * (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

fn reference(x: &[f64], n: usize) -> Vec<f64> {
    let row = |row: &[f64]| -> Vec<f64> {
        (0..n)
            .map(|i| row[i] * row[n + i] * normal_cdf(row[n + i]))
            .collect()
    };
    x.chunks(2 * n).flat_map(row).collect()
}

#[test]
fn values_and_gradients_match_f64() {
    let mut rng = rng(141);
    for dtype in float_types() {
        for (rows, n) in [(1, 1), (3, 7), (5, 12), (33, 64), (2, 131)] {
            let values: Vec<f32> = uniform(&mut rng, 2 * n * rows)
                .iter()
                .map(|v| 3.0 * v)
                .collect();
            let (x, x64) = upload(&values, dtype, &[rows, 2 * n]);
            let (dy, dy64) = upload(&uniform(&mut rng, n * rows), dtype, &[rows, n]);
            assert_close(
                &format!("geglu {rows}×{n}"),
                &geglu(&x),
                &reference(&x64, n),
            );
            let dx = numeric_gradient(&x64, |x| dot(&reference(x, n), &dy64));
            let what = format!("geglu backward {rows}×{n}");
            assert_close(&what, &geglu_backward(&x, &dy), &dx);
        }
    }
}
