//! Which kernel family does a product.

use super::{Cooperative, Geometry, Operands, Variant, launch};
use crate::gpu::Tier;

/// The family for a product: the one that is asked for, or else the likely best; where it cannot do the product or its
/// kernel does not compile here, the next that does.
pub(super) fn variant(o: &Operands<'_>, g: &Geometry, asked: Option<Variant>) -> Variant {
    let gpu = o.a.gpu();
    let order = asked.into_iter().chain(candidates(gpu.tier(), o, g));
    let mut serving = order.filter(|&v| serves(v, gpu.tier(), o, g)).peekable();
    while let Some(variant) = serving.next() {
        let last = serving.peek().is_none();
        if last || gpu.compiles(&launch::kernel_of(&Operands { variant, ..*o }, g)) {
            return variant;
        }
    }
    unreachable!("matmul: the tile serves every product")
}

/// Whether the family can do the product at all.
fn serves(variant: Variant, tier: &Tier, o: &Operands<'_>, g: &Geometry) -> bool {
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
        Variant::Cooperative(shape) => {
            shape.serves(tier, super::cooperative::half(o.a.dtype(), o.b.storage()))
        }
    }
}

/// Families in the order of how fast they should be, without having measured them; the tile among them serves always.
fn candidates(tier: &Tier, o: &Operands<'_>, g: &Geometry) -> Vec<Variant> {
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
