//! From the teacher's token maps to a target per word.

use image::RgbImage;
use sha2::{Digest, Sha256};

use super::maps::min_max_host;
use super::words::{Case, Word, word_tokens, words};
use crate::diffusion::maps::{MapLayers, TokenMaps};
use crate::diffusion::pipeline::{Recorded, StableDiffusion, Trajectory, centre_square};
use crate::ops::concat::concat;
use crate::tensor::Tensor;
use crate::vlm::processor::resize::{Filter, resize};
use crate::{Error, Result};

/// The maps of a text's words.
#[derive(Clone, Debug, Default)]
pub struct WordMaps {
    /// The words that have a map, in order of first occurrence.
    pub words: Vec<Word>,
    /// Mean probabilities, row-major `[words, 32, 32]`.
    pub raw: Vec<f32>,
    /// The same with each word's map stretched to 0…1.
    pub maps: Vec<f32>,
}

/// Averages tokens into words: mean over an occurrence's tokens, then over occurrences, then min-max per word.
///
/// Words without a token are left out.
pub fn word_maps(text: &str, case: Case, tokens: &TokenMaps) -> WordMaps {
    let words = words(text, case);
    let mut maps = WordMaps::default();
    for found in word_tokens(&words, &tokens.offsets) {
        let raw = tokens.weighted(&found.weights());
        maps.maps.extend(min_max_host(&raw));
        maps.raw.extend(raw);
        maps.words
            .extend(words.iter().find(|w| w.text == found.text).cloned());
    }
    maps
}

/// An image as a teacher of image side `side` looks at it: the square in its middle, resized.
///
/// What the host does for an image, apart from the model so that other threads can do it ahead of the GPU.
pub fn fitted(image: &RgbImage, side: usize) -> RgbImage {
    let side = side as u32;
    resize(&centre_square(image), side, side, Filter::Lanczos)
}

/// An image and the text whose words get maps.
#[derive(Clone, Copy, Debug)]
pub struct Item<'a> {
    /// Names the item in messages, and with the seed fixes its noise.
    pub id: &'a str,
    /// The image; cropped to the square in its middle and resized where it is not [`fitted`] yet.
    pub image: &'a RgbImage,
    /// The caption or answer.
    pub text: &'a str,
}

/// A teacher and how it is asked.
pub struct TargetMaker<'a> {
    /// The diffusion model.
    pub model: &'a StableDiffusion,
    /// Where maps are recorded.
    pub trajectory: Trajectory,
    /// Which layers' maps.
    pub layers: MapLayers,
    /// Case of the words.
    pub case: Case,
    /// Seed of the noise.
    pub seed: u64,
}

/// What a batch of items gave.
pub struct Made {
    /// Word maps of each item.
    pub maps: Vec<WordMaps>,
    /// Latents of the images, f32 `[items, height, width, channels]`.
    pub latents: Tensor,
    /// Text states, trajectory and token maps.
    pub recorded: Recorded,
}

impl TargetMaker<'_> {
    /// The word maps of a batch. Each item's are those it would have alone.
    ///
    /// # Errors
    /// A text without a word, naming the item; what the GPU reports.
    pub fn make(&self, items: &[Item], on_step: impl FnMut(usize) -> Result<()>) -> Result<Made> {
        let mut texts = Vec::with_capacity(items.len());
        for item in items {
            if words(item.text, self.case).is_empty() {
                return Err(Error::Input(format!(
                    "`{}`: the text {:?} has no word, so there is nothing to map; give a caption with a word",
                    item.id, item.text
                )));
            }
            texts.push(self.model.tokenizer.chunks(item.text)?);
        }
        let latents: Vec<Tensor> = items
            .iter()
            .map(|item| {
                self.model
                    .encode_images(&self.model.prepare_image(item.image))
            })
            .collect();
        let latents = concat(&latents.iter().collect::<Vec<_>>(), 0);
        let seeds: Vec<u64> = items.iter().map(|item| self.seed_of(item.id)).collect();
        let recorded = self.model.token_maps(
            &latents,
            &texts,
            self.trajectory,
            self.layers,
            &seeds,
            on_step,
        )?;
        let maps = items
            .iter()
            .zip(&recorded.tokens)
            .map(|(item, tokens)| word_maps(item.text, self.case, tokens))
            .collect();
        Ok(Made {
            maps,
            latents,
            recorded,
        })
    }

    /// A seed for one item that does not depend on its place in the data set.
    fn seed_of(&self, id: &str) -> u64 {
        let digest = Sha256::new()
            .chain_update(self.seed.to_le_bytes())
            .chain_update(id.as_bytes())
            .finalize();
        u64::from_le_bytes(std::array::from_fn(|i| digest[i]))
    }
}
