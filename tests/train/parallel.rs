//! Parallel and mirrored attention beyond ten steps: refusals, resume, generation; and the product of many layers.

use std::path::Path;

use lavender_wgpu::align::aligner::{Aligner, AlignerShape};
use lavender_wgpu::align::loss::aligned;
use lavender_wgpu::align::options::{
    Aggregate, AlignerActivation, AlignerKind, AlignerNorm, Parallel,
};
use lavender_wgpu::autograd::Var;
use lavender_wgpu::data::ImageRef;
use lavender_wgpu::nn::LoadOptions;
use lavender_wgpu::tensor::Tensor;
use lavender_wgpu::train::config::Config;
use lavender_wgpu::train::metrics::StepMetrics;
use lavender_wgpu::train::recipe::{Observer, Training};
use lavender_wgpu::train::rundir::RunDir;
use lavender_wgpu::vlm::processor::labels::Tail;
use lavender_wgpu::vlm::processor::template::Message;
use lavender_wgpu::vlm::{Pictures, Prepared, Sampling, Student};

use crate::support::{gpu, reference, rng, uniform};
use crate::ten_steps::{config, run, store};

fn with(config: &Config, sets: &[&str]) -> Result<Config, String> {
    let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
    config.clone().with(&sets).map_err(|e| e.to_string())
}

#[test]
fn what_does_not_go_together_is_refused_by_name() {
    let plain = Config::default();
    for (sets, wanted) in [
        (
            ["attention.parallel=map", "attention.mirror=true"],
            "mirror",
        ),
        (
            ["attention.aggregate=flow", "attention.parallel=diff"],
            "flow.sum",
        ),
        (
            ["attention.parallel=map", "control.aligner_only=true"],
            "aligner_only",
        ),
        (
            ["attention.mirror=false", "init.parallel=x"],
            "attention.parallel",
        ),
        (
            ["attention.mirror=false", "attention.parallel=dif"],
            "diff-output",
        ),
    ] {
        let error = with(&plain, &sets).expect_err(sets[1]);
        assert!(error.contains(wanted), "{error}");
    }
    let fixture = reference("train_mllama");
    let dir = tempfile::tempdir().unwrap();
    store(&fixture, &dir.path().join("targets"));
    let config = config("mllama", &fixture, dir.path());
    let config = with(&config, &["attention.mirror=true"]).unwrap();
    let error = Training::new(gpu(), &config).err().expect("refused");
    let error = error.to_string();
    assert!(
        error.contains("attention.mirror") && error.contains("cross-attention"),
        "{error}"
    );
}

struct Silent;

impl Observer for Silent {
    fn step(&mut self, _: &StepMetrics, _: u64) {}

    fn interrupted(&self) -> bool {
        false
    }
}

/// Bytes of what a run leaves of its trained tensors.
fn left(run: &RunDir) -> [Vec<u8>; 3] {
    let files = [
        "lora/adapter_model.safetensors",
        "aligner.safetensors",
        "parallel.safetensors",
    ];
    files.map(|file| std::fs::read(run.root().join(file)).expect(file))
}

#[test]
fn a_run_with_parallel_attention_resumes_bit_equal_and_starts_another() {
    let fixture = reference("train_smolvlm");
    let dir = tempfile::tempdir().unwrap();
    store(&fixture, &dir.path().join("targets"));
    let base = config("smolvlm", &fixture, dir.path());
    let of = |name: &str, more: &[&str]| {
        let mut config = with(&base, &["attention.parallel=diff-output", "train.steps=4"]).unwrap();
        config = with(&config, &["train.checkpoint_activations=true"]).unwrap();
        config = with(&config, more).unwrap();
        config.run.dir = Some(dir.path().join(name));
        config
    };
    let whole = run(&of("whole", &[]));
    let part = run(&of("part", &["train.steps=2"]));
    let (part, _, checkpoint) = RunDir::open(part.root()).unwrap();
    let mut training = Training::new(gpu(), &of("part", &[])).unwrap();
    training.restore(&checkpoint.expect("whole")).unwrap();
    training.run(gpu(), &part, &mut Silent).unwrap();
    assert!(left(&whole) == left(&part), "a resumed run");
    // Its projections begin another run.
    let file = whole.root().join("parallel.safetensors");
    let again = of(
        "again",
        &[
            &format!("init.parallel={}", file.display()),
            "optimizer.lr=1e-30",
        ],
    );
    let again = run(&again);
    assert!(
        left(&again)[2] == left(&whole)[2],
        "loaded and hardly moved"
    );
    let missing = of("missing", &["init.parallel=nowhere.safetensors"]);
    let error = Training::new(gpu(), &missing)
        .err()
        .expect("refused")
        .to_string();
    assert!(
        error.contains("nowhere.safetensors: no such file"),
        "{error}"
    );
}

/// `prompt` with more tokens at its end.
fn longer(prompt: &Prepared, tokens: &[u32]) -> Prepared {
    let mut prompt = prompt.clone();
    prompt.ids.extend(tokens);
    if let Pictures::Mllama(inner) = &mut prompt.pictures {
        inner.encoded.ids.clone_from(&prompt.ids);
        let last = *inner.image_bits.last().unwrap();
        inner.image_bits.resize(prompt.ids.len(), last);
    }
    prompt
}

#[test]
fn generation_with_a_parallel_output_says_what_the_whole_sequence_says() {
    let picture = ImageRef::Path(reference("mllama/images/rgba.png"))
        .open()
        .unwrap();
    for family in ["smolvlm", "mllama"] {
        let dir = reference(&format!("{family}/a"));
        let open = || Student::open(Path::new(&dir), gpu(), LoadOptions::default()).unwrap();
        let mut student = open();
        let layers: Vec<usize> = (0..student.hooked_layers()).collect();
        let parameters = student
            .add_parallel(Parallel::DiffOutput, &layers, None, 1)
            .unwrap();
        let turns = [Message::image_and_text("What is there?")];
        let prompt = student.prepare_with(
            std::slice::from_ref(&picture),
            &turns,
            Tail::GenerationPrompt,
        );
        let prompt = prompt.unwrap();
        // New values are zero: the model is what it was.
        let plain = open().prompt_logits(&prompt).unwrap();
        assert_eq!(student.prompt_logits(&prompt).unwrap(), plain, "{family}");
        for value in parameters
            .all()
            .iter()
            .filter(|p| p.name.contains("v_proj"))
        {
            let value = value.var.value();
            value.write_f32(&uniform(&mut rng(2), value.elements()));
        }
        let generated = student.generate(&prompt, 5, Sampling::default(), &mut |_, _| {});
        let tokens = generated.unwrap().tokens;
        let logits = student.prompt_logits(&longer(&prompt, &tokens)).unwrap();
        let change = logits.iter().zip(&plain).map(|(a, b)| (a - b).abs());
        assert!(
            change.fold(0.0, f32::max) > 0.1,
            "{family}: the output is read"
        );
        let rows = logits
            .chunks(student.vocabulary())
            .skip(prompt.ids.len() - 1);
        let likeliest = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        let said: Vec<u32> = rows.map(|row| likeliest(row).unwrap() as u32).collect();
        assert_eq!(said[..tokens.len()], tokens, "{family}");
    }
}

#[test]
fn the_flow_of_forty_layers_of_small_probabilities_neither_vanishes_nor_flattens() {
    let (words, heads, layers) = (2, 2, 40);
    let shape = [words, 32, 32, heads];
    let mut rng = rng(3);
    let values: Vec<Vec<f32>> = (0..layers)
        .map(|_| {
            let values = uniform(&mut rng, words * 1024 * heads);
            values.iter().map(|v| 1e-4 * (1.1 + v)).collect()
        })
        .collect();
    let shape_of = AlignerShape {
        kind: AlignerKind::None,
        channels: heads,
        hidden: 1,
        norm: AlignerNorm::Instance,
        activation: AlignerActivation::Relu6,
    };
    let none = Aligner::new(gpu(), shape_of, 0).unwrap();
    let leaf = |v: &Vec<f32>| Var::parameter(Tensor::from_f32(gpu(), v, &shape));
    let leaves: Vec<Var> = values.iter().map(leaf).collect();
    let maps = aligned(&leaves, &[words], &Aggregate::Flow.into(), &none);
    let found = maps.value().to_f32().unwrap();
    for word in 0..words {
        let product = |i: usize| -> f64 {
            let logs = values.iter().map(|v| f64::from(v[i]).ln());
            logs.sum::<f64>().exp()
        };
        let pixel = |p: usize| {
            (0..heads)
                .map(|h| product((word * 1024 + p) * heads + h))
                .sum()
        };
        let wanted: Vec<f64> = (0..1024).map(pixel).collect();
        let (low, high) = (
            wanted.iter().copied().fold(f64::MAX, f64::min),
            wanted.iter().copied().fold(0.0, f64::max),
        );
        for (found, wanted) in found[word * 1024..][..1024].iter().zip(&wanted) {
            let wanted = (wanted - low) / (high - low);
            // Forty roundings, and the min-max's epsilon.
            assert!(
                (f64::from(*found) - wanted).abs() < 2e-5,
                "{found} {wanted}"
            );
        }
    }
    let gradients = maps.square().mean_all().backward();
    let first = gradients.get(&leaves[0]).unwrap().to_f32().unwrap();
    assert!(first.iter().all(|g| g.is_finite()) && first.iter().any(|g| g.abs() > 1e-3));
}
