//! One sample, on the host, ready for any family's model.

use std::ops::Range;

use super::idefics3_processor::Idefics3Prompt;
use super::mllama_processor::MllamaPrompt;
use super::processor::labels::Rendered;
use super::processor::tokenizer::Encoded;
use crate::{Error, Result};

/// The image grid that a sample's map columns form, in raster order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Rows of patches or image tokens.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// The text of one answer and where each token stands in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The answer as the model reads it.
    pub text: String,
    /// For every token of the whole sequence its span in characters of `text`; (0, 0) outside.
    pub spans: Vec<(usize, usize)>,
}

/// What a family's model needs beside the token ids.
#[derive(Clone, Debug)]
pub enum Pictures {
    /// SmolVLM, Idefics3.
    Idefics3(Idefics3Prompt),
    /// Llama-3.2-Vision.
    Mllama(MllamaPrompt),
}

/// A conversation made ready: tokens, labels, words' places, pictures.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Token ids, image tokens expanded.
    pub ids: Vec<u32>,
    /// Per position the id to be predicted there: `ids[t + 1]` where that token is learned, else
    /// [`crate::ops::cross_entropy::IGNORE`].
    pub labels: Vec<u32>,
    /// The answers, in order.
    pub answers: Vec<Answer>,
    /// Key columns of the map grid in raster order, in the hooked attention's key sequence; empty without
    /// a picture.
    pub columns: Vec<u32>,
    /// The grid that `columns` form; 0 x 0 without a picture.
    pub grid: Grid,
    /// Pictures in the family's own form.
    pub pictures: Pictures,
    /// Tokens at the end that [`Prepared::pad`] added.
    pub padding: usize,
}

impl Prepared {
    /// Pads the sequence at its end to a multiple of `multiple` tokens, 0 for none. No real token sees what is added,
    /// and none of it is learned.
    pub fn pad(&mut self, multiple: usize) {
        let length = match multiple {
            0 => self.ids.len(),
            _ => self.ids.len().next_multiple_of(multiple),
        };
        self.padding += length - self.ids.len();
        self.ids.resize(length, 0);
        self.labels
            .resize(length, crate::ops::cross_entropy::IGNORE);
        for answer in &mut self.answers {
            answer.spans.resize(length, (0, 0));
        }
        if let Pictures::Mllama(prompt) = &mut self.pictures {
            let last = prompt.image_bits.last().copied().unwrap_or(0);
            prompt.encoded.ids.resize(length, 0);
            prompt.image_bits.resize(length, last);
        }
    }

    /// Cuts the sequence at its end to at most `length` tokens; whether it was longer. Not for a padded one.
    ///
    /// # Errors
    /// A cut that would take tokens of a picture away: how many tokens stand up to the last of them.
    pub fn cut(&mut self, length: usize) -> Result<bool> {
        if self.ids.len() <= length {
            return Ok(false);
        }
        let pictures = match &self.pictures {
            Pictures::Idefics3(prompt) => prompt.image_positions.last().map_or(0, |last| last + 1),
            // The last picture's own token is the first that sees it.
            Pictures::Mllama(prompt) => {
                let last = prompt.images.len().checked_sub(1);
                let sees = |bits: &u32| last.is_some_and(|last| bits >> last & 1 == 1);
                prompt
                    .image_bits
                    .iter()
                    .position(sees)
                    .map_or(0, |at| at + 1)
            }
        };
        if pictures > length {
            return Err(Error::Input(format!(
                "cannot be cut to {length} tokens: the first {pictures} hold its pictures"
            )));
        }
        self.ids.truncate(length);
        self.labels.truncate(length);
        // What the last position would predict is gone.
        if let Some(last) = self.labels.last_mut() {
            *last = crate::ops::cross_entropy::IGNORE;
        }
        for answer in &mut self.answers {
            answer.spans.truncate(length);
        }
        let (encoded, labels) = match &mut self.pictures {
            Pictures::Idefics3(prompt) => (&mut prompt.encoded, &mut prompt.labels),
            Pictures::Mllama(prompt) => {
                prompt.image_bits.truncate(length);
                (&mut prompt.encoded, &mut prompt.labels)
            }
        };
        encoded.ids.truncate(length);
        encoded.spans.truncate(length);
        labels.truncate(length);
        Ok(true)
    }

    /// Assembles a sample; `labels` are not shifted yet.
    pub(super) fn new(
        rendered: &Rendered,
        encoded: &Encoded,
        labels: &[u32],
        (columns, grid): (Vec<u32>, Grid),
        pictures: Pictures,
    ) -> Self {
        let shifted = labels.iter().skip(1).copied();
        let answers = rendered
            .answers
            .iter()
            .map(|range| answer(rendered, encoded, range));
        Self {
            ids: encoded.ids.clone(),
            labels: shifted.chain([crate::ops::cross_entropy::IGNORE]).collect(),
            answers: answers.collect(),
            columns,
            grid,
            pictures,
            padding: 0,
        }
    }

    /// Number of tokens, without padding.
    pub fn tokens(&self) -> usize {
        self.ids.len() - self.padding
    }

    /// Number of positions that a token is learned at.
    pub fn learned(&self) -> usize {
        let ignore = crate::ops::cross_entropy::IGNORE;
        self.labels.iter().filter(|&&label| label != ignore).count()
    }
}

fn answer(rendered: &Rendered, encoded: &Encoded, range: &Range<usize>) -> Answer {
    let text = &rendered.text[range.clone()];
    // Byte-level tokens may cut a character: a byte inside one counts as its first (start) or next (end).
    let before = |byte: usize| {
        text.char_indices()
            .take_while(|&(at, c)| at + c.len_utf8() <= byte)
            .count()
    };
    let upto = |byte: usize| text.char_indices().take_while(|&(at, _)| at < byte).count();
    let span = |token: &Range<usize>| {
        let (start, end) = (token.start.max(range.start), token.end.min(range.end));
        match start < end {
            true => (before(start - range.start), upto(end - range.start)),
            false => (0, 0),
        }
    };
    Answer {
        text: text.to_string(),
        spans: encoded.spans.iter().map(span).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_count_characters_and_cut_tokens_at_the_answer() {
        let text = "Q: é A: né!é";
        let start = text.find("né").expect("there");
        let rendered = Rendered {
            text: text.to_string(),
            answers: std::iter::once(start..text.len()).collect(),
        };
        let bytes = text.len();
        // A token over the space and "n", then each byte of "é" alone, then the rest.
        let encoded = Encoded {
            ids: vec![0; 4],
            spans: vec![
                start - 1..start + 1,
                start + 1..start + 2,
                start + 2..start + 3,
                start + 3..bytes,
            ],
        };
        let answer = answer(&rendered, &encoded, &rendered.answers[0]);
        assert_eq!(answer.text, "né!é");
        assert_eq!(answer.spans, [(0, 1), (1, 2), (1, 2), (2, 4)]);
    }
}
