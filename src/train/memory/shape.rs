//! What a batch is made of, from samples or from assumptions.

use std::path::Path;

use crate::Result;
use crate::align::options::WordSource;
use crate::train::batch::{Example, answer_words};
use crate::train::config::Config;
use crate::vlm::Pictures;
use crate::vlm::idefics3::Idefics3Config;
use crate::vlm::idefics3_processor::{SplitConfig, prompt_tokens};
use crate::vlm::mllama::MllamaConfig;

/// Side of the picture that is assumed without data, in pixels: a square one has the most tiles.
const SIDE: u32 = 640;
/// Tokens of the conversation assumed without data, beside the picture's: a question and its answer in a template.
pub(crate) const TEXT: usize = 96;
/// Tokens of them that are learned.
const LABELS: usize = 48;
/// Words with targets.
const WORDS: usize = 12;

/// What a micro-batch is made of: the most of any sample, times the samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Samples of the micro-batch.
    pub samples: usize,
    /// Text tokens, image tokens included where they stand among them.
    pub tokens: usize,
    /// Patches that the picture encoder sees, class tokens included.
    pub patches: usize,
    /// Tokens that are learned.
    pub labels: usize,
    /// Words with targets.
    pub words: usize,
}

impl Shape {
    /// Of the first samples of a data set; words that are known only in the run are assumed.
    ///
    /// # Errors
    /// A model configuration that cannot be read.
    pub fn of(examples: &[Example], config: &Config) -> Result<Shape> {
        let dir = &config.model.path;
        let tile = tile_patches(dir)?;
        let patches = |example: &Example| match &example.prepared.pictures {
            Pictures::Idefics3(prompt) => {
                tile * prompt.images.iter().map(|t| t.count()).sum::<usize>()
            }
            Pictures::Mllama(prompt) => tile * prompt.images.len(),
        };
        // Targets that the run makes itself: as many as the answers have words.
        let (made, rules) = (config.data.diffusion.is_some(), config.word_rules());
        let words = |example: &Example| match example.words.words.len() {
            0 if made => answer_words(&example.prepared, &rules).len(),
            0 if rules.source == WordSource::Predicted => WORDS,
            matched => matched,
        };
        let most = |of: &dyn Fn(&Example) -> usize| examples.iter().map(of).max().unwrap_or(0);
        Ok(Shape {
            samples: 1,
            tokens: most(&|e| e.prepared.ids.len()),
            patches: most(&patches),
            labels: most(&|e| e.prepared.learned()),
            words: most(&words),
        }
        .times(config.train.batch))
    }

    /// Of samples of a square picture, a short question and its answer: without data, tokenizer or weights.
    ///
    /// # Errors
    /// A model or image processor configuration that cannot be read.
    pub fn assumed(config: &Config) -> Result<Shape> {
        let dir = &config.model.path;
        let tile = tile_patches(dir)?;
        let (image_tokens, patches) = match Idefics3Config::load(dir) {
            Ok(model) => {
                let split = SplitConfig::load(dir)?;
                model.check_tile(dir, split.side)?;
                let (grid, side) = (split.grid(SIDE, SIDE), model.tile_side(split.side));
                (
                    prompt_tokens(grid, side * side),
                    (grid.0 * grid.1 + 1) * tile,
                )
            }
            Err(_) => (1, tile),
        };
        let most = config.data.max_tokens.unwrap_or(usize::MAX);
        let tokens = (image_tokens + TEXT).min(most.max(image_tokens));
        Ok(Shape {
            samples: 1,
            tokens: tokens.next_multiple_of(config.train.bucket.max(1)),
            patches,
            labels: LABELS,
            words: WORDS,
        }
        .times(config.train.batch))
    }

    fn times(self, samples: usize) -> Shape {
        Shape {
            samples,
            tokens: samples * self.tokens,
            patches: samples * self.patches,
            labels: samples * self.labels,
            words: samples * self.words,
        }
    }
}

/// Patches that the encoder sees of a tile, or of a whole picture where its tiles are always as many.
fn tile_patches(dir: &Path) -> Result<usize> {
    if let Ok(config) = MllamaConfig::load(dir) {
        return Ok(config.vision.max_tiles * config.vision.tokens());
    }
    let config = Idefics3Config::load(dir)?;
    Ok((SplitConfig::load(dir)?.side / config.vision.patch).pow(2))
}
