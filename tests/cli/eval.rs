//! `eval` and `eval compare` as a user starts them.

use std::fs;
use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

use crate::support::{refused_with, run, stderr, stdout};

fn reference(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
    root.join(path).to_str().unwrap().to_owned()
}

/// Runs `eval` with the mini student; gives what it printed.
fn eval(args: &[&str]) -> (String, String) {
    let mut all = vec!["eval", "--model", "mini"];
    all.extend(args);
    let output = run(&all);
    assert!(output.status.success(), "{}", stderr(&output));
    (stdout(&output), stderr(&output))
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn an_evaluation_goes_on_after_a_crash_and_repeats_its_figures() {
    let dir = tempfile::tempdir().unwrap();
    let (out, copy) = (dir.path().join("out"), dir.path().join("copy.json"));
    let (path, copied) = (out.to_str().unwrap(), copy.to_str().unwrap());
    let args = [
        "--data", "mini", "--limit", "12", "--out", path, "--json", copied,
    ];
    let (table, told) = eval(&args);
    assert!(
        table.starts_with("| vqa (12 samples)") && table.contains("| exact "),
        "{table}"
    );
    assert!(
        told.contains("benchmark vqa: most answers are short"),
        "{told}"
    );
    let figures = fs::read(out.join("figures.json")).unwrap();
    assert_eq!(fs::read(&copy).unwrap(), figures);
    let lines = fs::read_to_string(out.join("predictions.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 12);
    // Five lines and a half, as a crash leaves them.
    let kept: usize = lines.lines().take(5).map(|line| line.len() + 1).sum();
    fs::write(out.join("predictions.jsonl"), &lines[..kept + 20]).unwrap();
    let (again, _) = eval(&args);
    assert_eq!(again, table);
    assert_eq!(
        fs::read_to_string(out.join("predictions.jsonl")).unwrap(),
        lines
    );
    assert_eq!(fs::read(out.join("figures.json")).unwrap(), figures);
    // Other settings are another evaluation.
    refused_with(
        &[
            "eval", "--model", "mini", "--data", "mini", "--limit", "11", "--out", path,
        ],
        &["settings.json", "limit", "12", "11"],
    );
}

#[test]
fn vlmevalkit_s_tsv_is_measured_by_category_and_bad_rows_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("bench.tsv");
    let image = STANDARD.encode(fs::read(reference("mllama/images/wide.png")).unwrap());
    let text = format!(
        "index\tquestion\tA\tB\tanswer\tcategory\timage\timage_path\n\
         1\tWhat?\tred\tblue\tA\tcolour\t{image}\t\n\
         2\tWhich?\tone\ttwo\tB\tcount\t1\t\n\
         3\tWhere?\tup\tdown\tA\tcount\t\tnowhere.png\n\
         4\tHow?\tup\tdown\t\tcount\t1\t\n"
    );
    fs::write(&data, text).unwrap();
    let out = dir.path().join("out");
    let args = [
        "--data",
        data.to_str().unwrap(),
        "--max-tokens",
        "4",
        "--out",
        out.to_str().unwrap(),
    ];
    let (table, told) = eval(&args);
    assert!(table.contains("multiple-choice (2 samples)"), "{table}");
    for part in [
        "accuracy",
        "unparsed",
        "accuracy: colour (1)",
        "accuracy: count (1)",
    ] {
        assert!(table.contains(part), "{table}");
    }
    for part in [
        "2 samples cannot be used",
        "`3`: ",
        "nowhere.png",
        "`4`: no answer",
    ] {
        assert!(told.contains(part), "`{told}` lacks `{part}`");
    }
    let figures = json(&out.join("figures.json"));
    assert_eq!(figures["skipped"].as_array().unwrap().len(), 2);
    assert_eq!(figures["categories"]["count"]["samples"], 1);
    assert_eq!(figures["benchmark"], "multiple-choice");
    let line = fs::read_to_string(out.join("predictions.jsonl")).unwrap();
    let line: Value = serde_json::from_str(line.lines().next().unwrap()).unwrap();
    assert_eq!(
        (&line["index"], &line["A"]),
        (&Value::from("1"), &Value::from("red"))
    );
}

#[test]
fn evaluations_of_several_seeds_become_one_table() {
    let dir = tempfile::tempdir().unwrap();
    let mut runs = Vec::new();
    // The same figures under two labels: the differences are zero.
    for label in ["lambda=0", "lambda=10"] {
        let file = dir.path().join(format!("{label}.json"));
        let file = file.to_str().unwrap().to_owned();
        let args = [
            "--data",
            "mini",
            "--benchmark",
            "attention",
            "--limit",
            "3",
            "--label",
            label,
        ];
        let mut args = args.to_vec();
        args.extend(["--json", &file]);
        eval(&args);
        let mut report = json(Path::new(&file));
        for seed in 0..2 {
            report["seed"] = seed.into();
            let path = dir.path().join(format!("{label}-{seed}.json"));
            fs::write(&path, report.to_string()).unwrap();
            runs.push(path.to_str().unwrap().to_owned());
        }
    }
    let out = dir.path().join("table.json");
    let mut args = vec!["eval", "compare", "--json", out.to_str().unwrap()];
    args.extend(runs.iter().map(String::as_str));
    let output = run(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let table = stdout(&output);
    for part in [
        "attention (3 samples)",
        "entropy",
        "pointing",
        "− lambda=0",
        "+0.000 ± 0.000",
    ] {
        assert!(table.contains(part), "{table}");
    }
    let comparison = json(&out);
    assert_eq!(comparison["baseline"], "lambda=0");
    assert_eq!(comparison["rows"][1]["seeds"], serde_json::json!([0, 1]));
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.json");
    let sample = "{\"id\": \"x\", \"image\": \"gone.png\", \"conversations\": [\
                  {\"from\": \"human\", \"value\": \"What?\"}, {\"from\": \"gpt\", \"value\": \"red\"}]}";
    fs::write(&data, format!("[{sample}]")).unwrap();
    let path = data.to_str().unwrap();
    let refused = |more: &[&str], parts: &[&str]| {
        let mut args = vec!["eval", "--model", "mini", "--data"];
        args.extend(more);
        refused_with(&args, parts);
    };
    refused(&[path], &["data.json", "none of its 1 samples", "gone.png"]);
    refused(
        &[path, "--benchmark", "yes-no"],
        &["`red` is neither yes nor no"],
    );
    refused(&[path, "--limit", "0"], &["--limit", "at least 1"]);
    refused(&["nowhere.tsv"], &["nowhere.tsv"]);
    let masks = dir.path().to_str().unwrap();
    refused(
        &[path, "--benchmark", "attention", "--masks", masks],
        &["x/<word>.png"],
    );
    refused_with(&["eval", "compare", masks], &["figures.json"]);
    let output = run(&[
        "eval",
        "--model",
        "mini",
        "--data",
        "mini",
        "--benchmark",
        "vga",
    ]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("'vqa'"), "{}", stderr(&output));
    assert_eq!(run(&["eval", "--data", "mini"]).status.code(), Some(2));
}
