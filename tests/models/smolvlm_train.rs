//! Gradients through the whole of SmolVLM, with activations kept and recomputed; see
//! `tests/reference/train_smolvlm.py`. (Its ten steps are compared in `tests/train`.)

use std::collections::HashMap;

use lavender_wgpu::align::aligner::{Aligner, AlignerShape};
use lavender_wgpu::align::loss::{aligned, attention_loss};
use lavender_wgpu::align::maps::{SampleWords, word_maps};
use lavender_wgpu::align::options::{
    Aggregate, AlignerActivation, AlignerKind, AlignerNorm, LossKind,
};
use lavender_wgpu::align::words::{Case, word_tokens, words};
use lavender_wgpu::autograd::Var;
use lavender_wgpu::nn::{LoadOptions, LoraConfig, Parameter, load_lora};
use lavender_wgpu::tensor::Tensor;
use lavender_wgpu::vlm::processor::template::Message;
use lavender_wgpu::vlm::{Grid, Prepared, Student, Taps};
use serde_json::Value;

use crate::smolvlm_fixture::picture;
use crate::support::{gpu, reference};

fn json(path: &str) -> Value {
    let text = std::fs::read_to_string(reference(path)).expect("fixture");
    serde_json::from_str(&text).expect("JSON")
}

/// One sample with its matched words' tokens and targets.
struct Example {
    prepared: Prepared,
    words: SampleWords,
    targets: Vec<f32>,
}

fn examples(student: &Student) -> Vec<Example> {
    let lines = std::fs::read_to_string(reference("train_smolvlm/data.jsonl")).expect("fixture");
    let names = json("train_smolvlm/targets.json");
    let raw = std::fs::read(reference("train_smolvlm/targets.safetensors")).expect("fixture");
    let maps = safetensors::SafeTensors::deserialize(&raw).expect("fixture");
    let example = |line: &str| {
        let sample: Value = serde_json::from_str(line).expect("JSON");
        let text = |turn: usize, part: usize| {
            sample["messages"][turn]["content"][part]["text"]
                .as_str()
                .expect("a string")
                .to_string()
        };
        let id = sample["id"].as_str().expect("a string");
        let image = sample["image"]
            .as_str()
            .expect("a string")
            .trim_end_matches(".png");
        let turns = [
            Message::image_and_text(text(0, 1)),
            Message::text("assistant", text(1, 0)),
        ];
        let prepared = student.prepare(&picture(image), &turns).expect("fixture");
        let wanted: Vec<&str> = names[id]
            .as_array()
            .expect("a list")
            .iter()
            .filter_map(Value::as_str)
            .collect();
        let answer = &prepared.answers[0];
        let found: Vec<_> = word_tokens(&words(&answer.text, Case::Lower), &answer.spans)
            .into_iter()
            .filter(|word| wanted.contains(&word.text.as_str()))
            .collect();
        let words = SampleWords::new(&found);
        let bytes = maps.tensor(id).expect("fixture").data();
        let place = |word: &String| wanted.iter().position(|w| w == word).expect("filtered");
        let map = |word| {
            bytes[place(word) * 1024..][..1024]
                .iter()
                .map(|&b| f32::from(b) / 255.0)
        };
        let targets = words.words.iter().flat_map(map).collect();
        Example {
            prepared,
            words,
            targets,
        }
    };
    lines.lines().map(example).collect()
}

/// Language-model loss, attention loss and their gradient's sources for one batch.
fn losses(student: &Student, aligner: &Aligner, batch: &[&Example]) -> (Var, Var) {
    let longest = batch
        .iter()
        .map(|e| e.prepared.tokens())
        .max()
        .expect("samples");
    let (mut places, mut labels, mut rows, mut columns) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (b, example) in batch.iter().enumerate() {
        for (t, &label) in example
            .prepared
            .labels
            .iter()
            .enumerate()
            .filter(|(_, l)| **l != u32::MAX)
        {
            places.push((b * longest + t) as u32);
            labels.push(label);
        }
        rows.extend(
            example
                .words
                .rows
                .iter()
                .map(|row| (b * longest + row) as u32),
        );
        columns.extend(&example.prepared.columns);
    }
    let layers: Vec<usize> = (0..student.hooked_layers()).collect();
    let taps = Taps {
        layers: &layers,
        rows: Tensor::from_u32(gpu(), &rows, &[rows.len()]),
        columns: Tensor::from_u32(gpu(), &columns, &[batch.len(), columns.len() / batch.len()]),
        mirror: None,
    };
    let prepared: Vec<&Prepared> = batch.iter().map(|e| &e.prepared).collect();
    let output = student.forward(&prepared, Some(&taps)).expect("fixture");
    let hidden = output
        .hidden
        .reshape(&[batch.len() * longest, output.hidden.dim(2)]);
    let hidden = hidden.gather_rows(&Tensor::from_u32(gpu(), &places, &[places.len()]));
    let labels = Tensor::from_u32(gpu(), &labels, &[labels.len()]);
    let lm = student.logits(&hidden).cross_entropy(&labels, places.len());
    let grid = |e: &Example| e.prepared.grid;
    let samples: Vec<(&SampleWords, Grid)> = batch.iter().map(|e| (&e.words, grid(e))).collect();
    let maps: Vec<Var> = output
        .taps
        .iter()
        .map(|probs| word_maps(gpu(), probs, &samples).expect("words"))
        .collect();
    let words: Vec<usize> = batch.iter().map(|e| e.words.words.len()).collect();
    let maps = aligned(&maps, &words, &Aggregate::Learned.into(), aligner);
    let targets: Vec<f32> = batch
        .iter()
        .flat_map(|e| e.targets.iter().copied())
        .collect();
    let targets = Tensor::from_f32(gpu(), &targets, maps.shape());
    (
        lm,
        attention_loss(&maps, &Var::constant(targets), LossKind::Mse),
    )
}

/// Gradients of the whole loss of the first two samples, by parameter, and its value.
fn gradients(checkpointing: bool) -> (f32, Vec<(String, Vec<f32>)>) {
    let lora = LoraConfig {
        r: 4,
        alpha: 8.0,
        dropout: 0.0,
        target_modules: vec!["q_proj".into(), "v_proj".into()],
        ..LoraConfig::default()
    };
    let options = LoadOptions {
        lora: Some(lora),
        ..LoadOptions::default()
    };
    let mut student = Student::open(reference("smolvlm/a"), gpu(), options).expect("fixture");
    student.set_checkpointing(checkpointing);
    let init = reference("train_smolvlm/init");
    let rename = |name: &str| student.rename_lora(name);
    load_lora(&init, &student.parameters(), rename).expect("fixture");
    let file = init.join("aligner.safetensors");
    let shape = AlignerShape {
        kind: AlignerKind::Conv,
        channels: student.heads(),
        hidden: 32,
        norm: AlignerNorm::Instance,
        activation: AlignerActivation::Relu6,
    };
    let aligner = Aligner::open(gpu(), &file, shape).expect("fixture");
    let mut trained = student.parameters().all();
    trained.extend(aligner.parameters().all());
    let all = examples(&student);
    let (lm, attention) = losses(&student, &aligner, &[&all[0], &all[1]]);
    let loss = lm.add(&attention.scale(10.0));
    let value = loss.scalar().expect("readable");
    let gradients = loss.backward();
    let read = |p: &Parameter| {
        let gradient = gradients
            .get(&p.var)
            .unwrap_or_else(|| panic!("{}: none", p.name));
        (p.name.clone(), gradient.to_f32().expect("readable"))
    };
    (value, trained.iter().map(read).collect())
}

#[test]
fn recomputed_activations_give_the_same_gradients() {
    let (loss, kept) = gradients(false);
    let (same, recomputed) = gradients(true);
    assert_eq!(loss.to_bits(), same.to_bits());
    let step = &json("train_smolvlm/losses.json")["steps"][0];
    let wanted = step["loss"].as_f64().expect("a number") as f32;
    assert!(
        (loss - wanted).abs() < 1e-5 * wanted,
        "{loss} found, {wanted} expected"
    );
    let square =
        |(_, values): &(String, Vec<f32>)| values.iter().map(|v| f64::from(v * v)).sum::<f64>();
    let norm = kept.iter().map(square).sum::<f64>().sqrt();
    let wanted = step["grad_norm"].as_f64().expect("a number");
    assert!(
        (norm - wanted).abs() < 1e-4 * wanted,
        "norm {norm} found, {wanted} expected"
    );
    for ((name, kept), (_, recomputed)) in kept.iter().zip(&recomputed) {
        assert!(kept == recomputed, "{name}: other bits when recomputed");
    }
}

#[test]
fn words_are_matched_as_in_the_reference() {
    let student =
        Student::open(reference("smolvlm/a"), gpu(), LoadOptions::default()).expect("fixture");
    let found: HashMap<usize, Vec<String>> = examples(&student)
        .into_iter()
        .map(|e| e.words.words)
        .enumerate()
        .collect();
    assert_eq!(found[&0], ["green", "circle", "left"]);
    assert_eq!(found[&1], ["two", "squares"]);
    assert_eq!(found[&2], ["small", "triangle", "isn't"]);
    assert!(found[&3].is_empty());
}
