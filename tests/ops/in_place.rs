use lavender_wgpu::ops::in_place::{add_in_place, fill, scale_in_place, scale_in_place_by};
use lavender_wgpu::tensor::{DType, Tensor};

use crate::support::*;

#[test]
fn updates_match_f64_at_every_tail() {
    let mut rng = rng(141);
    for dtype in float_types() {
        for n in [1, 2, 3, 4, 5, 255, 1027] {
            let (x, held) = upload(&uniform(&mut rng, n), dtype, &[n]);
            scale_in_place(&x, -0.75);
            let mut expected: Vec<f64> = held.iter().map(|v| -0.75 * v).collect();
            assert_close("scale", &x, &expected);
            scale_in_place_by(&x, &Tensor::from_f32(gpu(), &[0.5], &[1]));
            expected.iter_mut().for_each(|v| *v *= 0.5);
            assert_close("scale by a device scalar", &x, &expected);
            for other in float_types() {
                let (y, hy) = upload(&uniform(&mut rng, n), other, &[n]);
                add_in_place(&x, &y, 1.5);
                expected
                    .iter_mut()
                    .zip(&hy)
                    .for_each(|(e, v)| *e += 1.5 * v);
                assert_close(&format!("{dtype:?} += {other:?}"), &x, &expected);
            }
            fill(&x, 2.5);
            assert_eq!(x.to_f32().unwrap(), vec![2.5; n]);
        }
    }
}

#[test]
fn rows_after_a_view_keep_their_values() {
    // A view whose last vector of four reaches into the next row.
    let row = gpu().tier().offset_alignment as usize / 4 + 1;
    let x = Tensor::from_f32(gpu(), &vec![1.0; 2 * row], &[2, row]);
    fill(&x.narrow(0, 1), 7.0);
    let values = x.to_f32().unwrap();
    assert_eq!(values[..row], vec![7.0; row]);
    assert_eq!(values[row..], vec![1.0; row]);
    assert_eq!(x.dtype(), DType::F32);
}
