//! From data-set samples to one batch on the GPU: tokens, words, targets.

use std::collections::BTreeMap;

use crate::align::filter::WordRules;
use crate::align::maps::SampleWords;
use crate::align::options::WordSource;
use crate::align::store::{SIDE, TargetStore, Targets};
use crate::align::words::{WordTokens, word_tokens};
use crate::autograd::Var;
use crate::data::{Part, Sample, Turn};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::ops::cross_entropy::IGNORE;
use crate::tensor::Tensor;
use crate::vlm::processor::labels::Tail;
use crate::vlm::processor::template::{self, Message};
use crate::vlm::{Grid, Prepared, Processor};

/// One sample ready for the student: tokens, image, and the matched words with their targets.
pub struct Example {
    /// The sample's id.
    pub id: String,
    /// Tokens, labels and pixels.
    pub prepared: Prepared,
    /// Words of the answers that have a target.
    pub words: SampleWords,
    /// [words, R·R]: their target maps.
    pub targets: Vec<f32>,
    /// All targets of the sample, where its words are only known once the model has spoken.
    pub known: Option<Targets>,
}

/// The words of a sample's answers with their tokens, each word once.
pub fn answer_words(prepared: &Prepared, rules: &WordRules) -> Vec<WordTokens> {
    let mut merged: BTreeMap<String, usize> = BTreeMap::new();
    let mut result: Vec<WordTokens> = Vec::new();
    for answer in &prepared.answers {
        for word in word_tokens(&rules.words(&answer.text), &answer.spans) {
            match merged.get(&word.text) {
                Some(&at) => result[at].occurrences.extend(word.occurrences),
                None => {
                    merged.insert(word.text.clone(), result.len());
                    result.push(word);
                }
            }
        }
    }
    result
}

/// The words of a sample's answers, each with its target map if it has one.
pub fn matched_words<'a>(
    prepared: &Prepared,
    found: &'a Targets,
    rules: &WordRules,
) -> Vec<(WordTokens, Option<&'a [f32]>)> {
    let with_map = |word: WordTokens| {
        // A map without any attention says nothing; a word's first token has no predicting row.
        let predicted = word.occurrences.iter().flatten().any(|&t| t > 0);
        let map = found
            .map_of(&word.text)
            .filter(|m| predicted && m.iter().any(|&v| v > 0.0));
        (word, map)
    };
    answer_words(prepared, rules)
        .into_iter()
        .map(with_map)
        .collect()
}

/// A data-set turn as the chat template takes it.
pub fn message(turn: &Turn) -> Message {
    let part = |part: &Part| match part {
        Part::Image => template::Part::Image,
        Part::Text(text) => template::Part::Text(text.clone()),
    };
    Message {
        role: turn.role.as_str().to_string(),
        parts: turn.parts.iter().map(part).collect(),
    }
}

impl Example {
    /// Reads the image, renders and tokenises the conversation, and matches words with targets.
    ///
    /// # Errors
    /// An unreadable image, a text longer than the context, a damaged target store; each names the
    /// sample.
    pub fn prepare(
        sample: &Sample,
        processor: &Processor,
        store: Option<&TargetStore>,
        rules: &WordRules,
    ) -> Result<Example> {
        let named = |error: Error| Error::Input(format!("sample `{}`: {error}", sample.id));
        let picture = sample.image.open().map_err(named)?;
        let messages: Vec<Message> = sample.turns.iter().map(message).collect();
        let pictures = std::slice::from_ref(&picture);
        let prepared = processor
            .prepare(pictures, &messages, Tail::None)
            .map_err(named)?;
        if prepared.learned() == 0 {
            return Err(Error::Input(format!(
                "sample `{}`: no answer to learn from; expected an assistant turn with text, that begins within \
                 `data.max_tokens` where that is set",
                sample.id
            )));
        }
        let found = match store {
            Some(store) => store.find(&sample.id, Some(&sample.image.file_name()))?,
            None => None,
        };
        let (mut matched, mut targets) = (Vec::new(), Vec::new());
        if let (Some(found), WordSource::Labels) = (&found, rules.source) {
            for (word, map) in matched_words(&prepared, found, rules) {
                if let Some(map) = map {
                    targets.extend_from_slice(map);
                    matched.push(word);
                }
            }
        }
        Ok(Example {
            id: sample.id.clone(),
            prepared,
            words: SampleWords::new(&matched),
            targets,
            known: found.filter(|_| rules.source == WordSource::Predicted),
        })
    }
}

/// Several examples as the tensors that one step needs.
pub struct Batch {
    /// Rows of the flattened hidden states [B·T, D] that predict a label, u32 `[N]`.
    pub label_rows: Tensor,
    /// The labels of those rows, u32 `[N]`.
    pub labels: Tensor,
    /// N.
    pub label_count: usize,
    /// Tap query rows, u32 `[R]`, flattened b·T + t; `None` without words.
    pub tap_rows: Option<Tensor>,
    /// Tap key columns, u32 [B, C], padded by repeating the first.
    pub tap_columns: Tensor,
    /// Target maps [W, R·R]; `None` without targets.
    pub targets: Option<Var>,
    /// Image grid of each example.
    pub grids: Vec<Grid>,
    /// W.
    pub words: usize,
    /// Tokens without padding.
    pub tokens: usize,
}

impl Batch {
    /// Uploads what `examples` need beside their own inputs.
    pub fn new(gpu: &Gpu, examples: &[&Example]) -> Batch {
        let length = examples
            .iter()
            .map(|e| e.prepared.ids.len())
            .max()
            .unwrap_or(0);
        let (mut label_rows, mut labels, mut tap_rows) = (Vec::new(), Vec::new(), Vec::new());
        for (b, example) in examples.iter().enumerate() {
            for (t, &label) in example.prepared.labels.iter().enumerate() {
                if label != IGNORE {
                    label_rows.push((b * length + t) as u32);
                    labels.push(label);
                }
            }
            tap_rows.extend(example.words.rows.iter().map(|&t| (b * length + t) as u32));
        }
        let widest = examples
            .iter()
            .map(|e| e.prepared.columns.len())
            .max()
            .unwrap_or(0);
        let columns: Vec<u32> = examples
            .iter()
            .flat_map(|e| {
                let own = &e.prepared.columns;
                let padding = own.first().copied().unwrap_or(0);
                own.iter()
                    .copied()
                    .chain(std::iter::repeat(padding))
                    .take(widest)
            })
            .collect();
        let targets: Vec<f32> = examples
            .iter()
            .flat_map(|e| e.targets.iter().copied())
            .collect();
        let words = examples.iter().map(|e| e.words.words.len()).sum();
        let some = |any: bool, tensor: &dyn Fn() -> Tensor| any.then(tensor);
        Batch {
            label_rows: Tensor::from_u32(gpu, &label_rows, &[label_rows.len()]),
            labels: Tensor::from_u32(gpu, &labels, &[labels.len()]),
            label_count: labels.len(),
            tap_rows: some(!tap_rows.is_empty(), &|| {
                Tensor::from_u32(gpu, &tap_rows, &[tap_rows.len()])
            }),
            tap_columns: Tensor::from_u32(gpu, &columns, &[examples.len(), widest]),
            targets: some(!targets.is_empty(), &|| {
                Tensor::from_f32(gpu, &targets, &[words, SIDE * SIDE])
            })
            .map(Var::constant),
            grids: examples.iter().map(|e| e.prepared.grid).collect(),
            words,
            tokens: examples.iter().map(|e| e.prepared.tokens()).sum(),
        }
    }
}
