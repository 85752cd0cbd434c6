use lavender_wgpu::ops::concat::concat;
use lavender_wgpu::ops::rotary::{rotary, rotary_backward, rotary_pair, rotary_pair_backward};
use lavender_wgpu::ops::slice::slice;
use lavender_wgpu::tensor::DType;

use crate::support::*;

#[test]
fn turns_pairs_and_back() {
    let mut rng = rng(9);
    for dtype in float_types() {
        for (batch, tokens, heads, dim, per_sample) in [
            (1, 1, 1, 2, true),
            (2, 5, 3, 10, false),
            (3, 7, 2, 16, true),
        ] {
            let half = dim / 2;
            let n = batch * tokens * heads * dim;
            let shape = [batch, tokens, heads * dim];
            let (x, x64) = upload(&uniform(&mut rng, n), dtype, &shape);
            let (dy, dy64) = upload(&uniform(&mut rng, n), dtype, &shape);
            let angle_rows = if per_sample { batch } else { 1 };
            let angles: Vec<f32> = uniform(&mut rng, angle_rows * tokens * half)
                .iter()
                .map(|v| 3.0 * v)
                .collect();
            let table = |f: fn(f32) -> f32| {
                let values: Vec<f32> = angles.iter().map(|&a| f(a)).collect();
                upload(&values, DType::F32, &[angle_rows, tokens, half])
            };
            let ((c, c64), (s, s64)) = (table(f32::cos), table(f32::sin));
            let reference = |x: &[f64], direction: f64| -> Vec<f64> {
                (0..n)
                    .map(|i| {
                        let (row, d) = (i / dim, i % dim);
                        let (b, t) = (row / heads / tokens, row / heads % tokens);
                        let a = ((if per_sample { b } else { 0 }) * tokens + t) * half + d % half;
                        let other = if d < half { -x[i + half] } else { x[i - half] };
                        x[i] * c64[a] + direction * other * s64[a]
                    })
                    .collect()
            };
            assert_close(
                "rotary",
                &rotary(&x, [&c, &s], heads),
                &reference(&x64, 1.0),
            );
            let dx = rotary_backward(&dy, [&c, &s], heads);
            assert_close("rotary backward", &dx, &reference(&dy64, -1.0));
            // Queries and keys together: twice as many heads of the same values, side by side.
            let twice = concat(&[&x, &x], 2);
            let [q, k] = rotary_pair([&twice, &x], [&c, &s], [2 * heads, heads]);
            assert_close("rotary of keys", &k, &reference(&x64, 1.0));
            assert_close(
                "of queries",
                &slice(&q, 2, heads * dim, heads * dim),
                &reference(&x64, 1.0),
            );
            let [_, dk] = rotary_pair_backward([&twice, &dy], [&c, &s], [2 * heads, heads]);
            assert_close("rotary backward of keys", &dk, &reference(&dy64, -1.0));
        }
    }
}
