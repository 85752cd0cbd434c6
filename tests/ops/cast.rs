use lavender_wgpu::ops::cast::cast;
use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::*;

/// Ordinary values, ties of the rounding, zeros, and the ends of both ranges.
fn values() -> Vec<f32> {
    let mut values = uniform(&mut rng(61), 1021);
    values.extend([
        0.0,
        -0.0,
        1.0,
        65504.0,
        -65504.0,
        6.1e-5,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        1e-3,
        300.7,
    ]);
    values
}

#[test]
fn every_pair_rounds_to_nearest_even() {
    let mut floats = float_types();
    floats.push(DType::Bf16);
    let values = values();
    for &from in &floats {
        for &to in &floats {
            let bytes = from.narrow(&values);
            let held = from.widen(&bytes);
            let x = Tensor::from_bytes(gpu(), &bytes, from, &[values.len()]);
            let y = cast(&x, to);
            assert_eq!(y.dtype(), to);
            let expected = to.widen(&to.narrow(&held));
            assert_eq!(y.to_f32().unwrap(), expected, "{from:?} to {to:?}");
        }
    }
}

#[test]
fn infinities_and_nan_survive_bf16() {
    let x = Tensor::from_f32(gpu(), &[f32::INFINITY, f32::NEG_INFINITY, f32::NAN], &[3]);
    let y = cast(&cast(&x, DType::Bf16), DType::F32).to_f32().unwrap();
    assert!(
        y[0] == f32::INFINITY && y[1] == f32::NEG_INFINITY && y[2].is_nan(),
        "{y:?}"
    );
}

#[test]
fn integers_become_floats_and_back() {
    let x = Tensor::from_u32(gpu(), &[0, 1, 7, 1 << 20, 4_000_000_000], &[5]);
    let y = cast(&x, DType::F32);
    assert_eq!(y.to_f32().unwrap(), [0.0, 1.0, 7.0, 1048576.0, 4e9]);
    assert_eq!(
        cast(&y, DType::U32).to_u32().unwrap(),
        [0, 1, 7, 1 << 20, 4_000_000_000]
    );
}
