//! `targets --report`: the page of a store, read from what is on disk.

use std::collections::HashSet;
use std::path::Path;

use image::imageops::FilterType;
use rayon::prelude::*;

use super::Context;
use crate::align::report::{Report, Shown, ShownWord};
use crate::align::store::failures;
use crate::align::store::{TargetStore, Targets};
use crate::data::{DataSet, Sample};
use crate::diffusion::pipeline::centre_square;
use crate::eval::attention::entropy;
use crate::{Result, files};

/// Samples that are shown.
const SHOWN: usize = 24;

/// Words that are shown of each.
const WORDS: usize = 40;

/// Side of a picture in pixels.
const SIDE: u32 = 160;

/// What the page's figures are drawn from, of one sample.
struct Figures {
    words: usize,
    entropies: Vec<f32>,
}

impl Figures {
    fn new(targets: &Targets) -> Self {
        let maps = (0..targets.words.len()).map(|i| targets.map(i));
        Self {
            words: targets.words.len(),
            // A flat map has nothing to normalise.
            entropies: maps
                .filter(|map| map.iter().any(|&value| value > 0.0))
                .map(entropy)
                .collect(),
        }
    }
}

/// Writes the page of `store` at `dir` for the samples of `data` to `file`; no store, no maps on it.
///
/// # Errors
/// A store that cannot be read, a page that cannot be written. A sample whose image is gone is not shown.
pub(super) fn write(
    file: &Path,
    dir: &Path,
    store: Option<&TargetStore>,
    data: &DataSet,
    context: &Context,
) -> Result<()> {
    let find = |sample: &Sample| match store {
        Some(store) => store.find(&sample.id, Some(&sample.image.file_name())),
        None => Ok(None),
    };
    let figures: Vec<Option<Figures>> = data
        .samples
        .par_iter()
        .map(|sample| Ok(find(sample)?.as_ref().map(Figures::new)))
        .collect::<Result<_>>()?;
    let there: Vec<&Sample> = data
        .samples
        .iter()
        .zip(&figures)
        .filter_map(|(sample, figures)| figures.as_ref().map(|_| sample))
        .collect();
    let made: HashSet<&str> = there.iter().map(|sample| sample.id.as_str()).collect();
    let mut report = Report {
        title: format!("Targets in {}", dir.display()),
        failures: failures::read_all(dir)?,
        ..Report::default()
    };
    report
        .failures
        .retain(|failure| !made.contains(failure.id.as_str()));
    for figures in figures.into_iter().flatten() {
        report.words.push(figures.words);
        report.entropies.extend(figures.entropies);
    }
    report.facts = facts(store, data, &report);
    report.samples = spread(&there)
        .into_par_iter()
        .filter_map(|sample| match find(sample) {
            Ok(targets) => shown(sample, &targets?).map(Ok),
            Err(error) => Some(Err(error)),
        })
        .collect::<Result<_>>()?;
    files::write_bytes(file, report.html()?.as_bytes())?;
    context.print(format_args!("report: {}", file.display()))
}

/// The head of the page.
fn facts(store: Option<&TargetStore>, data: &DataSet, report: &Report) -> Vec<(String, String)> {
    let mut facts = vec![
        ("data set".to_owned(), data.path.display().to_string()),
        (
            "samples".to_owned(),
            format!(
                "{} of {} with targets, {} failed",
                report.words.len(),
                data.samples.len(),
                report.failures.len()
            ),
        ),
    ];
    let mut add = |name: &str, value: String| facts.push((name.to_owned(), value));
    add("word maps", report.words.iter().sum::<usize>().to_string());
    if let Some(options) = store.and_then(TargetStore::options) {
        let options = serde_json::to_value(options).unwrap_or_default();
        for (name, value) in options.as_object().into_iter().flatten() {
            let text = value.as_str().map(str::to_owned);
            add(&name.replace('_', " "), text.unwrap_or(value.to_string()));
        }
    }
    for place in store.map(TargetStore::provenances).unwrap_or_default() {
        add("teacher", place.teacher.clone());
        add("adapter", place.adapter.clone());
        add("driver", place.driver.clone());
        add("version", place.version.clone());
    }
    facts
}

/// [`SHOWN`] samples, evenly spread.
fn spread<'a>(samples: &[&'a Sample]) -> Vec<&'a Sample> {
    let count = samples.len().min(SHOWN);
    (0..count)
        .map(|i| samples[i * samples.len() / count])
        .collect()
}

/// A sample with its picture; none where its image can no longer be read.
fn shown(sample: &Sample, targets: &Targets) -> Option<Shown> {
    let image = sample.image.open().ok()?;
    let picture = image::imageops::resize(&centre_square(&image), SIDE, SIDE, FilterType::Triangle);
    let words = targets.words.iter().enumerate().take(WORDS);
    Some(Shown {
        id: sample.id.clone(),
        caption: sample.answer(),
        picture,
        words: words
            .map(|(i, word)| ShownWord {
                text: word.text.clone(),
                map: targets.map(i).to_vec(),
                entropy: entropy(targets.map(i)),
            })
            .collect(),
        more: targets.words.len().saturating_sub(WORDS),
    })
}
