//! `devices`, and what happens where there is no adapter.

use crate::support::{program, refused, run, stderr, stdout};

#[test]
fn devices_lists_adapters_in_both_forms() {
    let plain = run(&["devices"]);
    assert_eq!(
        plain.status.code(),
        Some(0),
        "the tests need an adapter: run them by `make test`"
    );
    let json: serde_json::Value =
        serde_json::from_str(&stdout(&run(&["devices", "--json"]))).unwrap();
    let adapters = json.as_array().unwrap();
    assert_eq!(adapters.len(), stdout(&plain).lines().count());
    for (index, (adapter, line)) in adapters.iter().zip(stdout(&plain).lines()).enumerate() {
        assert_eq!(adapter["index"], index);
        assert!(line.contains(adapter["name"].as_str().unwrap()), "{line}");
        assert!(
            adapter["max_binding"].as_u64().unwrap() >= 128 << 20,
            "{adapter}"
        );
    }
}

/// As on processors whose registers have 128 bits, where the software driver lists matrix units that it does not open. Other
/// drivers do not know the variable.
#[test]
fn a_software_driver_with_narrow_subgroups_opens() {
    let output = program()
        .env("LP_NATIVE_VECTOR_WIDTH", "128")
        .args(["bench", "kernels", "--filter", "copy", "--seconds", "0.01"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(stdout(&output).contains("copy"), "{}", stdout(&output));
}

/// Only Linux lets a test hide the drivers.
#[test]
#[cfg(target_os = "linux")]
fn without_an_adapter_the_message_says_what_to_install() {
    // Started without the runner, which would set the driver again; a manifest that does not exist hides the rest.
    let mut direct = std::process::Command::new(env!("CARGO_BIN_EXE_lavender-wgpu"));
    direct
        .env("VK_DRIVER_FILES", "/nonexistent.json")
        .env("VK_ICD_FILENAMES", "/nonexistent.json");
    let json = direct.args(["devices", "--json"]).output().unwrap();
    assert_eq!(stdout(&json).trim(), "[]");
    let mut direct = std::process::Command::new(env!("CARGO_BIN_EXE_lavender-wgpu"));
    direct
        .env("VK_DRIVER_FILES", "/nonexistent.json")
        .env("VK_ICD_FILENAMES", "/nonexistent.json");
    let error = refused(&direct.arg("devices").output().unwrap());
    assert!(
        error.contains("no GPU adapter") && error.contains("make train"),
        "{error}"
    );
}

#[test]
fn json_goes_to_a_closed_pipe_without_a_panic() {
    use std::process::Stdio;
    let mut child = program()
        .args(["devices"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!text.contains("panicked"), "{text}");
}
