//! The students' common face: what training and the command line ask of any family.

use std::path::Path;
use std::sync::Arc;

use image::RgbImage;
use serde_json::Value;

use super::generate::{Generated, Sampler, Sampling};
use super::idefics3::{Idefics3, Idefics3Cache, Idefics3Config, Idefics3Input};
use super::mirror::Mirror;
use super::mllama::{self, Mllama, MllamaCache, MllamaConfig, MllamaInput};
use super::prepare::{Processor, model_type};
use super::processor::labels::Tail;
use super::processor::template::Message;
use super::processor::tokenizer::{TextTokenizer, read_json};
use super::sample::{Pictures, Prepared};
use crate::align::options::Parallel;
use crate::autograd::{Var, no_grad};
use crate::gpu::Gpu;
use crate::nn::{Freeze, LoadOptions, Loader, Parameters};
use crate::ops::attention_tap::AttentionTap;
use crate::tensor::{Checkpoint, Tensor};
use crate::{Error, Result};

/// Rows of logits computed at once are limited to this many values, 64 MiB of f32.
const MAX_LOGITS: usize = 16 << 20;

/// Which attention probabilities a forward gives.
pub struct Taps<'a> {
    /// Hooked layers, ascending, below [`Student::hooked_layers`].
    pub layers: &'a [usize],
    /// Text rows u32 `[R]`, `b · T + t` with T the longest sample's tokens.
    pub rows: Tensor,
    /// Key columns u32 `[B, C]`, of each sample's [`Prepared::columns`], padded to the most.
    pub columns: Tensor,
    /// What is added to the probabilities of a self-attention student.
    pub mirror: Option<Mirror>,
}

/// What a forward gives.
pub struct Output {
    /// Hidden states after the last norm `[B, T, D]`; rows past a sample's end are undefined.
    pub hidden: Var,
    /// Per tapped layer the probabilities f32 `[R, heads, C]`.
    pub taps: Vec<Var>,
}

enum Family {
    Idefics3 { model: Box<Idefics3> },
    Mllama { model: Box<Mllama> },
}

enum Cache {
    Idefics3(Idefics3Cache),
    Mllama(Box<MllamaCache>),
}

/// A vision-language model with its processor.
pub struct Student {
    family: Family,
    processor: Arc<Processor>,
    gpu: Gpu,
    parameters: Parameters,
    end: Vec<u32>,
}

impl Student {
    /// Opens a checkpoint directory in the layout of its publisher.
    ///
    /// # Errors
    /// A missing or unusable file, an unknown `model_type`, a missing or mis-shaped tensor, by name.
    pub fn open(dir: impl AsRef<Path>, gpu: &Gpu, mut options: LoadOptions) -> Result<Self> {
        let dir = dir.as_ref();
        let rename = canonical(&model_type(dir)?);
        let checkpoint = Checkpoint::open(dir, "model")?.rename(rename);
        options.lora = options.lora.map(|lora| lora.rename(rename));
        check_freeze(
            &options.freeze,
            &checkpoint.names().collect::<Vec<_>>(),
            dir,
        )?;
        Self::load(dir, &Loader::new(gpu, checkpoint, options))
    }

    /// The model that the configuration and processor files of `dir` describe, its weights from `loader`
    /// (a random one to train from nothing).
    ///
    /// # Errors
    /// As [`Student::open`].
    pub fn load(dir: impl AsRef<Path>, loader: &Loader) -> Result<Self> {
        let dir = dir.as_ref();
        let processor = Processor::open(dir)?;
        let (family, mut end) = match model_type(dir)?.as_str() {
            "idefics3" | "smolvlm" => {
                let config = Idefics3Config::load(dir)?;
                let model = Box::new(Idefics3::load(&config, loader)?);
                (Family::Idefics3 { model }, config.eos)
            }
            "mllama" => {
                let config = MllamaConfig::load(dir)?;
                let model = Box::new(Mllama::load(&config, loader)?);
                (Family::Mllama { model }, config.eos)
            }
            _ => unreachable!("model_type lets no other pass"),
        };
        end.extend(generation_end(dir)?);
        let tokenizer = processor.tokenizer();
        end.extend(
            tokenizer
                .named("eos_token")
                .and_then(|token| tokenizer.id(token)),
        );
        Ok(Self {
            family,
            processor: Arc::new(processor),
            gpu: loader.gpu().clone(),
            parameters: loader.parameters(),
            end,
        })
    }

    /// The checkpoint directory.
    pub fn dir(&self) -> &Path {
        self.processor.dir()
    }

    /// The CPU side: tokenizer, chat template and image processor.
    pub fn processor(&self) -> &Arc<Processor> {
        &self.processor
    }

    /// The checkpoint's tokenizer.
    pub fn tokenizer(&self) -> &TextTokenizer {
        self.processor.tokenizer()
    }

    /// Number of layers whose attention can be tapped: all of a self-attention family, the
    /// cross-attention layers of Llama-3.2-Vision.
    pub fn hooked_layers(&self) -> usize {
        match &self.family {
            Family::Idefics3 { model } => model.config().layers,
            Family::Mllama { model } => model.config().cross_layers.len(),
        }
    }

    /// Query heads of a hooked layer.
    pub fn heads(&self) -> usize {
        match &self.family {
            Family::Idefics3 { model } => model.config().heads,
            Family::Mllama { model } => model.config().heads,
        }
    }

    /// Longest sequence in tokens.
    pub fn context(&self) -> usize {
        self.processor.context()
    }

    /// Size of the vocabulary.
    pub fn vocabulary(&self) -> usize {
        match &self.family {
            Family::Idefics3 { model } => model.config().vocabulary,
            Family::Mllama { model } => model.config().vocabulary,
        }
    }

    /// The trainable tensors.
    pub fn parameters(&self) -> Parameters {
        self.parameters.clone()
    }

    /// Whether the output projection is the token table.
    pub fn tied(&self) -> bool {
        match &self.family {
            Family::Idefics3 { model } => model.config().tied,
            Family::Mllama { .. } => false,
        }
    }

    /// Whether pictures stand among the text, in the self-attention; else layers of their own attend to them.
    pub fn attends_itself(&self) -> bool {
        match &self.family {
            Family::Idefics3 { .. } => true,
            Family::Mllama { .. } => false,
        }
    }

    /// Puts a parallel attention beside that of the hooked layers `layers` and gives its tensors, which are trained; with
    /// the weights of the safetensors file `from`, else new ones by `seed`. To be done before the first forward.
    ///
    /// # Errors
    /// A missing file or tensor, or another shape.
    pub fn add_parallel(
        &mut self,
        kind: Parallel,
        layers: &[usize],
        from: Option<&Path>,
        seed: u64,
    ) -> Result<Parameters> {
        let options = LoadOptions {
            trainable: true,
            seed,
            ..LoadOptions::default()
        };
        let loader = match from {
            Some(file) if !file.is_file() => {
                let message = "no such file; expected a run's parallel.safetensors";
                return Err(Error::file(file, message));
            }
            Some(file) => {
                let checkpoint = Checkpoint::open(file, "parallel")?;
                Loader::new(&self.gpu, checkpoint, options)
            }
            None => Loader::random(&self.gpu, options),
        };
        match &mut self.family {
            Family::Idefics3 { model } => model.add_parallel(&loader, kind, layers)?,
            Family::Mllama { model } => model.add_parallel(&loader, kind, layers)?,
        }
        Ok(loader.parameters())
    }

    /// Whether each layer is recomputed in the backward instead of keeping its activations.
    pub fn set_checkpointing(&mut self, on: bool) {
        match &mut self.family {
            Family::Idefics3 { model } => model.checkpointing = on,
            Family::Mllama { model } => model.checkpointing = on,
        }
    }

    /// Makes a sample of one picture and a conversation whose answers are learned.
    ///
    /// # Errors
    /// An empty answer, image parts other than one, or more tokens than the context has.
    pub fn prepare(&self, picture: &RgbImage, turns: &[Message]) -> Result<Prepared> {
        self.prepare_with(std::slice::from_ref(picture), turns, Tail::None)
    }

    /// Makes a sample of any number of pictures, with what follows the messages.
    ///
    /// # Errors
    /// As [`Student::prepare`]; as many image parts as pictures are expected.
    pub fn prepare_with(
        &self,
        pictures: &[RgbImage],
        turns: &[Message],
        tail: Tail<'_>,
    ) -> Result<Prepared> {
        self.processor.prepare(pictures, turns, tail)
    }

    /// Teacher-forced forward of a batch, padded to its longest sample.
    ///
    /// # Errors
    /// A sample that another family's student prepared.
    pub fn forward(&self, batch: &[&Prepared], taps: Option<&Taps<'_>>) -> Result<Output> {
        let tap = taps.map(|taps| AttentionTap {
            query_rows: taps.rows.clone(),
            key_columns: taps.columns.clone(),
        });
        let layers = taps.map_or(&[][..], |taps| taps.layers);
        let mirror = taps.and_then(|taps| taps.mirror.as_ref());
        match &self.family {
            Family::Idefics3 { model } => {
                let inputs: Vec<_> = batch
                    .iter()
                    .map(|sample| idefics3(sample))
                    .collect::<Result<_>>()?;
                let (hidden, taps) = model.forward_mirrored(&inputs, layers, tap.as_ref(), mirror);
                Ok(Output { hidden, taps })
            }
            Family::Mllama { model } => {
                let inputs: Vec<_> = batch
                    .iter()
                    .map(|sample| mllama(sample))
                    .collect::<Result<_>>()?;
                let (hidden, taps) = model.forward(&inputs, layers, tap.as_ref());
                Ok(Output { hidden, taps })
            }
        }
    }

    /// Logits `[N, V]` of hidden rows `[N, D]`.
    pub fn logits(&self, hidden: &Var) -> Var {
        match &self.family {
            Family::Idefics3 { model } => model.logits(hidden),
            Family::Mllama { model } => model.logits(hidden),
        }
    }

    /// Mean next-token loss of hidden states [N, hidden], as [`Var::cross_entropy`] of their logits, which are never all
    /// stored.
    pub fn next_token_loss(&self, hidden: &Var, labels: &Tensor, count: usize) -> Var {
        match &self.family {
            Family::Idefics3 { model } => model.next_token_loss(hidden, labels, count),
            Family::Mllama { model } => model.next_token_loss(hidden, labels, count),
        }
    }

    /// Logits of every prompt token on the host, `[tokens, vocabulary]` flattened.
    ///
    /// # Errors
    /// As [`Student::forward`], and GPU errors.
    pub fn prompt_logits(&self, prompt: &Prepared) -> Result<Vec<f32>> {
        no_grad(|| {
            let hidden = self.forward(&[prompt], None)?.hidden;
            let (tokens, width) = (hidden.dim(1), hidden.dim(2));
            let rows = hidden.reshape(&[tokens, width]);
            let step = (MAX_LOGITS / self.vocabulary()).max(1);
            let mut out = Vec::with_capacity(tokens * self.vocabulary());
            for start in (0..tokens).step_by(step) {
                let part = rows.narrow(0, start, step.min(tokens - start));
                out.extend(self.logits(&part).value().to_f32()?);
            }
            Ok(out)
        })
    }

    /// Continues a prompt until an end-of-turn token, `max_tokens`, or the context's end; `on_token` sees
    /// every token with the text that it completes.
    ///
    /// # Errors
    /// As [`Student::forward`], and GPU errors.
    pub fn generate(
        &self,
        prompt: &Prepared,
        max_tokens: usize,
        sampling: Sampling,
        on_token: &mut dyn FnMut(u32, &str),
    ) -> Result<Generated> {
        let mut sampler = Sampler::new(sampling);
        let mut out = Generated::default();
        no_grad(|| {
            let (mut hidden, mut cache) = self.prefill(prompt)?;
            let room = (self.context() + 1).saturating_sub(prompt.tokens());
            while out.tokens.len() < max_tokens.min(room) {
                let (tokens, width) = (hidden.dim(1), hidden.dim(2));
                let last = hidden.narrow(1, tokens - 1, 1).reshape(&[1, width]);
                let logits = self.logits(&last).value().to_f32()?;
                let token = sampler.choose(&logits);
                out.tokens.push(token);
                out.finished = self.end.contains(&token);
                let text = self.tokenizer().decode(&out.tokens, true)?;
                // A character whose bytes are not complete yet decodes to U+FFFD: it waits for the next.
                if !text.ends_with('\u{fffd}') || out.finished {
                    on_token(token, text.get(out.text.len()..).unwrap_or_default());
                    out.text = text;
                } else {
                    on_token(token, "");
                }
                if out.finished {
                    break;
                }
                if out.tokens.len() < max_tokens.min(room) {
                    hidden = self.decode(token, &mut cache);
                }
            }
            out.text = self.tokenizer().decode(&out.tokens, true)?;
            Ok(out)
        })
    }

    fn prefill(&self, prompt: &Prepared) -> Result<(Var, Cache)> {
        match &self.family {
            Family::Idefics3 { model } => {
                let (hidden, cache) = model.prefill(idefics3(prompt)?);
                Ok((hidden, Cache::Idefics3(cache)))
            }
            Family::Mllama { model } => {
                let (hidden, cache) = model.prefill(mllama(prompt)?);
                Ok((hidden, Cache::Mllama(Box::new(cache))))
            }
        }
    }

    fn decode(&self, token: u32, cache: &mut Cache) -> Var {
        match (&self.family, cache) {
            (Family::Idefics3 { model }, Cache::Idefics3(cache)) => model.decode(token, cache),
            (Family::Mllama { model }, Cache::Mllama(cache)) => model.decode(token, cache),
            _ => unreachable!("the cache was made by this student's own prefill"),
        }
    }

    /// The GPU that the model is on.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Today's module path of a LoRA factor's name in any dialect of this family's checkpoints.
    pub fn rename_lora(&self, name: &str) -> String {
        match &self.family {
            Family::Idefics3 { .. } => canonical("idefics3")(name),
            Family::Mllama { .. } => canonical("mllama")(name),
        }
    }
}

/// That each pattern of `freeze` matches some tensor of the checkpoint in `dir`.
///
/// # Errors
/// The first that matches none of `names`.
pub fn check_freeze(freeze: &Freeze, names: &[&str], dir: &Path) -> Result<()> {
    match freeze.unmatched(names) {
        None => Ok(()),
        Some(pattern) => Err(Error::Config(format!(
            "train.freeze: `{pattern}` matches no tensor of {}; expected `vision`, `connector`, `language`, \
             `layers.A-B` or a part of a tensor's name between dots",
            dir.display()
        ))),
    }
}

fn idefics3(sample: &Prepared) -> Result<Idefics3Input<'_>> {
    match &sample.pictures {
        Pictures::Idefics3(prompt) => Ok(Idefics3Input {
            ids: &sample.ids,
            images: &prompt.images,
            image_positions: &prompt.image_positions,
        }),
        Pictures::Mllama(_) => Err(Error::Input(
            "a sample prepared for Llama-3.2-Vision was given to an Idefics3 model".into(),
        )),
    }
}

fn mllama(sample: &Prepared) -> Result<MllamaInput<'_>> {
    match &sample.pictures {
        Pictures::Mllama(prompt) => Ok(prompt.into()),
        Pictures::Idefics3(_) => Err(Error::Input(
            "a sample prepared for an Idefics3 model was given to Llama-3.2-Vision".into(),
        )),
    }
}

/// How a family's tensor and module names of any version of `transformers` become today's.
pub(super) fn canonical(model_type: &str) -> fn(&str) -> String {
    match model_type {
        "mllama" => mllama::canonical,
        // Never renamed: `model.text_model.…`, `model.vision_model.…` in every version.
        _ => str::to_string,
    }
}

/// `eos_token_id` of `generation_config.json`, if there.
fn generation_end(dir: &Path) -> Result<Vec<u32>> {
    let json = read_json(&dir.join("generation_config.json"))?;
    let ids = match json.as_ref().and_then(|json| json.get("eos_token_id")) {
        Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
        Some(value) => value.as_u64().into_iter().collect(),
        None => Vec::new(),
    };
    Ok(ids.into_iter().map(|id| id as u32).collect())
}
