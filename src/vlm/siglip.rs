//! The SigLIP picture encoder of SmolVLM and Idefics3, and the pixel shuffle behind it.

use std::rc::Rc;

use super::idefics3_config::SiglipConfig;
use crate::Result;
use crate::autograd::{Replayed, Var, attention};
use crate::gpu::Gpu;
use crate::nn::{Embedding, Init, LayerNorm, Linear, Loader, recomputed, replayed};
use crate::ops::attention::{AttentionMask, AttentionShape};
use crate::ops::unary::Unary;
use crate::tensor::{DType, Tensor};

struct Block {
    norm1: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    activation: Unary,
    shape: AttentionShape,
}

impl Block {
    fn load(config: &SiglipConfig, l: &Loader) -> Result<Self> {
        let (hidden, attn) = (config.hidden, l.sub("self_attn"));
        let square = |name: &str| Linear::load(&attn.sub(name), hidden, hidden, true);
        let mlp = l.sub("mlp");
        Ok(Self {
            norm1: LayerNorm::load(&l.sub("layer_norm1"), hidden, config.eps)?,
            key: square("k_proj")?,
            value: square("v_proj")?,
            query: square("q_proj")?,
            output: square("out_proj")?,
            norm2: LayerNorm::load(&l.sub("layer_norm2"), hidden, config.eps)?,
            fc1: Linear::load(&mlp.sub("fc1"), hidden, config.intermediate, true)?,
            fc2: Linear::load(&mlp.sub("fc2"), config.intermediate, hidden, true)?,
            activation: config.activation,
            shape: AttentionShape {
                heads: config.heads,
                kv_heads: config.heads,
                scale: ((hidden / config.heads) as f32).powf(-0.5),
            },
        })
    }

    /// [tiles, patches, hidden] to the same. Every patch of a tile sees every other: our tiles are never
    /// padded.
    fn forward(&self, x: &Var) -> Var {
        let h = self.norm1.forward(x);
        let (q, k, v) = (
            self.query.forward(&h),
            self.key.forward(&h),
            self.value.forward(&h),
        );
        let attended = attention(&q, &k, &v, self.shape, &AttentionMask::default());
        let x = self.output.forward_onto(&attended, x);
        let h = self
            .fc1
            .forward(&self.norm2.forward(&x))
            .unary(self.activation);
        self.fc2.forward_onto(&h, &x)
    }
}

/// The encoder with its plans.
pub struct Siglip {
    config: SiglipConfig,
    gpu: Gpu,
    activations: DType,
    encoder: Rc<Encoder>,
    plans: Replayed,
}

/// Its layers.
struct Encoder {
    config: SiglipConfig,
    patch_weight: Var,
    patch_bias: Var,
    positions: Embedding,
    blocks: Vec<Rc<Block>>,
    norm: LayerNorm,
}

impl Siglip {
    /// Loads the encoder at `l` (`model.vision_model`).
    ///
    /// # Errors
    /// A missing tensor or another shape than the configuration's, by name.
    pub fn load(config: &SiglipConfig, l: &Loader) -> Result<Self> {
        let (embeddings, hidden) = (l.sub("embeddings"), config.hidden);
        let kernel = [hidden, 3, config.patch, config.patch];
        let fan = (kernel[1] * kernel[2] * kernel[3]) as f32;
        let patch = embeddings.sub("patch_embedding");
        let table = (config.image_size / config.patch).pow(2);
        let layers = l.sub("encoder").sub("layers");
        let encoder = Encoder {
            patch_weight: patch.matrix("weight", &kernel, Init::Uniform(1.0 / fan.sqrt()))?,
            patch_bias: patch.vector("bias", &[hidden], Init::Zeros)?,
            positions: Embedding::load(&embeddings.sub("position_embedding"), table, hidden)?,
            blocks: (0..config.layers)
                .map(|i| Ok(Rc::new(Block::load(config, &layers.sub(i))?)))
                .collect::<Result<_>>()?,
            norm: LayerNorm::load(&l.sub("post_layernorm"), hidden, config.eps)?,
            config: config.clone(),
        };
        Ok(Self {
            encoder: Rc::new(encoder),
            plans: Replayed::new(l.gpu()),
            gpu: l.gpu().clone(),
            activations: l.activations(),
            config: config.clone(),
        })
    }

    /// Encodes tiles given as patches `[tiles, patches, 3 · patch · patch]` (channel, row, column within a
    /// patch) to `[tiles, patches, hidden]`; `recompute` forgets each block's activations.
    pub fn forward(&self, pixels: &[f32], tiles: usize, recompute: bool) -> Var {
        // No activation may exceed what one dispatch can bind: lavapipe's 128 MiB are 10 tiles of 1024 patches.
        let widest = self
            .config
            .intermediate
            .max(3 * self.config.patch * self.config.patch);
        let tile = pixels.len() / tiles;
        let patches = tile / (3 * self.config.patch * self.config.patch);
        let bytes = patches * widest * self.activations.bytes();
        let at_once = (self.gpu.tier().max_binding as usize / bytes).max(1);
        let parts: Vec<Var> = pixels
            .chunks(at_once * tile)
            .map(|part| self.encode(part, patches, recompute))
            .collect();
        match parts.len() {
            1 => parts[0].clone(),
            _ => Var::concat(&parts, 0),
        }
    }

    fn encode(&self, pixels: &[f32], patches: usize, recompute: bool) -> Var {
        let width = 3 * self.config.patch * self.config.patch;
        let tiles = pixels.len() / patches / width;
        let bytes = self.activations.narrow(pixels);
        let pixels = Tensor::from_bytes(
            &self.gpu,
            &bytes,
            self.activations,
            &[tiles, patches, width],
        );
        let encoder = self.encoder.clone();
        let own = [usize::from(recompute)];
        replayed(&self.plans, &own, &[Var::constant(pixels)], move |inputs| {
            vec![encoder.forward(&inputs[0], recompute)]
        })
        .remove(0)
    }
}

impl Encoder {
    /// Patches `[tiles, patches, 3 · patch · patch]` to `[tiles, patches, hidden]`.
    fn forward(&self, pixels: &Var, recompute: bool) -> Var {
        let (patches, width) = (pixels.dim(1), pixels.dim(2));
        let weight = self.patch_weight.reshape(&[self.config.hidden, width]);
        let x = pixels.linear(&weight, Some(&self.patch_bias));
        let side = patches.isqrt();
        let ids = position_ids(self.config.image_size / self.config.patch, side);
        let ids = Tensor::from_u32(pixels.value().gpu(), &ids, &[1, patches]);
        let mut x = x.add(&self.positions.forward(&ids));
        for block in &self.blocks {
            x = match recompute {
                false => block.forward(&x),
                true => {
                    let block = block.clone();
                    recomputed(&[x], move |inputs| vec![block.forward(&inputs[0])]).remove(0)
                }
            };
        }
        self.norm.forward(&x)
    }
}

/// Rows of a `table` x `table` position embedding for a grid of `side` x `side` patches, in raster order.
///
/// A patch's fractional place is put into the bucket of the table that it falls into, in single
/// precision as the published model computes it. (Its bucket edges come from a vectorised `arange` whose
/// last bit depends on the processor; the published sides 26, 27 and 32 are not touched by it.)
fn position_ids(table: usize, side: usize) -> Vec<u32> {
    let step = 1.0 / table as f64;
    let count = ((1.0 - step) / step).ceil() as usize;
    let edges: Vec<f32> = (0..count)
        .map(|i| (step + i as f64 * step) as f32)
        .collect();
    let fraction = 1.0 / side as f32;
    let bucket = |i: usize| {
        let place = (i as f32 * fraction).min((1.0 - 1e-6) as f32);
        edges
            .iter()
            .filter(|&&edge| edge <= place)
            .count()
            .min(table - 1)
    };
    (0..side * side)
        .map(|at| (bucket(at / side) * table + bucket(at % side)) as u32)
        .collect()
}

/// Merges groups of `factor` x `factor` neighbouring patches: [tiles, side², D] → [tiles · (side/factor)²,
/// factor² · D], rows in raster order within a tile.
pub fn pixel_shuffle(x: &Var, factor: usize) -> Var {
    let (tiles, patches, channels) = (x.dim(0), x.dim(1), x.dim(2));
    let side = patches.isqrt();
    let merged = side / factor;
    x.reshape(&[tiles * merged, factor, merged, factor * channels])
        .permute(&[0, 2, 1, 3])
        .reshape(&[tiles * merged * merged, factor * factor * channels])
}

#[cfg(test)]
mod tests {
    use super::position_ids;

    #[test]
    fn positions_of_a_full_grid_are_in_order() {
        for side in [8, 26, 27, 32] {
            let all: Vec<u32> = (0..(side * side) as u32).collect();
            assert_eq!(position_ids(side, side), all, "{side}");
        }
    }

    #[test]
    fn positions_of_a_smaller_grid_are_spread() {
        // torch.bucketize of 0, 1/3, 2/3 with edges 1/4, 1/2, 3/4: buckets 0, 1, 2.
        assert_eq!(position_ids(4, 3), [0, 1, 2, 4, 5, 6, 8, 9, 10]);
        assert_eq!(position_ids(4, 2), [0, 2, 8, 10]);
    }
}
