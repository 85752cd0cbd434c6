//! A page on which targets are looked at: one HTML file that holds its pictures and needs no network.

use std::collections::BTreeMap;
use std::ops::Range;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::RgbImage;
use image::codecs::jpeg::JpegEncoder;
use minijinja::{Environment, Value, context};
use plotters::prelude::*;

use super::picture::overlay;
use super::store::failures::Failure;
use crate::{Error, Result};

/// The page; values are escaped by its name's ending.
const TEMPLATE: (&str, &str) = ("report.html", include_str!("report.html"));

/// JPEG quality of the pictures.
const QUALITY: u8 = 85;

/// Size of a histogram in pixels.
const PLOT: (u32, u32) = (560, 260);

const BAR: RGBColor = RGBColor(108, 92, 170);

/// What the page shows.
#[derive(Debug, Default)]
pub struct Report {
    /// Its title.
    pub title: String,
    /// Names and values of its head: teacher, mode, counts.
    pub facts: Vec<(String, String)>,
    /// Entropy in nats of every word map that is not flat, −Σ p ln p of the map normalised to sum 1.
    pub entropies: Vec<f32>,
    /// Words of every sample.
    pub words: Vec<usize>,
    /// The samples without targets.
    pub failures: Vec<Failure>,
    /// Samples to look at.
    pub samples: Vec<Shown>,
}

/// A sample on the page.
#[derive(Debug)]
pub struct Shown {
    /// Its id.
    pub id: String,
    /// Its text.
    pub caption: String,
    /// The part of its image that the teacher saw, in the size that it is shown in.
    pub picture: RgbImage,
    /// Words with their maps.
    pub words: Vec<ShownWord>,
    /// Words that are left out.
    pub more: usize,
}

/// A word on the page.
#[derive(Debug)]
pub struct ShownWord {
    /// The word.
    pub text: String,
    /// Its map, square and row-major in 0…1.
    pub map: Vec<f32>,
    /// The map's entropy in nats.
    pub entropy: f32,
}

impl Report {
    /// The page. Errors: a picture or plot that cannot be drawn.
    pub fn html(&self) -> Result<String> {
        let samples = self
            .samples
            .iter()
            .map(sample)
            .collect::<Result<Vec<_>>>()?;
        let mut groups: BTreeMap<_, Vec<&Failure>> = BTreeMap::new();
        for failure in &self.failures {
            groups.entry(failure.cause).or_default().push(failure);
        }
        let groups: Vec<Value> = groups
            .into_iter()
            .map(|(cause, failures)| {
                let rows = failures
                    .into_iter()
                    .map(|f| context! { id => f.id.clone(), reason => f.reason.clone() });
                context! { cause => cause.describe(), failures => rows.collect::<Vec<Value>>() }
            })
            .collect();
        let facts: Vec<Value> = self
            .facts
            .iter()
            .map(|(name, value)| Value::from(vec![name.clone(), value.clone()]))
            .collect();
        let words: Vec<f32> = self.words.iter().map(|&n| n as f32).collect();
        let longest = words.iter().copied().fold(1.0, f32::max);
        let uniform = ((super::store::SIDE * super::store::SIDE) as f32).ln();
        let wrong = |e: minijinja::Error| Error::Input(format!("report: {e:#}"));
        let mut environment = Environment::new();
        environment
            .add_template(TEMPLATE.0, TEMPLATE.1)
            .map_err(wrong)?;
        let page = environment.get_template(TEMPLATE.0).map_err(wrong)?;
        page.render(context! {
            title => self.title.clone(),
            facts,
            entropy => histogram(&self.entropies, 0.0..uniform, 40, "entropy of a word map, nats", "word maps")?,
            mean_entropy => format!("{:.2}", mean(&self.entropies)),
            uniform => format!("{uniform:.2}"),
            words => histogram(&words, -0.5..longest + 0.5, (longest as usize + 1).min(40), "words of a sample", "samples")?,
            mean_words => format!("{:.1}", mean(&words)),
            failed => self.failures.len(),
            groups,
            samples,
        })
        .map_err(wrong)
    }
}

fn mean(values: &[f32]) -> f64 {
    let sum: f64 = values.iter().copied().map(f64::from).sum();
    sum / values.len().max(1) as f64
}

fn sample(shown: &Shown) -> Result<Value> {
    let words = shown.words.iter().map(|word| {
        Ok(context! {
            text => word.text.clone(),
            entropy => format!("{:.2}", word.entropy),
            picture => data_url(&overlay(&shown.picture, &word.map))?,
        })
    });
    Ok(context! {
        id => shown.id.clone(),
        caption => shown.caption.clone(),
        picture => data_url(&shown.picture)?,
        side => shown.picture.width(),
        words => words.collect::<Result<Vec<Value>>>()?,
        more => shown.more,
    })
}

/// A picture inside the page.
fn data_url(picture: &RgbImage) -> Result<Value> {
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, QUALITY)
        .encode_image(picture)
        .map_err(|e| Error::Input(format!("report: a picture cannot be encoded: {e}")))?;
    // Base64 has nothing to escape but its slashes, which may stand as they are.
    let url = format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg));
    Ok(Value::from_safe_string(url))
}

/// How often values fall into each of `bins` over a range, as SVG; values outside count in the bin at that end.
fn histogram(
    values: &[f32],
    range: Range<f32>,
    bins: usize,
    of: &str,
    counted: &str,
) -> Result<String> {
    let mut counts = vec![0u32; bins];
    for value in values {
        let place = (value - range.start) / (range.end - range.start);
        let bin = (place * bins as f32).max(0.0) as usize;
        counts[bin.min(bins - 1)] += 1;
    }
    let highest = counts.iter().copied().max().unwrap_or(0).max(1);
    let mut svg = String::new();
    draw(&mut svg, &counts, highest, range, of, counted)
        .map_err(|e| Error::Input(format!("report: a histogram cannot be drawn: {e}")))?;
    Ok(svg)
}

fn draw(
    svg: &mut String,
    counts: &[u32],
    highest: u32,
    range: Range<f32>,
    of: &str,
    counted: &str,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let area = SVGBackend::with_string(svg, PLOT).into_drawing_area();
    let (start, width) = (range.start, (range.end - range.start) / counts.len() as f32);
    let mut chart = ChartBuilder::on(&area)
        .margin(8)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(range, 0f32..highest as f32 * 1.05)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc(of)
        .y_desc(counted)
        .x_label_formatter(&|value| format!("{value:.0}"))
        .y_label_formatter(&|count| format!("{count:.0}"))
        .light_line_style(TRANSPARENT)
        .draw()?;
    chart.draw_series(counts.iter().enumerate().map(|(bin, &count)| {
        let left = start + bin as f32 * width;
        Rectangle::new([(left, 0.0), (left + width, count as f32)], BAR.filled())
    }))?;
    area.present()?;
    Ok(())
}
