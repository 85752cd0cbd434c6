//! A student's sizes, from its configuration and, where they are there, the headers of its weights.

use std::path::Path;

use super::Shape;
use crate::error::{Error, Result};
use crate::nn::Freeze;
use crate::tensor::Checkpoint;
use crate::train::config::{Config, Mode};
use crate::train::trained::{lora_of, nothing};
use crate::vlm::idefics3::Idefics3Config;
use crate::vlm::mllama::{MllamaConfig, canonical};
use crate::vlm::{check_freeze, shapes};

/// A stack of transformer layers.
pub struct Tower {
    /// Number of layers.
    pub layers: usize,
    /// Channels of the hidden states.
    pub hidden: usize,
    /// Channels of the queries.
    pub queries: usize,
    /// Channels of the keys, and of the values.
    pub keys: usize,
    /// Channels within the feed-forward blocks times the copies of them that are kept.
    pub inner: usize,
    /// Tokens of a micro-batch.
    pub tokens: usize,
    /// Tokens that each of them attends to: half of a causal sequence.
    pub seen: usize,
}

impl Tower {
    /// Elements that the backward needs of one layer: the residual stream and what is added to it, twice each, the
    /// normed inputs, queries, keys, values, the attention's output, and the feed-forward block's.
    pub fn layer(&self) -> usize {
        self.tokens * (6 * self.hidden + 2 * self.queries + 2 * self.keys + self.inner)
    }
}

/// A tensor of the checkpoint.
pub struct Weight {
    /// Today's name.
    pub name: String,
    /// Shape in the checkpoint.
    pub shape: Vec<usize>,
    /// Bytes of an element as stored.
    pub bytes: usize,
}

/// How a weight takes part in training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It stays as it is.
    Frozen,
    /// It is trained itself.
    Own,
    /// LoRA factors of this rank are trained beside it.
    Adapted(usize),
}

impl Weight {
    /// Whether it is the picture encoder's.
    pub fn in_vision(&self) -> bool {
        self.name.contains("vision_model")
    }

    /// Whether it is of what leads from the picture encoder to the decoder.
    pub fn in_connector(&self) -> bool {
        self.name.contains("connector") || self.name.contains("multi_modal_projector")
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64
    }
}

/// A student's sizes.
pub struct Outline {
    /// The text decoder.
    pub text: Tower,
    /// The picture encoder.
    pub vision: Tower,
    /// Size of the vocabulary.
    pub vocabulary: usize,
    /// Whether the output projection is the token table.
    pub tied: bool,
    /// Layers whose attention can be tapped.
    pub hooked: usize,
    /// Cross-attention layers, which read the picture's keys and values.
    pub cross: usize,
    /// Query heads.
    pub heads: usize,
    /// Image tokens that the connector makes of a micro-batch.
    pub image_tokens: usize,
    /// Elements of image tokens, and of their keys and values where layers attend to them.
    pub pictures: usize,
    /// What it has to hold.
    pub weights: Vec<Weight>,
    /// Whether files with the weights are there; else they are as `config.json` has them.
    pub stored: bool,
    /// Names of any version of `transformers` to today's.
    pub rename: fn(&str) -> String,
}

impl Outline {
    /// The student in `dir`, for batches of `shape`.
    ///
    /// # Errors
    /// A configuration that cannot be read; weights that are not those of the configuration.
    pub fn open(dir: &Path, shape: &Shape) -> Result<Outline> {
        let (text, patches) = (shape.tokens, shape.patches);
        let (tokens, samples) = (text / shape.samples, shape.samples);
        if let Ok(config) = MllamaConfig::load(dir) {
            let (vision, head) = (&config.vision, config.hidden / config.heads);
            let cross = 2 * config.cross_layers.len() * config.kv_heads * head;
            let (weights, stored) = weights(dir, canonical)?;
            return Ok(Outline {
                text: Tower {
                    layers: config.layers,
                    hidden: config.hidden,
                    queries: config.hidden,
                    keys: config.kv_heads * head,
                    inner: 3 * config.intermediate,
                    tokens: text,
                    seen: tokens.div_ceil(2),
                },
                vision: Tower {
                    layers: vision.layers + vision.global_layers,
                    hidden: vision.hidden,
                    queries: vision.hidden,
                    keys: vision.hidden,
                    inner: 2 * vision.intermediate,
                    tokens: patches,
                    seen: patches / samples,
                },
                vocabulary: config.vocabulary,
                tied: false,
                hooked: config.cross_layers.len(),
                cross: config.cross_layers.len(),
                heads: config.heads,
                image_tokens: patches,
                pictures: patches * (config.hidden + cross),
                weights,
                stored,
                rename: canonical,
            });
        }
        let config = Idefics3Config::load(dir)?;
        let vision = &config.vision;
        let (weights, stored) = weights(dir, str::to_string)?;
        Ok(Outline {
            text: Tower {
                layers: config.layers,
                hidden: config.hidden,
                queries: config.heads * config.head_dim,
                keys: config.kv_heads * config.head_dim,
                inner: 3 * config.intermediate,
                tokens: text,
                seen: tokens.div_ceil(2),
            },
            vision: Tower {
                layers: vision.layers,
                hidden: vision.hidden,
                queries: vision.hidden,
                keys: vision.hidden,
                inner: 2 * vision.intermediate,
                tokens: patches,
                seen: (vision.image_size / vision.patch).pow(2),
            },
            vocabulary: config.vocabulary,
            tied: config.tied,
            hooked: config.layers,
            cross: 0,
            heads: config.heads,
            image_tokens: patches / (config.scale_factor * config.scale_factor),
            // Normed, merged, and among the text.
            pictures: 2 * patches * vision.hidden + 2 * text * config.hidden,
            weights,
            stored,
            rename: str::to_string,
        })
    }

    /// The tower that a tensor of this name belongs to.
    pub fn tower(&self, vision: bool) -> &Tower {
        match vision {
            true => &self.vision,
            false => &self.text,
        }
    }

    /// How each of the weights takes part in the training that `config` asks for.
    ///
    /// # Errors
    /// A pattern of `train.freeze` that matches nothing; nothing that is trained.
    pub fn roles(&self, config: &Config) -> Result<Vec<Role>> {
        let lora = lora_of(config)?.rename(self.rename);
        let freeze = Freeze(config.train.freeze.clone());
        let names: Vec<&str> = self.weights.iter().map(|w| w.name.as_str()).collect();
        check_freeze(&freeze, &names, &config.model.path)?;
        let role = |weight: &Weight| {
            let module = weight.name.strip_suffix(".weight").unwrap_or(&weight.name);
            match config.train.mode {
                Mode::Full if !freeze.matches(&weight.name) => Role::Own,
                Mode::Lora
                    if weight.shape.len() == 2
                        && !weight.name.contains("embed")
                        && lora.matches(module)
                        && !freeze.matches(module) =>
                {
                    Role::Adapted(lora.rank(module))
                }
                _ => Role::Frozen,
            }
        };
        let roles: Vec<Role> = self.weights.iter().map(role).collect();
        match roles.iter().all(|role| *role == Role::Frozen) {
            true => Err(nothing(config, &lora)),
            false => Ok(roles),
        }
    }

    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        self.weights.iter().map(Weight::elements).sum()
    }
}

/// What the configuration asks for, as the files store it where there are any, and whether there are.
fn weights(dir: &Path, rename: fn(&str) -> String) -> Result<(Vec<Weight>, bool)> {
    let shapes = shapes(dir)?;
    if !has_weights(dir) {
        let bytes = published_bytes(dir)?;
        let weight = |(name, shape)| Weight { name, shape, bytes };
        return Ok((shapes.into_iter().map(weight).collect(), false));
    }
    let checkpoint = Checkpoint::open(dir, "model")?.rename(rename);
    let weight = |(name, shape): (String, Vec<usize>)| {
        checkpoint.check(&name, &shape)?;
        let bytes = checkpoint.element_bytes(&name).unwrap_or(4);
        Ok(Weight { name, shape, bytes })
    };
    let weights: Result<Vec<Weight>> = shapes.into_iter().map(weight).collect();
    Ok((weights?, true))
}

/// Whether there is anything that [`Checkpoint::open`] would read or refuse.
fn has_weights(dir: &Path) -> bool {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files.map(|file| file.file_name()).any(|name| {
        let name = name.to_string_lossy();
        let ends = [".safetensors", ".bin", ".pt", ".pth", ".ckpt"];
        name.contains(".index.") || ends.iter().any(|end| name.ends_with(end))
    })
}

/// Bytes of an element by `dtype` of `config.json` (`torch_dtype` before transformers 4.56).
fn published_bytes(dir: &Path) -> Result<usize> {
    let path = dir.join("config.json");
    let json: serde_json::Value = serde_json::from_str(&crate::files::read_text(&path)?)
        .map_err(|e| Error::file(&path, format!("not JSON: {e}")))?;
    let dtype = ["dtype", "torch_dtype"]
        .iter()
        .find_map(|key| json[*key].as_str());
    Ok(match dtype {
        Some("float16" | "bfloat16") => 2,
        _ => 4,
    })
}
