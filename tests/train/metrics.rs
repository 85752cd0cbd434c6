//! `metrics.jsonl`.

use lavender_wgpu::train::metrics::{MetricsLog, StepMetrics, read};

fn step(step: u64) -> StepMetrics {
    StepMetrics {
        step,
        epoch: 0,
        loss: 2.5,
        lm_loss: 1.5,
        attn_loss: 0.1,
        matched_words: 3,
        lr: 1e-4,
        grad_norm: 0.7,
        tokens: 100,
        step_ms: 12.5,
        data_ms: 0.5,
        peak_bytes: 1 << 33,
        ..StepMetrics::default()
    }
}

#[test]
fn a_line_has_the_documented_keys() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut log = MetricsLog::open(&path, 0).unwrap();
    log.append(&step(0)).unwrap();
    // On disk without closing: a run is watched while it goes.
    let text = std::fs::read_to_string(&path).unwrap();
    let value: serde_json::Value = serde_json::from_str(text.trim_end()).unwrap();
    let keys: Vec<&String> = value.as_object().unwrap().keys().collect();
    let expected = [
        "step",
        "epoch",
        "loss",
        "lm_loss",
        "attn_loss",
        "matched_words",
        "lr",
        "grad_norm",
        "tokens",
        "step_ms",
        "data_ms",
        "peak_bytes",
    ];
    assert_eq!(keys, expected);
    assert_eq!(value["peak_bytes"], 1u64 << 33);
}

#[test]
fn a_resumed_log_drops_the_steps_that_are_done_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut log = MetricsLog::open(&path, 0).unwrap();
    for i in 0..6 {
        log.append(&step(i)).unwrap();
    }
    drop(log);
    // Killed in the middle of a line.
    let mut text = std::fs::read_to_string(&path).unwrap();
    text.push_str("{\"step\": 6, \"ep");
    std::fs::write(&path, &text).unwrap();
    let mut log = MetricsLog::open(&path, 4).unwrap();
    log.append(&StepMetrics {
        loss: 9.0,
        ..step(4)
    })
    .unwrap();
    let found = read(&path).unwrap();
    assert_eq!(
        found.iter().map(|m| m.step).collect::<Vec<_>>(),
        [0, 1, 2, 3, 4]
    );
    assert_eq!((found[3].loss, found[4].loss), (2.5, 9.0));

    std::fs::write(&path, "{}\n").unwrap();
    let error = MetricsLog::open(&path, 1).unwrap_err().to_string();
    assert!(
        error.contains("metrics.jsonl") && error.contains("line 1") && error.contains("step"),
        "{error}"
    );
    // A new run starts a new log.
    drop(MetricsLog::open(&path, 0).unwrap());
    assert!(read(&path).unwrap().is_empty());
}
