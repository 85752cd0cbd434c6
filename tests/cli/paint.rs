//! `generate`, and the pictures of `attention` on a diffusion model.

use std::path::{Path, PathBuf};

use crate::support::{refused_with, run, stderr, stdout};

fn reference(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference/teacher")
        .join(path)
}

#[test]
fn pictures_are_painted_by_seed() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (reference("a"), dir.path().join("x.png"));
    let arguments = |seed: &'static str, more: &[&'static str]| -> Vec<String> {
        let mut list = vec!["generate", "a red circle", "--steps", "3", "--seed", seed];
        list.extend(more);
        let mut list: Vec<String> = list.into_iter().map(str::to_owned).collect();
        list.extend(["--diffusion".to_owned(), model.display().to_string()]);
        list.extend(["--out".to_owned(), out.display().to_string()]);
        list
    };
    let paint = |seed, more: &[&'static str]| {
        let arguments = arguments(seed, more);
        let output = run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    };
    let bytes = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    paint("5", &[]);
    let alone = bytes("x.png");
    let side = image::load_from_memory(&alone).unwrap();
    // sample_size 16, a VAE of two levels.
    assert_eq!((side.width(), side.height()), (32, 32));
    let printed = paint("4", &["--count", "2"]);
    assert!(
        printed.contains("x-4.png") && printed.contains("x-5.png"),
        "{printed}"
    );
    assert_eq!(bytes("x-5.png"), alone, "a seed's picture is its own");
    assert_ne!(bytes("x-4.png"), alone);
    paint("5", &["--sampler", "ddim"]);
    assert_ne!(bytes("x.png"), alone, "another sampler goes another way");
    paint("5", &["--negative", "a blue square"]);
    assert_ne!(bytes("x.png"), alone);
}

#[test]
fn wrong_options_of_generate_are_refused() {
    let model = reference("a").display().to_string();
    let with = |more: &[&str], parts: &[&str]| {
        let mut arguments = vec!["generate", "a circle", "--diffusion", &model];
        arguments.extend(more);
        refused_with(&arguments, parts);
    };
    with(&["--steps", "0"], &["--steps", "found 0", "1 to 1000"]);
    with(&["--guidance", "nan"], &["--guidance"]);
    let output = run(&["generate", "x", "--diffusion", &model, "--sampler", "euler"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("expected ddim or pndm"));
}

#[test]
fn attention_draws_a_sheet_and_a_preview() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (model, image) = (
        reference("a").display().to_string(),
        reference("image.png").display().to_string(),
    );
    let (out, sheet, preview) = (
        path("m.safetensors"),
        path("sheet.png"),
        path("preview.png"),
    );
    let base = [
        "attention",
        "--model",
        &model,
        "--image",
        &image,
        "--text",
        "a red circle",
        "--out",
        &out,
        "--steps",
        "2",
        "--sheet",
        &sheet,
    ];
    let mut arguments = base.to_vec();
    arguments.extend([
        "--mode",
        "null-text",
        "--layers",
        "daam",
        "--preview",
        &preview,
    ]);
    let output = run(&arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    let width = |file: String| image::open(file).unwrap().width();
    // Four cells beside each other: the image and three words; the image and three reconstructions.
    assert_eq!(width(sheet.clone()), width(preview.clone()));
    let bytes = std::fs::read(&out).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().clone().unwrap()["mode"], "null-text");
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("null_text").unwrap().shape(), [1, 2, 77, 32]);
    assert_eq!(
        file.tensor("reconstructed").unwrap().shape(),
        [1, 4, 16, 16]
    );
    let with = |more: &[&str], parts: &[&str]| {
        let mut arguments = base.to_vec();
        arguments.extend(more);
        refused_with(&arguments, parts);
    };
    with(
        &["--mode", "noised", "--preview", &preview],
        &["--preview", "ddim"],
    );
    with(&["--layers", "all"], &["16+32", "daam"]);
}

#[test]
fn targets_take_layers_and_leave_previews() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    std::fs::copy(reference("image.png"), path("image.png")).unwrap();
    let sample = |id: &str, text: &str| {
        serde_json::json!({"id": id, "image": "image.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": text}]})
    };
    let samples = [
        sample("one", "a red circle"),
        sample("two/2", "a blue square"),
    ];
    std::fs::write(path("data.json"), serde_json::json!(samples).to_string()).unwrap();
    let (model, data, out) = (
        reference("a").display().to_string(),
        path("data.json"),
        path("out"),
    );
    let base = [
        "targets",
        "--diffusion",
        &model,
        "--data",
        &data,
        "--out",
        &out,
        "--steps",
        "2",
        "--preview",
    ];
    let mut arguments = base.to_vec();
    arguments.extend(["1", "--mode", "null-text", "--layers", "daam"]);
    let output = run(&arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    let previews: Vec<String> = std::fs::read_dir(path("out/preview"))
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(previews, ["one.png"]);
    let index = std::fs::read_to_string(path("out/maps-0of1-00000.jsonl")).unwrap();
    let line: serde_json::Value = serde_json::from_str(index.lines().next().unwrap()).unwrap();
    assert_eq!(
        (&line["layers"], &line["mode"]),
        (&"daam".into(), &"null-text".into())
    );
    let mut arguments = base.to_vec();
    arguments.extend(["--mode", "noised"]);
    refused_with(&arguments, &["--preview", "noised", "ddim"]);
}
