//! Several runs beside each other.

use std::collections::BTreeMap;
use std::path::Path;

use minijinja::{Value, context};

use super::figures::Better;
use super::plot::{COLOURS, Chart, Curve, chart};
use super::{Figure, RunReport, Series, data_url, render, stem};
use crate::Result;

/// Samples whose word maps are shown, of those that all runs have.
const SAMPLES: usize = 3;

/// What the figures mean.
const NOTE: &str = "Losses are means over the last tenth of the steps.";

/// And where their sums have other weights.
const OTHER_LOSS: &str = "The total losses are not of the same kind: the runs differ in [loss].";

/// Runs to compare, the first of them being the one that others are told by.
#[derive(Debug)]
pub struct Comparison {
    runs: Vec<RunReport>,
    /// What each is called; no two are called the same.
    labels: Vec<String>,
}

/// A key of the configuration that not all runs have the same value of.
#[derive(Debug, PartialEq, Eq)]
struct Difference {
    key: String,
    values: Vec<String>,
}

impl Comparison {
    /// Compares `runs`, in their order.
    pub fn new(runs: Vec<RunReport>) -> Self {
        Self {
            labels: labels(&runs),
            runs,
        }
    }

    /// The figures that any of the runs has, a row a figure.
    fn rows(&self) -> Vec<(String, Vec<Figure>)> {
        let mut each: Vec<Vec<Figure>> = self.runs.iter().map(Figure::all).collect();
        if !self.same_loss() {
            for figure in each.iter_mut().flatten().filter(|figure| figure.total) {
                figure.better = Better::Neither;
            }
        }
        let count = each.first().map_or(0, Vec::len);
        (0..count)
            .map(|row| each.iter().map(|run| run[row].clone()).collect::<Vec<_>>())
            .filter(|row| row.iter().any(|figure| figure.value.is_some()))
            .map(|row| (row[0].title(), row))
            .collect()
    }

    /// Whether all runs minimise the same.
    fn same_loss(&self) -> bool {
        let mut losses = self.runs.windows(2);
        losses.all(|pair| pair[0].config.loss == pair[1].config.loss)
    }

    /// The keys that differ, by name.
    fn differences(&self) -> Result<Vec<Difference>> {
        let Some(first) = self.runs.first() else {
            return Ok(Vec::new());
        };
        let mut keys: BTreeMap<String, Vec<Option<String>>> = BTreeMap::new();
        let mut firsts: BTreeMap<String, String> = BTreeMap::new();
        for (place, run) in self.runs.iter().enumerate() {
            for difference in first.config.differences(&run.config)? {
                let values = keys.entry(difference.key.clone());
                values.or_insert_with(|| vec![None; self.runs.len()])[place] =
                    Some(difference.after);
                firsts.insert(difference.key, difference.before);
            }
        }
        let rows = keys.into_iter().map(|(key, values)| {
            // Where a run does not differ from the first, it has its value.
            let values = values.into_iter();
            let values = values.map(|value| value.unwrap_or_else(|| firsts[&key].clone()));
            Difference {
                values: values.collect(),
                key,
            }
        });
        Ok(rows.collect())
    }

    /// The page.
    ///
    /// # Errors
    /// A picture that cannot be read, a plot that cannot be drawn.
    pub fn html(&self) -> Result<String> {
        let runs = self.runs.iter().zip(&self.labels).enumerate();
        let runs = runs.map(|(place, (run, label))| {
            let colour = COLOURS[place % COLOURS.len()];
            let last = run.record.as_ref().and_then(|r| r.stretches.last());
            context! {
                label,
                colour => format!("rgb({}, {}, {})", colour.0, colour.1, colour.2),
                dir => run.run.root().display().to_string(),
                state => run.state(),
                adapter => last.map(|s| format!("{} [{}], lavender-wgpu {}", s.adapter, s.driver, s.version)),
            }
        });
        let figures = self.rows().into_iter().map(|(title, row)| {
            let best = best(&row);
            let cells = row.iter().enumerate().map(|(place, figure)| {
                context! { text => figure.text(), best => best.contains(&place) }
            });
            context! { title, cells => cells.collect::<Vec<Value>>() }
        });
        let differences = self.differences()?.into_iter();
        let differences = differences.map(|d| context! { key => d.key, values => d.values });
        render(
            "compare.html",
            context! {
                runs => runs.collect::<Vec<Value>>(),
                charts => self.charts()?,
                figures => figures.collect::<Vec<Value>>(),
                note => match self.same_loss() {
                    true => NOTE.to_owned(),
                    false => format!("{NOTE} {OTHER_LOSS}"),
                },
                differences => differences.collect::<Vec<Value>>(),
                samples => self.samples()?,
            },
        )
    }

    /// Curves over each other: a chart for each series that any run has.
    fn charts(&self) -> Result<Vec<Value>> {
        let each: Vec<Vec<Series>> = self.runs.iter().map(Series::all).collect();
        let mut charts = Vec::new();
        for row in 0..each.first().map_or(0, Vec::len) {
            let series = &each[0][row];
            let evaluation = series.name.starts_with("evaluation");
            if !(series.plotted || evaluation) || each.iter().all(|run| run[row].points.is_empty())
            {
                continue;
            }
            let curves = each.iter().enumerate().map(|(place, run)| {
                let points = &run[row].points;
                match evaluation {
                    true => Curve::dotted(points, place),
                    false => Curve::new(points, place),
                }
            });
            let curves: Vec<Curve> = curves.collect();
            let note = match evaluation {
                true => String::new(),
                false => "bold: running mean over a twentieth of the steps".into(),
            };
            let drawing = Chart {
                unit: series.unit,
                curves,
            };
            charts.push(context! { title => series.name, svg => chart(&drawing)?, note });
        }
        Ok(charts)
    }

    /// Word maps of samples that all runs drew, run beside run.
    fn samples(&self) -> Result<Vec<Value>> {
        let Some(first) = self.runs.first() else {
            return Ok(Vec::new());
        };
        let mut samples = Vec::new();
        for path in &first.pictures {
            let name = stem(path);
            let same = self.runs.iter().map(|run| {
                let mut pictures = run.pictures.iter();
                pictures.find(|path| stem(path) == name)
            });
            let Some(paths) = same.collect::<Option<Vec<_>>>() else {
                continue;
            };
            let pictures = paths.into_iter().zip(&self.labels);
            let pictures =
                pictures.map(|(path, label)| Ok(context! { label, picture => data_url(path)? }));
            let pictures = pictures.collect::<Result<Vec<Value>>>()?;
            samples.push(context! { name, pictures });
            if samples.len() == SAMPLES {
                break;
            }
        }
        Ok(samples)
    }

    /// Figures and differences as text.
    ///
    /// # Errors
    /// A configuration that cannot be compared.
    pub fn text(&self) -> Result<String> {
        let mut head = vec![String::new()];
        head.extend(self.labels.iter().cloned());
        let mut rows = vec![head];
        for (title, row) in self.rows() {
            rows.push(
                [title]
                    .into_iter()
                    .chain(row.iter().map(Figure::text))
                    .collect(),
            );
        }
        let figures = rows.len();
        for difference in self.differences()? {
            rows.push(
                [difference.key]
                    .into_iter()
                    .chain(difference.values)
                    .collect(),
            );
        }
        let widths: Vec<usize> = (0..rows[0].len())
            .map(|column| {
                rows.iter()
                    .map(|row| row[column].chars().count())
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let mut text = String::new();
        for (number, row) in rows.iter().enumerate() {
            if number == figures {
                text += "\nkeys of the configuration that differ\n";
            }
            let cells = row.iter().zip(&widths).enumerate();
            let cells = cells.map(|(column, (cell, &width))| match column {
                0 => format!("{cell:width$}"),
                _ => format!("{cell:>width$}"),
            });
            text += cells.collect::<Vec<_>>().join("  ").trim_end();
            text.push('\n');
        }
        Ok(text)
    }
}

/// The places of the best values of a row; none where all are the same or one stands alone.
fn best(row: &[Figure]) -> Vec<usize> {
    let values: Vec<f64> = row.iter().filter_map(|figure| figure.value).collect();
    let most = match row.first().map(|figure| figure.better) {
        Some(Better::Lower) => values.iter().copied().reduce(f64::min),
        Some(Better::Higher) => values.iter().copied().reduce(f64::max),
        _ => None,
    };
    match most {
        Some(most) if values.iter().any(|&value| value != most) => {
            let places = row.iter().enumerate();
            places
                .filter(|(_, figure)| figure.value == Some(most))
                .map(|(place, _)| place)
                .collect()
        }
        _ => Vec::new(),
    }
}

/// The runs' names, with as many parent directories as it takes to tell them apart, else numbered.
fn labels(runs: &[RunReport]) -> Vec<String> {
    let tail = |path: &Path, parts: usize| {
        let all: Vec<String> = path
            .components()
            .map(|part| part.as_os_str().to_string_lossy().into_owned())
            .collect();
        all[all.len().saturating_sub(parts)..].join("/")
    };
    let different = |labels: &[String]| {
        let mut sorted: Vec<&String> = labels.iter().collect();
        sorted.sort();
        sorted.windows(2).all(|pair| pair[0] != pair[1])
    };
    let names: Vec<String> = runs.iter().map(|run| run.name.clone()).collect();
    if different(&names) {
        return names;
    }
    for parts in 2..8 {
        let labels: Vec<String> = runs.iter().map(|run| tail(run.run.root(), parts)).collect();
        if different(&labels) {
            return labels;
        }
    }
    let numbered = names.iter().enumerate();
    numbered
        .map(|(place, name)| format!("{name} ({})", place + 1))
        .collect()
}
