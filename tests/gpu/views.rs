use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::*;

fn ramp(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32).collect()
}

#[test]
fn aligned_rows_are_views_and_others_are_copies() {
    let row = gpu().tier().offset_alignment as usize / 4;
    let x = Tensor::from_f32(gpu(), &ramp(6 * row), &[6, row]);
    let view = x.narrow(2, 3);
    assert!(view.shares_storage(&x));
    assert_eq!(view.shape(), [3, row]);
    assert_eq!(view.to_f32().unwrap(), ramp(6 * row)[2 * row..5 * row]);
    let inner = view.narrow(1, 1);
    assert!(inner.shares_storage(&x));
    assert_eq!(inner.to_f32().unwrap(), ramp(6 * row)[3 * row..4 * row]);
    inner.write_f32(&vec![-1.0; row]);
    assert_eq!(x.to_f32().unwrap()[3 * row..4 * row], vec![-1.0; row]);
    assert_eq!(
        x.to_f32().unwrap()[4 * row],
        4.0 * row as f32,
        "the next row is untouched"
    );

    let narrow = Tensor::from_f32(gpu(), &ramp(15), &[5, 3]);
    let copy = narrow.narrow(1, 2);
    if row > 3 {
        assert!(!copy.shares_storage(&narrow));
    }
    assert_eq!(copy.to_f32().unwrap(), ramp(15)[3..9]);
}

#[test]
fn reshape_is_a_view_of_the_same_elements() {
    let x = Tensor::from_f32(gpu(), &ramp(12), &[3, 4]);
    let y = x.reshape(&[2, 1, 6]);
    assert!(y.shares_storage(&x));
    assert_eq!(
        (y.shape(), y.rank(), y.last_dim()),
        ([2, 1, 6].as_slice(), 3, 6)
    );
    assert_eq!(y.to_f32().unwrap(), ramp(12));
    let own = x.duplicate();
    assert!(!own.shares_storage(&x));
    x.write_f32(&[0.0; 12]);
    assert_eq!(own.to_f32().unwrap(), ramp(12));
}

#[test]
#[should_panic(expected = "reshape: [3, 4] to [5]")]
fn a_reshape_of_another_size_is_named() {
    Tensor::from_f32(gpu(), &ramp(12), &[3, 4]).reshape(&[5]);
}

#[test]
#[should_panic(expected = "narrow: rows 2..4 of [3, 4]")]
fn rows_past_the_end_are_named() {
    Tensor::from_f32(gpu(), &ramp(12), &[3, 4]).narrow(2, 2);
}

#[test]
fn sixteen_bit_floats_of_odd_length_go_both_ways() {
    for dtype in [DType::F16, DType::Bf16] {
        for n in [1, 2, 3, 5] {
            let values = [1.5, -2.0, 0.25, 8.0, -0.5][..n].to_vec();
            let x = Tensor::from_bytes(gpu(), &dtype.narrow(&values), dtype, &[n]);
            assert_eq!(x.to_f32().unwrap(), values);
            assert_eq!(x.bytes(), 2 * n as u64);
        }
    }
}

#[test]
fn uploads_beyond_one_chunk_arrive_whole() {
    // Uploads go in chunks of 64 MiB.
    let n = 17 << 20;
    let values: Vec<u32> = (0..n as u32).collect();
    let x = Tensor::from_u32(gpu(), &values, &[n]);
    let row = 1 << 20;
    let tail = x.reshape(&[n / row, row]).narrow(n / row - 1, 1);
    assert_eq!(tail.to_u32().unwrap(), values[n - row..]);
    assert_eq!(x.narrow(0, 4).to_u32().unwrap(), [0, 1, 2, 3]);
}
