//! Training beside a quantised base against training beside the weights that it stands for.

use std::path::{Path, PathBuf};

use lavender_wgpu::nn::LoadOptions;
use lavender_wgpu::tensor::{
    Checkpoint, DType, HostTensor, Quantization, QuantizedMatrix, save_safetensors,
};
use lavender_wgpu::train::config::{Config, Quantize};
use lavender_wgpu::train::metrics;
use lavender_wgpu::train::recipe::Training;
use lavender_wgpu::train::rundir::RunDir;
use lavender_wgpu::vlm::Student;

use crate::support::{gpu, reference};
use crate::ten_steps::{compare_weights, config, run, store};

/// Whether a tensor is the weight of a linear layer that is quantised: written down here once more.
fn is_quantized(name: &str, shape: &[usize]) -> bool {
    let kept = ["embed_tokens", "position_embedding", "patch_embedding"];
    shape.len() == 2
        && name.ends_with(".weight")
        && !name.starts_with("lm_head")
        && !kept.iter().any(|part| name.contains(part))
}

/// The checkpoint at `from` with its tensors changed by `change`, in f32.
fn rewritten(
    from: &Path,
    to: &Path,
    change: impl Fn(&str, Vec<f32>, &[usize]) -> Vec<f32>,
) -> PathBuf {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "safetensors") {
            std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
    let checkpoint = Checkpoint::open(from, "model").unwrap();
    let tensors: Vec<(String, HostTensor)> = checkpoint
        .names()
        .map(|name| {
            let (values, shape) = checkpoint.values(name).unwrap();
            let values = change(name, values, &shape);
            (name.into(), HostTensor::float(DType::F32, &shape, &values))
        })
        .collect();
    save_safetensors(&to.join("model.safetensors"), &tensors, None).unwrap();
    to.to_path_buf()
}

fn dequantized(to: &Path, kind: Quantization) -> PathBuf {
    rewritten(
        &reference("smolvlm/a"),
        to,
        |name, values, shape| match is_quantized(name, shape) {
            true => QuantizedMatrix::from_f32(gpu(), &values, [shape[0], shape[1]], kind)
                .unwrap()
                .to_f32()
                .unwrap(),
            false => values,
        },
    )
}

/// Losses and final weights to 1e-4 relative: both runs see the same weights and differ in rounding at most.
fn against_the_dequantized_base(quantize: Quantize, adapter: &str) {
    let fixture = reference("train_smolvlm");
    let dir = tempfile::tempdir().unwrap();
    store(&fixture, &dir.path().join("targets"));
    let mut base = config("smolvlm", &fixture, dir.path());
    base.init.lora = Some(reference(adapter));
    let with = |name: &str, change: &dyn Fn(&mut Config)| {
        let mut config = base.clone();
        config.run.dir = Some(dir.path().join(name));
        change(&mut config);
        run(&config)
    };
    let plain = with("plain", &|_| {});
    let quantized = with("quantized", &|c| c.model.quantize = quantize);
    let model = dequantized(&dir.path().join("model"), quantize.kind().unwrap());
    let expected = with("dequantized", &|c| c.model.path = model.clone());
    let losses = |run: &RunDir| -> Vec<[f64; 4]> {
        let steps = metrics::read(run.metrics()).unwrap();
        let of = |m: &metrics::StepMetrics| [m.loss, m.lm_loss, m.attn_loss, m.grad_norm];
        steps.iter().map(of).collect()
    };
    let (found, wanted) = (losses(&quantized), losses(&expected));
    assert_eq!((found.len(), wanted.len()), (10, 10));
    for (step, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        for (found, wanted) in found.iter().zip(wanted) {
            assert!(
                (found - wanted).abs() <= 1e-4 * wanted.abs(),
                "step {step}: {found} found, {wanted} expected"
            );
        }
    }
    // And the base is really another one.
    assert!((found[0][1] / losses(&plain)[0][1] - 1.0).abs() > 1e-5);
    compare_weights(&quantized.lora(), &expected.lora(), "adapter_model", 1e-4);
    compare_weights(&quantized.aligner(), &expected.aligner(), "aligner", 3e-4);
    // A resumed run and `ask --lora` read how the base was held from the run.
    let (_, again, _) = RunDir::open(quantized.root()).unwrap();
    assert_eq!(again.model.quantize, quantize);
}

#[test]
fn q8_trains_as_its_dequantised_base_does() {
    against_the_dequantized_base(Quantize::Q8, "train_smolvlm/init");
}

/// With DoRA, which needs the lengths of the rows too.
#[test]
fn q4_trains_as_its_dequantised_base_does() {
    against_the_dequantized_base(Quantize::Q4, "strategies/dora");
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let options = LoadOptions {
        trainable: true,
        quantize: Some(Quantization::Q4),
        ..LoadOptions::default()
    };
    let error = Student::open(reference("smolvlm/a"), gpu(), options)
        .err()
        .expect("refused")
        .to_string();
    assert!(
        error.contains("would be trained") && error.contains("LoRA"),
        "{error}"
    );
    let dir = tempfile::tempdir().unwrap();
    let broken = "model.text_model.layers.1.mlp.up_proj.weight";
    let mut config = Config::default();
    config.model.quantize = Quantize::Q8;
    config.data.path = reference("train_smolvlm/data.jsonl");
    config.data.images = Some(reference("mllama/images"));
    config.model.path = rewritten(
        &reference("smolvlm/a"),
        dir.path(),
        |name, mut values, _| {
            if name == broken {
                values[7] = f32::NAN;
            }
            values
        },
    );
    let error = Training::new(gpu(), &config)
        .err()
        .expect("refused")
        .to_string();
    assert!(
        error.contains(broken) && error.contains("not finite") && error.contains("none"),
        "{error}"
    );
}

#[test]
fn quantize_is_a_key_of_the_configuration() {
    let set = |value: &str| Config::default().with(&[format!("model.quantize={value}")]);
    assert_eq!(set("q4").unwrap().model.quantize, Quantize::Q4);
    let text = set("q8").unwrap().to_toml().unwrap();
    assert_eq!(
        Config::parse(&text, "again", &[]).unwrap().model.quantize,
        Quantize::Q8
    );
    let error = set("int4").unwrap_err().to_string();
    assert!(error.contains("q8") && error.contains("q4"), "{error}");
}
