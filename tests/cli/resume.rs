//! A run that is stopped or killed goes on to the same bits; a changed configuration is taken or refused.
#![cfg(unix)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{program, refused, run, stderr};

const STEPS: usize = 7;

fn reference(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference");
    root.join(path).to_str().unwrap().to_owned()
}

/// A run on two shares of the fixture's samples, shuffled, with dropout, a checkpoint every two steps.
fn config(dir: &Path) -> PathBuf {
    let text = fs::read_to_string(reference("train_smolvlm/data.jsonl")).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    fs::write(dir.join("a.jsonl"), lines[..1].join("\n")).unwrap();
    fs::write(dir.join("b.jsonl"), lines[1..].join("\n")).unwrap();
    let part = |name: &str, weight: f64| {
        let (path, images) = (dir.join(name), reference("mllama/images"));
        format!(
            "[[data.mixture]]\npath = '{}'\nimages = '{images}'\nweight = {weight}\n",
            path.display()
        )
    };
    let path = dir.join("config.toml");
    let text = format!(
        "[model]\npath = '{}'\n[lora]\ndropout = 0.2\n[optimizer]\nlr = 1e-3\nschedule = 'cosine'\n\
         warmup_steps = 2\n[train]\nbatch = 1\naccumulate = 2\nsteps = {STEPS}\ncheckpoint_every = 2\n{}{}",
        reference("smolvlm/a"),
        part("a.jsonl", 1.5),
        part("b.jsonl", 0.67),
    );
    fs::write(&path, text).unwrap();
    path
}

fn start(config: &Path, root: &Path) -> Child {
    let set = format!("run.dir={}", root.display());
    let args = ["train", config.to_str().unwrap(), "--set", &set];
    let mut command = program();
    command
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().unwrap()
}

/// Waits until `ready`, or the program has ended.
fn wait_until(child: &mut Child, ready: impl Fn() -> bool) {
    let begun = Instant::now();
    while !ready() && child.try_wait().unwrap().is_none() {
        assert!(
            begun.elapsed() < Duration::from_secs(300),
            "nothing happened"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn resume(root: &Path, more: &[&str]) -> std::process::Output {
    let args = ["train", "--resume", root.to_str().unwrap()];
    run(&[&args, more].concat())
}

/// The weights that a run leaves, and each step's figures but times and memory.
fn results(root: &Path) -> (Vec<u8>, Vec<u8>, Vec<Value>) {
    let read = |name: &str| fs::read(root.join(name)).unwrap();
    let text = fs::read_to_string(root.join("metrics.jsonl")).unwrap();
    let figures = text.lines().map(|line| {
        let mut value: Value = serde_json::from_str(line).unwrap();
        for key in ["step_ms", "data_ms", "peak_bytes"] {
            value.as_object_mut().unwrap().remove(key);
        }
        value
    });
    (
        read("lora/adapter_model.safetensors"),
        read("aligner.safetensors"),
        figures.collect(),
    )
}

#[test]
fn stopped_or_killed_runs_go_on_to_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path());
    let root = |name: &str| dir.path().join(name);
    let whole = root("whole");
    assert!(start(&config, &whole).wait().unwrap().success());
    let expected = results(&whole);
    assert_eq!(expected.2.len(), STEPS);

    let stopped = root("stopped");
    let mut child = start(&config, &stopped);
    let log = stopped.join("metrics.jsonl");
    let some = || fs::read_to_string(&log).is_ok_and(|text| text.lines().count() >= 2);
    wait_until(&mut child, some);
    let process = child.id().to_string();
    let signal = Command::new("kill").args(["-INT", &process]).status();
    let signalled = signal.unwrap().success();
    let status = child.wait().unwrap();
    // A fast machine may have been done before the signal came.
    assert!(
        status.code() == Some(130) || !signalled || status.success(),
        "{status}"
    );
    let page = fs::read_to_string(stopped.join("report.html")).unwrap();
    assert_eq!(
        page.contains("stopped by Ctrl-C"),
        status.code() == Some(130),
        "{page}"
    );
    let output = resume(&stopped, &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(results(&stopped), expected, "stopped");

    let killed = root("killed");
    let mut child = start(&config, &killed);
    // As the second checkpoint is being written, or just after.
    wait_until(&mut child, || killed.join("checkpoints/step-2").exists());
    let writing = || {
        let entries = fs::read_dir(killed.join("checkpoints")).unwrap();
        entries.count() > 1
    };
    wait_until(&mut child, writing);
    child.kill().unwrap();
    child.wait().unwrap();
    let output = resume(&killed, &[]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(results(&killed), expected, "killed");
}

#[test]
fn a_longer_run_goes_on_and_another_recipe_is_refused_with_every_difference() {
    let dir = tempfile::tempdir().unwrap();
    let (config, root) = (config(dir.path()), dir.path().join("run"));
    let set = format!("run.dir={}", root.display());
    let first = [
        "train",
        config.to_str().unwrap(),
        "--set",
        &set,
        "--set",
        "train.steps=2",
    ];
    let output = run(&first);
    assert!(output.status.success(), "{}", stderr(&output));
    let before = fs::read_to_string(root.join("config.toml")).unwrap();

    let more = [
        "--set",
        "optimizer.lr=0.5",
        "--set",
        "lora.r=2",
        "--set",
        "train.steps=3",
    ];
    let error = refused(&resume(&root, &more));
    for part in ["optimizer.lr: 0.001 → 0.5", "lora.r: 8 → 2", "init.lora"] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(
        fs::read_to_string(root.join("config.toml")).unwrap(),
        before
    );

    let output = resume(&root, &["--set", "train.steps=3", "--set", "train.keep=1"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("train.steps: 2 → 3"),
        "{}",
        stderr(&output)
    );
    let log = fs::read_to_string(root.join("metrics.jsonl")).unwrap();
    assert_eq!(log.lines().count(), 3);
    assert!(root.join("checkpoints/step-3").is_dir() && !root.join("checkpoints/step-2").exists());

    let error = refused(&resume(&root, &["--set", "train.steps=1"]));
    assert!(error.contains("3 steps are done"), "{error}");
}
