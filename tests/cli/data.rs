//! `data check` on a small set with planted faults. No adapter of the name given exists, so nothing may open one.

use std::path::{Path, PathBuf};

use lavender_wgpu::align::store::{Layout, MapType, Provenance, SIDE, TargetOptions, TargetWriter};
use lavender_wgpu::align::words::{Case, Word};
use serde_json::{Value, json};

use crate::support::{refused, refused_with, run, stderr, stdout};

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference")
        .join(name)
}

/// Targets of `a` (red, cat) and of `b` (dog, a map of zeros).
fn store(into: &Path) {
    let options = TargetOptions {
        teacher_hash: "none".into(),
        mode: "ddim".into(),
        steps: 1,
        layers: "16+32".into(),
        seed: 0,
        case: Case::Lower,
        maps: MapType::U8,
        precision: "f32".into(),
    };
    let provenance = Provenance {
        teacher: "none".into(),
        adapter: "none".into(),
        driver: "none".into(),
        version: "0".into(),
    };
    let mut writer =
        TargetWriter::create(into, Layout::Shards, options, provenance, (0, 1)).unwrap();
    for (id, words, value) in [("a", &["red", "cat"][..], 1.0), ("b", &["dog"], 0.0)] {
        let spans = Vec::new;
        let maps = vec![value; words.len() * SIDE * SIDE];
        let words: Vec<Word> = words
            .iter()
            .map(|w| Word {
                text: (*w).to_owned(),
                spans: spans(),
            })
            .collect();
        writer.put(id, None, "", &words, &maps).unwrap();
    }
    writer.finish().unwrap();
}

fn turn(from: &str, value: &str) -> Value {
    json!({"from": from, "value": value})
}

fn sample(id: &str, image: &str, answer: &str) -> Value {
    json!({"id": id, "image": image, "conversations": [turn("human", "What is it?"), turn("gpt", answer)]})
}

/// Writes the set, with its faults or without, and gives the arguments that check it.
fn prepare(dir: &Path, faults: bool) -> Vec<String> {
    for name in ["wide", "square"] {
        let image = std::fs::read(reference(&format!("mllama/images/{name}.png"))).unwrap();
        std::fs::write(dir.join(format!("{name}.png")), &image).unwrap();
        std::fs::write(dir.join("cut.png"), &image[..image.len() / 2]).unwrap();
    }
    let mut samples = vec![
        sample("a", "wide.png", "A red cat."),
        sample("b", "square.png", "a dog"),
        json!({"id": "c", "image": "square.png", "conversations": [
            turn("human", "What?"), turn("gpt", "a dog"), turn("human", "Where?"), turn("gpt", "left")]}),
        sample("d", "square.png", "a dog"),
    ];
    if faults {
        samples.push(sample("e", "missing.png", "a dog"));
        samples.push(sample("f", "cut.png", "a dog"));
        samples.push(sample("g", "square.png", &"word ".repeat(600)));
    }
    let data = dir.join("data.json");
    std::fs::write(&data, Value::Array(samples).to_string()).unwrap();
    if !dir.join("targets").exists() {
        store(&dir.join("targets"));
    }
    let path = |name: &str| dir.join(name).display().to_string();
    let model = reference("smolvlm/a").display().to_string();
    [
        "data",
        "check",
        "--adapter",
        "no-such-adapter",
        "--data",
        &path("data.json"),
        "--model",
        &model,
        "--targets",
        &path("targets"),
        "--json",
        &path("report.json"),
    ]
    .map(str::to_owned)
    .to_vec()
}

fn check(args: &[String]) -> std::process::Output {
    run(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn planted_faults_are_found_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let args = prepare(dir.path(), true);
    let output = check(&args);
    let error = refused(&output);
    for part in [
        "2 missing or unreadable images",
        "1 samples longer than the context",
    ] {
        assert!(error.contains(part), "{error}");
    }
    let text = std::fs::read_to_string(dir.path().join("report.json")).unwrap();
    let report: Value = serde_json::from_str(&text).unwrap();
    let ids = |field: &str| -> Vec<&str> {
        let list = report[field].as_array().unwrap();
        list.iter()
            .map(|f| f["id"].as_str().or(f.as_str()).unwrap())
            .collect()
    };
    assert_eq!(ids("bad_images"), ["e", "f"]);
    assert_eq!(ids("too_long"), ["g"]);
    assert_eq!(ids("without_targets"), ["c", "d", "e", "f", "g"]);
    assert_eq!(report["duplicates"], json!([["b", "d"]]));
    assert_eq!(report["answers"], json!({"1": 6, "2": 1}));
    assert_eq!(report["context"], 512);
    // Of a: a, red, cat; of b: a, dog, whose map is empty.
    assert_eq!(
        (&report["words"], &report["matched_words"]),
        (&json!(5), &json!(2))
    );
    assert_eq!(report["unmatched"], json!([["a", 2], ["dog", 1]]));
    let size = |name: &str| image::image_dimensions(dir.path().join(name)).unwrap();
    let (wide, square) = (size("wide.png"), size("square.png"));
    assert_eq!(report["image_width"]["max"], wide.0.max(square.0));
    assert_eq!(report["image_width"]["median"], square.0);
    assert!(report["tokens"]["max"].as_u64().unwrap() > 512);
    assert!(report["answer_tokens"]["min"].as_u64().unwrap() >= 2);

    let table = stdout(&output);
    for part in [
        "`e`: ",
        "missing.png",
        "`f`: ",
        "cut.png",
        "40.0 % matched",
        "a (2), dog (1)",
        "b = d",
    ] {
        assert!(table.contains(part), "{part} is not in\n{table}");
    }
}

#[test]
fn a_good_set_passes_and_the_embedded_one_too() {
    let dir = tempfile::tempdir().unwrap();
    let output = check(&prepare(dir.path(), false));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("4 samples"), "{}", stdout(&output));
    let config = dir.path().join("run.toml");
    std::fs::write(&config, "[train]\nsteps = 3\n").unwrap();
    let output = run(&[
        "data",
        "check",
        "--adapter",
        "no-such-adapter",
        config.to_str().unwrap(),
    ]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(
        stdout(&output).contains("288 samples"),
        "{}",
        stdout(&output)
    );
}

#[test]
fn what_cannot_be_checked_is_named() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path(), false);
    let data = dir.path().join("data.json").display().to_string();
    let nowhere = dir.path().join("nowhere").display().to_string();
    refused_with(&["data", "check", "--data", &nowhere], &["nowhere"]);
    refused_with(
        &["data", "check", "--data", &data, "--model", &nowhere],
        &["nowhere", "config.json"],
    );
    refused_with(
        &["data", "check", "--data", &data, "--targets", &nowhere],
        &["nowhere"],
    );
    // A store made for another data set.
    let other = dir.path().join("other.json");
    std::fs::write(
        &other,
        json!([sample("z", "square.png", "a dog")]).to_string(),
    )
    .unwrap();
    let targets = dir.path().join("targets").display().to_string();
    refused_with(
        &[
            "data",
            "check",
            "--data",
            other.to_str().unwrap(),
            "--targets",
            &targets,
        ],
        &["no sample of", "other.json", "has a target"],
    );
    let usage = run(&["data", "check"]);
    assert_eq!(usage.status.code(), Some(2));
}

#[test]
fn a_longest_length_cuts_samples_but_not_their_pictures() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path(), false);
    let long = sample("long", "square.png", &"word ".repeat(600));
    let samples = json!([sample("short", "square.png", "a dog"), long]);
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(path("data.json"), samples.to_string()).unwrap();
    let config = format!(
        "[model]\npath = {:?}\n[data]\npath = {:?}\n",
        reference("smolvlm/a"),
        path("data.json")
    );
    std::fs::write(path("run.toml"), config).unwrap();
    let check = |tokens: &str| {
        let set = format!("data.max_tokens={tokens}");
        let args = ["data", "check", &path("run.toml"), "--set", &set];
        let output = run(&[&args[..], &["--json", &path("report.json")]].concat());
        let report = std::fs::read_to_string(path("report.json")).unwrap();
        let report: Value = serde_json::from_str(&report).unwrap();
        (output, report)
    };
    let (output, report) = check("400");
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("cut                1: long"));
    assert_eq!(report["cut"], json!(["long"]));
    assert_eq!(report["tokens"]["max"], 400);
    let (output, report) = check("9");
    assert!(refused(&output).contains("longer than the context"));
    let message = report["too_long"][0]["message"].as_str().unwrap();
    assert!(message.contains("hold its pictures"), "{message}");
}
