use lavender_wgpu::ops::cross_entropy::{IGNORE, cross_entropy_backward, cross_entropy_with};
use lavender_wgpu::tensor::{DType, Tensor};
use rand::RngExt;

use crate::support::*;

#[test]
fn losses_and_gradients_match_f64() {
    let mut rng = rng(13);
    for dtype in float_types() {
        for (rows, columns) in [(1, 2), (5, 7), (9, 64), (3, 515), (130, 12)] {
            let values: Vec<f32> = uniform(&mut rng, rows * columns)
                .iter()
                .map(|v| 30.0 + 6.0 * v)
                .collect();
            let (logits, held) = upload(&values, dtype, &[rows, columns]);
            let mut labels: Vec<u32> = (0..rows)
                .map(|_| rng.random_range(0..columns as u32))
                .collect();
            if rows > 2 {
                labels[1] = IGNORE;
                labels[rows - 1] = columns as u32 - 1;
            }
            let label_tensor = Tensor::from_u32(gpu(), &labels, &[rows]);
            let (upstream, up64) = upload(&uniform(&mut rng, rows), DType::F32, &[rows]);
            let (mut loss, mut lse, mut gradient) = (vec![], vec![], vec![]);
            for (r, row) in held.chunks(columns).enumerate() {
                let l = 40.0 + row.iter().map(|v| (v - 40.0).exp()).sum::<f64>().ln();
                lse.push(l);
                let used = labels[r] != IGNORE;
                loss.push(if used {
                    l - row[labels[r] as usize]
                } else {
                    0.0
                });
                gradient.extend(row.iter().enumerate().map(|(c, v)| {
                    let hot = if c as u32 == labels[r] { 1.0 } else { 0.0 };
                    if used {
                        ((v - l).exp() - hot) * up64[r]
                    } else {
                        0.0
                    }
                }));
            }
            for threads in [8, 128] {
                let what = format!("cross_entropy {rows}×{columns}, {threads} threads");
                let result = cross_entropy_with(&logits, &label_tensor, threads);
                assert_close(&what, &result.loss, &loss);
                assert_close(&what, &result.lse, &lse);
                let d = cross_entropy_backward(&logits, &label_tensor, &result.lse, &upstream);
                assert_close(&what, &d, &gradient);
            }
        }
    }
}
