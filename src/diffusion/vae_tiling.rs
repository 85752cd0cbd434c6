//! The VAE in overlapping tiles, for images whose activations do not fit: as `diffusers`' `enable_tiling`.
//!
//! Neighbouring tiles share a quarter of their side, over which their results are blended linearly. Each tile is
//! normalised by itself, so the result differs a little from that of the whole image: nothing is tiled that fits.

use super::vae::{Vae, VaeConfig};
use crate::autograd::Var;
use crate::ops::cast::cast;
use crate::tensor::Tensor;

impl VaeConfig {
    /// Elements of the encoder's largest activation, a latent: a level's first is as wide as the finer level.
    pub(super) fn encoder_elements(&self) -> usize {
        self.widest(|i| i.saturating_sub(1))
    }

    /// Elements of the decoder's largest activation, a latent: a level's first is as wide as the coarser level.
    pub(super) fn decoder_elements(&self) -> usize {
        self.widest(|i| (i + 1).min(self.block_out_channels.len() - 1))
    }

    fn widest(&self, before: impl Fn(usize) -> usize) -> usize {
        let channels = &self.block_out_channels;
        (0..channels.len())
            .map(|i| self.pixels(i) * channels[i].max(channels[before(i)]))
            .max()
            .unwrap_or(1)
    }

    /// Pixels of level `i`, counted from the finest, a latent.
    fn pixels(&self, i: usize) -> usize {
        (self.factor() >> i).pow(2)
    }
}

impl Vae {
    /// Runs `f` on as much of `x` `[batch, …]` at a time as the adapter can bind the activations of: all images, one
    /// after the other, or one after the other in tiles of the given side.
    ///
    /// `sides` are the latents'; `elements` those of the largest activation, a latent.
    pub(super) fn in_pieces(
        &self,
        x: &Var,
        sides: [usize; 2],
        elements: usize,
        f: impl Fn(&Var, Option<usize>) -> Var,
    ) -> Var {
        let (batch, [height, width]) = (x.dim(0), sides);
        let limit = x.value().gpu().tier().max_binding;
        let latents = (limit / (elements * x.dtype().bytes()) as u64) as usize;
        let (side, most) = (height.max(width), latents.isqrt());
        let bindable = (height * width > latents).then(|| even_tile(side, most));
        let wanted = self.tile.filter(|&tile| tile < side);
        let tile = match (bindable, wanted) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        if tile.is_none() && batch * height * width <= latents {
            return f(x, None);
        }
        let images: Vec<Var> = (0..batch)
            .map(|i| {
                let image = if batch == 1 {
                    x.clone()
                } else {
                    x.narrow(0, i, 1)
                };
                f(&image, tile)
            })
            .collect();
        Var::concat(&images, 0)
    }

    /// Mean and log-variance side by side of images `[batch, height, width, 3]`, in tiles of `tile` latents.
    pub fn encode_tiled(&self, images: &Var, tile: usize) -> Var {
        let factor = self.config().factor();
        let blend = tile / 4;
        let step = tile * factor * 3 / 4;
        tiled(images, [tile * factor, step], [tile - blend, blend], |x| {
            self.encode_whole(x)
        })
    }

    /// Images from unscaled latents `[batch, height, width, latent_channels]`, in tiles of `tile` latents.
    pub fn decode_tiled(&self, latents: &Var, tile: usize) -> Var {
        let size = tile * self.config().factor();
        let blend = size / 4;
        tiled(latents, [tile, tile * 3 / 4], [size - blend, blend], |x| {
            self.decode_whole(x)
        })
    }
}

/// The side of tiles of at most `most` latents that cover `side` in as few as those would, and no more than needed.
pub fn even_tile(side: usize, most: usize) -> usize {
    let most = (most / 4 * 4).max(4);
    let count = |tile: usize| side.div_ceil(tile * 3 / 4);
    let tiles = (4..=most).step_by(4);
    tiles
        .into_iter()
        .find(|&tile| count(tile) <= count(most))
        .unwrap_or(most)
}

/// `f` on tiles of `[size, step]` of `x`, blended over `blend` pixels of the result and cut to `keep` of each.
fn tiled(
    x: &Var,
    [size, step]: [usize; 2],
    [keep, blend]: [usize; 2],
    f: impl Fn(&Var) -> Var,
) -> Var {
    let (height, width) = (x.dim(1), x.dim(2));
    let mut above: Vec<Var> = Vec::new();
    let mut rows = Vec::new();
    for i in (0..height).step_by(step) {
        let strip = x.narrow(1, i, size.min(height - i));
        let mut row: Vec<Var> = Vec::new();
        for (j, at) in (0..width).step_by(step).enumerate() {
            let mut tile = f(&strip.narrow(2, at, size.min(width - at)));
            if let Some(above) = above.get(j) {
                tile = blended(above, &tile, 1, blend);
            }
            if let Some(left) = row.last() {
                tile = blended(left, &tile, 2, blend);
            }
            row.push(tile);
        }
        let cut = |tile: &Var| {
            let tile = tile.narrow(1, 0, keep.min(tile.dim(1)));
            tile.narrow(2, 0, keep.min(tile.dim(2)))
        };
        rows.push(Var::concat(&row.iter().map(cut).collect::<Vec<_>>(), 2));
        above = row;
    }
    Var::concat(&rows, 1)
}

/// `b` whose first `extent` lines along `axis` are led over to from the last of `a`.
fn blended(a: &Var, b: &Var, axis: usize, extent: usize) -> Var {
    let extent = extent.min(a.dim(axis)).min(b.dim(axis));
    if extent == 0 {
        return b.clone();
    }
    let mut shape = [1; 4];
    shape[axis] = extent;
    let ramp = |of: &dyn Fn(f32) -> f32| {
        let values: Vec<f32> = (0..extent).map(|i| of(i as f32 / extent as f32)).collect();
        let ramp = Tensor::from_f32(b.value().gpu(), &values, &shape);
        Var::constant(cast(&ramp, b.dtype()))
    };
    let from = a.narrow(axis, a.dim(axis) - extent, extent);
    let to = b.narrow(axis, 0, extent);
    let mixed = from.mul(&ramp(&|t| 1.0 - t)).add(&to.mul(&ramp(&|t| t)));
    match b.dim(axis) - extent {
        0 => mixed,
        rest => Var::concat(&[mixed, b.narrow(axis, extent, rest)], axis),
    }
}
