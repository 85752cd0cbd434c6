//! Reading a whole data set once, on the CPU, for what a run would meet in it.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};

use super::batch::{matched_words, message};
use crate::align::filter::WordRules;
use crate::align::store::TargetStore;
use crate::data::picture::decode;
use crate::data::{DataSet, Role, Sample};
use crate::error::Result;
use crate::vlm::Processor;
use crate::vlm::processor::labels::Tail;

/// Unmatched words that are listed.
const LISTED_WORDS: usize = 20;

/// A data set with what its samples are read with.
pub struct Check<'a> {
    /// The samples.
    pub data: &'a DataSet,
    /// A target store for each share of the data set.
    pub stores: &'a [Option<TargetStore>],
    /// The student's processor; without one, tokens are not counted.
    pub processor: Option<&'a Processor>,
    /// Which words count and how they are compared; those of the labels, also where a run takes the predicted ones.
    pub rules: WordRules,
}

/// Least, middle, 95th percentile and most of a figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// The least.
    pub min: usize,
    /// The middle; of an even count the lower of two.
    pub median: usize,
    /// The smallest value that at least 95 % do not exceed.
    pub p95: usize,
    /// The most.
    pub max: usize,
}

impl Spread {
    /// The spread of some figures; `None` of none.
    pub fn of(mut values: Vec<usize>) -> Option<Self> {
        values.sort_unstable();
        // The nearest-rank percentile.
        let rank = |percent: usize| values.get((values.len() * percent).div_ceil(100).max(1) - 1);
        Some(Self {
            min: *values.first()?,
            median: *rank(50)?,
            p95: *rank(95)?,
            max: *values.last()?,
        })
    }
}

/// What is wrong with a sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// The sample's id.
    pub id: String,
    /// What was found, what was expected, what to do.
    pub message: String,
}

/// One data set of a mixture.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ShareReport {
    /// The file.
    pub path: PathBuf,
    /// Its samples.
    pub samples: usize,
    /// Passes over it in an epoch.
    pub weight: f64,
    /// Samples in its target store; `None` without a store.
    pub targets: Option<usize>,
    /// Its samples that the store lacks.
    pub without_targets: usize,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// Each data set.
    pub data: Vec<ShareReport>,
    /// Samples in all.
    pub samples: usize,
    /// Samples by their number of answers.
    pub answers: BTreeMap<usize, usize>,
    /// Pixels.
    pub image_width: Option<Spread>,
    /// Pixels.
    pub image_height: Option<Spread>,
    /// Images that are missing or cannot be decoded.
    pub bad_images: Vec<Fault>,
    /// Longest sequence of the model, in tokens.
    pub context: Option<usize>,
    /// Tokens that are read only: prompt, pictures, headers.
    pub prompt_tokens: Option<Spread>,
    /// Tokens that are learned.
    pub answer_tokens: Option<Spread>,
    /// Both.
    pub tokens: Option<Spread>,
    /// Samples longer than the context, or that cannot be cut without cutting their picture; a run refuses them.
    pub too_long: Vec<Fault>,
    /// Samples that `data.max_tokens` cuts; their tokens are counted as they are after it.
    pub cut: Vec<String>,
    /// Samples without a token to learn.
    pub nothing_to_learn: Vec<String>,
    /// Samples that the chat template or tokenizer refuses.
    pub refused: Vec<Fault>,
    /// Distinct words of the answers, over the samples that have targets.
    pub words: usize,
    /// Those of them with a target.
    pub matched_words: usize,
    /// The most frequent of the others, with the number of samples they stand in.
    pub unmatched: Vec<(String, usize)>,
    /// Samples that the target stores lack; empty without stores.
    pub without_targets: Vec<String>,
    /// Groups of samples with the same image and the same conversation.
    pub duplicates: Vec<Vec<String>>,
    /// What would stop a run, in words; empty if nothing would.
    pub problems: Vec<String>,
}

/// What one sample showed.
#[derive(Default)]
struct Outcome {
    size: Option<(usize, usize)>,
    bad_image: Option<String>,
    prompt: Option<usize>,
    learned: Option<usize>,
    too_long: Option<String>,
    cut: bool,
    refused: Option<String>,
    /// Each word of the answers, and whether it has a target; `None` without targets.
    words: Option<Vec<(String, bool)>>,
    content: Option<[u8; 32]>,
}

impl Check<'_> {
    /// Reads every sample on all cores; `each` is called after each one and may stop the whole.
    ///
    /// # Errors
    /// What `each` gives; a damaged target store. What is wrong with samples is in the report.
    pub fn run(&self, each: impl Fn(&Sample) -> Result<()> + Sync) -> Result<Report> {
        let outcomes: Vec<Outcome> = (0..self.data.samples.len())
            .into_par_iter()
            .map(|index| {
                let outcome = self.read(index)?;
                each(&self.data.samples[index])?;
                Ok(outcome)
            })
            .collect::<Result<_>>()?;
        Ok(self.report(outcomes))
    }

    fn read(&self, index: usize) -> Result<Outcome> {
        let sample = &self.data.samples[index];
        let mut outcome = Outcome::default();
        let store = self.stores[self.data.share_of(index)].as_ref();
        let found = match store {
            Some(store) => store.find(&sample.id, Some(&sample.image.file_name()))?,
            None => None,
        };
        let picture = sample.image.encoded().and_then(|(path, bytes)| {
            outcome.content = Some(content(sample, &bytes));
            decode(&path, &bytes)
        });
        let picture = match picture {
            Ok(picture) => picture,
            Err(error) => {
                outcome.bad_image = Some(error.to_string());
                return Ok(outcome);
            }
        };
        outcome.size = Some((picture.width() as usize, picture.height() as usize));
        let Some(processor) = self.processor else {
            outcome.words = found.map(|found| {
                let words = self.rules.words(&sample.answer()).into_iter();
                let has = |word: &str| {
                    found
                        .map_of(word)
                        .is_some_and(|m| m.iter().any(|&v| v > 0.0))
                };
                words.map(|w| (w.text.clone(), has(&w.text))).collect()
            });
            return Ok(outcome);
        };
        let messages: Vec<_> = sample.turns.iter().map(message).collect();
        match processor.prepare_any_length(std::slice::from_ref(&picture), &messages, Tail::None) {
            Err(error) => outcome.refused = Some(error.to_string()),
            Ok(mut prepared) => {
                let cut = processor.cut(&mut prepared);
                let fits = cut.and_then(|cut| {
                    outcome.cut = cut;
                    processor.check_length(&prepared)
                });
                outcome.too_long = fits.err().map(|e| e.to_string());
                let learned = prepared.learned();
                outcome.learned = Some(learned);
                outcome.prompt = Some(prepared.tokens() - learned);
                outcome.words = found.map(|found| {
                    let words = matched_words(&prepared, &found, &self.rules).into_iter();
                    words
                        .map(|(word, map)| (word.text, map.is_some()))
                        .collect()
                });
            }
        }
        Ok(outcome)
    }

    fn report(&self, outcomes: Vec<Outcome>) -> Report {
        let samples = &self.data.samples;
        let faults = |of: fn(&Outcome) -> &Option<String>| -> Vec<Fault> {
            let all = samples.iter().zip(&outcomes);
            let fault = |(sample, outcome): (&Sample, &Outcome)| {
                Some(Fault {
                    id: sample.id.clone(),
                    message: of(outcome).clone()?,
                })
            };
            all.filter_map(fault).collect()
        };
        let spread = |of: fn(&Outcome) -> Option<usize>| {
            Spread::of(outcomes.iter().filter_map(of).collect())
        };
        let mut report = Report {
            samples: samples.len(),
            image_width: spread(|o| o.size.map(|s| s.0)),
            image_height: spread(|o| o.size.map(|s| s.1)),
            bad_images: faults(|o| &o.bad_image),
            context: self.processor.map(Processor::context),
            prompt_tokens: spread(|o| o.prompt),
            answer_tokens: spread(|o| o.learned),
            tokens: spread(|o| Some(o.prompt? + o.learned?)),
            too_long: faults(|o| &o.too_long),
            refused: faults(|o| &o.refused),
            ..Report::default()
        };
        let (mut unmatched, mut contents) = (HashMap::new(), BTreeMap::new());
        for (sample, outcome) in samples.iter().zip(&outcomes) {
            let answers = sample
                .turns
                .iter()
                .filter(|t| t.role == Role::Assistant)
                .count();
            *report.answers.entry(answers).or_default() += 1;
            if outcome.cut {
                report.cut.push(sample.id.clone());
            }
            if outcome.learned == Some(0) {
                report.nothing_to_learn.push(sample.id.clone());
            }
            if let Some(content) = outcome.content {
                let same: &mut Vec<String> = contents.entry(content).or_default();
                same.push(sample.id.clone());
            }
            for (word, matched) in outcome.words.iter().flatten() {
                report.words += 1;
                match matched {
                    true => report.matched_words += 1,
                    false => *unmatched.entry(word.clone()).or_insert(0) += 1,
                }
            }
        }
        report.unmatched = unmatched.into_iter().collect();
        report
            .unmatched
            .sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        report.unmatched.truncate(LISTED_WORDS);
        report.duplicates = contents.into_values().filter(|ids| ids.len() > 1).collect();
        report.duplicates.sort();
        self.targets(&mut report);
        report.problems = problems(&report);
        report
    }

    fn targets(&self, report: &mut Report) {
        for (share, store) in self.data.shares.iter().zip(self.stores) {
            let samples = &self.data.samples[share.samples.clone()];
            let mut missing: Vec<String> = Vec::new();
            if let Some(store) = store {
                let lacks = |s: &&Sample| !store.has(&s.id, Some(&s.image.file_name()));
                missing = samples.iter().filter(lacks).map(|s| s.id.clone()).collect();
            }
            report.data.push(ShareReport {
                path: share.path.clone(),
                samples: samples.len(),
                weight: share.weight,
                targets: store.as_ref().map(TargetStore::len),
                without_targets: missing.len(),
            });
            report.without_targets.extend(missing);
        }
    }
}

/// What would stop a run.
fn problems(report: &Report) -> Vec<String> {
    let counted = [
        (report.bad_images.len(), "missing or unreadable images"),
        (report.too_long.len(), "samples longer than the context"),
        (
            report.nothing_to_learn.len(),
            "samples without a token to learn",
        ),
        (
            report.refused.len(),
            "samples that the chat template or tokenizer refuses",
        ),
    ];
    let counted = counted.into_iter().filter(|(count, _)| *count > 0);
    let mut problems: Vec<String> = counted
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    for share in &report.data {
        if share.targets.is_some() && share.without_targets == share.samples {
            problems.push(format!(
                "no sample of {} has a target in its store",
                share.path.display()
            ));
        }
    }
    problems
}

/// A hash of a sample's image and conversation.
fn content(sample: &Sample, image: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update((image.len() as u64).to_le_bytes());
    hash.update(image);
    for turn in &sample.turns {
        let text = turn.text();
        hash.update(turn.role.as_str());
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hash.finalize().into()
}
