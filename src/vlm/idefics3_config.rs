//! Configuration of SmolVLM and Idefics3 checkpoints.

use std::path::Path;

use serde_json::Value;

use super::decoder::{Rope, number};
use super::processor::tokenizer::read_json;
use crate::ops::unary::Unary;
use crate::{Error, Result};

/// Configuration of the SigLIP picture encoder; defaults are those of transformers' `Idefics3VisionConfig`.
#[derive(Clone, Debug, PartialEq)]
pub struct SiglipConfig {
    /// Channels of the hidden states.
    pub hidden: usize,
    /// Channels within the feed-forward blocks.
    pub intermediate: usize,
    /// Encoder layers.
    pub layers: usize,
    /// Attention heads.
    pub heads: usize,
    /// Side of the pictures that the position table was made for, in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch: usize,
    /// Activation of the feed-forward blocks.
    pub activation: Unary,
    /// Epsilon of the layer norms.
    pub eps: f64,
}

/// Configuration of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Idefics3Config {
    /// The picture encoder.
    pub vision: SiglipConfig,
    /// Patches merged into one image token, along each side.
    pub scale_factor: usize,
    /// Id of `<image>`.
    pub image_token: u32,
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// Channels of the text decoder's hidden states.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Channels within the feed-forward blocks.
    pub intermediate: usize,
    /// Epsilon of the RMS norms.
    pub eps: f64,
    /// Rotary positions.
    pub rope: Rope,
    /// Longest sequence.
    pub max_positions: usize,
    /// Whether the output projection is the token table when the file has no `lm_head`.
    pub tied: bool,
    /// Tokens that end a generation, as `config.json` names them.
    pub eos: Vec<u32>,
}

/// A section of the configuration, for messages and defaults.
struct Section<'a> {
    json: &'a Value,
    name: &'a str,
    path: &'a Path,
}

impl Section<'_> {
    fn wrong(&self, key: &str, expected: &str) -> Error {
        let found = self.json.get(key);
        let found = found.map_or("nothing".to_string(), Value::to_string);
        let message = format!(
            "field `{}.{key}`: {found} found, {expected} expected",
            self.name
        );
        Error::file(self.path, message)
    }

    /// A positive whole number, `default` where the field is absent or null.
    fn size(&self, key: &str, default: usize) -> Result<usize> {
        match self.json.get(key) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value
                .as_u64()
                .filter(|&n| n > 0 && n < 1 << 31)
                .map(|n| n as usize)
                .ok_or_else(|| self.wrong(key, "a positive whole number")),
        }
    }

    fn text<'a>(&'a self, key: &str, default: &'a str) -> &'a str {
        self.json
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or(default)
    }
}

impl SiglipConfig {
    fn parse(json: &Value, path: &Path) -> Result<Self> {
        let s = Section {
            json,
            name: "vision_config",
            path,
        };
        let activation = match s.text("hidden_act", "gelu_pytorch_tanh") {
            "gelu_pytorch_tanh" | "gelu_new" => Unary::GeluTanh,
            "gelu" => Unary::GeluErf,
            "quick_gelu" => Unary::QuickGelu,
            _ => {
                return Err(s.wrong(
                    "hidden_act",
                    "\"gelu_pytorch_tanh\", \"gelu\" or \"quick_gelu\"",
                ));
            }
        };
        let config = Self {
            hidden: s.size("hidden_size", 1152)?,
            intermediate: s.size("intermediate_size", 3072)?,
            layers: s.size("num_hidden_layers", 12)?,
            heads: s.size("num_attention_heads", 16)?,
            image_size: s.size("image_size", 224)?,
            patch: s.size("patch_size", 32)?,
            activation,
            eps: number(json, "layer_norm_eps", 1e-6),
        };
        if !config.hidden.is_multiple_of(config.heads) {
            return Err(s.wrong(
                "num_attention_heads",
                &format!("a divisor of hidden_size {}", config.hidden),
            ));
        }
        if config.patch > config.image_size {
            return Err(s.wrong(
                "patch_size",
                &format!("at most image_size {}", config.image_size),
            ));
        }
        match s.size("num_channels", 3)? {
            3 => Ok(config),
            _ => Err(s.wrong("num_channels", "3")),
        }
    }
}

impl Idefics3Config {
    /// Reads `config.json` of a checkpoint directory.
    ///
    /// # Errors
    /// A missing file, another `model_type`, or a field with an unusable value, naming file and field.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let path = dir.as_ref().join("config.json");
        let json = read_json(&path)?.ok_or_else(|| Error::file(&path, "no such file"))?;
        let top = Section {
            json: &json,
            name: "config",
            path: &path,
        };
        if !["idefics3", "smolvlm"].contains(&top.text("model_type", "")) {
            return Err(top.wrong("model_type", "\"idefics3\" or \"smolvlm\""));
        }
        let empty = Value::Object(serde_json::Map::new());
        let section = |name: &str| json.get(name).filter(|v| v.is_object()).unwrap_or(&empty);
        let vision = SiglipConfig::parse(section("vision_config"), &path)?;
        let text = Section {
            json: section("text_config"),
            name: "text_config",
            path: &path,
        };
        if text.text("hidden_act", "silu") != "silu" {
            return Err(text.wrong("hidden_act", "\"silu\""));
        }
        for field in ["attention_bias", "mlp_bias", "qk_layer_norms"] {
            if text.json.get(field).and_then(Value::as_bool) == Some(true) {
                return Err(text.wrong(field, "false"));
            }
        }
        let (hidden, heads) = (
            text.size("hidden_size", 4096)?,
            text.size("num_attention_heads", 32)?,
        );
        let kv_heads = text.size("num_key_value_heads", heads)?;
        let head_dim = text.size("head_dim", hidden / heads)?;
        if heads % kv_heads != 0 {
            let expected = format!("a divisor of num_attention_heads {heads}");
            return Err(text.wrong("num_key_value_heads", &expected));
        }
        if head_dim % 2 != 0 {
            return Err(text.wrong("head_dim", "an even number"));
        }
        let vocabulary = text.size("vocab_size", 32_000)?;
        let image_token = top.size("image_token_id", 128_257)?;
        if image_token >= vocabulary {
            return Err(top.wrong(
                "image_token_id",
                &format!("an id below vocab_size {vocabulary}"),
            ));
        }
        let scale_factor = top.size("scale_factor", 2)?;
        let flag = |json: &Value| json.get("tie_word_embeddings").and_then(Value::as_bool);
        let mut eos = Vec::new();
        for json in [text.json, &json] {
            match json.get("eos_token_id") {
                Some(Value::Array(list)) => eos.extend(list.iter().filter_map(Value::as_u64)),
                Some(value) => eos.extend(value.as_u64()),
                None => {}
            }
        }
        Ok(Self {
            scale_factor,
            image_token: image_token as u32,
            vocabulary,
            hidden,
            layers: text.size("num_hidden_layers", 32)?,
            heads,
            kv_heads,
            head_dim,
            intermediate: text.size("intermediate_size", 11_008)?,
            eps: number(text.json, "rms_norm_eps", 1e-6),
            rope: Rope::parse(text.json, "text_config", head_dim, &path)?,
            max_positions: text.size("max_position_embeddings", 2048)?,
            tied: flag(&json).or_else(|| flag(text.json)).unwrap_or(false),
            eos: eos.into_iter().map(|id| id as u32).collect(),
            vision,
        })
    }

    /// Image tokens along one side of a tile of `side` pixels.
    pub fn tile_side(&self, side: usize) -> usize {
        side / self.vision.patch / self.scale_factor
    }

    /// That tiles of `side` pixels can be encoded: whole groups of patches. Pixels beyond the last whole patch are left
    /// out, as the published model does (384 pixels are 27 patches of 14).
    ///
    /// # Errors
    /// Names the processor's file in `dir`, found and expected.
    pub fn check_tile(&self, dir: &Path, side: usize) -> Result<()> {
        let patches = side / self.vision.patch;
        if patches > 0 && patches.is_multiple_of(self.scale_factor) {
            return Ok(());
        }
        let message = format!(
            "image processor, field `max_image_size.longest_edge`: {side} found, which is {patches} patches of {}; \
             a multiple of scale_factor {} expected",
            self.vision.patch, self.scale_factor
        );
        Err(Error::file(dir, message))
    }
}
