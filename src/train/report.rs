//! The page of a run, and of several beside each other: one HTML file that holds its pictures and needs no network.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::codecs::jpeg::JpegEncoder;
use minijinja::{Environment, Value, context};

use super::config::Config;
use super::metrics::{EvalMetrics, Line, MapMetrics, StepMetrics, read_lines};
use super::record::{Record, date};
use super::rundir::RunDir;
use crate::align::picture::{HEAD, ROW};
use crate::{Error, Result};

mod compare;
mod figures;
mod plot;

pub use compare::Comparison;
pub use figures::{Better, Figure, Series, duration, number};
use plot::{Chart, Curve, chart};

/// JPEG quality of the pictures.
const QUALITY: u8 = 85;

/// Words that are shown of a sample.
const WORDS: u32 = 12;

/// A run as its directory holds it.
#[derive(Clone, Debug)]
pub struct RunReport {
    /// What it is called: its directory's name.
    pub name: String,
    /// Its directory.
    pub run: RunDir,
    /// Its configuration.
    pub config: Config,
    /// Where and when it ran; none where it was made by a program that kept none.
    pub record: Option<Record>,
    /// Its steps so far.
    pub steps: Vec<StepMetrics>,
    /// Its evaluations so far.
    pub evaluations: Vec<EvalMetrics>,
    /// The figures of its word maps, one a step that they were drawn at.
    pub maps: Vec<MapMetrics>,
    /// Pictures of its word maps as they were last.
    pub pictures: Vec<PathBuf>,
    /// Steps after which there are other pictures of them.
    pub drawn: Vec<u64>,
}

impl RunReport {
    /// Reads the run in `dir`, whole, stopped or going on; a torn last line of a log is left out.
    ///
    /// # Errors
    /// No run there; a log that holds something else.
    pub fn read(dir: impl AsRef<Path>) -> Result<Self> {
        let (run, config) = RunDir::read(dir)?;
        let whole = run.root().canonicalize();
        let whole = whole.as_deref().unwrap_or(run.root());
        let name = whole.file_name().unwrap_or(whole.as_os_str());
        let mut maps: Vec<MapMetrics> = log(&run.map_figures())?;
        // A resumed run may draw the same step's again.
        maps.reverse();
        maps.sort_by_key(|line| line.step);
        maps.dedup_by_key(|line| line.step);
        let (pictures, drawn) = pictures(&run.maps())?;
        Ok(Self {
            name: name.to_string_lossy().into_owned(),
            record: Record::read(&run)?,
            steps: log(&run.metrics())?,
            evaluations: log(&run.evaluations())?,
            maps,
            pictures,
            drawn,
            config,
            run,
        })
    }

    /// The page.
    ///
    /// # Errors
    /// A picture that cannot be read, a plot that cannot be drawn.
    pub fn html(&self) -> Result<String> {
        let charts = self.charts()?;
        let rows = Series::all(self).into_iter().filter_map(|s| s.row());
        let pictures = self
            .pictures
            .iter()
            .map(|path| Ok(context! { name => stem(path), picture => data_url(path)? }));
        render(
            "run.html",
            context! {
                name => self.name.clone(),
                state => self.state(),
                facts => pairs(self.facts()),
                highlights => pairs(self.highlights()),
                charts,
                rows => rows.collect::<Vec<Vec<String>>>(),
                attention => self.attention(),
                pictures => pictures.collect::<Result<Vec<Value>>>()?,
                drawn => self.drawn.clone(),
                config => self.config.to_toml()?,
            },
        )
    }

    /// How it stands, in words.
    fn state(&self) -> String {
        let last = self.record.as_ref().and_then(|r| r.stretches.last());
        match last {
            Some(last) => last.outcome.describe().into(),
            None => "not recorded how it ended".into(),
        }
    }

    /// Names and values of the page's head.
    fn facts(&self) -> Vec<(String, String)> {
        let mut facts = vec![(
            "run directory".to_owned(),
            self.run.root().display().to_string(),
        )];
        let mut add = |name: &str, value: String| facts.push((name.to_owned(), value));
        add("model", self.config.model.path.display().to_string());
        match self.config.data.mixture.len() {
            0 => add("data set", self.config.data.path.display().to_string()),
            sets => add("data set", format!("a mixture of {sets}")),
        }
        add("seed", self.config.train.seed.to_string());
        let Some(record) = &self.record else {
            return facts;
        };
        add("samples", record.samples.to_string());
        let mut last = None;
        for stretch in &record.stretches {
            let place = (&stretch.adapter, &stretch.driver, &stretch.version);
            if last != Some(place) {
                add("adapter", stretch.adapter.clone());
                add("driver", stretch.driver.clone());
                add("program", format!("lavender-wgpu {}", stretch.version));
            }
            last = Some(place);
        }
        for stretch in &record.stretches {
            let mut text = format!(
                "{}: steps {} to {}, {}",
                date(stretch.started),
                stretch.from,
                stretch.to,
                stretch.outcome.describe()
            );
            if stretch.seconds > 0.0 {
                text += &format!(" after {}", duration(stretch.seconds));
            }
            if let Some(reason) = &stretch.reason {
                text += &format!(": {reason}");
            }
            add("ran", text);
        }
        facts
    }

    /// The few figures that stand large on top.
    fn highlights(&self) -> Vec<(String, String)> {
        let total = self.record.as_ref().map(|r| r.total_steps);
        let done = self.steps.len();
        let steps = total.map_or(done.to_string(), |total| format!("{done} of {total}"));
        let mut shown = vec![("steps".to_owned(), steps)];
        let wanted = [
            "language loss",
            "attention loss",
            "best evaluation",
            "tokens/s",
            "GPU memory",
            "wall time",
        ];
        for figure in Figure::all(self) {
            if let (true, Some(_)) = (wanted.contains(&figure.name), figure.value) {
                shown.push((figure.title(), figure.text()));
            }
        }
        shown
    }

    fn charts(&self) -> Result<Vec<Value>> {
        let mut charts = Vec::new();
        let series = Series::all(self);
        let evaluated = |name: &str| {
            let series = series
                .iter()
                .find(|s| s.name == format!("evaluation {name}"));
            series.map(|s| s.points.clone()).unwrap_or_default()
        };
        for series in series.iter().filter(|s| s.plotted && !s.points.is_empty()) {
            let curve = Curve::new(&series.points, 0);
            let mut notes = vec![curve.note("step")];
            let mut curves = vec![curve];
            let dots = evaluated(series.name);
            if !dots.is_empty() {
                notes.push("dots: evaluation".into());
                curves.push(Curve::dotted(&dots, 1));
            }
            let drawing = Chart {
                unit: series.unit,
                curves,
            };
            charts.push(context! {
                title => series.name,
                svg => chart(&drawing)?,
                note => notes.join("; "),
            });
        }
        if self.maps.len() > 1 {
            let line = |value: fn(&MapMetrics) -> f64| -> Vec<(u64, f64)> {
                self.maps.iter().map(|m| (m.step, value(m))).collect()
            };
            let drawing = Chart {
                unit: "nats",
                curves: vec![
                    Curve::dotted(&line(|m| m.entropy), 0),
                    Curve::plain(&line(|m| m.target_entropy), 2),
                ],
            };
            charts.push(context! {
                title => "entropy of attention",
                svg => chart(&drawing)?,
                note => "dots: mean over the words that are drawn; line without dots: their targets; lower is sharper",
            });
        }
        Ok(charts)
    }

    /// Rows of the table before and after: name, before, after, target.
    fn attention(&self) -> Vec<Vec<String>> {
        let mut rows = Vec::new();
        let mut add = |name: &str, before: f64, after: Option<f64>, target: Option<f64>| {
            let show = |value: Option<f64>| value.map_or("–".into(), number);
            rows.push(vec![name.into(), number(before), show(after), show(target)]);
        };
        if let Some(before) = self.maps.first() {
            let after = self.maps.last().filter(|_| self.maps.len() > 1);
            let words = format!("{} words that are drawn", before.words);
            add(
                &format!("attention entropy, nats ({words})"),
                before.entropy,
                after.map(|m| m.entropy),
                Some(before.target_entropy),
            );
            add(
                &format!("squared error of their aligned maps ({words})"),
                before.distance,
                after.map(|m| m.distance),
                Some(0.0),
            );
        }
        if let Some(held) = self.record.as_ref().and_then(|r| r.held_out) {
            let figures = |f: &crate::eval::drawn::Figures| {
                [
                    ("answer loss, nats/token", f.answer_loss, None),
                    ("answer accuracy", f.answer_accuracy, None),
                    ("attention entropy, nats", f.attention_entropy, None),
                    (
                        "pointing game (by chance in the last column)",
                        f.pointing,
                        Some(f.chance),
                    ),
                ]
            };
            let after = held.after.as_ref().map(figures);
            for (place, (name, before, chance)) in figures(&held.before).into_iter().enumerate() {
                let name = format!("{name} ({} held-out scenes)", held.scenes);
                add(&name, before, after.map(|rows| rows[place].1), chance);
            }
        }
        rows
    }
}

/// A log that may not be there yet.
fn log<T: Line>(path: &Path) -> Result<Vec<T>> {
    match path.exists() {
        true => read_lines(path),
        false => Ok(Vec::new()),
    }
}

/// The pictures in a directory of word maps, and the steps that have one of their own.
fn pictures(dir: &Path) -> Result<(Vec<PathBuf>, Vec<u64>)> {
    let (mut pictures, mut steps) = (Vec::new(), Vec::new());
    if dir.is_dir() {
        for item in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
            let path = item.map_err(|e| Error::io(dir, e))?.path();
            let name = stem(&path);
            if path.extension().is_some_and(|ending| ending == "png") {
                pictures.push(path);
            } else if let Some(step) = name.strip_prefix("step-") {
                steps.extend(step.parse::<u64>().ok());
            }
        }
    }
    pictures.sort();
    steps.sort_unstable();
    Ok((pictures, steps))
}

fn stem(path: &Path) -> String {
    path.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// A picture inside the page: its first [`WORDS`] words.
fn data_url(path: &Path) -> Result<Value> {
    let wrong =
        |e: image::ImageError| Error::file(path, format!("not a picture of word maps: {e}"));
    let picture = image::open(path).map_err(wrong)?.into_rgb8();
    let (width, height) = picture.dimensions();
    let height = height.min(HEAD + WORDS * ROW);
    let shown = image::imageops::crop_imm(&picture, 0, 0, width, height).to_image();
    let mut jpeg = Cursor::new(Vec::new());
    JpegEncoder::new_with_quality(&mut jpeg, QUALITY)
        .encode_image(&shown)
        .map_err(wrong)?;
    // Base64 has nothing to escape but its slashes, which may stand as they are.
    let url = format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg.get_ref()));
    Ok(Value::from_safe_string(url))
}

fn pairs(pairs: Vec<(String, String)>) -> Vec<Value> {
    let pairs = pairs.into_iter();
    pairs
        .map(|(name, value)| Value::from(vec![name, value]))
        .collect()
}

/// A page from one of the templates; values are escaped by its name's ending.
fn render(name: &str, values: Value) -> Result<String> {
    let wrong = |e: minijinja::Error| Error::Input(format!("report: {e:#}"));
    let mut environment = Environment::new();
    for (name, text) in [
        ("style.css", include_str!("report/style.css")),
        ("run.html", include_str!("report/run.html")),
        ("compare.html", include_str!("report/compare.html")),
    ] {
        environment.add_template(name, text).map_err(wrong)?;
    }
    let page = environment.get_template(name).map_err(wrong)?;
    page.render(values).map_err(wrong)
}
