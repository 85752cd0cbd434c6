use std::collections::HashMap;
use std::path::Path;

use lavender_wgpu::files::write_bytes;
use lavender_wgpu::tensor::{Checkpoint, HostTensor, save_safetensors};
use tempfile::TempDir;

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn what_is_saved_is_read_again_with_its_metadata() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("maps.safetensors");
    let tensors = [
        (
            "maps".to_string(),
            HostTensor::f32(&[2, 2], &[1.0, 2.0, 3.0, 4.0]),
        ),
        ("mask".to_string(), HostTensor::u8(&[3], &[0, 1, 255])),
        ("empty".to_string(), HostTensor::f32(&[0], &[])),
    ];
    let metadata = HashMap::from([("words".to_string(), "[\"red\"]".to_string())]);
    save_safetensors(&path, &tensors, Some(metadata)).unwrap();
    assert_eq!(
        files(dir.path()),
        ["maps.safetensors"],
        "no temporary file stays"
    );
    let checkpoint = Checkpoint::open(&path, "model").unwrap();
    assert_eq!(checkpoint.values("maps").unwrap().0, [1.0, 2.0, 3.0, 4.0]);
    assert_eq!(
        checkpoint.shape("mask").map(<[usize]>::to_vec),
        Some(vec![3])
    );
    let bytes = std::fs::read(&path).unwrap();
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["words"], "[\"red\"]");
    assert_eq!(
        safetensors::SafeTensors::deserialize(&bytes)
            .unwrap()
            .tensor("mask")
            .unwrap()
            .data(),
        [0, 1, 255]
    );
}

#[test]
fn a_shape_that_does_not_fit_its_values_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("bad.safetensors");
    let tensors = [("weight".to_string(), HostTensor::f32(&[3], &[1.0, 2.0]))];
    let message = save_safetensors(&path, &tensors, None)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("`weight`") && message.contains("bad.safetensors"),
        "{message}"
    );
    assert!(files(dir.path()).is_empty());
}

#[test]
fn missing_directories_are_made_and_impossible_ones_named() {
    let dir = TempDir::new().unwrap();
    write_bytes(dir.path().join("a/b/file"), b"data").unwrap();
    assert_eq!(std::fs::read(dir.path().join("a/b/file")).unwrap(), b"data");
    let message = write_bytes(dir.path().join("a/b/file/place"), b"data")
        .unwrap_err()
        .to_string();
    assert!(message.contains("file"), "{message}");
    assert_eq!(files(&dir.path().join("a/b")), ["file"]);
}

#[test]
fn a_failed_rename_leaves_no_temporary_file() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("taken");
    std::fs::create_dir(&path).unwrap();
    std::fs::write(path.join("inside"), b"x").unwrap();
    let message = write_bytes(&path, b"data").unwrap_err().to_string();
    assert!(message.contains("taken"), "{message}");
    assert_eq!(files(dir.path()), ["taken"]);
    assert_eq!(files(&path), ["inside"]);
}

#[test]
fn an_existing_file_is_replaced_whole() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("file");
    write_bytes(&path, &[1; 1000]).unwrap();
    write_bytes(&path, &[2; 10]).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [2; 10]);
    assert_eq!(files(dir.path()), ["file"]);
}

/// Folder that the child process of the next test writes to.
const TARGET: &str = "LAVENDER_TEST_FULL_DISK";

/// A full disk, as far as one process can have one: the shell caps the size of its files, so the
/// write breaks off half-way.
#[cfg(unix)]
#[test]
fn a_write_that_breaks_off_keeps_the_old_file() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.safetensors");
    let old = [("a".to_string(), HostTensor::f32(&[2], &[1.0, 2.0]))];
    save_safetensors(&path, &old, None).unwrap();
    let child = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$@\"", "sh"])
        // Not `current_exe`, which is the loader where a private software driver brings its own.
        .arg(std::env::args_os().next().unwrap())
        .args(["--ignored", "--exact", "save::child_with_a_full_disk"])
        .env(TARGET, dir.path())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success(),
        "{output}{}",
        String::from_utf8_lossy(&child.stderr)
    );
    assert!(output.contains("1 passed"), "the child ran: {output}");
    assert_eq!(files(dir.path()), ["model.safetensors"]);
    let checkpoint = Checkpoint::open(&path, "model").unwrap();
    assert_eq!(checkpoint.values("a").unwrap().0, [1.0, 2.0]);
}

#[test]
#[ignore = "runs as the child of a_write_that_breaks_off_keeps_the_old_file"]
fn child_with_a_full_disk() {
    let Some(dir) = std::env::var_os(TARGET) else {
        return;
    };
    let path = Path::new(&dir).join("model.safetensors");
    let large = [(
        "a".to_string(),
        HostTensor::f32(&[1 << 20], &vec![0.5; 1 << 20]),
    )];
    let message = save_safetensors(&path, &large, None)
        .expect_err("no room")
        .to_string();
    assert!(message.contains("model.safetensors"), "{message}");
}
