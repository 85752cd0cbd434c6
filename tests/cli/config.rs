//! `config`: the commented file it writes, and what it says of files.

use std::fs;

use crate::support::{program, refused_with, run, stdout};

#[test]
fn a_commented_configuration_is_written_once() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run.toml");
    let out = out.to_str().unwrap();
    let plain = stdout(&run(&["config", "init"]));
    assert!(plain.contains("\n# Rank.\nr = 8\n"), "{plain}");

    let filled = [
        "config",
        "init",
        "--out",
        out,
        "--model",
        "my model",
        "--data",
        "d.json",
        "--targets",
        "t",
        "--set",
        "loss.lambda=0",
    ];
    assert_eq!(run(&filled).status.code(), Some(0));
    let text = fs::read_to_string(out).unwrap();
    for line in [
        "path = \"my model\"",
        "path = \"d.json\"",
        "targets = \"t\"",
        "lambda = 0.0",
        "# images = \"pictures\"",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}: {text}");
    }
    assert_eq!(text.lines().count(), plain.lines().count());

    refused_with(&filled, &["run.toml", "there already", "--force"]);
    assert_eq!(fs::read_to_string(out).unwrap(), text);
    assert_eq!(
        run(&["config", "init", "--out", out, "--force"])
            .status
            .code(),
        Some(0)
    );
    assert_eq!(fs::read_to_string(out).unwrap(), plain);
}

#[test]
fn a_checked_configuration_is_printed_with_its_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.toml");
    fs::write(&file, "[loss]\nlambda = 3\n").unwrap();
    let file = file.to_str().unwrap();
    let printed = stdout(&run(&["config", "check", file, "--set", "train.batch=2"]));
    for line in ["lambda = 3.0", "batch = 2", "gamma = 0.85"] {
        assert!(printed.lines().any(|found| found == line), "{printed}");
    }
    let again = dir.path().join("again.toml");
    fs::write(&again, &printed).unwrap();
    let again = stdout(&run(&["config", "check", again.to_str().unwrap()]));
    assert_eq!(again, printed);

    fs::write(dir.path().join("bad.toml"), "[loss]\nlamda = 3\n").unwrap();
    let mut command = program();
    command.current_dir(dir.path());
    let output = command
        .args(["config", "check", "bad.toml"])
        .output()
        .unwrap();
    let error = crate::support::refused(&output);
    assert!(
        error.contains("bad.toml: line 2") && error.contains("`loss.lambda`"),
        "{error}"
    );
    refused_with(
        &[
            "config",
            "init",
            "--data",
            "d",
            "--set",
            "data.mixture=[{path = \"a\"}]",
        ],
        &["data.path", "beside `data.mixture`"],
    );
    refused_with(
        &["config", "check", "none.toml"],
        &["none.toml", "No such file"],
    );
}
