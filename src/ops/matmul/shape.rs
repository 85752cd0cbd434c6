//! Products as tuning tells them apart: their shapes, and classes of shapes that are alike.

use std::fmt;
use std::str::FromStr;

use super::right::Storage;
use super::{Geometry, Operands};
use crate::ops::ways::near;
use crate::tensor::{DType, Quantization};

/// Sizes, orders and types of a product: [batch, m, k]·[batch, k, n]. Written `1x300x1536x576 nt f32 bf16 f32`: batch, m,
/// n and k, whether a and b are transposed, types of a, b and the result.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    pub batch: usize,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub trans: [bool; 2],
    pub(super) a: DType,
    pub(super) b: Storage,
    pub(super) c: DType,
}

/// Products smaller than this are not worth a measurement: their time is that of a dispatch.
const SMALL: usize = 2_000_000;

impl Shape {
    /// a [m, k] by b [k, n] of floats, into a's type.
    pub fn float([m, n, k]: [usize; 3], trans: [bool; 2], a: DType, b: DType) -> Shape {
        Shape {
            batch: 1,
            m,
            n,
            k,
            trans,
            a,
            b: Storage::Float(b),
            c: a,
        }
    }

    pub(super) fn of(o: &Operands<'_>, g: &Geometry) -> Shape {
        Shape {
            batch: g.batch,
            m: g.m,
            n: g.n,
            k: g.k,
            trans: [o.options.trans_a, o.options.trans_b],
            a: o.a.dtype(),
            b: o.b.storage(),
            c: o.c.dtype(),
        }
    }

    /// Floating-point operations.
    pub fn flops(&self) -> usize {
        2 * self.batch * self.m * self.n * self.k
    }

    /// Whether it is worth measuring.
    pub(super) fn counts(&self) -> bool {
        self.flops() >= SMALL
    }

    /// The class that it is measured with: sizes to half a power of two, few rows exactly, whether lines are whole fours.
    pub fn class(&self) -> String {
        let along = [
            if self.trans[0] { self.m } else { self.k },
            if self.trans[1] { self.k } else { self.n },
        ];
        let fours = along.iter().all(|size| size.is_multiple_of(4));
        let like = Shape {
            batch: near(self.batch),
            m: near(self.m),
            n: near(self.n),
            k: near(self.k),
            ..*self
        };
        format!("matmul {like}{}", if fours { "" } else { " ragged" })
    }

    /// The same in few words, for a table of what has been decided.
    pub(super) fn key(&self) -> [u32; 5] {
        let float = |dtype| u32::from(dtype == DType::F16);
        let stored = match self.b {
            Storage::Float(DType::F16) => 1,
            Storage::Float(DType::Bf16) => 2,
            Storage::Float(_) => 0,
            Storage::Quantized(Quantization::Q8) => 3,
            Storage::Quantized(Quantization::Q4) => 4,
        };
        let trans = u32::from(self.trans[0]) | u32::from(self.trans[1]) << 1;
        let types = trans | float(self.a) << 2 | float(self.c) << 3 | stored << 4;
        let [m, n, k, batch] = [self.m, self.n, self.k, self.batch].map(|size| size as u32);
        [m, n, k, batch, types]
    }
}

fn name(b: Storage) -> &'static str {
    match b {
        Storage::Float(DType::F16) => "f16",
        Storage::Float(DType::Bf16) => "bf16",
        Storage::Float(_) => "f32",
        Storage::Quantized(Quantization::Q8) => "q8",
        Storage::Quantized(Quantization::Q4) => "q4",
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [ta, tb] = self.trans.map(|t| if t { 't' } else { 'n' });
        let [a, b, c] = [Storage::Float(self.a), self.b, Storage::Float(self.c)].map(name);
        write!(
            f,
            "{}x{}x{}x{} {ta}{tb} {a} {b} {c}",
            self.batch, self.m, self.n, self.k
        )
    }
}

impl FromStr for Shape {
    type Err = String;

    fn from_str(text: &str) -> Result<Shape, String> {
        let wrong =
            || format!("`{text}`: expected a product such as `1x300x1536x576 nt f32 f16 f32`");
        let words: Vec<&str> = text.split(' ').collect();
        let [sizes, trans, a, b, c] = words[..] else {
            return Err(wrong());
        };
        // A size that no tensor has would overflow what is computed from it.
        let sizes: Vec<usize> = sizes
            .split('x')
            .map(|size| {
                size.parse()
                    .ok()
                    .filter(|size| (1..=1 << 24).contains(size))
            })
            .collect::<Option<_>>()
            .ok_or_else(wrong)?;
        let [batch, m, n, k] = sizes[..] else {
            return Err(wrong());
        };
        let trans = match trans {
            "nn" => [false, false],
            "nt" => [false, true],
            "tn" => [true, false],
            "tt" => [true, true],
            _ => return Err(wrong()),
        };
        let stored = |word: &str| match word {
            "f32" => Ok(Storage::Float(DType::F32)),
            "f16" => Ok(Storage::Float(DType::F16)),
            "bf16" => Ok(Storage::Float(DType::Bf16)),
            "q8" => Ok(Storage::Quantized(Quantization::Q8)),
            "q4" => Ok(Storage::Quantized(Quantization::Q4)),
            _ => Err(wrong()),
        };
        let float = |word: &str| match stored(word)? {
            Storage::Float(dtype) if dtype != DType::Bf16 => Ok(dtype),
            _ => Err(wrong()),
        };
        Ok(Shape {
            batch,
            m,
            n,
            k,
            trans,
            a: float(a)?,
            b: stored(b)?,
            c: float(c)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_written_and_read_and_hostile_ones_refused() {
        for text in [
            "1x300x1536x576 nt f32 q4 f32",
            "8x77x64x4096 tn f16 bf16 f32",
        ] {
            assert_eq!(text.parse::<Shape>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "1x2x3 nn f32 f32 f32",
            "1x2x3x4 nn f32 f32",
            "1x0x3x4 nn f32 f32 f32",
            "1x2x3x99999999999 nn f32 f32 f32",
            "1x-2x3x4 nn f32 f32 f32",
            "1x2x3x4 xx f32 f32 f32",
            "1x2x3x4 nn q8 f32 f32",
            "1x2x3x4 nn f32 f64 f32",
        ] {
            assert!(text.parse::<Shape>().is_err(), "{text}");
        }
    }

    #[test]
    fn like_shapes_share_a_class() {
        let class =
            |m, n, k| Shape::float([m, n, k], [false, true], DType::F32, DType::F32).class();
        assert_eq!(class(300, 1536, 576), class(280, 1500, 540));
        assert_ne!(class(300, 1536, 576), class(600, 1536, 576));
        assert_ne!(class(1, 1536, 576), class(2, 1536, 576));
        assert_ne!(class(300, 1536, 576), class(300, 1536, 575));
    }
}
