//! SmolVLM and Idefics3 against transformers on two tiny random checkpoints; see
//! `tests/reference/smolvlm.py`.

use lavender_wgpu::autograd::no_grad;
use lavender_wgpu::nn::{LoadOptions, Loader};
use lavender_wgpu::tensor::{Checkpoint, DType, Tensor};
use lavender_wgpu::vlm::idefics3::{Idefics3, Idefics3Config};
use lavender_wgpu::vlm::processor::labels::Tail;
use lavender_wgpu::vlm::{Prepared, Sampling, Student, Taps};
use serde_json::Value;

use crate::smolvlm_fixture::{expected, messages, numbers, picture, strings};
use crate::support::{gpu, reference};

/// Largest difference allowed, relative to the largest expected value: f32 sums in another order.
const TOLERANCE: f32 = 1e-4;

#[track_caller]
fn assert_near(what: &str, actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (at, (a, e)) in actual.iter().zip(expected).enumerate() {
        // Also false for NaN.
        let near = (a - e).abs() <= TOLERANCE * largest;
        assert!(
            near,
            "{what}[{at}]: {a} found, {e} expected, largest {largest}"
        );
    }
}

fn student(name: &str) -> Student {
    let dir = reference(&format!("smolvlm/{name}"));
    Student::open(dir, gpu(), LoadOptions::default()).expect("fixture")
}

fn stored(name: &str) -> Checkpoint {
    let path = reference(&format!("smolvlm/{name}/expected.safetensors"));
    Checkpoint::open(&path, "expected").expect("fixture")
}

fn cases(name: &str) -> Vec<Value> {
    expected(name)["cases"].as_array().expect("a list").clone()
}

fn prepare(student: &Student, case: &Value, tail: Tail<'_>) -> Prepared {
    let pictures: Vec<_> = strings(&case["images"]).into_iter().map(picture).collect();
    let chat = messages(case, tail == Tail::None);
    student
        .prepare_with(&pictures, &chat, tail)
        .expect("fixture")
}

#[test]
fn pictures_are_encoded_as_published() {
    for name in ["a", "b"] {
        let dir = reference(&format!("smolvlm/{name}"));
        let config = Idefics3Config::load(&dir).expect("fixture");
        let weights = Checkpoint::open(&dir, "model").expect("fixture");
        let loader = Loader::new(gpu(), weights, LoadOptions::default());
        let model = Idefics3::load(&config, &loader).expect("fixture");
        let processor = crate::idefics3_processor::processor(name);
        for case in cases(name) {
            let images = strings(&case["images"]);
            let tiles: Vec<_> = images
                .iter()
                .map(|image| processor.split.tiles(&picture(image)))
                .collect();
            if tiles.is_empty() {
                continue;
            }
            let states = no_grad(|| model.encode(tiles.iter(), false));
            let all = states.value().to_f32().expect("readable");
            let label = case["name"].as_str().expect("a string");
            let (wanted, _) = stored(name)
                .values(&format!("{label}.features"))
                .expect("fixture");
            // The fixture keeps about 24 rows, evenly spaced.
            let step = (states.dim(0) / 24).max(1);
            let kept: Vec<f32> = all
                .chunks_exact(states.dim(1))
                .step_by(step)
                .flatten()
                .copied()
                .collect();
            assert_near(&format!("{name} {label}"), &kept, &wanted);
        }
    }
}

#[test]
fn prompt_logits_are_transformers() {
    for name in ["a", "b"] {
        let student = student(name);
        for case in cases(name) {
            let label = case["name"].as_str().expect("a string");
            let prompt = prepare(&student, &case, Tail::GenerationPrompt);
            let logits = student.prompt_logits(&prompt).expect("readable");
            assert_eq!(logits.len(), prompt.tokens() * student.vocabulary());
            let (wanted, _) = stored(name)
                .values(&format!("{label}.logits"))
                .expect("fixture");
            // All rows of one case, the last ones of the others.
            let last = &logits[logits.len() - wanted.len()..];
            assert_near(&format!("{name} {label}"), last, &wanted);
        }
    }
}

#[test]
fn greedy_tokens_with_a_cache_are_transformers() {
    for name in ["a", "b"] {
        let student = student(name);
        for case in cases(name) {
            let prompt = prepare(&student, &case, Tail::GenerationPrompt);
            let wanted = numbers(&case["generated"]);
            let mut seen = Vec::new();
            let mut on_token = |token: u32, _: &str| seen.push(token);
            let sampling = Sampling::default();
            let out = student
                .generate(&prompt, wanted.len(), sampling, &mut on_token)
                .expect("generates");
            // The fixture goes on past an end of turn; the student stops at it.
            assert_eq!(
                out.tokens,
                wanted[..out.tokens.len()],
                "{name} {}",
                case["name"]
            );
            assert!(out.finished || out.tokens.len() == wanted.len());
            assert_eq!(seen, out.tokens);
        }
    }
}

#[test]
fn word_maps_are_transformers() {
    for name in ["a", "b"] {
        let student = student(name);
        for case in cases(name)
            .iter()
            .filter(|case| strings(&case["images"]).len() == 1)
        {
            let answer = format!(" {}", case["answer"].as_str().expect("a string"));
            let sample = prepare(&student, case, Tail::Answer(&answer));
            let words: Vec<Vec<Vec<u32>>> = case["words"]
                .as_array()
                .expect("a list")
                .iter()
                .map(|word| serde_json::from_value(word["rows"].clone()).expect("rows"))
                .collect();
            let rows: Vec<u32> = words.iter().flatten().flatten().copied().collect();
            let layers: Vec<usize> = (0..student.hooked_layers()).collect();
            let columns = sample.columns.len();
            assert_eq!(columns, sample.grid.height * sample.grid.width);
            let taps = Taps {
                layers: &layers,
                rows: Tensor::from_u32(gpu(), &rows, &[rows.len()]),
                columns: Tensor::from_u32(gpu(), &sample.columns, &[1, columns]),
                mirror: None,
            };
            let output = no_grad(|| student.forward(&[&sample], Some(&taps))).expect("fixture");
            assert_eq!(output.taps.len(), layers.len());
            let mut maps = Vec::new();
            for probs in &output.taps {
                assert_eq!(probs.shape(), [rows.len(), student.heads(), columns]);
                let probs = probs.value().to_f32().expect("readable");
                for head in 0..student.heads() {
                    let mut row = 0;
                    for word in &words {
                        let mut map = vec![0.0; columns];
                        for occurrence in word {
                            for _ in occurrence {
                                let own =
                                    &probs[(row * student.heads() + head) * columns..][..columns];
                                let weight = 1.0 / (occurrence.len() * word.len()) as f32;
                                map.iter_mut().zip(own).for_each(|(m, p)| *m += weight * p);
                                row += 1;
                            }
                        }
                        maps.extend(map);
                    }
                }
            }
            let label = case["name"].as_str().expect("a string");
            let (wanted, _) = stored(name)
                .values(&format!("{label}.maps"))
                .expect("fixture");
            assert_near(&format!("{name} {label}"), &maps, &wanted);
        }
    }
}

#[test]
fn a_padded_batch_has_the_loss_of_transformers() {
    for name in ["a", "b"] {
        let student = student(name);
        let all = cases(name);
        let batch = &expected(name)["batch"];
        let samples: Vec<Prepared> = strings(&batch["cases"])
            .into_iter()
            .map(|label| {
                all.iter()
                    .find(|case| case["name"] == label)
                    .expect("fixture")
            })
            .map(|case| prepare(&student, case, Tail::None))
            .collect();
        let refs: Vec<&Prepared> = samples.iter().collect();
        let longest = samples.iter().map(Prepared::tokens).max().expect("samples");
        let (mut rows, mut labels) = (Vec::new(), Vec::new());
        for (sample, prepared) in samples.iter().enumerate() {
            for (at, &label) in prepared
                .labels
                .iter()
                .enumerate()
                .filter(|(_, l)| **l != u32::MAX)
            {
                rows.push((sample * longest + at) as u32);
                labels.push(label);
            }
        }
        let count = rows.len();
        assert_eq!(count, samples.iter().map(Prepared::learned).sum::<usize>());
        let loss = no_grad(|| {
            let hidden = student.forward(&refs, None).expect("fixture").hidden;
            let flat = hidden.reshape(&[hidden.dim(0) * hidden.dim(1), hidden.dim(2)]);
            let rows = flat.gather_rows(&Tensor::from_u32(gpu(), &rows, &[count]));
            let labels = Tensor::from_u32(gpu(), &labels, &[count]);
            student
                .logits(&rows)
                .cross_entropy(&labels, count)
                .scalar()
                .expect("readable")
        });
        let wanted = batch["loss"].as_f64().expect("a number") as f32;
        assert!(
            (loss - wanted).abs() <= TOLERANCE * wanted,
            "{name}: {loss} found, {wanted} expected"
        );
    }
}

#[test]
fn what_a_model_cannot_read_is_refused_by_name() {
    let open = |dir: &std::path::Path| {
        Student::open(dir, gpu(), LoadOptions::default())
            .err()
            .expect("refused")
            .to_string()
    };
    let dir = tempfile::tempdir().expect("a directory");
    assert!(open(dir.path()).contains("config.json"));
    std::fs::write(dir.path().join("config.json"), r#"{"model_type": "llava"}"#).expect("writable");
    let text = open(dir.path());
    assert!(text.contains("`model_type`: \"llava\" found"), "{text}");
    let student = student("a");
    let long = vec![lavender_wgpu::vlm::processor::template::Message::text(
        "user",
        "a circle ".repeat(600),
    )];
    let text = student
        .prepare_with(&[], &long, Tail::GenerationPrompt)
        .expect_err("refused")
        .to_string();
    assert!(text.contains("expected at most 512"), "{text}");
    let text = student
        .prepare_with(&[picture("wide")], &long, Tail::None)
        .expect_err("refused")
        .to_string();
    assert!(text.contains("0 image parts"), "{text}");
}

#[test]
fn half_precision_activations_stay_close() {
    if !gpu().tier().f16 {
        return;
    }
    let options = LoadOptions {
        activations: DType::F16,
        ..LoadOptions::default()
    };
    for name in ["a", "b"] {
        let half = Student::open(
            reference(&format!("smolvlm/{name}")),
            gpu(),
            options.clone(),
        )
        .expect("fixture");
        let case = &cases(name)[0];
        let logits = half
            .prompt_logits(&prepare(&half, case, Tail::GenerationPrompt))
            .expect("readable");
        let (wanted, _) = stored(name).values("wide.logits").expect("fixture");
        let last = &logits[logits.len() - wanted.len()..];
        let error: f32 = last.iter().zip(&wanted).map(|(a, e)| (a - e).powi(2)).sum();
        let norm: f32 = wanted.iter().map(|e| e * e).sum();
        // f16 rounds to 4.9e-4 at each of some twenty operations along the way.
        assert!(
            (error / norm).sqrt() < 1e-2,
            "{name}: {} of the norm off",
            (error / norm).sqrt()
        );
    }
}
