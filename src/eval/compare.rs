//! Evaluations side by side: AutoR against Lavender against controls, over seeds.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::intervals::mean_and_half_width;
use super::report::{Report, markdown};
use crate::error::{Error, Result};
use crate::files::read_text;

/// One figure of one label.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// What it is.
    pub figure: String,
    /// Mean over the runs.
    pub mean: f64,
    /// Half the width of its 95 % interval by Student's t; none for a single run.
    pub half_width: Option<f64>,
    /// The runs' values, in their order.
    pub values: Vec<f64>,
    /// Mean difference to the baseline, seed by seed where both have the same seeds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference: Option<f64>,
    /// Half the width of its interval.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub difference_half_width: Option<f64>,
}

/// The runs of one label.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The label.
    pub label: String,
    /// The runs' seeds; null where unknown.
    pub seeds: Vec<Option<u64>>,
    /// A cell a figure.
    pub cells: Vec<Cell>,
}

/// A comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// What was measured.
    pub benchmark: String,
    /// Samples of each run.
    pub samples: usize,
    /// The label that differences are taken to.
    pub baseline: Option<String>,
    /// A row a label, in the order of their first run.
    pub rows: Vec<Row>,
}

/// Reads `figures.json` of each directory (or each file itself).
///
/// # Errors
/// A directory without figures, a file that is no report.
pub fn read(paths: &[PathBuf]) -> Result<Vec<(PathBuf, Report)>> {
    let one = |path: &PathBuf| {
        let file = match path.is_dir() {
            true => path.join("figures.json"),
            false => path.clone(),
        };
        if !file.is_file() {
            let message = "no such file; expected what `eval --out` wrote when it was finished";
            return Err(Error::file(&file, message));
        }
        let report = serde_json::from_str(&read_text(&file)?)
            .map_err(|e| Error::file(&file, format!("no figures of `eval`: {e}")))?;
        Ok((file, report))
    };
    paths.iter().map(one).collect()
}

/// Groups the reports by label. `baseline` is a label; by default `lambda=0` if there.
///
/// # Errors
/// Reports of unlike benchmarks or of unlike samples; an unknown baseline.
pub fn compare(reports: &[(PathBuf, Report)], baseline: Option<&str>) -> Result<Comparison> {
    let Some((_, first)) = reports.first() else {
        return Err(Error::Input("nothing to compare".into()));
    };
    for (path, report) in reports {
        let what = |r: &Report| format!("{} on {} samples", r.benchmark.name(), r.overall.samples);
        if what(report) != what(first) {
            let message = format!(
                "{} found, {} expected as in the first",
                what(report),
                what(first)
            );
            return Err(Error::file(path, message));
        }
        check_data(path, report, first)?;
    }
    let mut labels: Vec<&str> = Vec::new();
    for (_, report) in reports {
        if !labels.contains(&report.label.as_str()) {
            labels.push(&report.label);
        }
    }
    let known = labels.join("`, `");
    let baseline = match baseline {
        Some(label) if !labels.contains(&label) => {
            let message = format!("--baseline: no run has the label `{label}`; found `{known}`");
            return Err(Error::Input(message));
        }
        Some(label) => Some(label),
        None => labels.iter().find(|label| **label == "lambda=0").copied(),
    };
    let of = |label: &str| -> Vec<&Report> {
        let reports = reports.iter().map(|(_, report)| report);
        reports.filter(|report| report.label == label).collect()
    };
    let base = baseline.map(of).unwrap_or_default();
    let row = |label: &str| {
        let runs = of(label);
        let names = first.overall.figures.iter().map(|figure| &figure.name);
        let against = if baseline == Some(label) {
            &[][..]
        } else {
            &base[..]
        };
        Row {
            label: label.to_owned(),
            seeds: runs.iter().map(|run| run.seed).collect(),
            cells: names.map(|name| cell(name, &runs, against)).collect(),
        }
    };
    Ok(Comparison {
        benchmark: first.benchmark.name().to_owned(),
        samples: first.overall.samples,
        baseline: baseline.map(String::from),
        rows: labels.iter().map(|label| row(label)).collect(),
    })
}

/// The options that decide what a figure means have to be those of the first report.
fn check_data(path: &Path, report: &Report, first: &Report) -> Result<()> {
    for field in ["data", "limit", "max_tokens", "instruction"] {
        let (found, expected) = (&report.settings[field], &first.settings[field]);
        if found != expected {
            let message = format!(
                "field `settings.{field}`: {found} found, {expected} expected as in the first"
            );
            return Err(Error::file(path, message));
        }
    }
    Ok(())
}

fn value(report: &Report, name: &str) -> Option<f64> {
    let figures = report.overall.figures.iter();
    figures.filter(|f| f.name == name).map(|f| f.value).next()
}

fn cell(name: &str, runs: &[&Report], base: &[&Report]) -> Cell {
    let values: Vec<f64> = runs.iter().filter_map(|run| value(run, name)).collect();
    let (mean, half_width) = mean_and_half_width(&values);
    // Seed by seed: what the seeds share (the order of samples, the initial weights) drops out.
    let pair = |run: &&Report| {
        let seed = run.seed?;
        let partner = base.iter().find(|b| b.seed == Some(seed))?;
        Some(value(run, name)? - value(partner, name)?)
    };
    let pairs: Option<Vec<f64>> = runs.iter().map(pair).collect();
    let pairs = pairs.filter(|pairs| pairs.len() == base.len() && !pairs.is_empty());
    let difference = pairs.map(|pairs| mean_and_half_width(&pairs));
    Cell {
        figure: name.to_owned(),
        mean,
        half_width,
        values,
        difference: difference.map(|(mean, _)| mean),
        difference_half_width: difference.and_then(|(_, half)| half),
    }
}

impl Comparison {
    /// A Markdown table: a row a label, two columns a figure where there is a baseline.
    pub fn table(&self) -> String {
        let plus_minus = |mean: f64, half: Option<f64>, sign: bool| {
            let mean = match sign {
                true => format!("{mean:+.3}"),
                false => format!("{mean:.3}"),
            };
            match half {
                Some(half) => format!("{mean} ± {half:.3}"),
                None => mean,
            }
        };
        let with_difference = |cell: usize| {
            let mut cells = self.rows.iter().filter_map(|row| row.cells.get(cell));
            cells.any(|cell| cell.difference.is_some())
        };
        let figures = self.rows.first().map_or(0, |row| row.cells.len());
        let mut head = vec![
            format!("{} ({} samples)", self.benchmark, self.samples),
            "runs".into(),
        ];
        for cell in 0..figures {
            head.push(self.rows[0].cells[cell].figure.clone());
            if with_difference(cell) {
                head.push(format!(
                    "− {}",
                    self.baseline.as_deref().unwrap_or_default()
                ));
            }
        }
        let mut rows = vec![head];
        for row in &self.rows {
            let mut cells = vec![row.label.clone(), row.seeds.len().to_string()];
            for (at, cell) in row.cells.iter().enumerate() {
                cells.push(plus_minus(cell.mean, cell.half_width, false));
                if with_difference(at) {
                    let difference = cell.difference;
                    cells.push(difference.map_or(String::new(), |mean| {
                        plus_minus(mean, cell.difference_half_width, true)
                    }));
                }
            }
            rows.push(cells);
        }
        markdown(&rows)
    }
}
