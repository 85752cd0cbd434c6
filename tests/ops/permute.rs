use lavender_wgpu::ops::permute::{inverse_order, permute};
use lavender_wgpu::tensor::{DType, Tensor, elements};
use rand::RngExt;
use rand::seq::SliceRandom;

use crate::support::*;

fn reference(x: &[f64], shape: &[usize], order: &[usize]) -> Vec<f64> {
    let out: Vec<usize> = order.iter().map(|&i| shape[i]).collect();
    (0..x.len())
        .map(|mut i| {
            let mut index = 0;
            for k in (0..out.len()).rev() {
                index += i % out[k] * elements(&shape[order[k] + 1..]);
                i /= out[k];
            }
            x[index]
        })
        .collect()
}

#[test]
fn any_order_moves_elements_exactly_and_back() {
    let mut rng = rng(31);
    let mut cases = vec![
        (vec![1], vec![0]),
        (vec![37, 41], vec![1, 0]),
        (vec![2, 7, 3, 8], vec![0, 2, 1, 3]),
        (vec![2, 7, 3, 5], vec![0, 2, 1, 3]),
        (vec![3, 1, 4, 1], vec![3, 2, 1, 0]),
        (vec![2, 3, 2, 3, 2, 4], vec![4, 2, 0, 3, 1, 5]),
    ];
    for _ in 0..10 {
        let rank = rng.random_range(1..=6usize);
        let shape: Vec<usize> = (0..rank).map(|_| rng.random_range(1..=5usize)).collect();
        let mut order: Vec<usize> = (0..rank).collect();
        order.shuffle(&mut rng);
        cases.push((shape, order));
    }
    for dtype in float_types() {
        for (shape, order) in &cases {
            let (x, held) = upload(&uniform(&mut rng, elements(shape)), dtype, shape);
            let y = permute(&x, order);
            let expected: Vec<f32> = reference(&held, shape, order)
                .iter()
                .map(|&v| v as f32)
                .collect();
            assert_eq!(y.to_f32().unwrap(), expected, "{shape:?} by {order:?}");
            let back = permute(&y, &inverse_order(order));
            assert_eq!(back.to_f32().unwrap(), x.to_f32().unwrap());
            assert_eq!(back.shape(), shape);
        }
    }
}

#[test]
fn integers_keep_every_bit() {
    // As floats these would be NaNs with payloads.
    let x = Tensor::from_u32(gpu(), &[u32::MAX, 0x7f80_0001, 3, 0xff80_1234], &[2, 2]);
    let y = permute(&x, &[1, 0]);
    assert_eq!(y.dtype(), DType::U32);
    assert_eq!(y.to_u32().unwrap(), [u32::MAX, 3, 0x7f80_0001, 0xff80_1234]);
}
