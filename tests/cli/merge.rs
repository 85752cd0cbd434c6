//! `merge` as a user starts it.

use std::fs;
use std::path::Path;

use crate::support::{refused_with, run, stderr, stdout};

fn reference(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
    root.join(path).to_str().unwrap().to_owned()
}

#[test]
fn merge_writes_a_model_that_ask_reads() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("merged");
    let out = out.to_str().unwrap();
    let (base, lora) = (reference("smolvlm/a"), reference("merge/smolvlm-rslora"));
    let output = run(&["merge", "--model", &base, "--lora", &lora, "--out", out]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stdout(&output).starts_with("13 modules merged; "),
        "{}",
        stdout(&output)
    );
    let image = reference("mllama/images/wide.png");
    let ask = |model: &[&str]| {
        let mut args = vec![
            "ask",
            "Describe it.",
            "--image",
            &image,
            "--max-tokens",
            "8",
        ];
        args.extend(model);
        let output = run(&args);
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    };
    let merged = ask(&["--model", out]);
    assert_eq!(merged, ask(&["--model", &base, "--lora", &lora]));
    assert_ne!(merged, ask(&["--model", &base]));
    // A second time, the directory is not empty.
    refused_with(
        &["merge", "--model", &base, "--lora", &lora, "--out", out],
        &[out, "not empty"],
    );
}

#[test]
fn what_cannot_be_merged_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (out, lora) = (dir.path().join("merged"), dir.path().join("lora"));
    let (to, from) = (out.to_str().unwrap(), lora.to_str().unwrap());
    let base = reference("smolvlm/a");
    let merge = |model: &str, lora: &str, parts: &[&str]| {
        refused_with(
            &["merge", "--model", model, "--lora", lora, "--out", to],
            parts,
        );
        assert!(!out.exists());
    };
    let adapter = reference("merge/smolvlm-rslora");
    merge("mini", &adapter, &["lora_A.weight", "in this base"]);
    merge(&reference("nowhere"), &adapter, &["nowhere"]);
    merge(&base, &reference("nowhere"), &["nowhere"]);
    // A variant that is not supported, then one with a tensor that is no factor.
    fs::create_dir(&lora).unwrap();
    let config = fs::read_to_string(format!("{adapter}/adapter_config.json")).unwrap();
    let other = config.replace("\"use_qalora\": false", "\"use_qalora\": true");
    fs::write(lora.join("adapter_config.json"), other).unwrap();
    merge(&base, from, &["use_qalora", "not supported"]);
    fs::write(lora.join("adapter_config.json"), config).unwrap();
    let weights = lora.join("adapter_model.safetensors");
    fs::copy(format!("{base}/model.safetensors"), &weights).unwrap();
    merge(&base, from, &["lm_head.weight", "lora_A"]);
    fs::write(&weights, b"short").unwrap();
    merge(&base, from, &["adapter_model.safetensors", "too short"]);
}
