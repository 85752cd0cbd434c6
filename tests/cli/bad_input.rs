//! What a user can get wrong, apart from the model itself: one clear line, exit code 1, nothing half-written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::{program, refused, refused_with, stdout};

/// A tiny Stable Diffusion saved by diffusers.
fn model() -> String {
    format!("{}/tests/reference/teacher/a", env!("CARGO_MANIFEST_DIR"))
}

fn image() -> String {
    format!(
        "{}/tests/reference/teacher/image.png",
        env!("CARGO_MANIFEST_DIR")
    )
}

fn attention(image: &str, out: &Path) -> Vec<String> {
    let model = model();
    [
        "attention",
        "--model",
        &model,
        "--image",
        image,
        "--text",
        "a red circle",
        "--steps",
        "2",
        "--out",
    ]
    .into_iter()
    .map(str::to_owned)
    .chain([out.display().to_string()])
    .collect()
}

/// Runs and asserts that it is refused with `parts` in the message, and that `dir` holds what it held before.
fn refused_cleanly(dir: &Path, args: &[String], parts: &[&str]) {
    let before = files(dir);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    refused_with(&args, parts);
    assert_eq!(files(dir), before, "{parts:?}");
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|f| f.unwrap().path())
        .collect();
    found.sort();
    found
}

#[test]
fn images_that_cannot_be_read_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let png = fs::read(image()).unwrap();
    let mut huge = png.clone();
    huge[16..20].copy_from_slice(&400_000u32.to_be_bytes());
    let crc = crc::Crc::<u32>::new(&crc::CRC_32_ISO_HDLC).checksum(&huge[12..29]);
    huge[29..33].copy_from_slice(&crc.to_be_bytes());
    let bad: [(&str, &[u8], &str); 4] = [
        ("empty.png", b"", "0 bytes"),
        ("note.png", b"this is no picture", "not a PNG"),
        ("cut.png", &png[..png.len() / 3], "damaged image"),
        ("huge.png", &huge, "400000"),
    ];
    for (name, bytes, reason) in bad {
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        let args = attention(path.to_str().unwrap(), &dir.path().join("maps.safetensors"));
        refused_cleanly(dir.path(), &args, &[name, reason]);
    }
    let missing = dir.path().join("missing.png");
    let args = attention(
        missing.to_str().unwrap(),
        &dir.path().join("maps.safetensors"),
    );
    refused_cleanly(dir.path(), &args, &["missing.png", "No such file"]);
}

#[test]
fn data_sets_that_cannot_be_read_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let targets = |data: &Path| -> Vec<String> {
        let (model, out) = (model(), dir.path().join("out"));
        [
            "targets",
            "--diffusion",
            &model,
            "--data",
            data.to_str().unwrap(),
            "--out",
            out.to_str().unwrap(),
        ]
        .map(str::to_owned)
        .to_vec()
    };
    refused_cleanly(
        dir.path(),
        &targets(&dir.path().join("none.json")),
        &["none.json", "No such file"],
    );
    let bad: [(&str, &str, &[&str]); 3] = [
        (
            "a.jsonl",
            "{\"image\": 3, \"messages\": []}",
            &["line 1", "field `image`", "found 3"],
        ),
        (
            "b.json",
            r#"[{"image": "x.png", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": " "}]}]"#,
            &["entry 0", "empty", "caption"],
        ),
        ("c.parquet", "PAR1", &["c.parquet", "not a whole parquet"]),
    ];
    for (name, text, parts) in bad {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        let parts: Vec<&str> = [name].into_iter().chain(parts.iter().copied()).collect();
        refused_cleanly(dir.path(), &targets(&path), &parts);
    }
}

#[test]
fn adapters_that_are_not_there_or_too_small_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let with = |extra: [&str; 2]| {
        let mut args = attention(&image(), &dir.path().join("maps.safetensors"));
        args.extend(extra.map(str::to_owned));
        args
    };
    refused_cleanly(
        dir.path(),
        &with(["--adapter", "Voodoo 2"]),
        &["Voodoo 2", "this machine has"],
    );
    refused_cleanly(
        dir.path(),
        &with(["--adapter", "77"]),
        &["77", "this machine has"],
    );
    refused_cleanly(
        dir.path(),
        &with(["--max-memory", "0"]),
        &["out of GPU memory", "smaller"],
    );
}

#[test]
fn a_place_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let out = file.join("maps.safetensors");
    refused_cleanly(dir.path(), &attention(&image(), &out), &["file"]);
}

/// A file system of a few KiB in a mount namespace of its own: the disk is full in the middle of writing.
#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_leaves_nothing_half_written() {
    let allowed = Command::new("unshare").args(["-rm", "true"]).status();
    if !allowed.is_ok_and(|status| status.success()) {
        eprintln!("skipped: this system lets no user make a mount namespace");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::copy(image(), dir.path().join("image.png")).unwrap();
    let data = dir.path().join("data.jsonl");
    let line = r#"{"image":"image.png","messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a red circle above two squares"}]}"#;
    fs::write(&data, line).unwrap();
    let disk = dir.path().join("disk");
    fs::create_dir(&disk).unwrap();
    // Prints what is left on the small disk; the exit code is the program's.
    let on_small_disk = |args: &[String]| -> Output {
        let plain = program();
        let script = "mount -t tmpfs -o size=8k none \"$1\" || exit 99; shift 1; \
                      \"$@\"; code=$?; ls -A \"$DISK\"; exit $code";
        let mut command = Command::new("unshare");
        command
            .args(["-rm", "bash", "-c", script, "bash"])
            .arg(&disk)
            .env("DISK", &disk);
        command
            .arg(plain.get_program())
            .args(plain.get_args())
            .args(args)
            .arg("--quiet");
        command.output().unwrap()
    };

    let output = on_small_disk(&attention(&image(), &disk.join("maps.safetensors")));
    let error = refused(&output);
    assert!(
        error.contains("maps.safetensors") && error.contains("No space left"),
        "{error}"
    );
    assert_eq!(stdout(&output), "");

    let (model, data) = (model(), data.display().to_string());
    let store = disk.display().to_string();
    let args = [
        "targets",
        "--diffusion",
        &model,
        "--data",
        &data,
        "--out",
        &store,
    ];
    let args: Vec<String> = args
        .into_iter()
        .chain(["--mode", "noised", "--steps", "1"])
        .map(str::to_owned)
        .collect();
    let output = on_small_disk(&args);
    let error = refused(&output);
    assert!(
        error.contains("disk/p")
            && error.contains("No space left")
            && error.contains("same command"),
        "{error}"
    );
    // The plan is whole, and what is not whole is not there.
    assert!(["", "plan-0of1.json\n"].contains(&stdout(&output).as_str()));
    // With room, the same command does the work.
    let again = program().args(&args).output().unwrap();
    assert!(
        again.status.success(),
        "{}",
        String::from_utf8_lossy(&again.stderr)
    );
    assert_eq!(files(&disk).len(), 2);
}
