use lavender_wgpu::ops::resize_bicubic::resize_bicubic;
use lavender_wgpu::tensor::Tensor;
use rand::RngExt;

use crate::support::*;

/// Keys' kernel at distance `d`, a = −0.75.
fn keys(d: f64) -> f64 {
    let (a, d) = (-0.75, d.abs());
    match d {
        d if d <= 1.0 => (a + 2.0) * d.powi(3) - (a + 3.0) * d.powi(2) + 1.0,
        d if d < 2.0 => a * d.powi(3) - 5.0 * a * d.powi(2) + 8.0 * a * d - 4.0 * a,
        _ => 0.0,
    }
}

/// Weights (input pixel, share) of output pixel `i` on one axis, as PyTorch defines them.
fn taps(i: usize, input: usize, output: usize) -> [(usize, f64); 4] {
    // The point in f32 as the kernel has it: whether it is a whole number decides which pixels are met.
    let at = (i as f32 + 0.5) * (input as f32 / output as f32) - 0.5;
    let (first, at) = (at.floor() as i64, f64::from(at));
    std::array::from_fn(|k| {
        let pixel = first - 1 + k as i64;
        let clamped = pixel.clamp(0, input as i64 - 1) as usize;
        (clamped, keys(at - pixel as f64))
    })
}

#[test]
fn values_match_f64() {
    let mut rng = rng(103);
    let mut cases = vec![
        ([1, 1, 1, 1], [4, 4]),
        ([1, 1, 1, 2], [5, 3]),
        ([2, 16, 16, 3], [64, 64]),
        ([1, 64, 48, 1], [7, 5]),
    ];
    for _ in 0..8 {
        let mut side = || rng.random_range(1..=23usize);
        cases.push(([2, side(), side(), 3], [side(), side()]));
    }
    for dtype in float_types() {
        for &([b, h, w, c], [oh, ow]) in &cases {
            let (x, hx) = upload(&uniform(&mut rng, b * h * w * c), dtype, &[b, h, w, c]);
            let mut y = vec![0.0; b * oh * ow * c];
            for (i, y) in y.iter_mut().enumerate() {
                let (ch, col) = (i % c, i / c % ow);
                let (row, image) = (i / c / ow % oh, i / c / ow / oh);
                for (r, wy) in taps(row, h, oh) {
                    for (q, wx) in taps(col, w, ow) {
                        *y += wy * wx * hx[((image * h + r) * w + q) * c + ch];
                    }
                }
            }
            let what = format!("{h}x{w} to {oh}x{ow} {dtype:?}");
            assert_close(&what, &resize_bicubic(&x, oh, ow), &y);
        }
    }
}

#[test]
fn a_known_row_comes_out_as_in_pytorch() {
    // torch.nn.functional.interpolate(torch.tensor([[[[0., 1., 2.]]]]), (1, 6), mode="bicubic")
    let x = Tensor::from_f32(gpu(), &[0.0, 1.0, 2.0], &[1, 1, 3, 1]);
    let y = resize_bicubic(&x, 1, 6).to_f32().unwrap();
    let expected = [
        -0.10546875,
        0.19140625,
        0.66796875,
        1.33203125,
        1.80859375,
        2.10546875,
    ];
    assert!(nmse(&y, &expected) < 1e-12, "{y:?}");
}
