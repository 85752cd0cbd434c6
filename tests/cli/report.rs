//! `report`: pages of one run and of several.

use std::fs;
use std::path::Path;

use crate::support::{program, refused_with, run, stderr, stdout};

/// A run directory as an older program left it: no record, no maps.
fn old_run(root: &Path, lambda: f64) {
    fs::create_dir_all(root).unwrap();
    fs::write(
        root.join("config.toml"),
        format!("[loss]\nlambda = {lambda}\n"),
    )
    .unwrap();
    let step = |step: u64| {
        format!(
            "{{\"step\":{step},\"epoch\":0,\"loss\":{},\"lm_loss\":1.5,\"attn_loss\":0.1,\"matched_words\":2,\
             \"lr\":0.0001,\"grad_norm\":1.0,\"tokens\":50,\"step_ms\":10.0,\"peak_bytes\":1048576}}\n",
            lambda + 2.0
        )
    };
    fs::write(root.join("metrics.jsonl"), step(0) + &step(1) + "{\"st").unwrap();
}

#[test]
fn a_run_has_its_page_written_again_and_several_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    old_run(&root.join("autor"), 0.0);
    old_run(&root.join("lavender"), 5.0);
    let path = |name: &str| root.join(name).to_str().unwrap().to_owned();

    let output = run(&["report", &path("autor")]);
    assert!(output.status.success(), "{}", stderr(&output));
    let page = fs::read_to_string(root.join("autor/report.html")).unwrap();
    assert!(
        page.contains("<title>Run autor</title>") && page.contains("not recorded"),
        "{page}"
    );
    let text = stdout(&output);
    assert!(
        text.contains("report: ") && text.contains("autor/report.html"),
        "{text}"
    );

    // Where it is started, unless --out says else.
    let mut command = program();
    command
        .current_dir(root)
        .args(["report", "autor", "lavender"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    let line = |name: &str| {
        text.lines()
            .find(|line| line.starts_with(name))
            .unwrap_or_default()
    };
    let cells = |name: &str| {
        line(name)
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(cells(" "), ["autor", "lavender"]);
    assert_eq!(cells("loss "), ["loss", "2", "7"]);
    assert_eq!(cells("loss.lambda"), ["loss.lambda", "0.0", "5.0"]);
    assert_eq!(line("report: "), "report: comparison.html");
    let page = fs::read_to_string(root.join("comparison.html")).unwrap();
    assert!(page.contains("<h1>2 runs compared</h1>"), "{page}");

    let out = path("deep/all.html");
    let output = run(&["report", &path("autor"), &path("lavender"), "--out", &out]);
    assert!(output.status.success(), "{}", stderr(&output));
    let title = "<title>2 runs compared</title>";
    assert!(fs::read_to_string(&out).unwrap().contains(title));
}

#[test]
fn what_is_no_run_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    refused_with(
        &["report", path],
        &[path, "not a run directory", "config.toml"],
    );
    refused_with(&["report", "no/such/run"], &["no/such/run"]);
    assert_eq!(run(&["report"]).status.code(), Some(2));
}
