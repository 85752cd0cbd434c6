//! The students' common processor: pictures and conversations to tokens, on the CPU alone.

use std::path::{Path, PathBuf};

use image::RgbImage;
use serde_json::Value;

use super::idefics3::Idefics3Config;
use super::idefics3_processor::Idefics3Processor;
use super::mllama::MllamaConfig;
use super::mllama_processor::MllamaProcessor;
use super::processor::labels::Tail;
use super::processor::template::Message;
use super::processor::tokenizer::{TextTokenizer, read_json};
use super::sample::{Grid, Pictures, Prepared};
use crate::{Error, Result};

/// A checkpoint's tokenizer, chat template and image processor, whatever its family.
///
/// It needs no GPU and no weights, and may be shared between threads.
pub struct Processor {
    family: Family,
    dir: PathBuf,
    context: usize,
    cut: Option<usize>,
}

enum Family {
    Idefics3(Idefics3Processor),
    Mllama {
        processor: MllamaProcessor,
        config: Box<MllamaConfig>,
    },
}

impl Processor {
    /// Reads the configuration and processor files of a checkpoint directory.
    ///
    /// # Errors
    /// A missing or unusable file, an unknown `model_type`, files that disagree, by name and field.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let (family, context) = match model_type(dir)?.as_str() {
            "mllama" => {
                let config = Box::new(MllamaConfig::load(dir)?);
                let processor = MllamaProcessor::load(dir)?;
                config.check_tiles(dir, &processor.tiling)?;
                let context = config.max_positions;
                (Family::Mllama { processor, config }, context)
            }
            _ => {
                let config = Idefics3Config::load(dir)?;
                let side = |tile| config.tile_side(tile);
                let processor = Idefics3Processor::load(dir, |tile| side(tile) * side(tile))?;
                config.check_tile(dir, processor.split.side)?;
                (Family::Idefics3(processor), config.max_positions)
            }
        };
        Ok(Self {
            family,
            dir: dir.to_path_buf(),
            context,
            cut: None,
        })
    }

    /// The same processor, that cuts conversations with their answers (`Tail::None`) at their end to so many tokens.
    ///
    /// # Errors
    /// More tokens than the context has.
    pub fn cut_at(self, tokens: Option<usize>) -> Result<Self> {
        match tokens.filter(|&tokens| tokens > self.context) {
            None => Ok(Self {
                cut: tokens,
                ..self
            }),
            Some(tokens) => Err(Error::Config(format!(
                "data.max_tokens: found {tokens}, expected at most {}, the context of {}",
                self.context,
                self.dir.display()
            ))),
        }
    }

    /// The checkpoint directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The checkpoint's tokenizer.
    pub fn tokenizer(&self) -> &TextTokenizer {
        match &self.family {
            Family::Idefics3(processor) => &processor.tokenizer,
            Family::Mllama { processor, .. } => &processor.tokenizer,
        }
    }

    /// The token that stands for a picture, or for each part of it.
    pub fn image_token(&self) -> u32 {
        match &self.family {
            Family::Idefics3(processor) => processor.image_token,
            Family::Mllama { processor, .. } => processor.image_token,
        }
    }

    /// Longest sequence in tokens.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Makes a sample of any number of pictures, with what follows the messages.
    ///
    /// # Errors
    /// An empty answer, image parts other than one per picture, more tokens than the context has, a cut that would
    /// take tokens of a picture away.
    pub fn prepare(
        &self,
        pictures: &[RgbImage],
        turns: &[Message],
        tail: Tail<'_>,
    ) -> Result<Prepared> {
        let mut prepared = self.prepare_any_length(pictures, turns, tail)?;
        if tail == Tail::None {
            self.cut(&mut prepared)?;
        }
        self.check_length(&prepared)?;
        Ok(prepared)
    }

    /// Cuts a conversation to the length that [`Processor::cut_at`] was given; whether it was longer.
    ///
    /// # Errors
    /// As [`Prepared::cut`].
    pub fn cut(&self, prepared: &mut Prepared) -> Result<bool> {
        prepared.cut(self.cut.unwrap_or(usize::MAX))
    }

    /// [`Processor::prepare`] of a sample that may be longer than the context.
    ///
    /// # Errors
    /// An empty answer, image parts other than one per picture.
    pub fn prepare_any_length(
        &self,
        pictures: &[RgbImage],
        turns: &[Message],
        tail: Tail<'_>,
    ) -> Result<Prepared> {
        let parts: usize = turns.iter().map(Message::images).sum();
        if parts != pictures.len() {
            return Err(Error::Input(format!(
                "the conversation has {parts} image parts, expected {}: one per picture",
                pictures.len()
            )));
        }
        match &self.family {
            Family::Idefics3(processor) => {
                let prompt = processor.conversation(turns, pictures, tail)?;
                let first = prompt.global.first().cloned().unwrap_or(0..0);
                let side = match first.is_empty() {
                    true => 0,
                    false => processor.tile_tokens.isqrt(),
                };
                let grid = Grid {
                    height: side,
                    width: side,
                };
                let columns = first.map(|at| at as u32).collect();
                // The texts are small; the pixels, which are not, are moved.
                let (rendered, encoded) = (prompt.rendered.clone(), prompt.encoded.clone());
                let labels = prompt.labels.clone();
                Ok(Prepared::new(
                    &rendered,
                    &encoded,
                    &labels,
                    (columns, grid),
                    Pictures::Idefics3(prompt),
                ))
            }
            Family::Mllama { processor, config } => {
                let prompt = processor.conversation(turns, pictures, tail)?;
                let none = Grid {
                    height: 0,
                    width: 0,
                };
                let map = prompt
                    .images
                    .first()
                    .map(|tiles| config.map_columns(tiles, 0));
                // The texts are small; the pixels, which are not, are moved.
                let (rendered, encoded) = (prompt.rendered.clone(), prompt.encoded.clone());
                let labels = prompt.labels.clone();
                Ok(Prepared::new(
                    &rendered,
                    &encoded,
                    &labels,
                    map.unwrap_or((Vec::new(), none)),
                    Pictures::Mllama(prompt),
                ))
            }
        }
    }

    /// That the sample fits the context.
    ///
    /// # Errors
    /// It does not: its tokens, how many are the pictures', and what to do.
    pub fn check_length(&self, prepared: &Prepared) -> Result<()> {
        let (tokens, context) = (prepared.tokens(), self.context);
        if tokens <= context {
            return Ok(());
        }
        let image_tokens = match &prepared.pictures {
            Pictures::Idefics3(prompt) => prompt.image_positions.len(),
            Pictures::Mllama(prompt) => prompt.images.len(),
        };
        let advice = match image_tokens > context / 2 {
            true => {
                "cutting it would drop image tokens; use a smaller picture or a smaller `size.longest_edge`"
            }
            false => "shorten the text, or set `data.max_tokens` in training",
        };
        Err(Error::Input(format!(
            "the prompt has {tokens} tokens ({image_tokens} of them for pictures), expected at most {context}, \
             the context of {}; {advice}",
            self.dir.display()
        )))
    }
}

/// `model_type` of a checkpoint's `config.json`, one of those known.
pub(super) fn model_type(dir: &Path) -> Result<String> {
    let path = dir.join("config.json");
    let Some(json) = read_json(&path)? else {
        return Err(Error::file(
            &path,
            "no such file; expected a model directory with config.json, *.safetensors, tokenizer.json",
        ));
    };
    let kind = json
        .get("model_type")
        .and_then(Value::as_str)
        .unwrap_or_default();
    match kind {
        "idefics3" | "smolvlm" | "mllama" => Ok(kind.to_string()),
        _ => Err(Error::file(
            &path,
            format!(
                "field `model_type`: {kind:?} found, \"smolvlm\", \"idefics3\" or \"mllama\" expected"
            ),
        )),
    }
}
