//! Ten steps of every strategy of the method against PyTorch: `tests/reference/strategies.py`.

use std::path::Path;

use lavender_wgpu::tensor::{Checkpoint, HostTensor, save_safetensors};
use lavender_wgpu::train::metrics;
use serde_json::Value;

use crate::support::reference;
use crate::ten_steps::{config, relative, run, store};

/// The tensors of `file` under `strategy.`, without that prefix.
fn of(file: &str, strategy: &str) -> Vec<(String, Vec<f32>, Vec<usize>)> {
    let file = Checkpoint::open(&reference(&format!("strategies/{file}")), "").unwrap();
    file.names()
        .filter_map(|name| {
            let rest = name.strip_prefix(strategy)?.strip_prefix('.')?;
            let (values, shape) = file.values(name).unwrap();
            Some((rest.to_owned(), values, shape))
        })
        .collect()
}

fn check(strategy: &str, expected: &Value) {
    let student = expected["student"].as_str().unwrap();
    let fixture = reference(&format!("train_{student}"));
    let dir = tempfile::tempdir().unwrap();
    store(&fixture, &dir.path().join("targets"));
    let mut config = config(student, &fixture, dir.path());
    config.aligner.hidden = 8;
    let adapter = reference(&format!("strategies/{strategy}"));
    if adapter.is_dir() {
        config.init.lora = Some(adapter);
    }
    // In an order in which each step is a valid configuration: what joins the maps before what needs it.
    let mut keys: Vec<(&String, &Value)> = expected["keys"].as_object().unwrap().iter().collect();
    keys.sort_by_key(|(key, _)| (!key.starts_with("attention"), !key.starts_with("flow")));
    let mut sets: Vec<String> = keys
        .iter()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    config.init.aligner = None;
    for part in ["aligner", "parallel"] {
        let init = of("init.safetensors", &format!("{strategy}.{part}"));
        if !init.is_empty() {
            let file = dir.path().join(format!("{part}.safetensors"));
            let tensors: Vec<(String, HostTensor)> = init
                .iter()
                .map(|(name, values, shape)| (name.clone(), HostTensor::f32(shape, values)))
                .collect();
            save_safetensors(&file, &tensors, None).unwrap();
            sets.push(format!("init.{part}={}", file.display()));
        }
    }
    let config = config.with(&sets).unwrap();
    let run = run(&config);
    let lines = metrics::read(run.metrics()).unwrap();
    let steps = expected["steps"].as_array().unwrap();
    // Where PyTorch's own runs in f32 and f64 differ by more (gradients that are nearly zero), three times that.
    let tolerance = |what: &str| f64::max(1e-4, 3.0 * expected["spread"][what].as_f64().unwrap());
    assert_eq!(lines.len(), steps.len());
    for (step, (found, expected)) in lines.iter().zip(steps).enumerate() {
        let value = |key: &str| expected[key].as_f64().unwrap();
        for (what, found) in [
            ("loss", found.loss),
            ("lm_loss", found.lm_loss),
            ("attn_loss", found.attn_loss),
            ("grad_norm", found.grad_norm),
        ] {
            let expected = value(what);
            let tolerance = tolerance(what);
            let error = (found - expected).abs() / expected.abs().max(1e-3);
            assert!(
                error < tolerance,
                "{strategy}, step {step}: {what} {found}, expected {expected}"
            );
        }
    }
    let file = |path: &Path, stem: &str| Checkpoint::open(path, stem).unwrap();
    let lora = file(&run.lora(), "adapter_model");
    let added = |part: &str| file(&run.root().join(format!("{part}.safetensors")), part);
    let mut compared = 0;
    for (name, values, _) in of("final.safetensors", strategy) {
        let (part, found) = match name.split_once('.') {
            // Biases move aligned maps nearly alike and min-max takes it away: hardly a gradient, and Adam lifts noise.
            Some(("aligner", name)) if name.ends_with(".bias") => continue,
            Some((part @ ("aligner" | "parallel"), name)) => (part, added(part).values(name)),
            _ => ("lora", lora.values(&name)),
        };
        let found = found.unwrap().0;
        let error = f64::from(relative(&found, &values));
        assert!(
            error < tolerance(part),
            "{strategy}: {name} is off by {error:e}"
        );
        compared += 1;
    }
    assert!(compared > 2, "{strategy}: {compared} tensors compared");
}

#[test]
fn losses_and_weights_of_every_strategy_are_pytorchs() {
    let text = std::fs::read_to_string(reference("strategies/strategies.json")).unwrap();
    let all: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    assert!(all.len() >= 27);
    for (strategy, expected) in &all {
        check(strategy, expected);
    }
}
