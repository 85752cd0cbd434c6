use lavender_wgpu::ops::slice::{pad_slice, slice};
use lavender_wgpu::tensor::{Tensor, elements};
use rand::RngExt;

use crate::support::*;

#[test]
fn ranges_of_any_axis_and_their_padding_are_exact() {
    let mut rng = rng(41);
    for dtype in float_types() {
        for case in 0..24 {
            let rank = rng.random_range(1..=4usize);
            let mut shape: Vec<usize> = (0..rank).map(|_| rng.random_range(1..=9usize)).collect();
            if case % 2 == 0 {
                // The vec4 path: rows of multiples of four.
                shape[rank - 1] *= 4;
            }
            let axis = rng.random_range(0..rank);
            let unit = if axis == rank - 1 && case % 2 == 0 {
                4
            } else {
                1
            };
            let len = unit * rng.random_range(1..=shape[axis] / unit);
            let start = unit * rng.random_range(0..=(shape[axis] - len) / unit);
            let what = format!("{shape:?} axis {axis} {start}+{len} {dtype:?}");
            let (x, held) = upload(&uniform(&mut rng, elements(&shape)), dtype, &shape);
            let inner = elements(&shape[axis + 1..]);
            let inside = |i: usize| (start..start + len).contains(&(i / inner % shape[axis]));
            let expected: Vec<f32> = (0..held.len())
                .filter(|&i| inside(i))
                .map(|i| held[i] as f32)
                .collect();
            let y = slice(&x, axis, start, len);
            assert_eq!(y.to_f32().unwrap(), expected, "{what}");
            let padded = pad_slice(&y, axis, start, shape[axis]);
            let expected: Vec<f32> = (0..held.len())
                .map(|i| if inside(i) { held[i] as f32 } else { 0.0 })
                .collect();
            assert_eq!(padded.shape(), shape);
            assert_eq!(padded.to_f32().unwrap(), expected, "{what} padded");
        }
    }
}

#[test]
fn integers_keep_every_bit() {
    let x = Tensor::from_u32(gpu(), &[1, u32::MAX, 3, 4, 0x7f80_0001, 6], &[2, 3]);
    assert_eq!(
        slice(&x, 1, 1, 1).to_u32().unwrap(),
        [u32::MAX, 0x7f80_0001]
    );
}

#[test]
#[should_panic(expected = "slice: 2..5 of axis 1 of [2, 4]")]
fn a_range_outside_is_named() {
    slice(&Tensor::from_f32(gpu(), &[0.0; 8], &[2, 4]), 1, 2, 3);
}
