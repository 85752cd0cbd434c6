use lavender_wgpu::ops::concat::concat;
use lavender_wgpu::ops::slice::slice;
use lavender_wgpu::tensor::{Tensor, elements};
use rand::RngExt;

use crate::support::*;

#[test]
fn parts_join_on_any_axis_and_slice_apart() {
    let mut rng = rng(51);
    for dtype in float_types() {
        for case in 0..16 {
            let rank = rng.random_range(1..=4usize);
            let axis = rng.random_range(0..rank);
            let unit = if case % 2 == 0 { 4 } else { 1 };
            let mut shape: Vec<usize> = (0..rank).map(|_| rng.random_range(1..=5usize)).collect();
            shape[rank - 1] *= unit;
            let parts: Vec<(Tensor, Vec<f64>)> = (0..rng.random_range(1..=4))
                .map(|_| {
                    shape[axis] =
                        rng.random_range(1..=5usize) * if axis == rank - 1 { unit } else { 1 };
                    upload(&uniform(&mut rng, elements(&shape)), dtype, &shape)
                })
                .collect();
            let tensors: Vec<&Tensor> = parts.iter().map(|(t, _)| t).collect();
            let y = concat(&tensors, axis);
            let (outer, inner) = (elements(&shape[..axis]), elements(&shape[axis + 1..]));
            let mut expected = Vec::new();
            for o in 0..outer {
                for (t, held) in &parts {
                    let width = t.dim(axis) * inner;
                    expected.extend(held[o * width..][..width].iter().map(|&v| v as f32));
                }
            }
            assert_eq!(
                y.to_f32().unwrap(),
                expected,
                "axis {axis} of {shape:?} {dtype:?}"
            );
            let mut start = 0;
            for (t, _) in &parts {
                let part = slice(&y, axis, start, t.dim(axis));
                assert_eq!(part.to_f32().unwrap(), t.to_f32().unwrap());
                start += t.dim(axis);
            }
            assert_eq!(start, y.dim(axis));
        }
    }
}

#[test]
#[should_panic(expected = "concat on axis 0")]
fn shapes_that_do_not_fit_are_named() {
    let a = Tensor::from_f32(gpu(), &[0.0; 6], &[2, 3]);
    let b = Tensor::from_f32(gpu(), &[0.0; 8], &[2, 4]);
    concat(&[&a, &b], 0);
}
