//! Words of a text, where they stand in it, and which tokens they are made of.
//!
//! Teacher and student share these rules: words by the word boundaries of UAX #29, segments without a letter or
//! digit dropped; a word that occurs several times counts once, with all its occurrences.

use serde::{Deserialize, Serialize};
use unicode_segmentation::UnicodeSegmentation;

/// How words are compared: `words.case` of the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Case {
    /// Compared and stored in lower case (the default).
    #[default]
    Lower,
    /// Kept as written, as the published target sets do.
    Keep,
}

/// A word of a text and every place where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    /// The word, in the case asked for.
    pub text: String,
    /// Its occurrences `[start, end)` in characters (Unicode scalar values) of the text, in text order.
    pub spans: Vec<(usize, usize)>,
}

/// A word's tokens: one list of token indices per occurrence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WordTokens {
    /// The word.
    pub text: String,
    /// For each occurrence the indices of its tokens, ascending; never empty.
    pub occurrences: Vec<Vec<usize>>,
}

/// The words of `text` in order of first occurrence, each once.
///
/// An empty text, or one of punctuation and emoji alone, has none.
pub fn words(text: &str, case: Case) -> Vec<Word> {
    let mut found: Vec<Word> = Vec::new();
    let mut places = std::collections::HashMap::new();
    let (mut byte, mut character) = (0, 0);
    for (start, segment) in text.unicode_word_indices() {
        character += text[byte..start].chars().count();
        let end = character + segment.chars().count();
        let written = match case {
            Case::Lower => segment.to_lowercase(),
            Case::Keep => segment.to_owned(),
        };
        let place = *places.entry(written.clone()).or_insert_with(|| {
            found.push(Word {
                text: written,
                spans: Vec::new(),
            });
            found.len() - 1
        });
        found[place].spans.push((character, end));
        byte = start + segment.len();
        character = end;
    }
    found
}

impl Word {
    /// The same word where its text begins `by` characters into a longer one (an answer inside a prompt).
    pub fn shifted(&self, by: usize) -> Word {
        Word {
            text: self.text.clone(),
            spans: self.spans.iter().map(|&(s, e)| (s + by, e + by)).collect(),
        }
    }
}

/// Maps words to tokens by their spans; words without any token (cut off by the context) are left out.
///
/// `offsets[t]` is the span of token `t` in characters of the same text, as `tokenizers` gives it in
/// `encode_char_offsets`; special tokens have an empty span and belong to no word. A token belongs to every word that
/// it overlaps, so a token that only holds the space before a word does not, and one that covers two words belongs to
/// both. An occurrence that is not wholly inside the tokens' reach counts with the tokens it has.
pub fn word_tokens(words: &[Word], offsets: &[(usize, usize)]) -> Vec<WordTokens> {
    words
        .iter()
        .filter_map(|word| {
            let occurrences: Vec<Vec<usize>> = word
                .spans
                .iter()
                .map(|&(start, end)| {
                    (0..offsets.len())
                        .filter(|&t| offsets[t].0.max(start) < offsets[t].1.min(end))
                        .collect()
                })
                .filter(|tokens: &Vec<usize>| !tokens.is_empty())
                .collect();
            (!occurrences.is_empty()).then(|| WordTokens {
                text: word.text.clone(),
                occurrences,
            })
        })
        .collect()
}

impl WordTokens {
    /// The weight of each token's map in the word's: mean over an occurrence's tokens, then over occurrences.
    ///
    /// Ascending token indices, each once; the weights sum to 1.
    pub fn weights(&self) -> Vec<(usize, f32)> {
        let mut weights = std::collections::BTreeMap::new();
        for tokens in &self.occurrences {
            let weight = 1.0 / (tokens.len() * self.occurrences.len()) as f32;
            for &token in tokens {
                *weights.entry(token).or_insert(0.0) += weight;
            }
        }
        weights.into_iter().collect()
    }
}

/// Byte spans turned into character spans of the same text, for tokenizers that count bytes.
///
/// A byte inside a character counts as that character; an end inside one takes the whole character.
pub fn character_offsets(text: &str, bytes: &[(usize, usize)]) -> Vec<(usize, usize)> {
    let starts: Vec<usize> = text.char_indices().map(|(i, _)| i).collect();
    bytes
        .iter()
        .map(|&(start, end)| {
            if start >= end {
                return (0, 0);
            }
            let first = starts.partition_point(|&b| b <= start).saturating_sub(1);
            (first, starts.partition_point(|&b| b < end))
        })
        .collect()
}
