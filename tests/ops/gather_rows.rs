use lavender_wgpu::ops::gather_rows::{gather_rows, scatter_add_rows};
use lavender_wgpu::tensor::Tensor;
use rand::RngExt;

use crate::support::*;

#[test]
fn rows_are_gathered_exactly_and_summed_back() {
    let mut rng = rng(71);
    for dtype in float_types() {
        for (n, width, count) in [
            (1, 1, 1),
            (5, 3, 17),
            (67, 8, 131),
            (300, 20, 7),
            (3, 1, 64),
        ] {
            let (x, held) = upload(&uniform(&mut rng, n * width), dtype, &[n, width]);
            let rows: Vec<u32> = (0..count).map(|_| rng.random_range(0..n as u32)).collect();
            let index = Tensor::from_u32(gpu(), &rows, &[count]);
            let y = gather_rows(&x, &index);
            assert_eq!(y.shape(), [count, width]);
            let at = |r: u32| r as usize * width..(r as usize + 1) * width;
            let expected: Vec<f32> = rows
                .iter()
                .flat_map(|&r| held[at(r)].iter().map(|&v| v as f32))
                .collect();
            assert_eq!(y.to_f32().unwrap(), expected, "{n}x{width} rows {count}");

            let (dy, hdy) = upload(&uniform(&mut rng, count * width), dtype, &[count, width]);
            let mut dx = vec![0.0; n * width];
            for (k, &r) in rows.iter().enumerate() {
                for c in 0..width {
                    dx[r as usize * width + c] += hdy[k * width + c];
                }
            }
            let first = scatter_add_rows(&dy, &index, n);
            assert_close(&format!("scatter {n}x{width} rows {count}"), &first, &dx);
            let again = scatter_add_rows(&dy, &index, n);
            assert_eq!(
                first.to_f32().unwrap(),
                again.to_f32().unwrap(),
                "same bits each time"
            );
        }
    }
}

#[test]
fn rows_past_the_end_give_zeros_and_take_nothing() {
    let x = Tensor::from_f32(gpu(), &[1.0, 2.0, 3.0, 4.0], &[2, 2]);
    let rows = Tensor::from_u32(gpu(), &[1, u32::MAX, 0], &[3]);
    let y = gather_rows(&x, &rows);
    assert_eq!(y.to_f32().unwrap(), [3.0, 4.0, 0.0, 0.0, 1.0, 2.0]);
    let dx = scatter_add_rows(&Tensor::from_f32(gpu(), &[1.0; 6], &[3, 2]), &rows, 2);
    assert_eq!(dx.to_f32().unwrap(), [1.0; 4]);
}

#[test]
fn integers_keep_every_bit() {
    let x = Tensor::from_u32(gpu(), &[5, u32::MAX, 0x7f80_0001], &[3, 1]);
    let y = gather_rows(&x, &Tensor::from_u32(gpu(), &[2, 1], &[2]));
    assert_eq!(y.to_u32().unwrap(), [0x7f80_0001, u32::MAX]);
}
