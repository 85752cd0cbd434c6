//! How much GPU memory a run will take, by part, from shapes alone, before any weight is loaded.

use std::fmt;
use std::path::Path;

use super::batch::Example;
use super::config::{Config, Mode};
use super::loader::Loader;
use super::trained::lora_of;
use crate::align::options::{Aggregate, AlignerKind};
use crate::error::{Error, Result};
use crate::gpu::{Gpu, size_class};
use crate::nn::{Freeze, LoraConfig};
use crate::tensor::{Checkpoint, DType};
use crate::vlm::Pictures;
use crate::vlm::idefics3::Idefics3Config;
use crate::vlm::mllama::{MllamaConfig, canonical};

/// Samples that are looked at for the shape of a batch.
const LOOKED_AT: usize = 4;
/// Pixels of a word map.
const MAP: usize = 1024;

/// Bytes of a run's parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// The model's weights, trained ones in f32.
    pub weights: u64,
    /// LoRA factors and aligner.
    pub added: u64,
    /// Moments and gradients of everything trained.
    pub optimizer: u64,
    /// What the backward of one micro-batch needs of the student's forward, logits included.
    pub activations: u64,
    /// What it needs of the word maps and the aligner.
    pub maps: u64,
    /// Samples of that micro-batch.
    pub batch: usize,
    /// The memory there is: `--max-memory` or the adapter's; `None` where neither is known.
    pub room: Option<u64>,
    /// The activations with `train.checkpoint_activations`.
    recomputed: u64,
}

/// What a batch is made of: the most of any sample, times the samples.
struct Shape {
    tokens: usize,
    patches: usize,
    labels: usize,
    words: usize,
}

/// A stack of transformer layers.
struct Tower {
    layers: usize,
    hidden: usize,
    /// Channels of queries, and of keys and values.
    queries: usize,
    keys: usize,
    /// Channels within the feed-forward blocks times the copies of them that are kept.
    inner: usize,
    tokens: usize,
}

impl Tower {
    /// Elements that the backward needs of one layer: the residual stream and what is added to it, twice each, the
    /// normed inputs, queries, keys, values, the attention's output, and the feed-forward block's.
    fn layer(&self) -> usize {
        self.tokens * (6 * self.hidden + 2 * self.queries + 2 * self.keys + self.inner)
    }
}

impl Estimate {
    /// What the run of `config` needs on `gpu`, by the first samples of its data.
    ///
    /// # Errors
    /// Files that cannot be read; weights and optimizer alone that do not fit, with what would make them.
    pub fn new(gpu: &Gpu, config: &Config, loader: &Loader) -> Result<Estimate> {
        let dtype = config.train.precision.dtype(gpu.tier())?;
        let (_, order) = loader.order(0);
        let looked_at = &order[..order.len().min(LOOKED_AT)];
        let shape = Shape::of(&loader.examples(looked_at)?, config)?;
        let mut estimate = Self::of(config, &shape, dtype)?;
        estimate.room = gpu.room();
        match estimate.room {
            Some(room) if estimate.fixed() > room => Err(Error::Config(format!(
                "out of GPU memory before it began: {estimate}; {}",
                match config.train.mode {
                    Mode::Full => "use train.mode = \"lora\", or freeze more by train.freeze",
                    Mode::Lora =>
                        "use model.quantize = \"q8\" or \"q4\", `--precision f16`, or a smaller model",
                }
            ))),
            _ => Ok(estimate),
        }
    }

    fn of(config: &Config, shape: &Shape, dtype: DType) -> Result<Estimate> {
        let dir = &config.model.path;
        let model = Model::of(dir, shape)?;
        let checkpoint = Checkpoint::open(dir, "model")?.rename(model.rename);
        let lora = lora_of(config)?.rename(model.rename);
        let freeze = Freeze(config.train.freeze.clone());
        let full = config.train.mode == Mode::Full;
        let element = dtype.bytes() as u64;

        let mut estimate = Estimate {
            batch: config.train.batch,
            ..Estimate::default()
        };
        let (mut trained, mut beside, mut vision_trained) = (0u64, 0u64, false);
        for name in checkpoint.names() {
            let sizes = checkpoint.shape(name).unwrap_or_default();
            let elements = sizes.iter().product::<usize>() as u64;
            let own = full && !freeze.matches(name);
            let stored = checkpoint.element_bytes(name).unwrap_or(4) as u64;
            let held = match sizes.len() {
                _ if own => 4,
                0 | 1 => 4,
                _ => stored.min(if dtype == DType::F16 { 2 } else { 4 }),
            };
            // Tables and the output projection stay as they are.
            let linear = !name.contains("embed") && !name.contains("lm_head");
            estimate.weights += match (config.model.quantize.kind(), sizes) {
                (Some(kind), [outputs, inputs]) if linear && !own => kind.bytes(*outputs, *inputs),
                _ => size_class(elements * held),
            };
            trained += if own { elements } else { 0 };
            let vision = name.contains("vision_model");
            vision_trained |= own && vision;
            let module = name.strip_suffix(".weight").unwrap_or(name);
            let adapted = !full && lora.matches(module) && !freeze.matches(module);
            if let ([outputs, inputs], true) = (sizes, adapted) {
                let rank = lora.rank(module);
                let factors = rank * (inputs + outputs);
                trained += factors as u64;
                estimate.added += 4 * factors as u64;
                vision_trained |= vision;
                beside += factors_kept(&lora, *inputs, *outputs, rank) as u64
                    * model.tower(vision).tokens as u64;
            }
        }
        let (aligner, maps) = aligner(config, &model, shape.words);
        estimate.added += 4 * aligner as u64;
        estimate.optimizer = 12 * (trained + aligner as u64);
        estimate.maps = 4 * maps as u64;

        // Logits, their gradient, and a copy on the way.
        let logits = 3 * (shape.labels * model.vocabulary) as u64;
        let towers = [(&model.text, true), (&model.vision, vision_trained)];
        let mut all = logits + beside + model.pictures as u64;
        let mut recomputed = logits + model.pictures as u64;
        for (tower, taped) in towers {
            // A gradient flows back through one layer at a time.
            let one = tower.layer() as u64;
            let layers = if taped { tower.layers as u64 } else { 0 };
            all += layers * one + one;
            recomputed += layers * (tower.tokens * tower.hidden) as u64 + 2 * one;
        }
        estimate.recomputed = element * recomputed;
        estimate.activations = match config.train.checkpoint_activations {
            true => estimate.recomputed,
            false => element * all,
        };
        Ok(estimate)
    }

    /// The most that is held at once.
    pub fn peak(&self) -> u64 {
        self.fixed() + self.activations + self.maps
    }

    /// What does not depend on the batch.
    fn fixed(&self) -> u64 {
        self.weights + self.added + self.optimizer
    }

    /// Which setting would make it fit; `None` where it does, or where the room is not known.
    pub fn advice(&self) -> Option<String> {
        let room = self.room?;
        if self.peak() <= room {
            return None;
        }
        let left = room.saturating_sub(self.fixed());
        let batch = |bytes: u64| (left * self.batch as u64 / bytes.max(1)) as usize;
        let (smaller, recomputed) = (
            batch(self.activations + self.maps),
            batch(self.recomputed + self.maps),
        );
        let less = |batch: usize| match batch {
            b if b >= self.batch => String::new(),
            b => format!(
                "train.batch = {b} with train.accumulate = {} times as large",
                self.batch.div_ceil(b)
            ),
        };
        Some(match (smaller, recomputed) {
            (1.., _) => format!("it would with {}", less(smaller)),
            (0, 1..) => {
                let smaller = less(recomputed);
                let and = if smaller.is_empty() { "" } else { " and " };
                format!("it would with train.checkpoint_activations = true{and}{smaller}")
            }
            _ => {
                "not even one sample at a time with train.checkpoint_activations = true would; use \
                  model.quantize = \"q4\", `--precision f16`, a smaller picture or model"
                    .into()
            }
        })
    }
}

impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "about {} of GPU memory: weights {}, LoRA and aligner {}, optimizer {}, activations of {} sample(s) {}, \
             word maps {}",
            mib(self.peak()),
            mib(self.weights),
            mib(self.added),
            mib(self.optimizer),
            self.batch,
            mib(self.activations),
            mib(self.maps)
        )?;
        match self.room {
            Some(room) => write!(f, "; there are {}", mib(room)),
            None => Ok(()),
        }
    }
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1u64 << 20) as f64)
}

impl Shape {
    fn of(examples: &[Example], config: &Config) -> Result<Shape> {
        let dir = &config.model.path;
        let merged = match Idefics3Config::load(dir) {
            Ok(config) => config.scale_factor * config.scale_factor,
            Err(_) => 1,
        };
        let vision = MllamaConfig::load(dir).map(|config| config.vision);
        let patches = |example: &Example| match (&example.prepared.pictures, &vision) {
            (Pictures::Idefics3(prompt), _) => prompt.image_positions.len() * merged,
            (Pictures::Mllama(prompt), Ok(vision)) => {
                let tile = (vision.image_size / vision.patch).pow(2) + 1;
                prompt.images.len() * vision.max_tiles * tile
            }
            (Pictures::Mllama(_), Err(_)) => 0,
        };
        let most = |of: &dyn Fn(&Example) -> usize| {
            config.train.batch * examples.iter().map(of).max().unwrap_or(0)
        };
        Ok(Shape {
            tokens: most(&|e| e.prepared.ids.len()),
            patches: most(&patches),
            labels: most(&|e| e.prepared.learned()),
            words: most(&|e| e.words.words.len()),
        })
    }
}

/// A student's sizes.
struct Model {
    text: Tower,
    vision: Tower,
    vocabulary: usize,
    hooked: usize,
    heads: usize,
    /// Elements of image tokens, and of their keys and values where layers attend to them.
    pictures: usize,
    rename: fn(&str) -> String,
}

impl Model {
    fn of(dir: &Path, shape: &Shape) -> Result<Model> {
        let (text, pictures) = (shape.tokens, shape.patches);
        if let Ok(config) = MllamaConfig::load(dir) {
            let (vision, head) = (&config.vision, config.hidden / config.heads);
            let cross = 2 * config.cross_layers.len() * config.kv_heads * head;
            return Ok(Model {
                text: Tower {
                    layers: config.layers,
                    hidden: config.hidden,
                    queries: config.hidden,
                    keys: config.kv_heads * head,
                    inner: 3 * config.intermediate,
                    tokens: text,
                },
                vision: Tower {
                    layers: vision.layers + vision.global_layers,
                    hidden: vision.hidden,
                    queries: vision.hidden,
                    keys: vision.hidden,
                    inner: 2 * vision.intermediate,
                    tokens: pictures,
                },
                vocabulary: config.vocabulary,
                hooked: config.cross_layers.len(),
                heads: config.heads,
                pictures: pictures * (config.hidden + cross),
                rename: canonical,
            });
        }
        let config = Idefics3Config::load(dir)?;
        let vision = &config.vision;
        Ok(Model {
            text: Tower {
                layers: config.layers,
                hidden: config.hidden,
                queries: config.heads * config.head_dim,
                keys: config.kv_heads * config.head_dim,
                inner: 3 * config.intermediate,
                tokens: text,
            },
            vision: Tower {
                layers: vision.layers,
                hidden: vision.hidden,
                queries: vision.hidden,
                keys: vision.hidden,
                inner: 2 * vision.intermediate,
                tokens: pictures,
            },
            vocabulary: config.vocabulary,
            hooked: config.layers,
            heads: config.heads,
            // Normed, merged, and among the text.
            pictures: 2 * pictures * vision.hidden + 2 * text * config.hidden,
            rename: str::to_string,
        })
    }

    fn tower(&self, vision: bool) -> &Tower {
        match vision {
            true => &self.vision,
            false => &self.text,
        }
    }
}

/// Elements a token that a pair of factors keeps: its input with dropout, the inner product, and the two outputs.
fn factors_kept(lora: &LoraConfig, inputs: usize, outputs: usize, rank: usize) -> usize {
    let dropped = if lora.dropout > 0.0 { inputs } else { 0 };
    dropped + rank + 2 * outputs
}

/// Elements of the aligner's weights, and of what the backward needs of the maps of `words` words.
fn aligner(config: &Config, model: &Model, words: usize) -> (usize, usize) {
    let (hidden, channels) = (config.aligner.hidden, model.heads);
    let all: Vec<usize> = (0..model.hooked).collect();
    let layers = config.attention.layers.choose(&all);
    let layers = layers.map_or(model.hooked, |chosen| chosen.len());
    let (blocks, window): (usize, usize) = match config.aligner.kind {
        AlignerKind::None => (0, 0),
        AlignerKind::Mlp => (2, 1),
        AlignerKind::Light => (2, 9),
        AlignerKind::Deep => (5, 9),
        AlignerKind::Conv => (3, 9),
    };
    let inner = blocks.max(1) - 1;
    let weights = match blocks {
        0 => 0,
        _ => {
            window * (2 * channels * hidden + inner.saturating_sub(1) * hidden * hidden) + channels
        }
    };
    // Each layer's words are resized and joined; then convolution, norm and activation of each block.
    let given = 2 * layers * words * MAP * channels;
    let through = match config.attention.aggregate {
        Aggregate::Learned => layers * words,
        _ => words,
    };
    let blocks = 3 * (inner * hidden + channels);
    // As much again while the widest block's gradient flows.
    (weights, given + through * MAP * (blocks + 2 * hidden))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_names_the_setting_that_makes_it_fit() {
        let advice = |room| {
            let estimate = Estimate {
                weights: 100,
                activations: 400,
                recomputed: 100,
                batch: 4,
                room: Some(room),
                ..Estimate::default()
            };
            estimate.advice()
        };
        assert_eq!(advice(500), None);
        let said = advice(300).expect("advice");
        assert!(
            said.contains("train.batch = 2 with train.accumulate = 2 times"),
            "{said}"
        );
        let said = advice(150).expect("advice");
        assert!(
            said.contains("checkpoint_activations = true and train.batch = 2"),
            "{said}"
        );
        assert!(advice(110).expect("advice").contains("not even one"));
    }
}
