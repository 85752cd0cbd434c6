use lavender_wgpu::ops::swiglu::{swiglu, swiglu_backward};

use crate::support::*;

#[test]
fn values_and_gradients_match_f64() {
    let mut rng = rng(111);
    for dtype in float_types() {
        for n in [1, 3, 64, 1027] {
            let spread: Vec<f32> = uniform(&mut rng, n).iter().map(|v| 6.0 * v).collect();
            let (gate, hg) = upload(&spread, dtype, &[n]);
            let (up, hu) = upload(&uniform(&mut rng, n), dtype, &[n]);
            let (dy, hd) = upload(&uniform(&mut rng, n), dtype, &[n]);
            let s: Vec<f64> = hg.iter().map(|g| 1.0 / (1.0 + (-g).exp())).collect();
            let y: Vec<f64> = (0..n).map(|i| hg[i] * s[i] * hu[i]).collect();
            let dg: Vec<f64> = (0..n)
                .map(|i| hd[i] * hu[i] * s[i] * (1.0 + hg[i] * (1.0 - s[i])))
                .collect();
            let du: Vec<f64> = (0..n).map(|i| hd[i] * hg[i] * s[i]).collect();
            assert_close("swiglu", &swiglu(&gate, &up), &y);
            let (dgate, dup) = swiglu_backward(&gate, &up, &dy);
            assert_close("swiglu dgate", &dgate, &dg);
            assert_close("swiglu dup", &dup, &du);
        }
    }
}

#[test]
fn large_gates_stay_finite() {
    let (gate, _) = upload(
        &[-200.0, 200.0, -88.8, 88.8],
        lavender_wgpu::tensor::DType::F32,
        &[4],
    );
    let y = swiglu(&gate, &gate).to_f32().unwrap();
    assert!(y.iter().all(|v| v.is_finite()), "{y:?}");
    assert!(y[0].abs() < 1e-20 && (y[1] - 40_000.0).abs() < 0.1, "{y:?}");
}
