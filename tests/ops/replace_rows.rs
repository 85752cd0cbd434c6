use lavender_wgpu::ops::replace_rows::{replace_rows, replace_rows_backward};
use lavender_wgpu::tensor::Tensor;
use rand::seq::SliceRandom;

use crate::support::*;

#[test]
fn rows_are_replaced_and_gradients_split() {
    let mut rng = rng(81);
    for dtype in float_types() {
        for (n, width, count) in [(1, 1, 1), (9, 3, 4), (65, 8, 31), (130, 5, 130)] {
            let (x, hx) = upload(&uniform(&mut rng, n * width), dtype, &[n, width]);
            let (source, hs) = upload(&uniform(&mut rng, count * width), dtype, &[count, width]);
            let mut rows: Vec<u32> = (0..n as u32).collect();
            rows.shuffle(&mut rng);
            rows.truncate(count);
            let index = Tensor::from_u32(gpu(), &rows, &[count]);
            let place = |i: usize| rows.iter().position(|&r| r as usize == i / width);
            let expected: Vec<f32> = (0..n * width)
                .map(|i| match place(i) {
                    Some(k) => hs[k * width + i % width] as f32,
                    None => hx[i] as f32,
                })
                .collect();
            let y = replace_rows(&x, &index, &source);
            assert_eq!(y.to_f32().unwrap(), expected, "{n}x{width} rows {count}");
            assert_eq!(
                x.to_f32().unwrap()[0],
                hx[0] as f32,
                "the input stays as it was"
            );

            let (dy, hdy) = upload(&uniform(&mut rng, n * width), dtype, &[n, width]);
            let (dx, ds) = replace_rows_backward(&dy, &index);
            let expected: Vec<f32> = (0..n * width)
                .map(|i| {
                    if place(i).is_some() {
                        0.0
                    } else {
                        hdy[i] as f32
                    }
                })
                .collect();
            assert_eq!(dx.to_f32().unwrap(), expected);
            let expected: Vec<f32> = rows
                .iter()
                .flat_map(|&r| hdy[r as usize * width..][..width].iter().map(|&v| v as f32))
                .collect();
            assert_eq!(ds.to_f32().unwrap(), expected);
        }
    }
}
