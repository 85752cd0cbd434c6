use lavender_wgpu::ops::finite::{FiniteFlag, is_finite};

use crate::support::*;

#[test]
fn one_bad_element_anywhere_is_found() {
    for dtype in float_types() {
        for n in [1, 4, 7, 1030] {
            let values = uniform(&mut rng(161), n);
            assert!(is_finite(&upload(&values, dtype, &[n]).0).unwrap());
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in [0, n / 2, n - 1] {
                    let mut values = values.clone();
                    values[at] = bad;
                    let (x, _) = upload(&values, dtype, &[n]);
                    assert!(!is_finite(&x).unwrap(), "{bad} at {at} of {n}");
                }
            }
        }
    }
}

#[test]
fn the_lowest_tag_is_kept_until_reset() {
    let (good, _) = upload(&[1.0, -2.0, 3e30], lavender_wgpu::tensor::DType::F32, &[3]);
    let (bad, _) = upload(&[1.0, f32::NAN], lavender_wgpu::tensor::DType::F32, &[2]);
    let flag = FiniteFlag::new(gpu());
    flag.check(&good, 1);
    assert_eq!(flag.found().unwrap(), None);
    for tag in [9, 4, 6] {
        flag.check(&bad, tag);
    }
    assert_eq!(flag.found().unwrap(), Some(4));
    flag.reset();
    flag.check(&good, 2);
    assert_eq!(flag.found().unwrap(), None);
}
