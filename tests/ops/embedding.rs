use lavender_wgpu::ops::embedding::{embedding, embedding_backward, embedding_in};
use lavender_wgpu::tensor::{DType, Tensor};
use rand::RngExt;

use crate::support::*;

fn ids(rng: &mut impl RngExt, n: usize, rows: usize) -> Vec<u32> {
    (0..n).map(|_| rng.random_range(0..rows as u32)).collect()
}

#[test]
fn rows_come_from_tables_of_every_dtype() {
    let mut rng = rng(10);
    for dtype in float_types() {
        for table_dtype in [DType::F32, DType::F16, DType::Bf16] {
            for (rows, width, n) in [(1, 2, 3), (13, 7 * 2, 29), (50, 64, 5)] {
                let values = uniform(&mut rng, rows * width);
                let (table, held) = upload(&values, table_dtype, &[rows, width]);
                let picks = ids(&mut rng, n, rows);
                let y = embedding(&table, &Tensor::from_u32(gpu(), &picks, &[1, n]), dtype);
                assert_eq!(y.shape(), [1, n, width]);
                let expected: Vec<f64> = picks
                    .iter()
                    .flat_map(|&id| held[id as usize * width..][..width].to_vec())
                    .collect();
                assert_close(&format!("{table_dtype:?} table"), &y, &expected);
            }
        }
    }
}

#[test]
fn a_table_read_in_ranges_gives_the_same_rows() {
    let (rows, width) = (200, 16);
    let mut rng = rng(11);
    let (table, held) = upload(&uniform(&mut rng, rows * width), DType::F32, &[rows, width]);
    let mut picks = ids(&mut rng, 40, rows);
    picks[7] = 5000; // beyond the table: zeros, whatever the range
    let tensor = Tensor::from_u32(gpu(), &picks, &[40]);
    let y = embedding_in(&table, &tensor, DType::F32, &[(0, 64), (64, 128), (192, 8)]);
    let expected: Vec<f64> = picks
        .iter()
        .flat_map(|&id| match (id as usize) < rows {
            true => held[id as usize * width..][..width].to_vec(),
            false => vec![0.0; width],
        })
        .collect();
    assert_close("ranges", &y, &expected);
}

#[test]
fn repeated_ids_add_up_in_the_gradient() {
    let mut rng = rng(12);
    for dtype in float_types() {
        for (rows, width, n) in [(3, 5, 40), (100, 64, 17), (7, 130, 1)] {
            let (dy, held) = upload(&uniform(&mut rng, n * width), dtype, &[n, width]);
            let picks = ids(&mut rng, n, rows);
            let mut expected = vec![0.0; rows * width];
            for (position, &id) in picks.iter().enumerate() {
                for column in 0..width {
                    expected[id as usize * width + column] += held[position * width + column];
                }
            }
            let dtable = embedding_backward(&dy, &Tensor::from_u32(gpu(), &picks, &[n]), rows);
            assert_close("embedding backward", &dtable, &expected);
        }
    }
}
