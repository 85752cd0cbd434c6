use lavender_wgpu::gpu::{Gpu, GpuOptions};
use lavender_wgpu::ops::cross_entropy::IGNORE;
use lavender_wgpu::ops::linear_cross_entropy::linear_cross_entropy_with;
use lavender_wgpu::tensor::{DType, Tensor};
use rand::RngExt;

use crate::support::*;

#[test]
fn chunked_losses_and_gradients_match_f64() {
    let mut rng = rng(31);
    for dtype in float_types() {
        // One chunk; chunks of 64 rows with a short last one; exactly two.
        for (rows, inputs, words) in [(1, 3, 5), (150, 12, 33), (128, 8, 64)] {
            let (x, x64) = upload(&uniform(&mut rng, rows * inputs), dtype, &[rows, inputs]);
            let (w, w64) = upload(&uniform(&mut rng, words * inputs), dtype, &[words, inputs]);
            let mut labels: Vec<u32> = (0..rows)
                .map(|_| rng.random_range(0..words as u32))
                .collect();
            if rows > 2 {
                labels[1] = IGNORE;
            }
            let factor = 0.125;
            let mut loss = 0.0;
            let (mut dx, mut dw) = (vec![0.0; x64.len()], vec![0.0; w64.len()]);
            for (r, &label) in labels.iter().enumerate().filter(|(_, l)| **l != IGNORE) {
                let row = &x64[r * inputs..][..inputs];
                let weight = |v: usize| &w64[v * inputs..][..inputs];
                let dot = |v: usize| -> f64 { row.iter().zip(weight(v)).map(|(a, b)| a * b).sum() };
                let logits: Vec<f64> = (0..words).map(dot).collect();
                let lse = logits.iter().map(|l| l.exp()).sum::<f64>().ln();
                loss += factor * (lse - logits[label as usize]);
                for (v, logit) in logits.iter().enumerate() {
                    let hot = if v as u32 == label { 1.0 } else { 0.0 };
                    let d = factor * ((logit - lse).exp() - hot);
                    for c in 0..inputs {
                        dx[r * inputs + c] += d * w64[v * inputs + c];
                        dw[v * inputs + c] += d * row[c];
                    }
                }
            }
            let labels = Tensor::from_u32(gpu(), &labels, &[rows]);
            let what = format!("linear_cross_entropy {rows}×{inputs}→{words} {dtype:?}");
            for needs in [[true, true], [false, true], [true, false], [false, false]] {
                let given = linear_cross_entropy_with(&x, &w, &labels, factor as f32, needs, 1);
                assert_close(&what, &given.loss, &[loss]);
                assert_eq!([given.dx.is_some(), given.dw.is_some()], needs);
                if let Some(given) = &given.dx {
                    assert_close(&what, given, &dx);
                }
                if let Some(given) = &given.dw {
                    assert_close(&what, given, &dw);
                }
            }
        }
    }
}

#[test]
fn logits_are_never_all_stored() {
    let (rows, inputs, words) = (640, 4, 4096);
    // A GPU of its own: other tests allocate too.
    let gpu = Gpu::new(&GpuOptions::default()).expect("an adapter");
    let x = Tensor::zeros(&gpu, DType::F32, &[rows, inputs]);
    let w = Tensor::zeros(&gpu, DType::F32, &[words, inputs]);
    let labels = Tensor::from_u32(&gpu, &vec![3; rows], &[rows]);
    let held = gpu.memory().current_bytes;
    gpu.reset_peak();
    let factor = 1.0 / rows as f32;
    let given = linear_cross_entropy_with(&x, &w, &labels, factor, [true, true], 1 << 20);
    let loss = given.loss.to_f32().expect("readable")[0];
    assert!((loss - (words as f32).ln()).abs() < 1e-4, "{loss}");
    let (peak, whole) = (gpu.memory().peak_bytes - held, (rows * words * 4) as u64);
    assert!(
        peak < whole,
        "{peak} bytes on the way, {whole} in all logits"
    );
}
