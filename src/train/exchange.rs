//! The control of shuffled targets: every matched word is taught another word's map.

use std::collections::HashMap;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::loader::Loader;
use crate::align::filter::WordRules;
use crate::data::Role;
use crate::error::{Error, Result};

/// A permutation of the words of a data set that have targets, none of which stays in its place.
///
/// Words lie in a row, image after image, images and each image's words in an order that the seed chooses; a word is
/// given the map of the word that lies as many places further, round the end, as the image with the most words has.
/// So it comes from another image whenever no image has more than half of all words.
pub struct Exchange {
    /// Per sample, the words that have a map, and the place of each in `row`.
    words: Vec<HashMap<String, usize>>,
    /// Sample and word.
    row: Vec<(usize, String)>,
    by: usize,
}

impl Exchange {
    /// The exchange of the maps of `loader`'s words.
    ///
    /// # Errors
    /// Fewer than two words with targets; a target store that cannot be read.
    pub fn new(loader: &Loader, rules: &WordRules, seed: u64) -> Result<Self> {
        let samples = &loader.data().samples;
        let mut images: Vec<Vec<(usize, String)>> = Vec::new();
        let mut place_of_image = HashMap::new();
        for (index, sample) in samples.iter().enumerate() {
            let Some(store) = loader.store(index) else {
                continue;
            };
            let image = sample.image.file_name();
            let known = store.words(&sample.id, Some(&image))?;
            let place = place_of_image
                .entry((loader.data().share_of(index), image))
                .or_insert(images.len());
            if *place == images.len() {
                images.push(Vec::new());
            }
            let words = &mut images[*place];
            let turns = sample.turns.iter().filter(|t| t.role == Role::Assistant);
            for word in turns.flat_map(|turn| rules.words(&turn.text())) {
                let entry = (index, word.text);
                if known.contains(&entry.1) && !words.contains(&entry) {
                    words.push(entry);
                }
            }
        }
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        // A stream that the order of the samples does not use.
        random.set_stream(u64::MAX);
        images.shuffle(&mut random);
        let most = images.iter().map(Vec::len).max().unwrap_or(0);
        let mut row = Vec::new();
        for mut words in images {
            words.shuffle(&mut random);
            row.append(&mut words);
        }
        if row.len() < 2 {
            return Err(Error::Config(format!(
                "control.targets: found \"shuffled\" and {} word(s) with targets, expected at least 2 to exchange",
                row.len()
            )));
        }
        let mut words = vec![HashMap::new(); samples.len()];
        for (place, (sample, word)) in row.iter().enumerate() {
            words[*sample].insert(word.clone(), place);
        }
        // Half the row, where one image has more: then only its words can be far from each other.
        let by = most.min(row.len() / 2).max(1);
        Ok(Self { words, row, by })
    }

    /// Number of words.
    pub fn len(&self) -> usize {
        self.row.len()
    }

    /// Whether there are none; never so.
    pub fn is_empty(&self) -> bool {
        self.row.is_empty()
    }

    /// The map of `[32, 32]` that `word` of sample `index` is given: its donor's, or that of the next word in the row
    /// where there is no attention in it.
    ///
    /// # Errors
    /// A target store that is damaged, or that changed since it was opened.
    pub fn map(&self, loader: &Loader, index: usize, word: &str) -> Result<Vec<f32>> {
        let samples = &loader.data().samples;
        let place = self.words.get(index).and_then(|words| words.get(word));
        let others = place.into_iter().flat_map(|place| {
            let row = self.row.iter().cycle().skip(place + self.by);
            row.take(self.row.len() - self.by)
        });
        for (other, donor) in others {
            let Some(store) = loader.store(*other) else {
                continue;
            };
            let other = &samples[*other];
            let found = store.find(&other.id, Some(&other.image.file_name()))?;
            let map = found.as_ref().and_then(|targets| targets.map_of(donor));
            if let Some(map) = map.filter(|map| map.iter().any(|&v| v > 0.0)) {
                return Ok(map.to_vec());
            }
        }
        Err(Error::Input(format!(
            "sample `{}`: no map to exchange for `{word}`; did the target store change?",
            samples[index].id
        )))
    }
}
