//! Pillow's image resampling, bit for bit, on 8-bit RGB.
//!
//! `PIL.Image.resize` filters with a support that grows with the down-scaling factor (antialias), in two
//! passes (along the rows and along the columns), each with coefficients in 22-bit fixed point and an 8-bit intermediate
//! image. Libraries that work in 14-bit or floating point differ from it by one grey level here and there,
//! which is enough to move a vision tower's logits, so the arithmetic of Pillow's `Resample.c` is followed
//! exactly.

use image::RgbImage;

/// Fraction bits of Pillow's fixed-point coefficients: 32 − 8 (pixel) − 2 (sign and overshoot).
const PRECISION_BITS: u32 = 22;

/// A resampling filter, numbered in `preprocessor_config.json` as `PIL.Image.Resampling` numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// `resample: 1`: windowed sinc, three lobes.
    Lanczos,
    /// `resample: 2`: triangle.
    Bilinear,
    /// `resample: 3`: Catmull-Rom cubic (a = −0.5).
    Bicubic,
    /// `resample: 4`: box.
    Box,
    /// `resample: 5`: Hamming-windowed sinc, one lobe.
    Hamming,
}

impl Filter {
    /// The filter of a `resample` number, `None` for nearest (0) and for unknown numbers.
    pub fn from_pil(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Lanczos),
            2 => Some(Self::Bilinear),
            3 => Some(Self::Bicubic),
            4 => Some(Self::Box),
            5 => Some(Self::Hamming),
            _ => None,
        }
    }

    fn support(self) -> f64 {
        match self {
            Self::Lanczos => 3.0,
            Self::Bicubic => 2.0,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Box => 0.5,
        }
    }

    fn weight(self, x: f64) -> f64 {
        let a = x.abs();
        match self {
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Bilinear if a < 1.0 => 1.0 - a,
            Self::Bicubic if a < 1.0 => ((1.5 * a) - 2.5) * a * a + 1.0,
            Self::Bicubic if a < 2.0 => (((a - 5.0) * a + 8.0) * a - 4.0) * -0.5,
            Self::Box if x > -0.5 && x <= 0.5 => 1.0,
            Self::Hamming if a == 0.0 => 1.0,
            Self::Hamming if a < 1.0 => {
                let t = a * std::f64::consts::PI;
                // Pillow writes these two as single-precision constants.
                t.sin() / t * (f64::from(0.54f32) + f64::from(0.46f32) * t.cos())
            }
            _ => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let t = x * std::f64::consts::PI;
    t.sin() / t
}

/// The source interval and fixed-point coefficients of every output position along one axis.
struct Coefficients {
    /// First source index and number of taps per output position.
    bounds: Vec<(usize, usize)>,
    /// `taps` coefficients per output position, the unused ones zero.
    values: Vec<i32>,
    taps: usize,
}

impl Coefficients {
    fn new(input: usize, output: usize, filter: Filter) -> Self {
        let scale = input as f64 / output as f64;
        let filter_scale = scale.max(1.0);
        let support = filter.support() * filter_scale;
        let taps = support.ceil() as usize * 2 + 1;
        let inverse = 1.0 / filter_scale;
        let mut bounds = Vec::with_capacity(output);
        let mut values = vec![0i32; output * taps];
        let mut weights = Vec::with_capacity(taps);
        for (position, row) in values.chunks_exact_mut(taps).enumerate() {
            let center = (position as f64 + 0.5) * scale;
            // C's double-to-int conversion truncates toward zero; both ends are clamped to the image.
            let first = (center - support + 0.5).max(0.0) as usize;
            let last = ((center + support + 0.5) as usize).min(input);
            let count = last - first;
            weights.clear();
            weights.extend(
                (0..count).map(|i| filter.weight(((i + first) as f64 - center + 0.5) * inverse)),
            );
            let total: f64 = weights.iter().sum();
            for (slot, &weight) in row.iter_mut().zip(&weights) {
                let weight = if total != 0.0 { weight / total } else { weight };
                let scaled = weight * f64::from(1u32 << PRECISION_BITS);
                *slot = (if weight < 0.0 {
                    scaled - 0.5
                } else {
                    scaled + 0.5
                }) as i32;
            }
            bounds.push((first, count));
        }
        Self {
            bounds,
            values,
            taps,
        }
    }

    fn row(&self, position: usize) -> (usize, &[i32]) {
        let (first, count) = self.bounds[position];
        (first, &self.values[position * self.taps..][..count])
    }
}

fn to_u8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

const ROUND: i32 = 1 << (PRECISION_BITS - 1);

fn horizontal(
    source: &[u8],
    (width, height): (usize, usize),
    out_width: usize,
    filter: Filter,
) -> Vec<u8> {
    let coefficients = Coefficients::new(width, out_width, filter);
    let mut out = vec![0u8; out_width * height * 3];
    for (line, out_line) in source
        .chunks_exact(width * 3)
        .zip(out.chunks_exact_mut(out_width * 3))
    {
        for (x, pixel) in out_line.chunks_exact_mut(3).enumerate() {
            let (first, taps) = coefficients.row(x);
            let mut sum = [ROUND; 3];
            for (tap, from) in taps.iter().zip(line[first * 3..].chunks_exact(3)) {
                for c in 0..3 {
                    sum[c] += tap * i32::from(from[c]);
                }
            }
            for c in 0..3 {
                pixel[c] = to_u8(sum[c]);
            }
        }
    }
    out
}

fn vertical(
    source: &[u8],
    (width, height): (usize, usize),
    out_height: usize,
    filter: Filter,
) -> Vec<u8> {
    let coefficients = Coefficients::new(height, out_height, filter);
    let stride = width * 3;
    let mut out = vec![0u8; stride * out_height];
    let mut sums = vec![0i32; stride];
    for (y, out_line) in out.chunks_exact_mut(stride).enumerate() {
        let (first, taps) = coefficients.row(y);
        sums.fill(ROUND);
        for (tap, line) in taps
            .iter()
            .zip(source[first * stride..].chunks_exact(stride))
        {
            for (sum, &value) in sums.iter_mut().zip(line) {
                *sum += tap * i32::from(value);
            }
        }
        for (to, &sum) in out_line.iter_mut().zip(&sums) {
            *to = to_u8(sum);
        }
    }
    out
}

/// Whether the rows are filtered before the columns. The intermediate image is rounded to 8 bits, so the
/// order shows. Pillow up to 12 always began with the columns; Pillow 13 begins with the rows when they
/// shrink by more than twice what the columns lose (read off its results: 2,638 random sizes and filters).
fn vertical_first(from: (usize, usize), to: (usize, usize)) -> bool {
    let lost = |axis: (usize, usize)| axis.0 as i64 - axis.1 as i64;
    let (columns, rows) = (lost((from.0, to.0)), lost((from.1, to.1)));
    rows > 0 && rows > 2 * columns
}

/// Resizes an RGB8 image as `PIL.Image.resize((width, height), filter)` does, bit for bit.
///
/// An axis whose length does not change is not filtered; an image whose size does not change is copied.
/// Panics if a side is zero: sizes are computed by our processors, which never make one.
pub fn resize(image: &RgbImage, width: u32, height: u32, filter: Filter) -> RgbImage {
    assert!(
        width > 0 && height > 0 && image.width() > 0 && image.height() > 0,
        "resize: sides must be positive, from {}x{} to {width}x{height}",
        image.width(),
        image.height()
    );
    let (from_width, from_height) = (image.width() as usize, image.height() as usize);
    let (to_width, to_height) = (width as usize, height as usize);
    let pass = |data: Vec<u8>, size: (usize, usize), along_width: bool| {
        if along_width && to_width != size.0 {
            horizontal(&data, size, to_width, filter)
        } else if !along_width && to_height != size.1 {
            vertical(&data, size, to_height, filter)
        } else {
            data
        }
    };
    let source = image.as_raw().clone();
    let size = (from_width, from_height);
    let out = if vertical_first(size, (to_width, to_height)) {
        pass(pass(source, size, false), (from_width, to_height), true)
    } else {
        pass(pass(source, size, true), (to_width, from_height), false)
    };
    RgbImage::from_raw(width, height, out).expect("the passes fill width x height x 3 bytes")
}
