use lavender_wgpu::ops::reduce::{
    Reduce, arg_extremum, reduce, reduce_as, reduce_backward, reduced_shape, sum_to,
};
use lavender_wgpu::tensor::{DType, elements};
use rand::RngExt;

use crate::support::*;

const OPS: [Reduce; 4] = [Reduce::Sum, Reduce::Mean, Reduce::Max, Reduce::Min];

/// For each element of `shape`, the index of the result it goes to.
fn targets(shape: &[usize], axes: &[usize]) -> Vec<usize> {
    (0..elements(shape))
        .map(|mut i| {
            let (mut index, mut stride) = (0, 1);
            for k in (0..shape.len()).rev() {
                if !axes.contains(&k) {
                    index += i % shape[k] * stride;
                    stride *= shape[k];
                }
                i /= shape[k];
            }
            index
        })
        .collect()
}

/// Reduced values and, for extrema, the element that each came from.
fn reference(x: &[f64], to: &[usize], n: usize, op: Reduce) -> (Vec<f64>, Vec<usize>) {
    let count = (x.len() / n) as f64;
    let mut y = vec![None; n];
    let mut from = vec![0; n];
    for (i, (&v, &t)) in x.iter().zip(to).enumerate() {
        match (y[t], op) {
            (None, _) => (y[t], from[t]) = (Some(v), i),
            (Some(s), Reduce::Sum | Reduce::Mean) => y[t] = Some(s + v),
            (Some(s), Reduce::Max) if v > s => (y[t], from[t]) = (Some(v), i),
            (Some(s), Reduce::Min) if v < s => (y[t], from[t]) = (Some(v), i),
            _ => {}
        }
    }
    let scale = if op == Reduce::Mean { 1.0 / count } else { 1.0 };
    let y = y.into_iter().map(|v| v.unwrap_or(0.0) * scale).collect();
    (y, from)
}

fn cases() -> Vec<(Vec<usize>, Vec<usize>)> {
    let mut cases = vec![
        (vec![1], vec![0]),
        (vec![10_007], vec![0]),
        (vec![4096], vec![0]),
        (vec![3, 1021], vec![1]),
        (vec![5, 1024], vec![1]),
        (vec![513, 12], vec![0]),
        (vec![129, 7], vec![0]),
        (vec![2, 65, 8], vec![1]),
        (vec![3, 4, 5, 6], vec![0, 2]),
        (vec![3, 4, 5, 8], vec![1, 3]),
        (vec![3, 4, 5], vec![0, 1, 2]),
        (vec![3, 1, 4], vec![1]),
        (vec![2, 3], vec![]),
    ];
    let mut rng = rng(21);
    for _ in 0..10 {
        let rank = rng.random_range(1..=5usize);
        let shape: Vec<usize> = (0..rank).map(|_| rng.random_range(1..=9usize)).collect();
        let axes = (0..rank).filter(|_| rng.random_range(0..2) == 0).collect();
        cases.push((shape, axes));
    }
    cases
}

#[test]
fn values_and_gradients_match_f64_over_axes() {
    let mut rng = rng(22);
    for dtype in float_types() {
        for (k, (shape, axes)) in cases().into_iter().enumerate() {
            for op in [OPS[k % 4], OPS[(k + 2) % 4]] {
                let what = format!("{op:?} {axes:?} of {shape:?} {dtype:?}");
                // Coarse values, so that extrema tie and the first must win.
                let values: Vec<f32> = uniform(&mut rng, elements(&shape))
                    .into_iter()
                    .map(|v| (v * 8.0).round() / 8.0 + 0.0625)
                    .collect();
                let (x, held) = upload(&values, dtype, &shape);
                let to = targets(&shape, &axes);
                let n = elements(&reduced_shape(&shape, &axes, false));
                let (y, from) = reference(&held, &to, n, op);
                for keep in [false, true] {
                    let actual = reduce(&x, &axes, op, keep);
                    assert_eq!(actual.shape(), reduced_shape(&shape, &axes, keep), "{what}");
                    assert_close(&what, &actual, &y);
                }
                assert_close(&what, &reduce_as(&x, &axes, op, false, DType::F32), &y);

                let (dy, hdy) = upload(
                    &uniform(&mut rng, n),
                    dtype,
                    &reduced_shape(&shape, &axes, true),
                );
                let count = (held.len() / n) as f64;
                let dx: Vec<f64> = (0..held.len())
                    .map(|i| match op {
                        Reduce::Sum => hdy[to[i]],
                        Reduce::Mean => hdy[to[i]] / count,
                        _ if from[to[i]] == i => hdy[to[i]],
                        _ => 0.0,
                    })
                    .collect();
                assert_close(
                    &format!("{what} backward"),
                    &reduce_backward(&x, &dy, &axes, op),
                    &dx,
                );
            }
        }
    }
}

#[test]
fn first_extremum_is_found() {
    let values = [0.5f32, 2.0, -3.0, 2.0, -3.0, 0.5];
    let (x, _) = upload(&values, DType::F32, &[2, 3]);
    assert_eq!(arg_extremum(&x, 1, Reduce::Max).to_u32().unwrap(), [1, 0]);
    assert_eq!(arg_extremum(&x, 1, Reduce::Min).to_u32().unwrap(), [2, 1]);
    assert_eq!(
        arg_extremum(&x, 0, Reduce::Max).to_u32().unwrap(),
        [1, 0, 1]
    );
    let flat = x.reshape(&[6]);
    assert_eq!(arg_extremum(&flat, 0, Reduce::Max).to_u32().unwrap(), [1]);
}

#[test]
fn sum_to_undoes_broadcasting() {
    let mut rng = rng(23);
    for dtype in float_types() {
        for (shape, to) in [
            (vec![4, 3, 5], vec![5]),
            (vec![4, 3, 5], vec![3, 1]),
            (vec![2, 3, 4, 8], vec![2, 1, 1, 8]),
            (vec![7, 9], vec![1]),
            (vec![7, 9], vec![7, 9]),
        ] {
            let (x, held) = upload(&uniform(&mut rng, elements(&shape)), dtype, &shape);
            let missing = shape.len() - to.len();
            let axes: Vec<usize> = (0..shape.len())
                .filter(|&i| i < missing || to[i - missing] == 1)
                .collect();
            let (y, _) = reference(&held, &targets(&shape, &axes), elements(&to), Reduce::Sum);
            let actual = sum_to(&x, &to, DType::F32);
            assert_eq!(
                (actual.shape(), actual.dtype()),
                (to.as_slice(), DType::F32)
            );
            assert_close(&format!("{shape:?} to {to:?}"), &actual, &y);
        }
    }
}
