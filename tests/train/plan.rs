//! The plan of a run against the run's own parts.

use lavender_wgpu::align::aligner::{Aligner, AlignerShape};
use lavender_wgpu::align::options::{Aggregate, AlignerKind};
use lavender_wgpu::nn::{Freeze, LoadOptions, LoraConfig, Parameters};
use lavender_wgpu::tensor::DType;
use lavender_wgpu::train::config::{Config, Mode};
use lavender_wgpu::train::plan::Plan;
use lavender_wgpu::vlm::Student;

use crate::support::{gpu, reference};

fn elements(parameters: &Parameters) -> u64 {
    let of = |shape: &[usize]| shape.iter().product::<usize>() as u64;
    parameters.all().iter().map(|p| of(p.var.shape())).sum()
}

fn plan(config: &Config) -> Plan {
    Plan::new(config, DType::F32, None).unwrap()
}

#[test]
fn what_is_trained_is_counted_without_loading_it() {
    for model in ["smolvlm/a", "mllama/b"] {
        let mut config = Config::default();
        config.model.path = reference(model);
        config.train.freeze = vec!["layers.0-1".into(), "connector".into()];
        for mode in [Mode::Lora, Mode::Full] {
            config.train.mode = mode;
            let lora = LoraConfig {
                r: config.lora.r,
                target_modules: config.lora.target_modules.clone(),
                ..LoraConfig::default()
            };
            let options = LoadOptions {
                trainable: mode == Mode::Full,
                lora: (mode == Mode::Lora).then_some(lora),
                freeze: Freeze(config.train.freeze.clone()),
                ..LoadOptions::default()
            };
            let student = Student::open(&config.model.path, gpu(), options).unwrap();
            let found = plan(&config).estimate.trained;
            assert_eq!(found, elements(&student.parameters()), "{model} {mode:?}");
        }
    }
}

#[test]
fn the_aligner_is_counted_without_making_it() {
    let mut config = Config::default();
    config.model.path = reference("smolvlm/a");
    config.aligner.hidden = 6;
    for kind in [
        AlignerKind::Conv,
        AlignerKind::Light,
        AlignerKind::Deep,
        AlignerKind::Mlp,
        AlignerKind::None,
    ] {
        for aggregate in [Aggregate::Learned, Aggregate::MaxMax] {
            config.aligner.kind = kind;
            config.attention.aggregate = aggregate;
            let shape = AlignerShape {
                kind,
                // The model has four heads.
                channels: config.aggregation().channels(4),
                hidden: config.aligner.hidden,
                norm: config.aligner.norm,
                activation: config.aligner.activation,
            };
            let aligner = Aligner::new(gpu(), shape, 0).unwrap();
            let found = plan(&config).estimate.aligner;
            assert_eq!(
                found,
                elements(aligner.parameters()),
                "{kind:?} {aggregate:?}"
            );
        }
    }
}

#[test]
fn a_step_computes_what_its_parts_do() {
    let mut config = Config::default();
    config.model.path = reference("recipes/SmolVLM-256M-Instruct");
    config.train.freeze = vec!["vision".into(), "connector".into()];
    let one = plan(&config).operations;
    // By hand, of 4 samples: the encoder's 12 layers (7,077,888 weights each, 17 x 1024 patches that see 1024) and its
    // patch embedding forward; the connector likewise; the decoder's 30 layers (3,538,944 weights) forward and back to
    // their input, and its attention (17 x 64 image tokens, 40 around them, 96 of text; half of them seen).
    let (patches, tokens) = (4 * 17 * 1024, 4 * (17 * 64 + 40 + 96));
    let vision = 12 * (2 * 7_077_888 * patches + 4 * patches * 1024 * 768);
    let entry = 2 * 589_824 * patches + 2 * 7_077_888 * (patches / 16);
    let text = 30 * (4 * 3_538_944 * tokens + 14 * tokens * (tokens / 8) * 576);
    let head = 4 * 49_280 * 576 * 4 * 48;
    let by_hand: u64 = vision + entry + text + head;
    // LoRA and the aligner are not in it.
    let ratio = one as f64 / by_hand as f64;
    assert!((1.0..1.1).contains(&ratio), "{one}, {by_hand} by hand");

    config.train.accumulate = 2;
    assert_eq!(plan(&config).operations, 2 * one);
    config.train.accumulate = 1;
    config.train.batch = 8;
    assert_eq!(plan(&config).operations, 2 * one);
    config.train.freeze.clear();
    assert!(plan(&config).operations > 3 * one, "the encoder's backward");
}
