//! The figures of one evaluation, with intervals, as a table and as JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::intervals::bootstrap;
use super::item::Skipped;
use super::predictions::Line;
use super::score::{Benchmark, Score, metrics};

/// A figure with its 95 % interval over samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What it is.
    pub name: String,
    /// Over all samples.
    pub value: f64,
    /// Lower end by bootstrap.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// The figures of a group of samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// How many samples.
    pub samples: usize,
    /// The figures.
    pub figures: Vec<Figure>,
}

/// An evaluation: `figures.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// What was measured.
    pub benchmark: Benchmark,
    /// What the run is grouped by in comparisons, such as `lambda=10`.
    pub label: String,
    /// The training run's seed, if known.
    pub seed: Option<u64>,
    /// How it was measured: model, LoRA, data and options.
    pub settings: Value,
    /// All samples.
    pub overall: Group,
    /// The samples of each category, where there are any.
    pub categories: BTreeMap<String, Group>,
    /// Samples that could not be used, and why.
    pub skipped: Vec<Skipped>,
}

/// The figures of `scores` with bootstrap intervals from `seed`.
pub fn group(scores: &[&Score], seed: u64) -> Group {
    let all = metrics(scores.iter().copied());
    // A resample may lack a figure (no word with a mask): looked up by name.
    let of = |chosen: &[usize]| {
        let found = metrics(chosen.iter().map(|&i| scores[i]));
        let value =
            |(name, _): &(&str, f64)| found.iter().find(|(n, _)| n == name).map(|(_, v)| *v);
        all.iter().map(|m| value(m).unwrap_or(f64::NAN)).collect()
    };
    let intervals = bootstrap(scores.len(), seed, of);
    let figures = all.iter().zip(intervals).map(|((name, value), interval)| {
        let (low, high) = interval.unwrap_or((*value, *value));
        Figure {
            name: (*name).to_owned(),
            value: *value,
            low,
            high,
        }
    });
    Group {
        samples: scores.len(),
        figures: figures.collect(),
    }
}

/// Overall figures and those of every category (only where there are two at least).
pub fn groups(lines: &[Line], seed: u64) -> (Group, BTreeMap<String, Group>) {
    let scores: Vec<&Score> = lines.iter().map(|line| &line.score).collect();
    let mut sorted: BTreeMap<String, Vec<&Score>> = BTreeMap::new();
    for line in lines {
        if let Some(category) = &line.category {
            sorted
                .entry(category.clone())
                .or_default()
                .push(&line.score);
        }
    }
    if sorted.len() < 2 {
        sorted.clear();
    }
    let categories = sorted.into_iter();
    let categories = categories.map(|(name, scores)| (name, group(&scores, seed)));
    (group(&scores, seed), categories.collect())
}

impl Report {
    /// The figures as a Markdown table: one line a figure, then one a category with the first figure.
    pub fn table(&self) -> String {
        let mut rows = vec![[
            format!(
                "{} ({} samples)",
                self.benchmark.name(),
                self.overall.samples
            ),
            "value".into(),
            "95 % interval".into(),
        ]];
        let row = |name: String, figure: &Figure| {
            let interval = format!("{:.3} – {:.3}", figure.low, figure.high);
            [name, format!("{:.3}", figure.value), interval]
        };
        let figures = self.overall.figures.iter();
        rows.extend(figures.map(|figure| row(figure.name.clone(), figure)));
        for (category, group) in &self.categories {
            if let Some(first) = group.figures.first() {
                let name = format!("{}: {category} ({})", first.name, group.samples);
                rows.push(row(name, first));
            }
        }
        markdown(&rows)
    }
}

/// Rows of equal length as a Markdown table, the first as its head, columns padded and all but the first right-aligned.
pub fn markdown<R: AsRef<[String]>>(rows: &[R]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row.as_ref()[column].chars().count());
        cells.max().unwrap_or(0).max(3)
    };
    let widths: Vec<usize> = (0..rows.first().map_or(0, |row| row.as_ref().len()))
        .map(width)
        .collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (column, (cell, &width)) in row.as_ref().iter().zip(&widths).enumerate() {
            match column {
                0 => text.push_str(&format!("| {cell:width$} ")),
                _ => text.push_str(&format!("| {cell:>width$} ")),
            }
        }
        text.push_str("|\n");
        if number == 0 {
            for (column, &width) in widths.iter().enumerate() {
                match column {
                    0 => text.push_str(&format!("|{}", "-".repeat(width + 2))),
                    _ => text.push_str(&format!("|{}:", "-".repeat(width + 1))),
                }
            }
            text.push_str("|\n");
        }
    }
    text
}
