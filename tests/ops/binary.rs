use lavender_wgpu::ops::binary::{Binary, binary, binary_backward, broadcast_shape, broadcast_to};
use lavender_wgpu::tensor::{DType, elements};
use rand::RngExt;

use crate::support::*;

const OPS: [Binary; 7] = [
    Binary::Add,
    Binary::Sub,
    Binary::Mul,
    Binary::Div,
    Binary::Max,
    Binary::Min,
    Binary::Step,
];

fn apply(op: Binary, a: f64, b: f64) -> f64 {
    match op {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Max => a.max(b),
        Binary::Min => a.min(b),
        Binary::Step if a == b => 0.5,
        Binary::Step => f64::from(a > b),
        Binary::First => a,
    }
}

/// Slopes of `op` in a and in b.
fn slopes(op: Binary, a: f64, b: f64) -> [f64; 2] {
    match op {
        Binary::Add => [1.0, 1.0],
        Binary::Sub => [1.0, -1.0],
        Binary::Mul => [b, a],
        Binary::Div => [1.0 / b, -a / (b * b)],
        Binary::Max => [apply(Binary::Step, a, b), apply(Binary::Step, b, a)],
        Binary::Min => [apply(Binary::Step, b, a), apply(Binary::Step, a, b)],
        Binary::Step => [0.0, 0.0],
        Binary::First => [1.0, 0.0],
    }
}

/// Linear index in `shape` of element `i` of `out`, which `shape` broadcasts to.
fn source(shape: &[usize], out: &[usize], mut i: usize) -> usize {
    let (mut index, mut stride) = (0, 1);
    for k in (0..out.len()).rev() {
        let c = i % out[k];
        i /= out[k];
        if let Some(j) = (k + shape.len()).checked_sub(out.len()) {
            if shape[j] != 1 {
                index += c * stride;
            }
            stride *= shape[j];
        }
    }
    index
}

fn cases() -> Vec<(Vec<usize>, Vec<usize>)> {
    let mut cases = vec![
        (vec![], vec![]),
        (vec![1031], vec![1031]),
        (vec![3, 5, 8], vec![8]),
        (vec![3, 5, 7], vec![7]),
        (vec![7, 12], vec![1]),
        (vec![1], vec![5, 3]),
        (vec![4, 1], vec![1, 9]),
        (vec![2, 3, 4, 8], vec![2, 1, 1, 8]),
        (vec![2, 1, 4, 1, 3, 4], vec![1, 3, 1, 2, 1, 4]),
    ];
    let mut rng = rng(11);
    for _ in 0..12 {
        let rank = rng.random_range(1..=6usize);
        let out: Vec<usize> = (0..rank).map(|_| rng.random_range(1..=5usize)).collect();
        let mut side = || -> Vec<usize> {
            let skip = rng.random_range(0..rank);
            let keep = out[skip..].iter();
            keep.map(|&n| if rng.random_range(0..3) == 0 { 1 } else { n })
                .collect()
        };
        cases.push((side(), side()));
    }
    cases
}

#[test]
fn values_and_gradients_match_f64_over_broadcast_shapes() {
    let mut rng = rng(12);
    for dtype in float_types() {
        for (k, (sa, sb)) in cases().into_iter().enumerate() {
            let op = OPS[k % OPS.len()];
            let what = format!("{op:?} {sa:?} {sb:?} {dtype:?}");
            // Halves of integers tie now and then; the divisor stays away from 0.
            let coarse = |v: f32| (v * 4.0).round() / 2.0;
            let va: Vec<f32> = uniform(&mut rng, elements(&sa))
                .into_iter()
                .map(coarse)
                .collect();
            let vb: Vec<f32> = uniform(&mut rng, elements(&sb))
                .into_iter()
                .map(|v| {
                    if op == Binary::Div {
                        v.signum() * (v.abs() + 0.5)
                    } else {
                        coarse(v)
                    }
                })
                .collect();
            let (a, ha) = upload(&va, dtype, &sa);
            let (b, hb) = upload(&vb, dtype, &sb);
            let out = broadcast_shape(&sa, &sb);
            let n = elements(&out);
            let at: Vec<(usize, usize)> = (0..n)
                .map(|i| (source(&sa, &out, i), source(&sb, &out, i)))
                .collect();
            let y: Vec<f64> = at.iter().map(|&(i, j)| apply(op, ha[i], hb[j])).collect();
            let actual = binary(&a, &b, op);
            assert_eq!(actual.shape(), out, "{what}");
            assert_close(&what, &actual, &y);

            let (dy, hdy) = upload(&uniform(&mut rng, n), dtype, &out);
            let (mut da, mut db) = (vec![0.0; ha.len()], vec![0.0; hb.len()]);
            for (&(i, j), g) in at.iter().zip(&hdy) {
                let [sa, sb] = slopes(op, ha[i], hb[j]);
                da[i] += g * sa;
                db[j] += g * sb;
            }
            let [actual_da, actual_db] = binary_backward(&a, &b, &dy, op, [true, true]);
            let (actual_da, actual_db) = (actual_da.unwrap(), actual_db.unwrap());
            assert_eq!(actual_da.shape(), sa);
            assert_eq!(actual_db.shape(), sb);
            assert_close(&format!("{what} da"), &actual_da, &da);
            assert_close(&format!("{what} db"), &actual_db, &db);
        }
    }
}

#[test]
fn operands_may_differ_in_dtype_and_the_first_decides() {
    if !gpu().tier().f16 {
        return;
    }
    let mut rng = rng(13);
    let (a, ha) = upload(&uniform(&mut rng, 6 * 12), DType::F16, &[6, 12]);
    let (b, hb) = upload(&uniform(&mut rng, 12), DType::F32, &[12]);
    let expected: Vec<f64> = ha.iter().enumerate().map(|(i, v)| v * hb[i % 12]).collect();
    let y = binary(&a, &b, Binary::Mul);
    assert_eq!(y.dtype(), DType::F16);
    assert_close("f16 · f32", &y, &expected);
    let swapped = binary(&b, &a, Binary::Mul);
    assert_eq!(swapped.dtype(), DType::F32);
    assert_close("f32 · f16", &swapped, &expected);
}

#[test]
fn broadcast_repeats_exactly() {
    let mut rng = rng(14);
    let (x, held) = upload(&uniform(&mut rng, 2 * 3), DType::F32, &[2, 1, 3]);
    let y = broadcast_to(&x, &[4, 2, 5, 3]);
    let expected: Vec<f32> = (0..4 * 2 * 5 * 3)
        .map(|i| held[source(&[2, 1, 3], &[4, 2, 5, 3], i)] as f32)
        .collect();
    assert_eq!(y.to_f32().unwrap(), expected);
}

#[test]
#[should_panic(expected = "binary: [2, 3] and [4, 3] do not broadcast")]
fn shapes_that_do_not_broadcast_are_named() {
    broadcast_shape(&[2, 3], &[4, 3]);
}
