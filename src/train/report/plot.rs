//! Curves as SVG.

use plotters::prelude::*;

use crate::{Error, Result};

/// Size of a chart in pixels.
const SIZE: (u32, u32) = (400, 210);

/// Size of its text in pixels.
const TEXT: u32 = 13;

/// Points that a chart has room for; more are joined.
const POINTS: usize = 280;

/// Share of a curve that its bold line is a mean over.
const SMOOTH: f64 = 0.05;

/// Colours of curves, to be told apart on white and on black.
pub const COLOURS: [RGBColor; 8] = [
    RGBColor(124, 107, 196),
    RGBColor(214, 106, 40),
    RGBColor(27, 153, 139),
    RGBColor(209, 73, 91),
    RGBColor(61, 132, 198),
    RGBColor(138, 141, 63),
    RGBColor(181, 93, 146),
    RGBColor(122, 110, 98),
];

/// A colour that the page's style sheet finds and replaces, for the grid.
const GRID: RGBColor = RGBColor(221, 221, 221);

/// What a chart shows.
pub struct Chart {
    /// Unit of the values, empty for none.
    pub unit: &'static str,
    /// Its curves, all over steps.
    pub curves: Vec<Curve>,
}

/// One curve.
pub struct Curve {
    /// The values themselves, joined to few.
    thin: Vec<(u64, f64)>,
    /// Their running mean.
    bold: Vec<(u64, f64)>,
    dots: Vec<(u64, f64)>,
    colour: RGBColor,
    /// Steps that a point of the bold line is a mean over.
    window: usize,
}

impl Curve {
    /// A thin line through every step and a bold one through their running mean.
    pub fn new(points: &[(u64, f64)], colour: usize) -> Self {
        let window = ((points.len() as f64 * SMOOTH) as usize).max(1);
        let bold = match window {
            1 => points.to_vec(),
            _ => running_mean(points, window),
        };
        Self {
            thin: match window {
                1 => Vec::new(),
                _ => extremes(points),
            },
            bold: every(&bold),
            dots: Vec::new(),
            colour: COLOURS[colour % COLOURS.len()],
            window,
        }
    }

    /// A line through points that are marked.
    pub fn dotted(points: &[(u64, f64)], colour: usize) -> Self {
        Self {
            dots: points.to_vec(),
            ..Self::plain(points, colour)
        }
    }

    /// A line.
    pub fn plain(points: &[(u64, f64)], colour: usize) -> Self {
        Self {
            thin: Vec::new(),
            bold: points.to_vec(),
            dots: Vec::new(),
            colour: COLOURS[colour % COLOURS.len()],
            window: 1,
        }
    }

    /// What its lines mean.
    pub fn note(&self, of: &str) -> String {
        match self.window {
            1 => format!("every {of}"),
            window => format!("thin: every {of}; bold: mean over {window}"),
        }
    }

    fn all(&self) -> impl Iterator<Item = &(u64, f64)> {
        self.thin.iter().chain(&self.bold).chain(&self.dots)
    }
}

/// The mean of `window` values that end at each.
fn running_mean(points: &[(u64, f64)], window: usize) -> Vec<(u64, f64)> {
    let mut sum = 0.0;
    let each = points.iter().enumerate().map(|(at, &(step, value))| {
        sum += value;
        if at >= window {
            sum -= points[at - window].1;
        }
        (step, sum / window.min(at + 1) as f64)
    });
    each.collect()
}

/// The lowest and the highest value of each of at most [`POINTS`] parts, in their order.
fn extremes(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    if points.len() <= 2 * POINTS {
        return points.to_vec();
    }
    let parts = points.chunks(points.len().div_ceil(POINTS));
    let ends = parts.flat_map(|part| {
        let by = |a: &&(u64, f64), b: &&(u64, f64)| a.1.total_cmp(&b.1);
        let (low, high) = (part.iter().min_by(by), part.iter().max_by(by));
        let mut ends: Vec<_> = low.into_iter().chain(high).copied().collect();
        ends.sort_by_key(|end| end.0);
        ends
    });
    ends.collect()
}

/// At most about 2 × [`POINTS`] of the points, the last among them.
fn every(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let stride = points.len().div_ceil(2 * POINTS).max(1);
    let offset = points.len().saturating_sub(1) % stride;
    points
        .iter()
        .skip(offset)
        .step_by(stride)
        .copied()
        .collect()
}

/// The chart as SVG.
///
/// # Errors
/// A plot that cannot be drawn.
pub fn chart(chart: &Chart) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, chart)
        .map_err(|e| Error::Input(format!("report: a chart cannot be drawn: {e}")))?;
    Ok(svg)
}

fn draw(svg: &mut String, chart: &Chart) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let points = || chart.curves.iter().flat_map(Curve::all);
    let last = points().map(|p| p.0).max().unwrap_or(0).max(1);
    let finite = || points().map(|p| p.1).filter(|v| v.is_finite());
    let low = finite().fold(f64::INFINITY, f64::min).min(f64::MAX);
    let high = finite().fold(f64::NEG_INFINITY, f64::max).max(f64::MIN);
    let (low, high) = match low <= high {
        true => (low, high),
        false => (0.0, 1.0),
    };
    // A constant has room around it too.
    let room = match high.abs().max(high - low) > 0.0 {
        true => (0.06 * (high - low)).max(0.05 * high.abs()),
        false => 1.0,
    };
    let bottom = if low >= 0.0 {
        (low - room).max(0.0)
    } else {
        low - room
    };
    let range = bottom..high + room;
    let label = labels(range.end - range.start, range.end);
    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let mut context = ChartBuilder::on(&area)
        .margin(8)
        .margin_right(16)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d(0..last, range)?;
    context
        .configure_mesh()
        .x_desc("step")
        .y_desc(chart.unit)
        .x_labels(6)
        .y_labels(5)
        .label_style(("sans-serif", TEXT))
        .axis_desc_style(("sans-serif", TEXT))
        .y_label_formatter(&label)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .draw()?;
    for curve in &chart.curves {
        let thin = curve.colour.mix(0.35).stroke_width(1);
        context.draw_series(LineSeries::new(curve.thin.iter().copied(), thin))?;
    }
    for curve in &chart.curves {
        let bold = curve.colour.stroke_width(2);
        context.draw_series(LineSeries::new(curve.bold.iter().copied(), bold))?;
        let dots = curve.dots.iter();
        context.draw_series(dots.map(|&at| Circle::new(at, 3, curve.colour.filled())))?;
        // A line of one point is not to be seen.
        if let ([only], true) = (curve.bold.as_slice(), curve.dots.is_empty()) {
            context.draw_series([Circle::new(*only, 3, curve.colour.filled())])?;
        }
    }
    area.present()?;
    Ok(())
}

/// How values are written beside an axis that spans so much.
fn labels(span: f64, most: f64) -> impl Fn(&f64) -> String {
    let small = most.abs() < 1e-3;
    let digits = (1.0 - (span / 5.0).log10().floor()).clamp(0.0, 8.0) as usize;
    let digits = if span >= 5.0 {
        digits.saturating_sub(1)
    } else {
        digits
    };
    move |value: &f64| match small {
        true if *value == 0.0 => "0".into(),
        true => format!("{value:.1e}"),
        false => format!("{value:.digits$}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_curves_keep_their_ends_and_extremes() {
        let points: Vec<(u64, f64)> = (0..10_000).map(|i| (i, (i % 997) as f64)).collect();
        let joined = extremes(&points);
        assert!(joined.len() <= 2 * POINTS && joined.is_sorted_by_key(|p| p.0));
        assert!(joined.iter().any(|p| p.1 == 996.0) && joined.iter().any(|p| p.1 == 0.0));
        let some = every(&points);
        assert!(some.len() <= 2 * POINTS + 1 && some.last() == points.last());
        assert_eq!(every(&points[..3]), points[..3]);
        let mean = running_mean(&[(0, 1.0), (1, 3.0), (2, 5.0)], 2);
        assert_eq!(mean, [(0, 1.0), (1, 2.0), (2, 4.0)]);
    }

    #[test]
    fn charts_of_nothing_of_one_point_and_of_what_is_not_finite_are_drawn() {
        for points in [
            &[][..],
            &[(0, 2.0)],
            &[(0, 0.0), (1, f64::NAN), (2, f64::INFINITY)],
        ] {
            let curves = vec![Curve::new(points, 0)];
            let svg = chart(&Chart { unit: "", curves }).unwrap();
            assert!(
                svg.starts_with("<svg") && svg.ends_with("</svg>\n"),
                "{svg}"
            );
        }
    }
}
