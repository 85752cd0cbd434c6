//! `targets` and `attention` with a diffusion model, and the checkpoints that they refuse.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

use crate::support::{refused, refused_with, run, stderr};

fn reference(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference/teacher")
        .join(path)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A copy of checkpoint `a` to spoil.
fn copy_of_a(to: &Path) -> PathBuf {
    let root = to.join("sd");
    for part in ["", "scheduler", "text_encoder", "tokenizer", "unet", "vae"] {
        fs::create_dir_all(root.join(part)).unwrap();
        for entry in fs::read_dir(reference("a").join(part)).unwrap().flatten() {
            if entry.path().is_file() {
                fs::copy(entry.path(), root.join(part).join(entry.file_name())).unwrap();
            }
        }
    }
    root
}

/// Sets a field of a JSON file.
fn set(path: &Path, field: &str, value: Value) {
    let mut json: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    json[field] = value;
    fs::write(path, json.to_string()).unwrap();
}

fn f32s(file: &SafeTensors, name: &str) -> (Vec<f32>, Vec<usize>) {
    let tensor = file.tensor(name).unwrap();
    let values = tensor
        .data()
        .chunks(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect();
    (values, tensor.shape().to_vec())
}

/// A data set of `captions` on the reference image.
fn data_set(dir: &Path, captions: &[&str]) -> PathBuf {
    fs::copy(reference("image.png"), dir.join("image.png")).unwrap();
    let entries: Vec<Value> = captions
        .iter()
        .enumerate()
        .map(|(i, caption)| {
            serde_json::json!({"id": format!("sample-{i}"), "image": "image.png", "conversations": [
                {"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": caption}]})
        })
        .collect();
    let path = dir.join("data.json");
    fs::write(&path, Value::Array(entries).to_string()).unwrap();
    path
}

#[test]
fn attention_writes_what_diffusers_computes() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        let expected = fs::read(reference(&format!("expected-{name}.safetensors"))).unwrap();
        let (_, header) = SafeTensors::read_metadata(&expected).unwrap();
        let metadata = header.metadata().clone().unwrap();
        let expected = SafeTensors::deserialize(&expected).unwrap();
        let texts: Vec<String> = serde_json::from_str(&metadata["texts"]).unwrap();
        for (caption, which) in texts.iter().zip(["short", "long"]) {
            let out = dir.path().join("maps.safetensors");
            let png = dir.path().join("pictures");
            let (model, image) = (reference(name), reference("image.png"));
            let output = run(&[
                "attention",
                "--model",
                text(&model),
                "--image",
                text(&image),
                "--text",
                caption,
                "--mode",
                "ddim",
                "--steps",
                "4",
                "--out",
                text(&out),
                "--png",
                text(&png),
                "--quiet",
            ]);
            assert!(output.status.success(), "{}", stderr(&output));
            let picture = image::open(png.join("circle.png")).unwrap();
            // The square in the middle of the 75 × 61 image.
            assert_eq!((picture.width(), picture.height()), (61, 61));
            let bytes = fs::read(&out).unwrap();
            let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
            let found = header.metadata().clone().unwrap();
            assert_eq!(
                found["words"],
                metadata[&format!("{which}.words")].replace("\", \"", "\",\"")
            );
            let file = SafeTensors::deserialize(&bytes).unwrap();
            for (ours, theirs) in [
                ("latents", "latents".to_string()),
                ("text", format!("{which}.text")),
                ("eps0", format!("{which}.eps0")),
                ("raw", format!("{which}.4.raw")),
            ] {
                let ((a, shape), (b, expected_shape)) =
                    (f32s(&file, ours), f32s(&expected, &theirs));
                assert_eq!(shape, expected_shape, "{name} {ours}");
                let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let error = a
                    .iter()
                    .zip(&b)
                    .fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
                assert!(
                    error <= 1e-4 * largest,
                    "{name} {which} {ours}: {error:e} of {largest:e}"
                );
            }
            let (maps, shape) = f32s(&file, "maps");
            assert_eq!(shape[1..], [32, 32]);
            for map in maps.chunks(32 * 32) {
                let low = map.iter().copied().fold(f32::INFINITY, f32::min);
                let high = map.iter().copied().fold(0.0f32, f32::max);
                // (max − min) / (max − min + 1e-6): these maps' range is some 1e-2.
                assert!(low == 0.0 && high > 0.99 && high <= 1.0, "{low} to {high}");
            }
        }
    }
}

#[test]
fn targets_are_written_once_and_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_set(
        dir.path(),
        &[
            "a red circle",
            "a blue square above a circle",
            "two circles",
        ],
    );
    let (out, model) = (dir.path().join("targets"), reference("b"));
    let arguments = |mode: &'static str, shard: &'static str| {
        [
            "targets",
            "--diffusion",
            text(&model),
            "--data",
            text(&data),
            "--out",
            text(&out),
            "--mode",
            mode,
            "--steps",
            "2",
            "--shard",
            shard,
            "--quiet",
        ]
        .map(str::to_owned)
        .to_vec()
    };
    let start = |mode, shard| {
        let arguments = arguments(mode, shard);
        run(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    };
    for part in ["0/2", "1/2", "0/1"] {
        let output = start("noised", part);
        assert!(output.status.success(), "{}", stderr(&output));
    }
    let store = lavender_wgpu::align::store::TargetStore::open(&out).unwrap();
    assert_eq!(store.len(), 3);
    let targets = store.get("sample-1").unwrap().unwrap();
    let words: Vec<&str> = targets.words.iter().map(|w| w.text.as_str()).collect();
    assert_eq!(words, ["a", "blue", "square", "above", "circle"]);
    for (i, word) in words.iter().enumerate() {
        let high = targets.map(i).iter().copied().fold(0.0f32, f32::max);
        assert!((0.9..=1.0).contains(&high), "{word}: {high}");
    }
    let error = refused(&start("ddim", "0/1"));
    assert!(
        error.contains("mode") && error.contains("noised"),
        "{error}"
    );
}

#[test]
fn one_seed_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let data = data_set(dir.path(), &["a red circle", "two circles"]);
    let model = reference("b");
    let shards: Vec<Vec<u8>> = ["first", "second"]
        .iter()
        .map(|name| {
            let out = dir.path().join(name);
            let output = run(&[
                "targets",
                "--diffusion",
                text(&model),
                "--data",
                text(&data),
                "--out",
                text(&out),
                "--mode",
                "noised",
                "--steps",
                "1",
                "--seed",
                "5",
                "--quiet",
            ]);
            assert!(output.status.success(), "{}", stderr(&output));
            let file = fs::read_dir(&out)
                .unwrap()
                .flatten()
                .map(|e| e.path())
                .find(|p| p.extension().is_some_and(|e| e == "safetensors"));
            fs::read(file.unwrap()).unwrap()
        })
        .collect();
    assert_eq!(shards[0], shards[1]);
}

#[test]
fn modes_and_steps_that_are_not_there_are_refused() {
    let (model, image) = (reference("a"), reference("image.png"));
    let with = |mode: &str, steps: &str, parts: &[&str]| {
        let arguments = [
            "attention",
            "--model",
            text(&model),
            "--image",
            text(&image),
            "--text",
            "a circle",
            "--out",
            "unused.safetensors",
            "--mode",
            mode,
            "--steps",
            steps,
        ];
        refused_with(&arguments, parts);
    };
    with("null-text", "0", &["--steps", "found 0", "1 to 1000"]);
    with("ddim", "0", &["--steps", "found 0", "1 to 1000"]);
    with("ddim", "1001", &["--steps", "found 1001"]);
    assert!(!Path::new("unused.safetensors").exists());
}

/// Asserts that `attention` refuses model `model` and text `caption`, naming `parts`, and writes nothing.
fn refuses(model: &Path, caption: &str, parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let (out, image) = (dir.path().join("out.safetensors"), reference("image.png"));
    let arguments = [
        "attention",
        "--model",
        text(model),
        "--image",
        text(&image),
        "--text",
        caption,
        "--out",
        text(&out),
        "--steps",
        "1",
    ];
    refused_with(&arguments, parts);
    assert_eq!(
        fs::read_dir(dir.path()).unwrap().count(),
        0,
        "something was written"
    );
}

#[test]
fn texts_without_a_word_are_refused() {
    for caption in ["", "   ", "?!"] {
        refuses(&reference("a"), caption, &["has no word"]);
    }
}

#[test]
fn models_that_are_not_stable_diffusion_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    refuses(
        &dir.path().join("nowhere"),
        "a circle",
        &["nowhere", "model_index.json"],
    );
    refuses(dir.path(), "a circle", &["no model_index.json", "unet/"]);
    let single = dir.path().join("v1.ckpt");
    fs::write(&single, b"x").unwrap();
    refuses(
        &single,
        "a circle",
        &["v1.ckpt", "from_single_file", "save_pretrained"],
    );
    let model = copy_of_a(dir.path());
    let unet = serde_json::json!(["diffusers", "SD3Transformer2DModel"]);
    set(&model.join("model_index.json"), "unet", unet);
    refuses(
        &model,
        "a circle",
        &[
            "model_index.json",
            "`unet`",
            "SD3Transformer2DModel",
            "UNet2DConditionModel",
        ],
    );
}

#[test]
fn configurations_that_do_not_fit_are_refused_by_field() {
    let dir = tempfile::tempdir().unwrap();
    for (file, field, value, parts) in [
        (
            "unet/config.json",
            "act_fn",
            "mish".into(),
            ["act_fn", "mish", "silu"],
        ),
        (
            "unet/config.json",
            "sample_size",
            15.into(),
            ["sample_size", "15", "multiple of 8"],
        ),
        (
            "unet/config.json",
            "sample_size",
            Value::Null,
            ["sample_size", "missing", "config.json"],
        ),
        (
            "unet/config.json",
            "class_embed_type",
            "timestep".into(),
            ["class_embed_type", "timestep", "not supported"],
        ),
        (
            "unet/config.json",
            "cross_attention_dim",
            48.into(),
            ["cross_attention_dim", "48", "expected 32"],
        ),
        (
            "unet/config.json",
            "norm_num_groups",
            5.into(),
            ["norm_num_groups", "5", "divide"],
        ),
        (
            "unet/config.json",
            "block_out_channels",
            "many".into(),
            ["block_out_channels", "many", "sequence"],
        ),
        (
            "vae/config.json",
            "latent_channels",
            16.into(),
            ["in_channels", "found 4", "expected 16"],
        ),
        (
            "vae/config.json",
            "shift_factor",
            0.1.into(),
            ["shift_factor", "0.1", "not supported"],
        ),
        (
            "text_encoder/config.json",
            "hidden_act",
            "relu".into(),
            ["hidden_act", "relu", "quick_gelu"],
        ),
        (
            "text_encoder/config.json",
            "model_type",
            "t5".into(),
            ["model_type", "t5", "clip_text_model"],
        ),
        (
            "text_encoder/config.json",
            "vocab_size",
            500.into(),
            ["vocab.json", "601", "500"],
        ),
        (
            "scheduler/scheduler_config.json",
            "prediction_type",
            "v_prediction".into(),
            ["prediction_type", "v_prediction", "epsilon"],
        ),
        (
            "scheduler/scheduler_config.json",
            "beta_start",
            0.into(),
            ["beta_start", "found 0", "between"],
        ),
    ] {
        let model = copy_of_a(dir.path());
        set(&model.join(file), field, value);
        refuses(&model, "a circle", &parts);
    }
    let model = copy_of_a(dir.path());
    fs::write(model.join("vae/config.json"), "{").unwrap();
    refuses(&model, "a circle", &["vae/config.json", "not valid JSON"]);
}

#[test]
fn weights_that_are_missing_pickled_or_misshapen_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let weights = "unet/diffusion_pytorch_model";
    let model = copy_of_a(dir.path());
    set(
        &model.join("unet/config.json"),
        "layers_per_block",
        2.into(),
    );
    refuses(&model, "a circle", &["unet", "missing"]);
    let model = copy_of_a(dir.path());
    set(
        &model.join("unet/config.json"),
        "block_out_channels",
        serde_json::json!([16, 16, 32, 64]),
    );
    refuses(&model, "a circle", &["unet", "tensor", "[64", "expected"]);
    let model = copy_of_a(dir.path());
    let file = model.join(format!("{weights}.safetensors"));
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    refuses(
        &model,
        "a circle",
        &[
            "diffusion_pytorch_model.safetensors",
            "not a whole safetensors",
        ],
    );
    fs::rename(&file, model.join(format!("{weights}.bin"))).unwrap();
    refuses(
        &model,
        "a circle",
        &["diffusion_pytorch_model.bin", "pickled", "save_pretrained"],
    );
    let model = copy_of_a(dir.path());
    fs::remove_file(model.join("tokenizer/merges.txt")).unwrap();
    refuses(&model, "a circle", &["merges.txt"]);
}
