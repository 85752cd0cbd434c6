//! `train --dry-run`, and the recipes of `models/recipes/` by it: configurations alone, no weights, data or adapter.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lavender_wgpu::train::config::Config;

use crate::support::{program, refused, stderr, stdout};

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn recipes() -> Vec<PathBuf> {
    let files = fs::read_dir(root("models/recipes")).unwrap();
    let mut files: Vec<PathBuf> = files.map(|f| f.unwrap().path()).collect();
    files.retain(|f| f.extension().is_some_and(|e| e == "toml"));
    files.sort();
    files
}

/// A dry run where no adapter can be found: started without the runner, which would set a driver.
fn without_adapter(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lavender-wgpu"))
        .env("VK_DRIVER_FILES", "/nonexistent.json")
        .env("VK_ICD_FILENAMES", "/nonexistent.json")
        .args(["train", "--dry-run"])
        .args(args)
        .output()
        .unwrap()
}

/// `name` of a plan's lines.
fn line<'a>(plan: &'a str, name: &str) -> &'a str {
    let found = plan
        .lines()
        .find(|line| line.split("  ").next() == Some(name));
    found.unwrap_or_else(|| panic!("no `{name}` in\n{plan}"))
}

#[test]
fn recipes_are_the_papers_settings_and_named_in_their_readme() {
    let readme = fs::read_to_string(root("models/recipes/README.md")).unwrap();
    let defaults = Config::default();
    let (recipes, paper) = (recipes(), (defaults.loss, defaults.lora));
    assert_eq!(recipes.len(), 4);
    for recipe in recipes {
        let name = recipe.file_name().unwrap().to_str().unwrap();
        assert!(readme.contains(name), "{name}");
        let config = Config::load(&recipe, &[]).unwrap();
        assert_eq!(config.effective_batch(), 4, "{name}");
        assert_eq!((config.loss, config.lora), paper, "{name}");
        assert_eq!(config.optimizer, defaults.optimizer, "{name}");
        assert_eq!(config.train.steps.or(config.train.epochs), None, "{name}");
        // They begin with the commands that run them.
        let text = fs::read_to_string(&recipe).unwrap();
        for command in [
            format!("lavender-wgpu train models/recipes/{name} --dry-run"),
            format!("lavender-wgpu train models/recipes/{name} --set loss.lambda=0"),
        ] {
            assert!(text.contains(&command), "{name} lacks `{command}`");
        }
    }
}

/// Only Linux lets a test hide the drivers.
#[test]
#[cfg(target_os = "linux")]
fn recipes_are_planned_without_weights_data_and_adapter() {
    let weights = [
        (
            "llama-3.2-11b-vision.toml",
            "10.67 G weights in 906",
            "8 of them cross",
        ),
        (
            "smolvlm-2.2b.toml",
            "2.25 G weights in 657",
            "24 layers of 2048",
        ),
        (
            "smolvlm-256m.toml",
            "256.48 M weights in 471",
            "30 layers of 576",
        ),
        (
            "smolvlm-500m.toml",
            "507.48 M weights in 489",
            "32 layers of 960",
        ),
    ];
    for (recipe, (name, count, layers)) in recipes().iter().zip(weights) {
        assert!(recipe.ends_with(name));
        let model = Config::load(recipe, &[]).unwrap().model.path;
        let published = root("tests/reference/recipes").join(model.file_name().unwrap());
        let model = format!("model.path={}", published.display());
        let recipe = recipe.to_str().unwrap();
        let output = without_adapter(&[recipe, "--set", &model, "--max-memory", "80GiB"]);
        let plan = stdout(&output);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        for (part, wanted) in [
            ("model", count),
            ("language", layers),
            ("trained", "LoRA of rank 8"),
            ("data", "? samples"),
            ("batch", "assumed"),
            ("missing", "tokenizer.json"),
            ("time", "no GPU adapter"),
            ("memory", "there are 80.0 GiB"),
        ] {
            assert!(line(&plan, part).contains(wanted), "{wanted}\n{plan}");
        }
        // The recipe is made to fit.
        assert!(!plan.contains("does not fit"), "{plan}");
        let output = without_adapter(&[recipe, "--set", &model, "--max-memory", "64MiB"]);
        let error = refused(&output);
        assert!(
            error.contains("out of GPU memory before") && error.contains("model.quantize"),
            "{error}"
        );
    }
}

#[test]
fn a_dry_run_of_the_embedded_models_makes_no_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = program();
    let output = command
        .current_dir(dir.path())
        .args(["train", "--dry-run"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let plan = stdout(&output);
    for (part, wanted) in [
        ("model", "embedded: "),
        ("model", "as its files have them"),
        ("data", "300 steps in all"),
        ("time", "not measured in training"),
    ] {
        assert!(line(&plan, part).contains(wanted), "{wanted}\n{plan}");
    }
    assert!(
        !plan.contains("missing") && !plan.contains("assumed"),
        "{plan}"
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn what_is_missing_is_told_and_refused_by_the_run_itself() {
    let dir = tempfile::tempdir().unwrap();
    let model = format!("model.path={}", root("tests/reference/smolvlm/a").display());
    let run = |args: &[&str]| {
        let mut command = program();
        let command = command.current_dir(dir.path()).arg("train");
        command.args(args).output().unwrap()
    };
    // A model without data.
    let sets = ["--set", &model, "--set", "data.path=none.json"];
    let output = run(&[&["--dry-run"], &sets[..]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let plan = stdout(&output);
    assert!(line(&plan, "missing").contains("none.json"), "{plan}");
    assert!(
        line(&plan, "model").contains("as its files have them"),
        "{plan}"
    );
    assert!(refused(&run(&sets)).contains("none.json"));
    // What no run could be of.
    let other = root("tests/reference/recipes/SmolVLM-256M-Instruct").join("config.json");
    let wrong = dir.path().join("wrong");
    fs::create_dir(&wrong).unwrap();
    fs::copy(other, wrong.join("config.json")).unwrap();
    let weights = root("tests/reference/smolvlm/a/model.safetensors");
    for file in ["model.safetensors", "preprocessor_config.json"] {
        let from = weights.with_file_name(file);
        fs::copy(from, wrong.join(file)).unwrap();
    }
    for (set, parts) in [
        (
            "model.path=nowhere",
            &["nowhere", "config.json", "model directory"][..],
        ),
        ("model.path=wrong", &["wrong", "lm_head", "expected"]),
        ("train.freeze=[\"visoin\"]", &["train.freeze", "`visoin`"]),
        (
            "lora.target_modules=[\"qproj\"]",
            &["lora.target_modules", "nothing would be trained"],
        ),
        ("attention.layers=[77]", &["attention.layers", "77"]),
    ] {
        let error = refused(&run(&["--dry-run", "--set", &model, "--set", set]));
        for part in parts {
            assert!(error.contains(part), "{set}: `{error}` lacks `{part}`");
        }
    }
    let both = run(&["--dry-run", "--resume", "runs/001"]);
    assert_eq!(both.status.code(), Some(2));
}
