//! Llama-3.2-Vision's picture encoder: a tiled vision transformer and a gated global transformer over all
//! tiles of a picture, whose output is joined by states from between the first one's layers.
//!
//! Tensor names are the checkpoint's, under `model.vision_model`.

use std::path::Path;
use std::rc::Rc;

use serde_json::Value;

use super::decoder::{number, size};
use super::mllama_processor::Tiles;
use crate::autograd::{Var, attention};
use crate::gpu::Gpu;
use crate::nn::{Init, LayerNorm, Linear, Loader, recomputed};
use crate::ops::attention::{AttentionMask, AttentionShape};
use crate::ops::unary::Unary;
use crate::tensor::{DType, Tensor};
use crate::{Error, Result};

/// Tokens of a tile are padded to a multiple of this many, as the original model does. The padding is no
/// mere alignment: real tokens attend to it.
const TOKEN_MULTIPLE: usize = 8;

/// A real token or padding that takes part with every real one.
const REAL: u32 = 0b11;
/// Query side of padding: meets real keys only.
const PADDING_QUERY: u32 = 0b01;
/// Key side of padding: meets real queries only.
const PADDING_KEY: u32 = 0b10;

/// `vision_config` of a Mllama checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct MllamaVisionConfig {
    /// Channels of a patch.
    pub hidden: usize,
    /// Attention heads.
    pub heads: usize,
    /// Layers of the tiled transformer.
    pub layers: usize,
    /// Layers of the gated global transformer.
    pub global_layers: usize,
    /// Channels within the feed-forward blocks.
    pub intermediate: usize,
    /// Side of a tile in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch: usize,
    /// Epsilon of the layers' norms.
    pub eps: f64,
    /// Tiles per picture, padding included.
    pub max_tiles: usize,
    /// Layers of the tiled transformer whose outputs join the final states.
    pub intermediate_layers: Vec<usize>,
    /// Number of supported tile grids.
    pub grids: usize,
    /// Activation of the feed-forward blocks.
    pub activation: Unary,
}

impl MllamaVisionConfig {
    pub(super) fn parse(json: &Value, path: &Path) -> Result<Self> {
        let section = "vision_config";
        let get = |key: &str| size(json, section, key, path);
        let config = Self {
            hidden: get("hidden_size")?,
            heads: get("attention_heads").or_else(|e| get("num_attention_heads").map_err(|_| e))?,
            layers: get("num_hidden_layers")?,
            global_layers: get("num_global_layers")?,
            intermediate: get("intermediate_size")?,
            image_size: get("image_size")?,
            patch: get("patch_size")?,
            eps: number(json, "norm_eps", 1e-5),
            max_tiles: get("max_num_tiles")?,
            intermediate_layers: match json
                .get("intermediate_layers_indices")
                .and_then(Value::as_array)
            {
                Some(list) => list
                    .iter()
                    .filter_map(Value::as_u64)
                    .map(|i| i as usize)
                    .collect(),
                None => vec![3, 7, 15, 23, 30],
            },
            grids: json
                .get("supported_aspect_ratios")
                .and_then(Value::as_array)
                .map_or(8, Vec::len),
            activation: match json
                .get("hidden_act")
                .and_then(Value::as_str)
                .unwrap_or("gelu")
            {
                "gelu" => Unary::GeluErf,
                "gelu_pytorch_tanh" | "gelu_new" => Unary::GeluTanh,
                "quick_gelu" => Unary::QuickGelu,
                other => {
                    return Err(Error::file(
                        path,
                        format!("field `{section}.hidden_act`: {other:?} found, \"gelu\" expected"),
                    ));
                }
            },
        };
        if !config.hidden.is_multiple_of(config.heads)
            || !config.image_size.is_multiple_of(config.patch)
        {
            return Err(Error::file(
                path,
                format!(
                    "field `{section}`: hidden_size {} by {} heads and image_size {} by patch_size {} must \
                     divide evenly",
                    config.hidden, config.heads, config.image_size, config.patch
                ),
            ));
        }
        if let Some(&wrong) = config
            .intermediate_layers
            .iter()
            .find(|&&i| i >= config.layers)
        {
            return Err(Error::file(
                path,
                format!(
                    "field `{section}.intermediate_layers_indices`: {wrong} found, below {} expected",
                    config.layers
                ),
            ));
        }
        Ok(config)
    }

    /// Patches across a tile.
    pub fn side(&self) -> usize {
        self.image_size / self.patch
    }

    /// Tokens of a tile: its patches and the class token before them.
    pub fn tokens(&self) -> usize {
        self.side() * self.side() + 1
    }

    /// Channels that the encoder puts out.
    pub fn output(&self) -> usize {
        self.hidden * (1 + self.intermediate_layers.len())
    }
}

struct Layer {
    input_norm: LayerNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    post_norm: LayerNorm,
    fc1: Linear,
    fc2: Linear,
    /// Gates on attention and feed-forward, before tanh.
    gates: Option<(Var, Var)>,
    shape: AttentionShape,
    activation: Unary,
}

impl Layer {
    fn load(config: &MllamaVisionConfig, l: &Loader, gated: bool) -> Result<Self> {
        let (dim, attention, mlp) = (config.hidden, l.sub("self_attn"), l.sub("mlp"));
        let projection = |name: &str| Linear::load(&attention.sub(name), dim, dim, false);
        Ok(Self {
            input_norm: LayerNorm::load(&l.sub("input_layernorm"), dim, config.eps)?,
            query: projection("q_proj")?,
            key: projection("k_proj")?,
            value: projection("v_proj")?,
            output: projection("o_proj")?,
            post_norm: LayerNorm::load(&l.sub("post_attention_layernorm"), dim, config.eps)?,
            fc1: Linear::load(&mlp.sub("fc1"), dim, config.intermediate, true)?,
            fc2: Linear::load(&mlp.sub("fc2"), config.intermediate, dim, true)?,
            gates: match gated {
                true => Some((gate(l, "gate_attn")?, gate(l, "gate_ffn")?)),
                false => None,
            },
            shape: AttentionShape {
                heads: config.heads,
                kv_heads: config.heads,
                scale: ((dim / config.heads) as f32).powf(-0.5),
            },
            activation: config.activation,
        })
    }

    /// Hidden states `[pictures, tokens, hidden]` to the same.
    fn forward(&self, x: &Var, mask: &AttentionMask) -> Var {
        let h = self.input_norm.forward(x);
        let (q, k, v) = (
            self.query.forward(&h),
            self.key.forward(&h),
            self.value.forward(&h),
        );
        let attended = attention(&q, &k, &v, self.shape, mask);
        let x = self.gated(x, &self.output, &attended, |gates| &gates.0);
        let h = self
            .fc1
            .forward(&self.post_norm.forward(&x))
            .unary(self.activation);
        self.gated(&x, &self.fc2, &h, |gates| &gates.1)
    }

    /// `x` plus what `layer` makes of `h`, through a gate where there are any.
    fn gated(&self, x: &Var, layer: &Linear, h: &Var, pick: impl Fn(&(Var, Var)) -> &Var) -> Var {
        match &self.gates {
            Some(gates) => {
                let gate = pick(gates).tanh().cast(x.dtype());
                x.add(&layer.forward(h).mul(&gate))
            }
            None => layer.forward_onto(h, x),
        }
    }
}

fn gate(l: &Loader, name: &str) -> Result<Var> {
    l.vector(name, &[1], Init::Zeros)
}

/// Embeddings by tile grid `[grids, width]`, added behind the tanh of a gate.
struct GridEmbedding {
    table: Var,
    gate: Var,
}

impl GridEmbedding {
    fn load(l: &Loader, table: &str, shape: &[usize; 2]) -> Result<Self> {
        Ok(Self {
            table: l.matrix(table, shape, Init::Normal(0.02))?,
            gate: gate(l, "gate")?,
        })
    }

    /// Rows of `grids`, gated: `[pictures, width]`.
    fn forward(&self, grids: &[u32], dtype: DType) -> Var {
        let gpu = self.table.value().gpu();
        let rows = if self.table.needs_grad() {
            let grids = Tensor::from_u32(gpu, grids, &[grids.len()]);
            Var::embedding(&self.table, &grids, dtype)
        } else {
            // Row by row: the whole table may be larger than an adapter can bind.
            let first = Tensor::from_u32(gpu, &[0], &[1]);
            let row = |&grid: &u32| {
                let row = Var::constant(self.table.value().narrow(grid as usize, 1));
                Var::embedding(&row, &first, dtype)
            };
            let rows: Vec<Var> = grids.iter().map(row).collect();
            Var::concat(&rows, 0)
        };
        rows.mul(&self.gate.tanh().cast(dtype))
    }
}

fn run(layer: &Rc<Layer>, x: Var, mask: &AttentionMask, recompute: bool) -> Var {
    if !recompute {
        return layer.forward(&x, mask);
    }
    let (layer, mask) = (layer.clone(), mask.clone());
    recomputed(&[x], move |inputs| vec![layer.forward(&inputs[0], &mask)]).remove(0)
}

/// The picture encoder.
pub struct MllamaVision {
    config: MllamaVisionConfig,
    patch_embedding: Var,
    class_embedding: Var,
    position: Var,
    tile_position: GridEmbedding,
    pre_tile: GridEmbedding,
    post_tile: GridEmbedding,
    norm_pre: LayerNorm,
    norm_post: LayerNorm,
    transformer: Vec<Rc<Layer>>,
    global: Vec<Rc<Layer>>,
    activations: DType,
}

impl MllamaVision {
    /// Loads the encoder; `l` stands at `model.vision_model`.
    ///
    /// # Errors
    /// A missing tensor or another shape than the configuration's, by name.
    pub fn load(config: &MllamaVisionConfig, l: &Loader) -> Result<Self> {
        let (dim, tiles, rows) = (config.hidden, config.max_tiles, config.grids + 1);
        let tile =
            |name| GridEmbedding::load(&l.sub(name), "embedding.weight", &[rows, tiles * dim]);
        let positions = l.sub("gated_positional_embedding");
        let stack = |name: &str, count: usize, gated: bool| -> Result<Vec<Rc<Layer>>> {
            let l = l.sub(name).sub("layers");
            (0..count)
                .map(|i| Ok(Rc::new(Layer::load(config, &l.sub(i), gated)?)))
                .collect()
        };
        let kernel = [dim, 3, config.patch, config.patch];
        let normal = Init::Normal((dim as f32).powf(-0.5));
        Ok(Self {
            patch_embedding: l.matrix("patch_embedding.weight", &kernel, normal)?,
            class_embedding: l.vector("class_embedding", &[dim], normal)?,
            position: positions.vector("embedding", &[config.tokens(), dim], normal)?,
            tile_position: GridEmbedding::load(
                &positions,
                "tile_embedding.weight",
                &[rows, tiles * config.tokens() * dim],
            )?,
            pre_tile: tile("pre_tile_positional_embedding")?,
            post_tile: tile("post_tile_positional_embedding")?,
            // These two keep PyTorch's default epsilon, whatever `norm_eps` says.
            norm_pre: LayerNorm::load(&l.sub("layernorm_pre"), dim, 1e-5)?,
            norm_post: LayerNorm::load(&l.sub("layernorm_post"), dim, 1e-5)?,
            transformer: stack("transformer", config.layers, false)?,
            global: stack("global_transformer", config.global_layers, true)?,
            config: config.clone(),
            activations: l.activations(),
        })
    }

    /// Encodes pictures; `None` stands for a place without one. Returns
    /// `[pictures, max_tiles · (1 + patches), output channels]`, the class token first in each tile and
    /// tiles that a picture lacks included. `recompute` forgets each layer's activations.
    pub fn forward(&self, pictures: &[Option<&Tiles>], recompute: bool) -> Var {
        let c = &self.config;
        let (n, tiles, patches, dim) = (pictures.len(), c.max_tiles, c.tokens() - 1, c.hidden);
        let (gpu, dtype) = (self.class_embedding.value().gpu(), self.activations);
        let width = 3 * c.patch * c.patch;
        let mut pixels = vec![0.0f32; n * tiles * patches * width];
        for (slot, picture) in pixels
            .chunks_exact_mut(tiles * patches * width)
            .zip(pictures)
        {
            if let Some(picture) = picture {
                let cut = picture.patches(c.patch);
                slot[..cut.len()].copy_from_slice(&cut);
            }
        }
        let grids: Vec<u32> = pictures
            .iter()
            .map(|p| p.map_or(0, |picture| picture.aspect_ratio_id))
            .collect();

        // Patches, the tile's place, the class token.
        let pixels = Tensor::from_f32(gpu, &pixels, &[n * tiles * patches, width]);
        let pixels = Var::constant(pixels).cast(dtype);
        let x = pixels
            .matmul_t(&self.patch_embedding.reshape(&[dim, width]))
            .reshape(&[n * tiles, patches, dim]);
        let x = x.add(
            &self
                .pre_tile
                .forward(&grids, dtype)
                .reshape(&[n * tiles, 1, dim]),
        );
        let class = Var::constant(Tensor::zeros(gpu, dtype, &[n * tiles, 1, dim]))
            .add(&self.class_embedding.cast(dtype).reshape(&[1, 1, dim]));
        let x = Var::concat(&[class, x], 1);

        // Positions within the tile and, by the rest of the gate, within the picture.
        let rest = self.tile_position.gate.tanh().scale(-1.0).add_scalar(1.0);
        let x = x.add(&self.position.mul(&rest).cast(dtype));
        let tile_position = self.tile_position.forward(&grids, dtype);
        let x = x.add(&tile_position.reshape(&[n * tiles, c.tokens(), dim]));
        let x = self.norm_pre.forward(&x);

        let padding = c.tokens().next_multiple_of(TOKEN_MULTIPLE) - c.tokens();
        let padded = c.tokens() + padding;
        let x = if padding > 0 {
            let zeros = Var::constant(Tensor::zeros(gpu, dtype, &[n * tiles, padding, dim]));
            Var::concat(&[x, zeros], 1)
        } else {
            x
        };
        let mut x = x.reshape(&[n, tiles * padded, dim]);
        let mask = self.mask(gpu, pictures, padded);
        let mut between = Vec::with_capacity(c.intermediate_layers.len());
        let mut kept: Vec<Option<Var>> = vec![None; c.layers];
        for (index, layer) in self.transformer.iter().enumerate() {
            x = run(layer, x, &mask, recompute);
            if c.intermediate_layers.contains(&index) {
                kept[index] = Some(x.clone());
            }
        }
        for &index in &c.intermediate_layers {
            between.extend(kept[index].clone());
        }

        let x = self
            .norm_post
            .forward(&x)
            .reshape(&[n * tiles, padded, dim]);
        let x = x.add(
            &self
                .post_tile
                .forward(&grids, dtype)
                .reshape(&[n * tiles, 1, dim]),
        );
        let mut x = x.reshape(&[n, tiles * padded, dim]);
        for layer in &self.global {
            x = run(layer, x, &mask, recompute);
        }

        let unpad = |x: &Var| {
            x.reshape(&[n * tiles, padded, dim])
                .narrow(1, 0, c.tokens())
        };
        let mut parts = vec![unpad(&x)];
        if !between.is_empty() {
            // Channel by channel, the states of all layers side by side.
            let count = between.len();
            let columns: Vec<Var> = between
                .iter()
                .map(|x| unpad(x).reshape(&[n * tiles, c.tokens(), dim, 1]))
                .collect();
            parts.push(Var::concat(&columns, 3).reshape(&[n * tiles, c.tokens(), dim * count]));
        }
        Var::concat(&parts, 2).reshape(&[n, tiles * c.tokens(), c.output()])
    }

    /// Only pairs of padding (a missing tile, or a tile's padding tokens) are masked: real tokens attend to
    /// padding and padding to real tokens, as in the original model.
    fn mask(&self, gpu: &Gpu, pictures: &[Option<&Tiles>], padded: usize) -> AttentionMask {
        let c = &self.config;
        let shape = [pictures.len(), c.max_tiles * padded];
        let real: Vec<bool> = pictures
            .iter()
            .flat_map(|picture| {
                // A place without a picture counts as one tile, or its rows would see nothing.
                let tiles = picture.map_or(1, Tiles::count);
                (0..c.max_tiles * padded)
                    .map(move |i| i / padded < tiles && i % padded < c.tokens())
            })
            .collect();
        let bits = |padding: u32| -> Tensor {
            let bits: Vec<u32> = real
                .iter()
                .map(|&real| if real { REAL } else { padding })
                .collect();
            Tensor::from_u32(gpu, &bits, &shape)
        };
        AttentionMask {
            causal: false,
            query_offset: 0,
            query_bits: Some(bits(PADDING_QUERY)),
            key_bits: Some(bits(PADDING_KEY)),
        }
    }
}
