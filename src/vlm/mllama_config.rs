//! Configuration and key dialects of Llama-3.2-Vision checkpoints.

use std::path::Path;

use serde_json::Value;

use super::decoder::{Rope, number, size};
use super::mllama_processor::{Tiles, TilingConfig};
use super::mllama_vision::MllamaVisionConfig;
use super::processor::tokenizer::read_json;
use super::sample::Grid;
use crate::ops::attention::AttentionShape;
use crate::{Error, Result};

/// Configuration of a Mllama checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct MllamaConfig {
    /// The picture encoder.
    pub vision: MllamaVisionConfig,
    /// Vocabulary of the output.
    pub vocabulary: usize,
    /// Channels of the hidden states.
    pub hidden: usize,
    /// Decoder layers, cross-attention layers included.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels within the feed-forward blocks.
    pub intermediate: usize,
    /// Epsilon of the RMS norms.
    pub eps: f64,
    /// Rotary positions.
    pub rope: Rope,
    /// Longest text.
    pub max_positions: usize,
    /// Which layers are cross-attention, ascending.
    pub cross_layers: Vec<usize>,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
}

impl MllamaConfig {
    /// Reads `config.json` of a checkpoint directory.
    ///
    /// # Errors
    /// A missing file, another `model_type`, or a field with an unusable value, naming file and field.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join("config.json");
        let json = read_json(&path)?.ok_or_else(|| Error::file(&path, "no such file"))?;
        let kind = json
            .get("model_type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if kind != "mllama" {
            let message = format!("field `model_type`: {kind:?} found, \"mllama\" expected");
            return Err(Error::file(&path, message));
        }
        let section = |name: &str| {
            let found = json.get(name).filter(|v| v.is_object());
            found.ok_or_else(|| Error::file(&path, format!("field `{name}`: an object expected")))
        };
        let (text, name) = (section("text_config")?, "text_config");
        let get = |key: &str| size(text, name, key, &path);
        let (hidden, heads) = (get("hidden_size")?, get("num_attention_heads")?);
        let kv_heads = get("num_key_value_heads")?;
        if !hidden.is_multiple_of(heads) || !heads.is_multiple_of(kv_heads) {
            let message = format!(
                "field `{name}`: hidden_size {hidden}, num_attention_heads {heads} and \
                 num_key_value_heads {kv_heads} must divide evenly"
            );
            return Err(Error::file(&path, message));
        }
        let layers = get("num_hidden_layers")?;
        let mut cross_layers: Vec<usize> =
            match text.get("cross_attention_layers").and_then(Value::as_array) {
                Some(list) => list
                    .iter()
                    .filter_map(Value::as_u64)
                    .map(|i| i as usize)
                    .collect(),
                None => (0..8).map(|i| 3 + 5 * i).collect(),
            };
        cross_layers.sort_unstable();
        if let Some(wrong) = cross_layers.iter().find(|&&i| i >= layers) {
            let message = format!(
                "field `{name}.cross_attention_layers`: {wrong} found, below {layers} expected"
            );
            return Err(Error::file(&path, message));
        }
        let activation = text
            .get("hidden_act")
            .and_then(Value::as_str)
            .unwrap_or("silu");
        if activation != "silu" {
            let message =
                format!("field `{name}.hidden_act`: {activation:?} found, \"silu\" expected");
            return Err(Error::file(&path, message));
        }
        let eos = match text.get("eos_token_id") {
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
            Some(value) => value.as_u64().into_iter().collect::<Vec<u64>>(),
            None => vec![128_001],
        };
        Ok(Self {
            vision: MllamaVisionConfig::parse(section("vision_config")?, &path)?,
            vocabulary: get("vocab_size")?,
            hidden,
            layers,
            heads,
            kv_heads,
            intermediate: get("intermediate_size")?,
            eps: number(text, "rms_norm_eps", 1e-5),
            rope: Rope::parse(text, name, hidden / heads, &path)?,
            max_positions: size(text, name, "max_position_embeddings", &path).unwrap_or(131_072),
            cross_layers,
            eos: eos.into_iter().map(|id| id as u32).collect(),
        })
    }

    /// Where picture `index` of a prompt lies among the key columns, without the class tokens, its
    /// tiles put together as its grid says.
    pub fn map_columns(&self, tiles: &Tiles, index: usize) -> (Vec<u32>, Grid) {
        let vision = &self.vision;
        let (side, tokens) = (vision.side(), vision.tokens());
        let (height, width) = (tiles.grid.0 * side, tiles.grid.1 * side);
        let column = |at: usize| {
            let (y, x) = (at / width, at % width);
            let tile = y / side * tiles.grid.1 + x / side;
            let patch = y % side * side + x % side;
            (((index * vision.max_tiles) + tile) * tokens + 1 + patch) as u32
        };
        (
            (0..height * width).map(column).collect(),
            Grid { height, width },
        )
    }

    /// Checks that the processor cuts pictures as the encoder expects them.
    ///
    /// # Errors
    /// Another tile side or number of tiles, naming the directory and both values.
    pub(super) fn check_tiles(&self, dir: &Path, tiling: &TilingConfig) -> Result<()> {
        for (what, found, expected) in [
            ("size", tiling.side, self.vision.image_size),
            ("max_image_tiles", tiling.max_tiles, self.vision.max_tiles),
        ] {
            if found != expected {
                let message = format!(
                    "image processor field `{what}`: {found} found, {expected} expected by \
                     `vision_config` in config.json"
                );
                return Err(Error::file(dir, message));
            }
        }
        Ok(())
    }

    /// Shape of the decoder's attention.
    pub(super) fn attention(&self) -> AttentionShape {
        let head_dim = self.hidden / self.heads;
        AttentionShape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            scale: (head_dim as f32).powf(-0.5),
        }
    }
}

/// Today's name of a weight or module of any dialect of this family's checkpoints.
pub fn canonical(name: &str) -> String {
    for (old, new) in [
        ("language_model.lm_head", "lm_head"),
        ("language_model.model.", "model.language_model."),
        ("vision_model.", "model.vision_model."),
        ("multi_modal_projector", "model.multi_modal_projector"),
    ] {
        if let Some(rest) = name.strip_prefix(old) {
            return format!("{new}{rest}");
        }
    }
    name.to_string()
}
