use lavender_wgpu::ops::resize_bilinear::{resize_bilinear, resize_bilinear_backward};
use lavender_wgpu::tensor::{DType, Tensor};
use rand::RngExt;

use crate::support::*;

/// Weights (input pixel, share) of output pixel `i` on one axis, as PyTorch defines them.
fn taps(i: usize, input: usize, output: usize) -> [(usize, f64); 2] {
    let at = ((i as f64 + 0.5) * input as f64 / output as f64 - 0.5).max(0.0);
    let low = (at as usize).min(input - 1);
    let share = at - low as f64;
    [(low, 1.0 - share), ((low + 1).min(input - 1), share)]
}

#[test]
fn values_and_gradients_match_f64() {
    let mut rng = rng(101);
    let mut cases = vec![
        ([1, 1, 1, 1], [1, 1]),
        ([1, 1, 1, 2], [5, 3]),
        ([2, 16, 16, 3], [32, 32]),
        ([2, 27, 27, 2], [32, 32]),
        ([1, 64, 48, 1], [7, 5]),
        ([1, 32, 32, 1], [1, 1]),
    ];
    for _ in 0..8 {
        let mut side = || rng.random_range(1..=23usize);
        cases.push(([2, side(), side(), 3], [side(), side()]));
    }
    for dtype in float_types() {
        for &([b, h, w, c], [oh, ow]) in &cases {
            let what = format!("{h}x{w} to {oh}x{ow} {dtype:?}");
            let (x, hx) = upload(&uniform(&mut rng, b * h * w * c), dtype, &[b, h, w, c]);
            let (dy, hdy) = upload(&uniform(&mut rng, b * oh * ow * c), dtype, &[b, oh, ow, c]);
            let mut y = vec![0.0; hdy.len()];
            let mut dx = vec![0.0; hx.len()];
            for i in 0..hdy.len() {
                let (ch, col) = (i % c, i / c % ow);
                let (row, image) = (i / c / ow % oh, i / c / ow / oh);
                for (r, wy) in taps(row, h, oh) {
                    for (q, wx) in taps(col, w, ow) {
                        let from = ((image * h + r) * w + q) * c + ch;
                        y[i] += wy * wx * hx[from];
                        dx[from] += wy * wx * hdy[i];
                    }
                }
            }
            assert_close(&what, &resize_bilinear(&x, oh, ow), &y);
            assert_close(
                &format!("{what} backward"),
                &resize_bilinear_backward(&dy, h, w),
                &dx,
            );
        }
    }
}

#[test]
fn a_known_row_comes_out_as_in_pytorch() {
    // torch.nn.functional.interpolate(torch.tensor([[[[0., 1., 2.]]]]), (1, 6), mode="bilinear")
    let x = Tensor::from_f32(gpu(), &[0.0, 1.0, 2.0], &[1, 1, 3, 1]);
    let y = resize_bilinear(&x, 1, 6).to_f32().unwrap();
    let expected = [0.0, 0.25, 0.75, 1.25, 1.75, 2.0].map(f64::from);
    assert!(nmse(&y, &expected) < 1e-12, "{y:?}");
    assert_eq!(x.dtype(), DType::F32);
}
