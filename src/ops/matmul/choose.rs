//! Which kernel does a product: the likely best, one that a caller asks for, or one that was measured.

use std::fmt;
use std::str::FromStr;

use super::tune::tune;
use super::{Cooperative, Geometry, Operands, Shape, Variant, launch};
use crate::gpu::{Tier, Tuning};

/// How a product is done.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Kernel family.
    pub variant: Variant,
    /// Whether [`Variant::Rows`] packs b though it could read it in place; by the number of rows when `None`.
    pub packed: Option<bool>,
    /// Parts of k at the most; by the number of workgroups when `None`.
    pub splits: Option<usize>,
}

/// Parts of k at the most that a choice can ask for.
const MOST_SPLITS: usize = 64;

impl From<Variant> for Choice {
    fn from(variant: Variant) -> Choice {
        Choice {
            variant,
            packed: None,
            splits: None,
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.variant {
            Variant::Tile(per) => write!(f, "tile {per}")?,
            Variant::Rows => write!(f, "rows")?,
            Variant::Vector(lanes) => write!(f, "vector {lanes}")?,
            Variant::Subgroup => write!(f, "subgroup")?,
            Variant::Cooperative(c) => write!(f, "cooperative {} {}", c.size, c.fragments)?,
        }
        match self.packed {
            Some(true) => write!(f, " packed")?,
            Some(false) => write!(f, " in-place")?,
            None => {}
        }
        match self.splits {
            Some(splits) => write!(f, " split {splits}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Choice, String> {
        let wrong = || format!("`{text}` is no way to multiply matrices");
        let words: Vec<&str> = text.split(' ').collect();
        let (variant, rest): (Variant, &[&str]) = match &words[..] {
            ["tile", "4", rest @ ..] => (Variant::Tile(4), rest),
            ["tile", "8", rest @ ..] => (Variant::Tile(8), rest),
            ["rows", rest @ ..] => (Variant::Rows, rest),
            ["vector", "1", rest @ ..] => (Variant::Vector(1), rest),
            ["vector", "32", rest @ ..] => (Variant::Vector(32), rest),
            ["subgroup", rest @ ..] => (Variant::Subgroup, rest),
            ["cooperative", size, fragments, rest @ ..] => {
                let shape = match (*size, *fragments) {
                    ("8", "2") => (8, 2),
                    ("8", "4") => (8, 4),
                    ("16", "2") => (16, 2),
                    ("16", "4") => (16, 4),
                    _ => return Err(wrong()),
                };
                let (size, fragments) = shape;
                (Variant::Cooperative(Cooperative { size, fragments }), rest)
            }
            _ => return Err(wrong()),
        };
        let (packed, rest) = match rest {
            ["packed", rest @ ..] => (Some(true), rest),
            ["in-place", rest @ ..] => (Some(false), rest),
            rest => (None, rest),
        };
        let splits = match rest {
            [] => None,
            ["split", parts] => {
                let parts = parts.parse().ok();
                Some(
                    parts
                        .filter(|p| (1..=MOST_SPLITS).contains(p))
                        .ok_or_else(wrong)?,
                )
            }
            _ => return Err(wrong()),
        };
        Ok(Choice {
            variant,
            packed,
            splits,
        })
    }
}

impl Choice {
    /// As one number, for [`crate::gpu::Gpu::decide`].
    fn bits(self) -> u64 {
        let (kind, x, y) = match self.variant {
            Variant::Tile(per) => (0, per, 0),
            Variant::Rows => (1, 0, 0),
            Variant::Vector(lanes) => (2, lanes, 0),
            Variant::Subgroup => (3, 0, 0),
            Variant::Cooperative(c) => (4, c.size, c.fragments),
        };
        let packed = self.packed.map_or(0, |packed| 1 + u64::from(packed));
        let splits = self.splits.unwrap_or(0) as u64;
        kind | u64::from(x) << 8 | u64::from(y) << 16 | packed << 24 | splits << 32
    }

    fn from_bits(bits: u64) -> Choice {
        let (x, y) = ((bits >> 8) as u8, (bits >> 16) as u8);
        Choice {
            variant: match bits & 0xff {
                0 => Variant::Tile(x.into()),
                1 => Variant::Rows,
                2 => Variant::Vector(x.into()),
                3 => Variant::Subgroup,
                _ => Variant::Cooperative(Cooperative {
                    size: x.into(),
                    fragments: y.into(),
                }),
            },
            packed: match (bits >> 24) as u8 {
                0 => None,
                packed => Some(packed == 2),
            },
            splits: match (bits >> 32) as usize {
                0 => None,
                splits => Some(splits),
            },
        }
    }
}

/// How the product is done: as asked for, where that can do it and compiles; else as measured, else by the likely best.
pub(super) fn choice(o: &Operands<'_>, g: &Geometry, asked: Option<Choice>) -> Choice {
    let gpu = o.a.gpu();
    if let Some(asked) = asked {
        return if works(asked.variant, o, g) {
            asked
        } else {
            usual(o, g)
        };
    }
    let shape = Shape::of(o, g);
    let key = shape.key();
    if let Some(bits) = gpu.decision(key) {
        return Choice::from_bits(bits);
    }
    let choice = measured(o, g, &shape).unwrap_or_else(|| usual(o, g));
    // With an error pending nothing runs and nothing is measured: whoever comes after it decides.
    if !gpu.failing() {
        gpu.decide(key, choice.bits());
    }
    choice
}

/// The choice that is kept or measured now, if it works here.
fn measured(o: &Operands<'_>, g: &Geometry, shape: &Shape) -> Option<Choice> {
    let gpu = o.a.gpu();
    if gpu.tuning() == Tuning::Off || !shape.counts() {
        return None;
    }
    let class = shape.class();
    let tuned = gpu.tuned_or(&class, Some(&shape.to_string()), || tune(gpu, shape))?;
    let choice = tuned.choice.parse().ok();
    let choice = choice.filter(|choice: &Choice| works(choice.variant, o, g));
    if choice.is_none() {
        // Met once: what is decided here stays.
        tracing::warn!(
            "{class}: the tuned choice `{}` cannot do {shape}; the usual kernel does",
            tuned.choice
        );
    }
    choice
}

fn works(variant: Variant, o: &Operands<'_>, g: &Geometry) -> bool {
    let gpu = o.a.gpu();
    serves(variant, gpu.tier(), o, g)
        && gpu.compiles(&launch::kernel_of(&o.with(variant.into()), g))
}

/// The likely best family whose kernel compiles.
pub(super) fn usual(o: &Operands<'_>, g: &Geometry) -> Choice {
    let tier = o.a.gpu().tier();
    let mut order = likely(tier, o, g);
    order.retain(|&variant| serves(variant, tier, o, g));
    let last = order.pop().unwrap_or(Variant::Tile(4));
    let first = order.into_iter().find(|&variant| works(variant, o, g));
    // If the last does not compile either, its dispatch tells so.
    first.unwrap_or(last).into()
}

/// Whether the family can do the product at all.
pub(super) fn serves(variant: Variant, tier: &Tier, o: &Operands<'_>, g: &Geometry) -> bool {
    match variant {
        Variant::Tile(_) | Variant::Rows => true,
        Variant::Vector(_) => {
            g.m <= 8
                && g.batch == 1
                && !o.options.trans_a
                && o.options.trans_b
                && g.k > 0
                && g.k.is_multiple_of(4)
        }
        Variant::Subgroup => {
            let (least, most) = tier.subgroup_size;
            tier.subgroup && least >= 8 && most <= 64
        }
        Variant::Cooperative(shape) => {
            shape.serves(tier, super::cooperative::half(o.a.dtype(), o.b.storage()))
        }
    }
}

/// Families in the order of how fast they should be, without having measured them. The last serves every product.
fn likely(tier: &Tier, o: &Operands<'_>, g: &Geometry) -> Vec<Variant> {
    if tier.cpu {
        return vec![Variant::Vector(1), Variant::Rows, Variant::Tile(4)];
    }
    let groups = |tile: usize| g.m.div_ceil(tile) * g.n.div_ceil(tile) * g.batch;
    let mut order = vec![Variant::Vector(32)];
    // Matrix units multiply f16 many times as fast; few rows would leave most of a tile empty.
    if super::cooperative::half(o.a.dtype(), o.b.storage()) && g.m > 8 && g.n > 8 {
        order.extend(
            Cooperative::candidates(groups)
                .into_iter()
                .map(Variant::Cooperative),
        );
    }
    let per = if groups(128) >= 128 { 8 } else { 4 };
    order.extend([Variant::Tile(per), Variant::Tile(4), Variant::Rows]);
    order
}

/// What tuning measures beside the usual choice: families that serve and compile, and their ways.
pub(super) fn alternatives(o: &Operands<'_>, g: &Geometry) -> Vec<Choice> {
    let tier = o.a.gpu().tier();
    let cooperative = |size, fragments| Variant::Cooperative(Cooperative { size, fragments });
    let mut choices: Vec<Choice> = match tier.cpu {
        true => [Variant::Vector(1), Variant::Rows, cooperative(8, 4)]
            .map(Choice::from)
            .to_vec(),
        false => [
            Variant::Vector(32),
            cooperative(16, 4),
            cooperative(16, 2),
            cooperative(8, 4),
            cooperative(8, 2),
            Variant::Tile(8),
            Variant::Tile(4),
            Variant::Subgroup,
        ]
        .map(Choice::from)
        .to_vec(),
    };
    let usual: Choice = Variant::Rows.into();
    let otherwise = Choice {
        packed: Some(!launch::packs_b(&o.with(usual), g)),
        ..usual
    };
    // Some operands have to be packed.
    if tier.cpu && launch::packs_b(&o.with(usual), g) != launch::packs_b(&o.with(otherwise), g) {
        choices.push(otherwise);
    }
    choices.retain(|choice| works(choice.variant, o, g));
    choices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_written_and_read_and_anything_else_refused() {
        for text in [
            "tile 4",
            "tile 8 split 64",
            "rows packed",
            "rows in-place split 3",
            "vector 32",
            "subgroup split 1",
            "cooperative 16 4",
        ] {
            let choice: Choice = text.parse().unwrap();
            assert_eq!(choice.to_string(), text);
            assert_eq!(Choice::from_bits(choice.bits()), choice);
        }
        for text in [
            "",
            "tile",
            "tile 5",
            "tile 4 split 0",
            "tile 4 split 65",
            "tile 4 split 1 x",
            "cooperative 16 3",
            "rows packed in-place",
            "../../etc/passwd",
        ] {
            assert!(text.parse::<Choice>().is_err(), "{text}");
        }
    }
}
