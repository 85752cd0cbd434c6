//! Weights in 8 or 4 bits with a scale for each group.
//!
//! A matrix [outputs, inputs] is stored row by row; a row is cut into groups of [`GROUP`] inputs, the last one filled
//! up with zeros, so that rows start at a group and all addresses follow from one element index. A weight is
//! `scale · q` with q signed, two's complement: 8 bits (−127…127, element e in byte e % 4 of word e / 4) or 4 bits
//! (−8…7, element e in nibble e % 8 of word e / 8), lowest first. Scales are bf16, which every adapter widens by a
//! shift and which has the range of f32: a bit less of precision costs nothing, as weights are rounded after it.
//!
//! With 8 bits the scale is the group's largest magnitude / 127. With 4 bits that magnitude goes to the side of −8, and
//! of eleven scales around it the one with the least squared error is taken: on normal weights an NMSE of 8.1e-3
//! (8 bits: 3.6e-5), where no search has 9.1e-3, NF4 8.4e-3, and a zero point beside the scale, a quarter bit more,
//! 8.1e-3.

use half::bf16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{DType, Tensor};
use crate::error::Result;
use crate::gpu::Gpu;

/// Inputs that share a scale.
pub const GROUP: usize = 64;

/// Divisors of a 4-bit group's largest magnitude, between 7 (nothing clipped on either side) and 9.5.
const DIVISORS: [f32; 11] = [8.0, 7.0, 7.25, 7.5, 7.75, 8.25, 8.5, 8.75, 9.0, 9.25, 9.5];

/// Bits of a quantised weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// 8 bits, 8.25 with the scale.
    Q8,
    /// 4 bits, 4.25 with the scale.
    Q4,
}

impl Quantization {
    /// Weights in a `u32`.
    pub fn per_word(self) -> usize {
        match self {
            Self::Q8 => 4,
            Self::Q4 => 8,
        }
    }

    /// Bytes of a matrix [outputs, inputs] with its scales.
    pub fn bytes(self, outputs: usize, inputs: usize) -> u64 {
        let groups = (outputs * inputs.div_ceil(GROUP)) as u64;
        groups * (4 * GROUP / self.per_word() + 2) as u64
    }

    /// Integers of one group and their scale; the rest of `values` short of [`GROUP`] is zero.
    fn group(self, values: &[f32]) -> ([i8; GROUP], bf16) {
        let largest = values
            .iter()
            .fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
        match self {
            Self::Q8 => rounded(values, largest.abs() / 127.0, -127.0, 127.0),
            Self::Q4 => {
                let candidates = DIVISORS.map(|d| rounded(values, largest / -d, -8.0, 7.0));
                // In units of the largest magnitude: the squares of small weights would vanish.
                let unit = 1.0 / largest.abs().max(f32::MIN_POSITIVE);
                let errors = candidates.map(|(q, scale)| {
                    let scale = scale.to_f32();
                    let error = |(&v, &q): (&f32, &i8)| ((v - scale * f32::from(q)) * unit).powi(2);
                    values.iter().zip(&q).map(error).sum::<f32>()
                });
                let mut best = 0;
                for (i, error) in errors.iter().enumerate() {
                    if *error < errors[best] {
                        best = i;
                    }
                }
                candidates[best]
            }
        }
    }
}

/// `values` over `scale` (as bf16) rounded to the nearest even integer within the limits.
fn rounded(values: &[f32], scale: f32, low: f32, high: f32) -> ([i8; GROUP], bf16) {
    let mut out = [0; GROUP];
    // Shaders may take smaller numbers as zero.
    if scale.abs() < f32::MIN_POSITIVE {
        return (out, bf16::ZERO);
    }
    let scale = bf16::from_f32(scale);
    let inverse = 1.0 / scale.to_f32();
    // 1.5 · 2²³: the sum has no bits left for a fraction, so it is rounded, to even on a tie, without a library call.
    const WHOLE: f32 = 12_582_912.0;
    for (q, &v) in out.iter_mut().zip(values) {
        *q = ((v * inverse).clamp(low, high) + WHOLE - WHOLE) as i8;
    }
    (out, scale)
}

/// A frozen matrix in 8 or 4 bits on the GPU; clones share the storage.
#[derive(Clone)]
pub struct QuantizedMatrix {
    words: Tensor,
    scales: Tensor,
    shape: [usize; 2],
    kind: Quantization,
}

impl std::fmt::Debug for QuantizedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuantizedMatrix{:?} {:?}", self.shape, self.kind)
    }
}

impl QuantizedMatrix {
    /// Quantises little-endian `bytes` of `dtype`, shape [outputs, inputs], on the CPU and uploads the result; the same
    /// bytes give the same bits on every machine. `None` where a weight is not finite.
    ///
    /// Panics when the byte count does not match the shape.
    pub fn from_bytes(
        gpu: &Gpu,
        bytes: &[u8],
        dtype: DType,
        shape: [usize; 2],
        kind: Quantization,
    ) -> Option<QuantizedMatrix> {
        let [outputs, inputs] = shape;
        assert!(
            outputs * inputs > 0 && bytes.len() == outputs * inputs * dtype.bytes(),
            "quantize: {} bytes for {shape:?} of {dtype:?}",
            bytes.len()
        );
        let groups = inputs.div_ceil(GROUP);
        let group_words = GROUP / kind.per_word();
        let mut words = vec![0u32; outputs * groups * group_words];
        let mut scales = vec![bf16::ZERO; outputs * groups];
        let finite = bytes
            .par_chunks(inputs * dtype.bytes())
            .zip(words.par_chunks_mut(groups * group_words))
            .zip(scales.par_chunks_mut(groups))
            .map(|((row, words), scales)| {
                let row = dtype.widen(row);
                for (g, values) in row.chunks(GROUP).enumerate() {
                    let (q, scale) = kind.group(values);
                    scales[g] = scale;
                    for (word, q) in words[g * group_words..]
                        .iter_mut()
                        .zip(q.chunks(kind.per_word()))
                    {
                        let bits = 32 / kind.per_word();
                        *word = q.iter().rev().fold(0, |word, &q| {
                            (word << bits) | (q as u8 as u32 & ((1 << bits) - 1))
                        });
                    }
                }
                row.iter().all(|v| v.is_finite())
            })
            .reduce(|| true, |a, b| a && b);
        finite.then(|| QuantizedMatrix {
            words: Tensor::from_u32(gpu, &words, &[words.len()]),
            scales: Tensor::from_bytes(
                gpu,
                bytemuck::cast_slice(&scales),
                DType::Bf16,
                &[scales.len()],
            ),
            shape,
            kind,
        })
    }

    /// [`QuantizedMatrix::from_bytes`] of `f32` values.
    pub fn from_f32(
        gpu: &Gpu,
        values: &[f32],
        shape: [usize; 2],
        kind: Quantization,
    ) -> Option<QuantizedMatrix> {
        Self::from_bytes(gpu, bytemuck::cast_slice(values), DType::F32, shape, kind)
    }

    /// [outputs, inputs].
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Elements from one row to the next: the inputs filled up to whole groups.
    pub fn pitch(&self) -> usize {
        self.shape[1].next_multiple_of(GROUP)
    }

    /// Bits of a weight.
    pub fn kind(&self) -> Quantization {
        self.kind
    }

    /// Packed integers, u32 [outputs · pitch / weights in a word].
    pub fn words(&self) -> &Tensor {
        &self.words
    }

    /// Scales, bf16 [outputs · groups].
    pub fn scales(&self) -> &Tensor {
        &self.scales
    }

    /// The GPU that holds it.
    pub fn gpu(&self) -> &Gpu {
        self.words.gpu()
    }

    /// Bytes of integers and scales.
    pub fn bytes(&self) -> u64 {
        self.words.bytes() + self.scales.bytes()
    }

    /// The weights that the kernels see, f32 [outputs, inputs] on the host: for tests and inspection.
    ///
    /// # Errors
    /// Any GPU error reported by then.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let (words, scales) = (self.words.to_u32()?, self.scales.to_f32()?);
        let (pitch, per_word) = (self.pitch(), self.kind.per_word());
        let bits = 32 / per_word;
        let weight = |e: usize| {
            let shifted = words[e / per_word] << (32 - bits * (e % per_word + 1));
            ((shifted as i32) >> (32 - bits)) as f32 * scales[e / GROUP]
        };
        let row = |r: usize| (0..self.shape[1]).map(move |c| r * pitch + c);
        Ok((0..self.shape[0]).flat_map(row).map(weight).collect())
    }

    /// Elements `start .. start + len` (counted with the rows' filling), begun early enough to be aligned; and the
    /// start within them. The shape is the whole matrix's.
    pub(crate) fn window(&self, start: usize, len: usize) -> (QuantizedMatrix, usize) {
        // Scales, a 32nd byte an element, are the coarser of the two parts.
        let unit = self.gpu().tier().offset_alignment as usize * 32;
        let begin = start / unit * unit;
        let part = |t: &Tensor, per: usize| {
            let end = (start + len).div_ceil(per).min(t.elements());
            t.narrow(begin / per, end - begin / per)
        };
        let window = QuantizedMatrix {
            words: part(&self.words, self.kind.per_word()),
            scales: part(&self.scales, GROUP),
            ..self.clone()
        };
        (window, start - begin)
    }
}
