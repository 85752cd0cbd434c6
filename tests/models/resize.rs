//! `vlm::processor::resize` against Pillow, bit for bit.

use image::RgbImage;
use lavender_wgpu::vlm::processor::resize::{Filter, resize};
use serde_json::Value;
use sha2::{Digest, Sha256};

/// The image of `tests/reference/resize.py`.
fn noise(width: u32, height: u32) -> RgbImage {
    let mut x = width * 65_536 + height;
    let bytes = (0..width * height * 3)
        .map(|_| {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 24) as u8
        })
        .collect();
    RgbImage::from_raw(width, height, bytes).unwrap()
}

#[test]
fn every_filter_and_size_is_bit_equal_to_pillow() {
    let cases: Vec<Vec<Value>> =
        serde_json::from_str(include_str!("../reference/resize.json")).unwrap();
    let mut wrong = Vec::new();
    for case in &cases {
        let number = |i: usize| case[i].as_u64().unwrap() as u32;
        let filter = Filter::from_pil(case[4].as_u64().unwrap()).unwrap();
        let resized = resize(&noise(number(0), number(1)), number(2), number(3), filter);
        let hash = Sha256::digest(resized.as_raw());
        let hex: String = hash[..8].iter().map(|b| format!("{b:02x}")).collect();
        if hex != case[5].as_str().unwrap() {
            wrong.push(format!("{case:?}"));
        }
    }
    assert!(cases.len() > 300, "the fixture is cut");
    assert!(
        wrong.is_empty(),
        "{} of {}: {}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}
