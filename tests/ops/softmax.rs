use lavender_wgpu::ops::softmax::{softmax_backward, softmax_with};

use crate::support::*;

fn reference(x: &[f64], columns: usize) -> Vec<f64> {
    x.chunks(columns)
        .flat_map(|row| {
            let peak = row.iter().cloned().fold(f64::MIN, f64::max);
            let sum: f64 = row.iter().map(|v| (v - peak).exp()).sum();
            row.iter()
                .map(move |v| (v - peak).exp() / sum)
                .collect::<Vec<_>>()
        })
        .collect()
}

#[test]
fn rows_and_gradients_match_f64() {
    let mut rng = rng(2);
    for dtype in float_types() {
        for (rows, columns) in [(1, 1), (3, 7), (5, 64), (2, 257), (130, 12), (1, 1028)] {
            let n = rows * columns;
            // Values around 40: exp without the row maximum would lose the sum's precision.
            let values: Vec<f32> = uniform(&mut rng, n)
                .iter()
                .map(|v| 40.0 + 5.0 * v)
                .collect();
            let (x, held) = upload(&values, dtype, &[rows, columns]);
            let expected = reference(&held, columns);
            for threads in [8, 128] {
                let what = format!("softmax {rows}×{columns}, {threads} threads");
                assert_close(&what, &softmax_with(&x, threads), &expected);
            }
            let y: Vec<f32> = expected.iter().map(|&v| v as f32).collect();
            let (y, y_held) = upload(&y, dtype, &[rows, columns]);
            let (dy, dy_held) = upload(&uniform(&mut rng, n), dtype, &[rows, columns]);
            if columns == 1 {
                continue; // the gradient is zero: no norm to compare with
            }
            let dx: Vec<f64> = (0..n)
                .map(|i| {
                    let row = i / columns * columns..(i / columns + 1) * columns;
                    y_held[i] * (dy_held[i] - dot(&y_held[row.clone()], &dy_held[row]))
                })
                .collect();
            assert_close("softmax backward", &softmax_backward(&y, &dy), &dx);
        }
    }
}
