//! Reports of several machines side by side.

use std::fmt::Write;

use super::Report;

/// A figure that reports have in common.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Its unit.
    pub unit: &'static str,
    /// Each report's figure, where it has it.
    pub values: Vec<Option<f64>>,
}

/// Every figure of the reports, in the order of the first that has it.
pub fn rows(reports: &[Report]) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (at, report) in reports.iter().enumerate() {
        for (name, unit, value) in figures(report) {
            let found = rows.iter().position(|row| row.name == name);
            let row = found.unwrap_or_else(|| {
                rows.push(Row {
                    name,
                    unit,
                    values: vec![None; reports.len()],
                });
                rows.len() - 1
            });
            rows[row].values[at] = Some(value);
        }
    }
    rows
}

fn figures(report: &Report) -> Vec<(String, &'static str, f64)> {
    let mut all = vec![
        ("multiply-adds".into(), "GFLOP/s", report.peak.gflops),
        ("copies".into(), "GB/s", report.peak.gbs),
    ];
    for kernel in &report.kernels {
        all.push((kernel.name.clone(), "ms", kernel.timing.median_ms));
    }
    for unet in &report.unet {
        let name = format!(
            "U-Net {}², batch {}, {}{}",
            unet.side,
            unet.batch,
            unet.dtype,
            if unet.capture { ", capture" } else { "" }
        );
        all.push((name, "ms", unet.timing.median_ms));
    }
    for step in &report.training {
        all.push((
            step.setting.name().to_string(),
            "tokens/s",
            step.tokens_per_second,
        ));
    }
    all
}

/// The table that `bench compare` prints: a column a machine, each figure with its ratio to the first's.
pub fn table(reports: &[Report], names: &[String]) -> String {
    let mut text = String::new();
    for (name, report) in names.iter().zip(reports) {
        let _ = writeln!(
            text,
            "{name}: {}, {} cores, version {}",
            report.machine(),
            report.cores,
            report.version
        );
    }
    let rows = rows(reports);
    let width = rows.iter().map(|row| row.name.chars().count()).max();
    let width = width.unwrap_or(0).max(6);
    let _ = write!(text, "\n{:width$} {:>8}", "", "");
    for name in names {
        let _ = write!(text, " {name:>20}");
    }
    for row in rows {
        let _ = write!(text, "\n{:width$} {:>8}", row.name, row.unit);
        let first = row.values[0];
        for (at, value) in row.values.iter().enumerate() {
            let cell = match (value, first) {
                (None, _) => "–".to_string(),
                (Some(value), Some(first)) if at > 0 => {
                    format!("{value:.2} ({:.2}×)", value / first)
                }
                (Some(value), _) => format!("{value:.2}"),
            };
            let _ = write!(text, " {cell:>20}");
        }
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::kernels::KernelTime;
    use crate::bench::{Peak, Timing};

    fn report(gflops: f64, kernel: Option<f64>) -> Report {
        let timed = |median_ms| KernelTime {
            name: "add".into(),
            timing: Timing {
                median_ms,
                ..Timing::default()
            },
            gflops: 0.0,
            gbs: 0.0,
            share: 0.0,
            pytorch: None,
        };
        Report {
            peak: Peak {
                gflops,
                gbs: 1.0,
                ..Peak::default()
            },
            kernels: kernel.map(timed).into_iter().collect(),
            ..Report::default()
        }
    }

    #[test]
    fn figures_stand_side_by_side_and_missing_ones_are_dashes() {
        let reports = [report(10.0, None), report(20.0, Some(3.0))];
        let rows = rows(&reports);
        assert_eq!(rows[0].values, [Some(10.0), Some(20.0)]);
        assert_eq!(rows[2].values, [None, Some(3.0)]);
        let table = table(&reports, &["a".into(), "b".into()]);
        let line = |start: &str| {
            table
                .lines()
                .find(|l| l.starts_with(start))
                .unwrap()
                .to_string()
        };
        assert!(line("multiply-adds").ends_with("20.00 (2.00×)"), "{table}");
        assert!(line("add").contains('–'), "{table}");
    }
}
