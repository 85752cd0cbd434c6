//! `--tuning`: kernels measured at first use, and the same bits in the next run.

use std::path::Path;

use crate::support::{program, stderr};

/// Paints with the mini teacher, the caches in `dir`; the picture, and what was told.
fn paint(dir: &Path, more: &[&str]) -> (Vec<u8>, String) {
    let teacher = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/mini/teacher");
    let out = dir.join("x.png");
    let mut command = program();
    command.env("XDG_CACHE_HOME", dir.join("cache"));
    command.args(["generate", "a red circle", "--steps", "2", "--diffusion"]);
    command.arg(teacher).arg("--out").arg(&out).args(more);
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    (std::fs::read(out).unwrap(), stderr(&output))
}

#[test]
fn a_run_that_measures_kernels_and_the_next_give_the_same_bits() {
    let dir = tempfile::tempdir().unwrap();
    let (first, told) = paint(dir.path(), &["--tuning", "first-use"]);
    let lines = |text: &str| told.lines().filter(|line| line.contains(text)).count();
    assert_eq!(lines("new adapter"), 1, "{told}");
    assert_eq!(lines("were measured"), 1, "{told}");
    let (second, told) = paint(dir.path(), &["--tuning", "first-use"]);
    let silent = !told.contains("new adapter") && !told.contains("were measured");
    assert!(silent, "{told}");
    assert!(first == second, "another picture");
}

#[test]
fn kernels_measured_while_a_plan_is_made_are_no_part_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let both = ["--tuning", "first-use", "--replay", "on"];
    let (first, told) = paint(dir.path(), &both);
    assert!(told.contains("were measured"), "{told}");
    let (second, _) = paint(dir.path(), &both);
    let (plain, _) = paint(dir.path(), &["--tuning", "first-use", "--replay", "off"]);
    assert!(first == second && first == plain, "another picture");
}

#[test]
fn measuring_is_silent_under_quiet() {
    let dir = tempfile::tempdir().unwrap();
    let (_, told) = paint(dir.path(), &["--tuning", "first-use", "--quiet"]);
    assert_eq!(told, "");
    // It was done all the same.
    let (_, told) = paint(dir.path(), &["--tuning", "first-use"]);
    assert!(!told.contains("new adapter"), "{told}");
}
