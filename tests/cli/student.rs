//! `ask`, `attention` and `train` with a vision-language model.

use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

use crate::support::{refused_with, run, stderr, stdout};

fn reference(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
    root.join(path).to_str().unwrap().to_owned()
}

fn case() -> Value {
    let text = fs::read_to_string(reference("smolvlm/a/expected.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["cases"][0].clone()
}

fn f32s(bytes: &[u8], name: &str) -> Vec<f32> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data())
}

fn u32s(bytes: &[u8], name: &str) -> Vec<u32> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    bytemuck::pod_collect_to_vec(file.tensor(name).unwrap().data())
}

/// Largest difference over the largest expected value.
fn relative(actual: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    let most = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let pairs = actual.iter().zip(expected);
    pairs.fold(0.0f32, |m, (a, e)| m.max((a - e).abs())) / most
}

#[test]
fn ask_writes_the_logits_and_tokens_of_transformers() {
    let (dir, case) = (tempfile::tempdir().unwrap(), case());
    let file = dir.path().join("logits.safetensors");
    let output = run(&[
        "ask",
        "--model",
        &reference("smolvlm/a"),
        "--image",
        &reference("mllama/images/wide.png"),
        case["question"].as_str().unwrap(),
        "--max-tokens",
        "12",
        "--logits",
        file.to_str().unwrap(),
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let bytes = fs::read(&file).unwrap();
    let list = |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone()).unwrap();
    assert_eq!(u32s(&bytes, "tokens"), list("prompt_tokens"));
    assert_eq!(u32s(&bytes, "generated"), list("generated"));
    let logits = f32s(&bytes, "logits");
    let expected = fs::read(reference("smolvlm/a/expected.safetensors")).unwrap();
    // The fixture keeps the last rows only.
    let expected = f32s(&expected, "wide.logits");
    let tail = &logits[logits.len() - expected.len()..];
    assert!(
        relative(tail, &expected) < 1e-4,
        "{}",
        relative(tail, &expected)
    );
}

#[test]
fn attention_writes_the_maps_of_transformers() {
    let (dir, case) = (tempfile::tempdir().unwrap(), case());
    let (file, pictures) = (dir.path().join("maps.safetensors"), dir.path().join("png"));
    let text = format!(" {}", case["answer"].as_str().unwrap());
    let output = run(&[
        "attention",
        "--model",
        &reference("smolvlm/a"),
        "--image",
        &reference("mllama/images/wide.png"),
        "--prompt",
        case["question"].as_str().unwrap(),
        "--text",
        &text,
        "--out",
        file.to_str().unwrap(),
        "--png",
        pictures.to_str().unwrap(),
        "--per-head",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let bytes = fs::read(&file).unwrap();
    let expected = fs::read(reference("smolvlm/a/expected.safetensors")).unwrap();
    let error = relative(&f32s(&bytes, "raw"), &f32s(&expected, "wide.mean"));
    assert!(error < 1e-4, "{error}");
    let words = case["words"].as_array().unwrap().len();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("maps").unwrap().shape(), [words, 32, 32]);
    assert_eq!(file.tensor("probs").unwrap().shape(), [3, 4, words, 32, 32]);
    assert_eq!(fs::read_dir(pictures).unwrap().count(), words);
}

/// A run on the fixture's four samples without targets.
fn config(dir: &Path, more: &str) -> PathBuf {
    let path = dir.join("config.toml");
    let text = format!(
        "[model]\npath = '{}'\n[data]\npath = '{}'\nimages = '{}'\nshuffle = false\n\
         [train]\nbatch = 2\nsteps = 3\n{more}",
        reference("smolvlm/a"),
        reference("train_smolvlm/data.jsonl"),
        reference("mllama/images"),
    );
    fs::write(&path, text).unwrap();
    path
}

#[test]
fn train_writes_a_run_that_ask_and_resume_read() {
    let dir = tempfile::tempdir().unwrap();
    let (config, root) = (config(dir.path(), ""), dir.path().join("run"));
    let set = format!("run.dir={}", root.display());
    let output = run(&["train", config.to_str().unwrap(), "--set", &set]);
    assert!(output.status.success(), "{}", stderr(&output));
    let metrics = fs::read_to_string(root.join("metrics.jsonl")).unwrap();
    assert_eq!(metrics.lines().count(), 3);
    for file in [
        "config.toml",
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
        "aligner.safetensors",
        "checkpoints/step-3/state.json",
        "run.json",
    ] {
        assert!(root.join(file).is_file(), "{file}");
    }
    let page = fs::read_to_string(root.join("report.html")).unwrap();
    assert!(
        page.contains("finished") && page.contains("3 of 3"),
        "{page}"
    );
    let output = run(&["train", "--resume", root.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(
        fs::read_to_string(root.join("metrics.jsonl")).unwrap(),
        metrics
    );
    let output = run(&[
        "ask",
        "--model",
        &reference("smolvlm/a"),
        "--lora",
        root.to_str().unwrap(),
        "--image",
        &reference("mllama/images/tiny.png"),
        "What is there?",
        "--max-tokens",
        "2",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stdout(&output).is_empty());
}

#[test]
fn a_loss_that_is_not_finite_names_step_and_op_and_keeps_the_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("run");
    // One step, and the scores are sums of 1e30 · 1e30.
    let config = config(
        dir.path(),
        "checkpoint_every = 1\n[optimizer]\nlr = 1e30\n[lora]\ntarget_modules = ['q_proj', 'k_proj']\n",
    );
    let set = format!("run.dir={}", root.display());
    refused_with(
        &["train", config.to_str().unwrap(), "--set", &set],
        &[
            "step 1: the loss (NaN), first attention",
            "not finite",
            "--resume",
        ],
    );
    assert!(root.join("checkpoints/step-1/state.json").is_file());
}

#[test]
fn a_loss_that_is_not_a_number_names_the_op_that_made_it() {
    let dir = tempfile::tempdir().unwrap();
    let (lora, root) = (dir.path().join("lora"), dir.path().join("run"));
    fs::create_dir(&lora).unwrap();
    let init = reference("train_smolvlm/init");
    let source = Path::new(&init);
    let config_file = "adapter_config.json";
    fs::copy(source.join(config_file), lora.join(config_file)).unwrap();
    // The first weight of the file becomes a NaN.
    let mut bytes = fs::read(source.join("adapter_model.safetensors")).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..12 + header].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(lora.join("adapter_model.safetensors"), bytes).unwrap();
    let config = config(
        dir.path(),
        &format!("[init]\nlora = '{}'\n", lora.display()),
    );
    let set = format!("run.dir={}", root.display());
    refused_with(
        &["train", config.to_str().unwrap(), "--set", &set],
        &[
            "step 0: the loss (NaN), first low_rank",
            "not finite",
            "optimizer.lr",
        ],
    );
}

#[test]
fn a_gradient_that_is_not_finite_is_named_where_the_loss_is() {
    let dir = tempfile::tempdir().unwrap();
    let (lora, root) = (dir.path().join("lora"), dir.path().join("run"));
    fs::create_dir(&lora).unwrap();
    let init = reference("train_smolvlm/init");
    let source = Path::new(&init);
    let config_file = "adapter_config.json";
    fs::copy(source.join(config_file), lora.join(config_file)).unwrap();
    // With A = 0 the model is what it was, however large B is; A's gradient is as large as B.
    let file = fs::read(source.join("adapter_model.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&file).unwrap();
    let poisoned: Vec<(String, Vec<u8>, Vec<usize>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let value: f32 = if name.contains("lora_B") { 3e38 } else { 0.0 };
            let bytes = value.to_le_bytes().repeat(tensor.shape().iter().product());
            (name.to_string(), bytes, tensor.shape().to_vec())
        })
        .collect();
    let views = poisoned.iter().map(|(name, bytes, shape)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name.clone(), view.unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::write(lora.join("adapter_model.safetensors"), bytes).unwrap();
    let config = config(
        dir.path(),
        &format!("[init]\nlora = '{}'\n", lora.display()),
    );
    let set = format!("run.dir={}", root.display());
    refused_with(
        &["train", config.to_str().unwrap(), "--set", &set],
        &[
            "step 0: the gradient norm (",
            "first the backward of ",
            "not finite",
        ],
    );
}

#[test]
fn an_adapter_out_of_memory_says_so_and_leaves_no_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("run");
    let config = config(dir.path(), "");
    let set = format!("run.dir={}", root.display());
    refused_with(
        &[
            "train",
            config.to_str().unwrap(),
            "--set",
            &set,
            "--memory-limit",
            "1",
        ],
        &["out of GPU memory", "1048576"],
    );
    assert!(!root.join("checkpoints").exists());
    assert!(!root.join("lora").exists());
}

#[test]
fn a_profile_names_kernels_with_their_time() {
    let model = reference("smolvlm/a");
    let image = reference("mllama/images/tiny.png");
    let output = run(&[
        "ask",
        "--model",
        &model,
        "--image",
        &image,
        "Hello",
        "--max-tokens",
        "1",
        "--profile",
    ]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stderr(&output);
    // An adapter without timestamps says so instead.
    assert!(
        text.contains(" ms ") && text.contains("matmul") || text.contains("no timestamps"),
        "{text}"
    );
}

#[test]
fn what_cannot_be_trained_or_asked_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let set = format!("run.dir={}", dir.path().join("run").display());
    let path = config(dir.path(), "[lora]\ntarget_modules = [\"no_such_layer\"]\n");
    refused_with(
        &["train", path.to_str().unwrap(), "--set", &set],
        &["lora.target_modules", "no_such_layer"],
    );
    let image = reference("mllama/images/wide.png");
    let model = reference("smolvlm/a");
    refused_with(
        &[
            "attention",
            "--model",
            &model,
            "--image",
            &image,
            "--text",
            "…!",
            "--out",
            "x",
        ],
        &["--text", "no word"],
    );
    refused_with(
        &[
            "attention",
            "--model",
            &model,
            "--image",
            &image,
            "--text",
            "a",
            "--out",
            "x",
            "--aggregate",
            "learned",
        ],
        &["learned", "--lora"],
    );
    refused_with(
        &[
            "ask",
            "--model",
            &model,
            "--image",
            &image,
            &"word ".repeat(9000),
        ],
        &["tokens", "context"],
    );
    refused_with(
        &[
            "ask",
            "--model",
            &reference("nowhere"),
            "--image",
            &image,
            "Hello",
        ],
        &["nowhere"],
    );
}

#[test]
fn a_run_tells_how_its_base_is_held() {
    let (dir, case) = (tempfile::tempdir().unwrap(), case());
    let root = dir.path();
    fs::write(root.join("config.toml"), "[model]\nquantize = \"q4\"\n").unwrap();
    fs::write(root.join("metrics.jsonl"), "").unwrap();
    let lora = root.join("lora");
    fs::create_dir(&lora).unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let from = reference(&format!("train_smolvlm/init/{file}"));
        fs::copy(from, lora.join(file)).unwrap();
    }
    let logits = |lora: &Path, more: &[&str]| {
        let file = root.join("logits.safetensors");
        let (model, image) = (reference("smolvlm/a"), reference("mllama/images/wide.png"));
        let question = case["question"].as_str().unwrap();
        let mut args = vec!["ask", "--model", &model, "--image", &image, question];
        args.extend(["--lora", lora.to_str().unwrap(), "--max-tokens", "0"]);
        args.extend(["--logits", file.to_str().unwrap()]);
        args.extend(more);
        let output = run(&args);
        assert!(output.status.success(), "{}", stderr(&output));
        f32s(&fs::read(&file).unwrap(), "logits")
    };
    let found = logits(root, &[]);
    assert_eq!(found, logits(&lora, &["--quantize", "q4"]));
    assert!(relative(&logits(&lora, &["--quantize", "none"]), &found) > 1e-2);
}
