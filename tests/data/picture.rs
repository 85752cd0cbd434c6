//! Images of every kind come out as upright 8-bit RGB, bad ones as an error that names them.

use std::io::Cursor;
use std::path::Path;

use image::{
    DynamicImage, GrayAlphaImage, GrayImage, ImageBuffer, ImageFormat, Luma, LumaA, Rgb, RgbImage,
    Rgba, RgbaImage,
};
use lavender_wgpu::data::picture::{MAX_SIDE, decode};

fn encoded(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn open(bytes: &[u8]) -> Result<RgbImage, String> {
    decode(Path::new("some/picture.png"), bytes).map_err(|e| e.to_string())
}

#[test]
fn gray_alpha_and_sixteen_bits_become_rgb() {
    let pixel = |bytes: &[u8]| open(bytes).unwrap().get_pixel(1, 0).0;
    let gray = GrayImage::from_pixel(2, 3, Luma([77]));
    assert_eq!(pixel(&encoded(gray, ImageFormat::Png)), [77, 77, 77]);
    let gray_alpha = GrayAlphaImage::from_pixel(2, 3, LumaA([78, 3]));
    assert_eq!(pixel(&encoded(gray_alpha, ImageFormat::Png)), [78, 78, 78]);
    // Alpha is dropped, not blended: PIL's convert("RGB").
    let rgba = RgbaImage::from_pixel(2, 3, Rgba([10, 20, 30, 0]));
    assert_eq!(pixel(&encoded(rgba, ImageFormat::Png)), [10, 20, 30]);
    // Pillow's `convert("RGB")` clips plain 16-bit gray, and keeps the high byte of every other kind.
    for (value, expected) in [(100, 100), (0x12ff, 255)] {
        let gray16: ImageBuffer<Luma<u16>, Vec<u16>> = ImageBuffer::from_pixel(2, 3, Luma([value]));
        assert_eq!(pixel(&encoded(gray16, ImageFormat::Png)), [expected; 3]);
    }
    let gray_alpha16: ImageBuffer<LumaA<u16>, Vec<u16>> =
        ImageBuffer::from_pixel(2, 3, LumaA([0x12ff, 9]));
    assert_eq!(pixel(&encoded(gray_alpha16, ImageFormat::Png)), [0x12; 3]);
    let rgb16: ImageBuffer<Rgb<u16>, Vec<u16>> =
        ImageBuffer::from_pixel(2, 3, Rgb([0x1234, 0xffff, 0xff]));
    assert_eq!(pixel(&encoded(rgb16, ImageFormat::Png)), [0x12, 0xff, 0]);
    let bmp = RgbImage::from_pixel(2, 3, Rgb([1, 2, 3]));
    assert_eq!(pixel(&encoded(bmp, ImageFormat::Bmp)), [1, 2, 3]);
}

#[test]
fn exif_orientation_turns_the_image_upright() {
    let mut image = RgbImage::new(24, 8);
    for (x, _, pixel) in image.enumerate_pixels_mut() {
        *pixel = if x < 12 {
            Rgb([250, 10, 10])
        } else {
            Rgb([10, 10, 250])
        };
    }
    let jpeg = encoded(image, ImageFormat::Jpeg);
    // An APP1 block right after the start marker: little-endian TIFF, one entry, orientation (0x0112) = 6.
    let mut tiff = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0".to_vec();
    let mut block = b"Exif\0\0".to_vec();
    block.append(&mut tiff);
    let mut turned = jpeg[..2].to_vec();
    turned.extend([0xff, 0xe1]);
    turned.extend(((block.len() + 2) as u16).to_be_bytes());
    turned.extend(&block);
    turned.extend(&jpeg[2..]);

    assert_eq!(open(&jpeg).unwrap().dimensions(), (24, 8));
    let upright = open(&turned).unwrap();
    assert_eq!(upright.dimensions(), (8, 24));
    // Orientation 6 is a quarter turn clockwise: what was left is on top.
    assert!(upright.get_pixel(4, 2)[0] > 200 && upright.get_pixel(4, 21)[2] > 200);
}

#[test]
fn a_cut_jpeg_is_refused_even_with_a_whole_thumbnail() {
    let jpeg = encoded(
        RgbImage::from_fn(64, 64, |x, y| Rgb([(x * y) as u8, x as u8, y as u8])),
        ImageFormat::Jpeg,
    );
    // An application segment that holds a whole JPEG, as cameras write them.
    let mut with_thumbnail = jpeg[..2].to_vec();
    with_thumbnail.extend([0xff, 0xe5]);
    with_thumbnail.extend(((jpeg.len() + 2) as u16).to_be_bytes());
    with_thumbnail.extend(&jpeg);
    with_thumbnail.extend(&jpeg[2..]);
    for whole in [jpeg, with_thumbnail] {
        assert_eq!(open(&whole).unwrap().dimensions(), (64, 64));
        for cut in [1, 2, 100] {
            let error = open(&whole[..whole.len() - cut]).expect_err("a cut JPEG was read");
            assert!(error.contains("cut off"), "{error}");
        }
        let trailing = [&whole[..], b"junk after the end"].concat();
        assert!(open(&trailing).is_ok());
    }
}

#[test]
fn bad_images_are_named_and_explained() {
    let png = encoded(RgbImage::new(9, 9), ImageFormat::Png);
    let sized = |width: u32, height: u32| {
        // A valid PNG header that claims other dimensions; its CRC is set right so that only the size is wrong.
        let mut bytes = png.clone();
        bytes[16..20].copy_from_slice(&width.to_be_bytes());
        bytes[20..24].copy_from_slice(&height.to_be_bytes());
        let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC).checksum(&bytes[12..29]);
        bytes[29..33].copy_from_slice(&crc.to_be_bytes());
        bytes
    };
    let cases: [(Vec<u8>, &[&str]); 7] = [
        (vec![], &["empty"]),
        (b"hello, not an image at all".to_vec(), &["not a PNG"]),
        (png[..png.len() / 2].to_vec(), &["damaged image"]),
        (png[..20].to_vec(), &["damaged image"]),
        (sized(0, 9), &["damaged image"]),
        (sized(400_000, 9), &["400000×9", &MAX_SIDE.to_string()]),
        (sized(2_000_000_000, 2_000_000_000), &["large"]),
    ];
    for (bytes, wanted) in cases {
        let error = open(&bytes).expect_err("a bad image was read");
        for part in ["some/picture.png"].iter().chain(wanted) {
            assert!(error.contains(part), "`{error}` lacks `{part}`");
        }
    }
}
