//! Runs side by side.

use std::collections::BTreeMap;
use std::path::PathBuf;

use lavender_wgpu::eval::Benchmark;
use lavender_wgpu::eval::compare::{compare, read};
use lavender_wgpu::eval::report::{Figure, Group, Report, markdown};
use serde_json::json;

fn report(label: &str, seed: u64, value: f64) -> (PathBuf, Report) {
    let figure = Figure {
        name: "exact".into(),
        value,
        low: value,
        high: value,
    };
    let report = Report {
        benchmark: Benchmark::Vqa,
        label: label.into(),
        seed: Some(seed),
        settings: json!({"data": "test.json", "max_tokens": 32}),
        overall: Group {
            samples: 100,
            figures: vec![figure],
        },
        categories: BTreeMap::new(),
        skipped: Vec::new(),
    };
    (format!("{label}-{seed}").into(), report)
}

#[test]
fn labels_get_means_and_intervals_over_seeds_and_differences_seed_by_seed() {
    let reports = [
        report("lambda=0", 0, 0.50),
        report("lambda=10", 0, 0.60),
        report("lambda=0", 1, 0.60),
        report("lambda=10", 1, 0.71),
        report("lambda=0", 2, 0.70),
        report("lambda=10", 2, 0.79),
        report("shuffled", 0, 0.40),
    ];
    let comparison = compare(&reports, None).unwrap();
    assert_eq!(comparison.baseline.as_deref(), Some("lambda=0"));
    let cell = |row: usize| &comparison.rows[row].cells[0];
    let near = |a: Option<f64>, b: f64| (a.unwrap() - b).abs() < 1e-3;
    assert_eq!(comparison.rows[1].seeds, [Some(0), Some(1), Some(2)]);
    // 4.303 · 0.1 / √3, and of the differences 0.10, 0.11, 0.09: 4.303 · 0.01 / √3.
    assert!((cell(0).mean - 0.6).abs() < 1e-12 && near(cell(0).half_width, 0.2484));
    assert!(near(cell(1).difference, 0.1) && near(cell(1).difference_half_width, 0.0248));
    assert_eq!(cell(0).difference, None);
    // Not the baseline's seeds: no difference; one run: no interval.
    assert_eq!((cell(2).difference, cell(2).half_width), (None, None));
    let table = comparison.table();
    let lines: Vec<&str> = table.lines().collect();
    assert!(
        lines[0].contains("vqa (100 samples)") && lines[0].contains("− lambda=0"),
        "{table}"
    );
    assert!(
        lines[3].contains("0.700 ± ") && lines[3].contains("+0.100 ± 0.025"),
        "{table}"
    );
    let width = lines[0].chars().count();
    assert!(
        lines.iter().all(|line| line.chars().count() == width),
        "{table}"
    );
    // Another baseline.
    let other = compare(&reports, Some("shuffled")).unwrap();
    assert_eq!(other.rows[2].cells[0].difference, None);
}

#[test]
fn runs_that_cannot_be_compared_are_refused() {
    let base = report("lambda=0", 0, 0.5);
    let refused = |other: Report, baseline: Option<&str>| {
        let reports = [base.clone(), ("other".into(), other)];
        compare(&reports, baseline).unwrap_err().to_string()
    };
    let (_, fine) = report("lambda=1", 0, 0.5);
    let mut other = fine.clone();
    other.settings["data"] = json!("train.json");
    let error = refused(other, None);
    assert!(
        error.contains("settings.data") && error.contains("other"),
        "{error}"
    );
    let mut other = fine.clone();
    other.overall.samples = 99;
    assert!(refused(other, None).contains("vqa on 99 samples"));
    let mut other = fine.clone();
    other.benchmark = Benchmark::YesNo;
    assert!(refused(other, None).contains("yes-no"));
    let error = refused(fine, Some("lambda=2"));
    assert!(
        error.contains("lambda=2") && error.contains("`lambda=0`, `lambda=1`"),
        "{error}"
    );

    let dir = tempfile::tempdir().unwrap();
    let error = read(&[dir.path().to_path_buf()]).unwrap_err().to_string();
    assert!(error.contains("figures.json"), "{error}");
    let file = dir.path().join("figures.json");
    std::fs::write(&file, serde_json::to_string(&base.1).unwrap()).unwrap();
    assert_eq!(
        read(&[dir.path().to_path_buf()]).unwrap(),
        [(file.clone(), base.1)]
    );
    std::fs::write(&file, "{}").unwrap();
    assert!(
        read(&[file])
            .unwrap_err()
            .to_string()
            .contains("no figures")
    );
}

#[test]
fn tables_are_aligned_markdown() {
    let row = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
    let table = markdown(&[row("name", "x"), row("é", "−1.25")]);
    assert_eq!(
        table,
        "| name |     x |\n|------|------:|\n| é    | −1.25 |\n"
    );
}
