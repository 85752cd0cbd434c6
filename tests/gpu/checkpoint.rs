use std::path::{Path, PathBuf};

use lavender_wgpu::error::Error;
use lavender_wgpu::tensor::{Checkpoint, DType, HostTensor, save_safetensors};
use tempfile::TempDir;

use crate::support::gpu;

/// A safetensors file made by hand: header, then `data` bytes of zeros.
fn raw(dir: &TempDir, name: &str, header: &str, data: usize) -> PathBuf {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn whole(dir: &TempDir, name: &str, tensors: &[(&str, &[usize])]) -> PathBuf {
    let path = dir.path().join(name);
    let tensors: Vec<_> = tensors
        .iter()
        .map(|&(name, shape)| {
            let n = shape.iter().product::<usize>();
            let values: Vec<f32> = (0..n).map(|i| i as f32).collect();
            (name.to_string(), HostTensor::f32(shape, &values))
        })
        .collect();
    save_safetensors(&path, &tensors, None).unwrap();
    path
}

/// Opens, expects an error, and checks that it names the file and every one of `parts`.
#[track_caller]
fn refused(path: &Path, file: &Path, parts: &[&str]) {
    let error = Checkpoint::open(path, "model")
        .map(|_| ())
        .expect_err("must be refused");
    let message = error.to_string();
    assert!(
        message.contains(&file.display().to_string()),
        "file not named: {message}"
    );
    for part in parts {
        assert!(message.contains(part), "`{part}` not in: {message}");
    }
}

#[test]
fn a_whole_file_reads_with_shapes_values_and_dtypes() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("model.safetensors");
    let values = [0.5f32, -1.25, 3.0, 65504.0, 0.0, 2.0];
    let tensors = [
        ("single".to_string(), HostTensor::f32(&[2, 3], &values)),
        ("half".to_string(), HostTensor::f16(&[6], &values)),
        (
            "brain".to_string(),
            HostTensor::float(DType::Bf16, &[3, 2], &values),
        ),
        ("ids".to_string(), HostTensor::u32(&[2], &[7, u32::MAX])),
    ];
    save_safetensors(&path, &tensors, None).unwrap();
    for open in [path.as_path(), dir.path()] {
        let checkpoint = Checkpoint::open(open, "model").unwrap();
        assert_eq!(checkpoint.path(), open);
        assert_eq!(
            checkpoint.names().collect::<Vec<_>>(),
            ["brain", "half", "ids", "single"]
        );
        assert_eq!(
            checkpoint.shape("single").map(<[usize]>::to_vec),
            Some(vec![2, 3])
        );
        let half = checkpoint.tensor(gpu(), "half", &[6]).unwrap();
        let expected = if gpu().tier().f16 {
            DType::F16
        } else {
            DType::F32
        };
        assert_eq!(half.dtype(), expected);
        assert_eq!(half.to_f32().unwrap(), values);
        let brain = checkpoint.tensor(gpu(), "brain", &[3, 2]).unwrap();
        assert_eq!(brain.dtype(), DType::Bf16);
        let wide = checkpoint.tensor_f32(gpu(), "brain", &[3, 2]).unwrap();
        assert_eq!(wide.dtype(), DType::F32);
        assert_eq!(
            wide.to_f32().unwrap(),
            DType::Bf16.widen(&DType::Bf16.narrow(&values))
        );
        assert_eq!(
            checkpoint.values("single").unwrap(),
            (values.to_vec(), vec![2, 3])
        );
        assert_eq!(checkpoint.values_u32("ids").unwrap().0, [7, u32::MAX]);
    }
}

#[test]
fn a_path_that_is_not_there_is_named() {
    let dir = TempDir::new().unwrap();
    let missing = dir.path().join("nowhere");
    refused(&missing, &missing, &["no such file or directory"]);
    refused(
        dir.path(),
        dir.path(),
        &["model.safetensors", "model.safetensors.index.json"],
    );
}

#[test]
fn short_and_truncated_files_are_refused() {
    let dir = TempDir::new().unwrap();
    let path = whole(&dir, "model.safetensors", &[("a", &[16, 16])]);
    let bytes = std::fs::read(&path).unwrap();
    for keep in [0, 5, 8, 20, bytes.len() / 2, bytes.len() - 1] {
        let cut = dir.path().join("cut.safetensors");
        std::fs::write(&cut, &bytes[..keep]).unwrap();
        refused(&cut, &cut, &[]);
    }
}

#[test]
fn oversized_headers_are_refused_before_they_are_read() {
    let dir = TempDir::new().unwrap();
    for length in [u64::MAX, 1 << 40, 101 << 20] {
        let path = dir.path().join("large.safetensors");
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}");
        std::fs::write(&path, bytes).unwrap();
        refused(&path, &path, &[&length.to_string(), "header"]);
    }
}

#[test]
fn headers_that_lie_are_refused() {
    let dir = TempDir::new().unwrap();
    let entry = |from: usize, to: usize| {
        format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":[{from},{to}]}}"#)
    };
    let cases = [
        (
            "overlap",
            format!(r#"{{"a":{},"b":{}}}"#, entry(0, 8), entry(4, 12)),
            12,
        ),
        (
            "gap",
            format!(r#"{{"a":{},"b":{}}}"#, entry(0, 8), entry(12, 20)),
            20,
        ),
        ("past the end", format!(r#"{{"a":{}}}"#, entry(0, 8)), 4),
        ("backwards", format!(r#"{{"a":{}}}"#, entry(8, 0)), 8),
        (
            "shape and bytes differ",
            format!(r#"{{"a":{}}}"#, entry(0, 12)),
            12,
        ),
        (
            "unknown dtype",
            r#"{"a":{"dtype":"Q7","shape":[2],"data_offsets":[0,8]}}"#.into(),
            8,
        ),
        ("no JSON", "{\"a\":".to_string(), 0),
        ("bytes left over", format!(r#"{{"a":{}}}"#, entry(0, 8)), 16),
        (
            "a shape whose product overflows",
            r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,8]}}"#
                .into(),
            8,
        ),
    ];
    for (what, header, data) in cases {
        let path = raw(&dir, "lies.safetensors", &header, data);
        let result = Checkpoint::open(&path, "model").map(|_| ());
        let message = result.expect_err(what).to_string();
        assert!(message.contains("lies.safetensors"), "{what}: {message}");
    }
}

#[test]
fn missing_and_misshaped_tensors_are_named_with_both_shapes() {
    let dir = TempDir::new().unwrap();
    let path = whole(
        &dir,
        "model.safetensors",
        &[("layers.0.q_proj.weight", &[4, 8])],
    );
    let checkpoint = Checkpoint::open(dir.path(), "model").unwrap();
    let error = checkpoint
        .tensor(gpu(), "layers.0.k_proj.weight", &[4, 8])
        .unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("`layers.0.k_proj.weight`") && message.contains("missing"),
        "{message}"
    );
    assert!(
        message.contains("nearest: `layers.0.q_proj.weight`"),
        "{message}"
    );
    assert!(
        message.contains(&dir.path().display().to_string()),
        "{message}"
    );
    let error = checkpoint
        .tensor(gpu(), "layers.0.q_proj.weight", &[8, 4])
        .unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::Tensor { .. }));
    assert!(
        message.contains("[4, 8]") && message.contains("[8, 4]"),
        "{message}"
    );
    assert!(
        checkpoint
            .tensor_f32(gpu(), "layers.0.q_proj.weight", &[32])
            .is_err()
    );
    assert!(checkpoint.values("other").is_err());
    drop(path);
}

#[test]
fn unusable_dtypes_are_named() {
    let dir = TempDir::new().unwrap();
    let header = r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#;
    let path = raw(&dir, "model.safetensors", header, 8);
    let checkpoint = Checkpoint::open(&path, "model").expect("other tensors may be of use");
    let message = checkpoint.values("a").unwrap_err().to_string();
    assert!(
        message.contains("`a`") && message.contains("I64") && message.contains("BF16"),
        "{message}"
    );
}

#[test]
fn pickled_checkpoints_are_refused_with_the_conversion() {
    let dir = TempDir::new().unwrap();
    for name in ["pytorch_model.bin", "model.ckpt", "weights.pt"] {
        let path = dir.path().join(name);
        std::fs::write(&path, b"\x80\x02}q\x00.").unwrap();
        refused(&path, &path, &["pickled", "safetensors.torch"]);
        refused(dir.path(), &path, &["pickled", "safetensors.torch"]);
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn shards_are_found_through_the_index() {
    let dir = TempDir::new().unwrap();
    whole(&dir, "model-00001-of-00002.safetensors", &[("a", &[2, 2])]);
    whole(
        &dir,
        "model-00002-of-00002.safetensors",
        &[("b", &[3]), ("c", &[1])],
    );
    let index = dir.path().join("model.safetensors.index.json");
    let one = "model-00001-of-00002.safetensors";
    let two = "model-00002-of-00002.safetensors";
    let map =
        format!(r#"{{"metadata":{{}},"weight_map":{{"a":"{one}","b":"{two}","c":"{two}"}}}}"#);
    std::fs::write(&index, &map).unwrap();
    let checkpoint = Checkpoint::open(dir.path(), "model").unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!(checkpoint.values("b").unwrap().0, [0.0, 1.0, 2.0]);
    assert_eq!(checkpoint.stored_bytes(), 4 * (4 + 3 + 1));

    std::fs::remove_file(dir.path().join(two)).unwrap();
    refused(
        dir.path(),
        &dir.path().join(two),
        &["missing", "model.safetensors.index.json"],
    );
}

#[test]
fn bad_indices_are_refused() {
    let dir = TempDir::new().unwrap();
    whole(&dir, "one.safetensors", &[("a", &[2])]);
    whole(&dir, "two.safetensors", &[("a", &[2])]);
    let index = dir.path().join("model.safetensors.index.json");
    let check = |text: &str, parts: &[&str]| {
        std::fs::write(&index, text).unwrap();
        refused(dir.path(), &index, parts);
    };
    check("{", &["JSON"]);
    check("{}", &["weight_map"]);
    check(r#"{"weight_map":{"a":3}}"#, &["weight_map.a"]);
    check(
        r#"{"weight_map":{"a":"../one.safetensors"}}"#,
        &["weight_map.a"],
    );
    check(r#"{"weight_map":{"a":".."}}"#, &["weight_map.a"]);
    let both = r#"{"weight_map":{"a":"one.safetensors","b":"two.safetensors"}}"#;
    std::fs::write(&index, both).unwrap();
    refused(
        dir.path(),
        &dir.path().join("two.safetensors"),
        &["`a`", "two shards"],
    );
}

#[test]
fn renamed_keys_are_found_under_their_new_names() {
    let dir = TempDir::new().unwrap();
    let path = whole(
        &dir,
        "model.safetensors",
        &[("text_model.layer.weight", &[2])],
    );
    let checkpoint = Checkpoint::open(&path, "model")
        .unwrap()
        .rename(|name| name.trim_start_matches("text_model.").to_string());
    assert!(checkpoint.contains("layer.weight") && !checkpoint.contains("text_model.layer.weight"));
    assert_eq!(checkpoint.values("layer.weight").unwrap().0, [0.0, 1.0]);
}
