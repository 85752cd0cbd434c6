//! Reports as a picture: bars of each kernel's share of its adapter's peak.

use std::path::Path;

use plotters::prelude::*;

use super::Report;
use crate::error::{Error, Result};
use crate::files::write_bytes;

/// Points a row takes.
const ROW: u32 = 22;
/// Points for the names.
const NAMES: i32 = 420;

/// Writes an SVG with, for every kernel, a bar a report: its share of what that report's adapter reaches at best.
///
/// # Errors
/// Reports without kernels; a file that cannot be written.
pub fn save_svg(path: &Path, reports: &[Report], names: &[String]) -> Result<()> {
    let kernels: Vec<&str> = reports
        .iter()
        .flat_map(|r| r.kernels.iter().map(|k| k.name.as_str()))
        .fold(Vec::new(), |mut list, name| {
            if !list.contains(&name) {
                list.push(name);
            }
            list
        });
    if kernels.is_empty() {
        return Err(Error::Input(
            "no kernels to plot: the reports were written by `bench unet` or `bench train`; \
             write one with `bench kernels --json FILE`"
                .into(),
        ));
    }
    let mut svg = String::new();
    draw(&mut svg, reports, names, &kernels)
        .map_err(|e| Error::file(path, format!("the plot cannot be drawn: {e}")))?;
    write_bytes(path, svg.as_bytes())
}

fn draw(
    svg: &mut String,
    reports: &[Report],
    names: &[String],
    kernels: &[&str],
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let height = ROW * kernels.len() as u32 + 90;
    let area = SVGBackend::with_string(svg, (1000, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let rows = kernels.len() as f64;
    let mut chart = ChartBuilder::on(&area)
        .caption("share of the adapter's peak", ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(NAMES)
        .build_cartesian_2d(0.0..1.05f64, 0.0..rows)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_label_formatter(&|x| format!("{:.0} %", 100.0 * x))
        .draw()?;
    for (row, name) in kernels.iter().enumerate() {
        let middle = chart.backend_coord(&(0.0, rows - row as f64 - 0.5)).1;
        let style = ("sans-serif", 13).into_font().color(&BLACK);
        area.draw_text(name, &style, (12, middle - 7))?;
    }
    let thick = 0.8 / reports.len() as f64;
    for (at, (report, name)) in reports.iter().zip(names).enumerate() {
        let color = Palette99::pick(at).to_rgba();
        let bars = report.kernels.iter().filter_map(|kernel| {
            let row = kernels.iter().position(|&k| k == kernel.name)?;
            let top = rows - row as f64 - 0.1 - at as f64 * thick;
            let corners = [(0.0, top), (kernel.share.min(1.05), top - thick)];
            Some(Rectangle::new(corners, color.filled()))
        });
        chart
            .draw_series(bars)?
            .label(format!("{name}: {}", report.tier.name))
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 14, y + 5)], color.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.9))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    area.present()?;
    Ok(())
}
