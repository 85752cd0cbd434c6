//! Decoding a sample's image to 8-bit RGB.

use std::borrow::Cow;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use image::{
    DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader, Limits, RgbImage,
    metadata::Orientation,
};

use super::ImageRef;
use crate::{Error, Result};

/// Largest width and height that is decoded.
pub const MAX_SIDE: u32 = 16_384;

/// Most memory that decoding one image may take.
const MAX_BYTES: u64 = 1 << 30;

impl ImageRef {
    /// Decodes the image: see [`decode`].
    pub fn open(&self) -> Result<RgbImage> {
        let (path, bytes) = self.encoded()?;
        decode(&path, &bytes)
    }

    /// The encoded image, and its name for messages.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn encoded(&self) -> Result<(PathBuf, Cow<'_, [u8]>)> {
        match self {
            Self::Path(path) => {
                let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
                Ok((path.clone(), bytes.into()))
            }
            Self::Embedded { name, bytes } => Ok((name.into(), bytes[..].into())),
            Self::Stored { name, file, at } => Ok((file.path().join(name), file.read(*at)?.into())),
        }
    }
}

/// Decodes an encoded image as 8-bit RGB, turned upright by its EXIF orientation.
///
/// As PIL's `convert("RGB")` does it: gray is repeated over the channels, an alpha channel is dropped without
/// blending; 16-bit values keep their high byte, but of plain gray ones those above 255 become 255. The format is told by the content, not by the name. Errors, naming
/// `path`: an empty, damaged or cut-off file, an unknown format, a side of 0 or above [`MAX_SIDE`].
pub fn decode(path: &Path, bytes: &[u8]) -> Result<RgbImage> {
    let wrong = |message: String| Error::file(path, message);
    if bytes.is_empty() {
        return Err(wrong("image file is empty (0 bytes)".into()));
    }
    let mut reader = ImageReader::new(Cursor::new(bytes))
        .with_guessed_format()
        .map_err(|e| Error::io(path, e))?;
    if reader.format().is_none() {
        return Err(wrong("not a PNG, JPEG, WebP, BMP or GIF image".into()));
    }
    if reader.format() == Some(ImageFormat::Jpeg) && !jpeg_ends(bytes) {
        return Err(wrong(
            "damaged image: the JPEG has no end marker; was it cut off?".into(),
        ));
    }
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_BYTES);
    reader.limits(limits);
    let mut decoder = reader.into_decoder().map_err(|e| wrong(explain(&e)))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 || width > MAX_SIDE || height > MAX_SIDE {
        return Err(wrong(format!(
            "image is {width}×{height} pixels, expected sides from 1 to {MAX_SIDE}"
        )));
    }
    // An unreadable EXIF block does not make the pixels unreadable.
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    let mut image = DynamicImage::from_decoder(decoder).map_err(|e| wrong(explain(&e)))?;
    image.apply_orientation(orientation);
    Ok(to_rgb(image))
}

/// Whether an end marker follows the first scan; the decoder would fill what is missing with gray.
fn jpeg_ends(bytes: &[u8]) -> bool {
    const SCAN: u8 = 0xda;
    let mut at = 2;
    // Segments before the scan are stepped over: a thumbnail in one of them has an end marker of its own.
    while let Some(&[0xff, kind, high, low]) = bytes.get(at..at + 4) {
        if kind == SCAN {
            return bytes[at..].windows(2).any(|pair| pair == [0xff, 0xd9]);
        }
        // A fill byte before a marker is no segment.
        at += match kind {
            0xff => 1,
            _ => 2 + usize::from(u16::from_be_bytes([high, low])),
        };
    }
    // Something else between the segments: the decoder says what.
    bytes.windows(2).any(|pair| pair == [0xff, 0xd9])
}

fn explain(error: &ImageError) -> String {
    match error {
        ImageError::Limits(_) => {
            format!("image is too large: its pixels need more than {MAX_BYTES} bytes")
        }
        ImageError::Unsupported(_) => format!("unsupported image: {error}"),
        _ => format!("damaged image: {error}"),
    }
}

fn to_rgb(image: DynamicImage) -> RgbImage {
    let high = |v: u16| (v >> 8) as u8;
    match image {
        DynamicImage::ImageRgb8(image) => image,
        DynamicImage::ImageRgba8(image) => {
            let mut rgb = RgbImage::new(image.width(), image.height());
            for (to, from) in rgb.pixels_mut().zip(image.pixels()) {
                to.0 = [from[0], from[1], from[2]];
            }
            rgb
        }
        DynamicImage::ImageLuma16(image) => {
            let mut rgb = RgbImage::new(image.width(), image.height());
            for (to, from) in rgb.pixels_mut().zip(image.pixels()) {
                to.0 = [from[0].min(255) as u8; 3];
            }
            rgb
        }
        DynamicImage::ImageRgb16(image) => {
            let mut rgb = RgbImage::new(image.width(), image.height());
            for (to, from) in rgb.pixels_mut().zip(image.pixels()) {
                to.0 = from.0.map(high);
            }
            rgb
        }
        DynamicImage::ImageLumaA16(image) => {
            let mut rgb = RgbImage::new(image.width(), image.height());
            for (to, from) in rgb.pixels_mut().zip(image.pixels()) {
                to.0 = [high(from[0]); 3];
            }
            rgb
        }
        DynamicImage::ImageRgba16(image) => {
            let mut rgb = RgbImage::new(image.width(), image.height());
            for (to, from) in rgb.pixels_mut().zip(image.pixels()) {
                to.0 = [high(from[0]), high(from[1]), high(from[2])];
            }
            rgb
        }
        // Gray, gray with alpha and float images; the library drops alpha as well.
        other => other.to_rgb8(),
    }
}
