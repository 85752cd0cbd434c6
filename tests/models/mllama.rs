//! Llama-3.2-Vision against transformers on two tiny random checkpoints; see `tests/reference/mllama.py`.

use lavender_wgpu::autograd::{Var, no_grad};
use lavender_wgpu::data::ImageRef;
use lavender_wgpu::nn::{LoadOptions, Loader, LoraConfig};
use lavender_wgpu::ops::attention_tap::AttentionTap;
use lavender_wgpu::tensor::{Checkpoint, Tensor};
use lavender_wgpu::vlm::mllama::{Mllama, MllamaConfig, MllamaInput, canonical};
use lavender_wgpu::vlm::mllama_processor::{MllamaProcessor, MllamaPrompt};
use lavender_wgpu::vlm::processor::labels::Tail;
use lavender_wgpu::vlm::processor::template::Message;
use lavender_wgpu::vlm::{Sampling, Student};
use serde_json::Value;

use crate::support::{gpu, reference};

/// Largest difference allowed, relative to the largest expected value: f32 sums in another order.
const TOLERANCE: f32 = 1e-4;

struct Fixture {
    model: Mllama,
    loader: Loader,
    processor: MllamaProcessor,
    json: Value,
    tensors: Checkpoint,
}

fn fixture(name: &str, options: LoadOptions) -> Fixture {
    let dir = reference(&format!("mllama/{name}"));
    let config = MllamaConfig::load(&dir).unwrap();
    let weights = Checkpoint::open(&dir, "model").unwrap().rename(canonical);
    let loader = Loader::new(gpu(), weights, options);
    let text = std::fs::read_to_string(dir.join("expected.json")).unwrap();
    Fixture {
        model: Mllama::load(&config, &loader).unwrap(),
        loader,
        processor: MllamaProcessor::load(&dir).unwrap(),
        json: serde_json::from_str(&text).unwrap(),
        tensors: Checkpoint::open(&dir.join("expected.safetensors"), "expected").unwrap(),
    }
}

impl Fixture {
    fn prompt(&self, case: &Value, key: &str) -> MllamaPrompt {
        let picture = |name: &Value| {
            let name = name.as_str().unwrap();
            ImageRef::Path(reference(&format!("mllama/images/{name}.png")))
                .open()
                .unwrap()
        };
        let pictures: Vec<_> = case["images"]
            .as_array()
            .unwrap()
            .iter()
            .map(picture)
            .collect();
        self.processor
            .text(case[key].as_str().unwrap(), &pictures)
            .unwrap()
    }

    fn case(&self, name: &str) -> &Value {
        self.json["cases"]
            .as_array()
            .unwrap()
            .iter()
            .find(|case| case["name"] == name)
            .unwrap()
    }

    fn logits(&self, prompt: &MllamaPrompt) -> Vec<f32> {
        no_grad(|| {
            let (hidden, _) = self.model.forward(&[prompt.into()], &[], None);
            self.model.logits(&hidden).value().to_f32().unwrap()
        })
    }
}

#[track_caller]
fn assert_near(what: &str, actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let gap = actual
        .iter()
        .zip(expected)
        .map(|(a, e)| (a - e).abs())
        .fold(0.0f32, f32::max);
    // `gap <= …` is false for NaN, which `fold` with `max` would lose.
    assert!(actual.iter().all(|v| v.is_finite()), "{what}: not finite");
    assert!(
        gap <= TOLERANCE * largest,
        "{what}: {gap} apart, largest value {largest}"
    );
}

fn ids(json: &Value) -> Vec<u32> {
    json.as_array()
        .unwrap()
        .iter()
        .map(|v| v.as_u64().unwrap() as u32)
        .collect()
}

#[test]
fn pictures_are_encoded_as_published() {
    for name in ["a", "b"] {
        let f = fixture(name, LoadOptions::default());
        for case in ["wide", "two"] {
            let prompt = f.prompt(f.case(case), "prompt");
            let pictures: Vec<_> = prompt.images.iter().map(Some).collect();
            let states = no_grad(|| f.model.encode(&pictures, false));
            // The fixture keeps every fifth token of each tile.
            let (expected, shape) = f.tensors.values(&format!("{case}.vision")).unwrap();
            let vision = &f.model.config().vision;
            let (tokens, width) = (vision.tokens(), states.shape()[2]);
            let all = states.value().to_f32().unwrap();
            let rows = all.chunks_exact(width).enumerate();
            let kept: Vec<f32> = rows
                .filter(|(row, _)| row % tokens % 5 == 0)
                .flat_map(|(_, row)| row.iter().copied())
                .collect();
            assert_eq!(shape[0], pictures.len() * vision.max_tiles);
            assert_near(&format!("{name} {case}"), &kept, &expected);
        }
    }
}

#[test]
fn prompt_logits_are_transformers() {
    for name in ["a", "b"] {
        let f = fixture(name, LoadOptions::default());
        for case in f.json["cases"].as_array().unwrap() {
            let label = case["name"].as_str().unwrap();
            let logits = f.logits(&f.prompt(case, "prompt"));
            let (expected, _) = f.tensors.values(&format!("{label}.logits")).unwrap();
            // All rows of one case, the last ones of the others.
            assert_near(
                &format!("{name} {label}"),
                &logits[logits.len() - expected.len()..],
                &expected,
            );
        }
    }
}

#[test]
fn greedy_tokens_with_a_cache_are_transformers() {
    for name in ["a", "b"] {
        let f = fixture(name, LoadOptions::default());
        for case in f.json["cases"].as_array().unwrap() {
            let prompt = f.prompt(case, "prompt");
            let wanted = ids(&case["generated"]);
            let vocabulary = f.model.config().vocabulary;
            let last = |hidden: &Var| {
                let mut logits = f.model.logits(hidden).value().to_f32().unwrap();
                logits.split_off(logits.len() - vocabulary)
            };
            let (mut hidden, mut cache) = no_grad(|| f.model.prefill(MllamaInput::from(&prompt)));
            let mut generated = Vec::new();
            while generated.len() < wanted.len() {
                let logits = last(&hidden);
                let best = (0..vocabulary).max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
                generated.push(best.unwrap() as u32);
                hidden = no_grad(|| f.model.decode(generated[generated.len() - 1], &mut cache));
            }
            assert_eq!(generated, wanted, "{name} {}", case["name"]);
            assert_eq!(cache.tokens(), prompt.encoded.ids.len() + wanted.len());
        }
    }
}

/// Text rows and weights of a case's words: rows in order, and per word (row index, weight).
fn word_rows(case: &Value) -> (Vec<u32>, Vec<Vec<(usize, f32)>>) {
    let (mut rows, mut words) = (Vec::new(), Vec::new());
    for word in case["words"].as_array().unwrap() {
        let occurrences = word["rows"].as_array().unwrap();
        let mut weights = Vec::new();
        for occurrence in occurrences {
            let tokens = ids(occurrence);
            for &row in &tokens {
                weights.push((rows.len(), 1.0 / (tokens.len() * occurrences.len()) as f32));
                rows.push(row);
            }
        }
        words.push(weights);
    }
    (rows, words)
}

#[test]
fn word_maps_are_eager_attention_without_class_tokens() {
    for name in ["a", "b"] {
        let f = fixture(name, LoadOptions::default());
        let layers = f.model.config().cross_layers.clone();
        for label in ["one", "wide", "tall"] {
            let case = f.case(label);
            let prompt = f.prompt(case, "full");
            let (rows, words) = word_rows(case);
            let (columns, map) = f.model.config().map_columns(&prompt.images[0], 0);
            let count = columns.len();
            let tap = AttentionTap {
                query_rows: Tensor::from_u32(gpu(), &rows, &[rows.len()]),
                key_columns: Tensor::from_u32(gpu(), &columns, &[1, count]),
            };
            let hooked: Vec<usize> = (0..layers.len()).collect();
            let (_, tapped) = no_grad(|| f.model.forward(&[(&prompt).into()], &hooked, Some(&tap)));
            assert_eq!(tapped.len(), layers.len());
            // [layers, heads, words, h, w] from [rows, heads, columns] per layer.
            let heads = f.model.config().heads;
            let mut maps = Vec::new();
            for probs in &tapped {
                let values = probs.value().to_f32().unwrap();
                for head in 0..heads {
                    for weights in &words {
                        maps.extend((0..count).map(|column| -> f32 {
                            let at = |row: usize| values[(row * heads + head) * count + column];
                            weights.iter().map(|&(row, weight)| weight * at(row)).sum()
                        }));
                    }
                }
            }
            let (expected, shape) = f.tensors.values(&format!("{label}.maps")).unwrap();
            assert_eq!(
                shape,
                [layers.len(), heads, words.len(), map.height, map.width]
            );
            assert_near(&format!("{name} {label}"), &maps, &expected);
            if label != "wide" {
                continue;
            }
            // Mean over layers and heads, resized bilinearly to 32 x 32.
            let planes = layers.len() * heads;
            let stacked =
                Tensor::from_f32(gpu(), &maps, &[planes, words.len(), map.height, map.width]);
            let mean = Var::constant(stacked).mean(&[0], false);
            let mean = mean
                .reshape(&[words.len(), map.height, map.width, 1])
                .resize_bilinear(32, 32);
            let (expected, _) = f.tensors.values("wide.mean").unwrap();
            assert_near(
                &format!("{name} mean"),
                &mean.value().to_f32().unwrap(),
                &expected,
            );
        }
    }
}

/// Loss of the fixture's padded batch, its taps' probabilities and the gradients of all LoRA factors.
fn batch_loss(f: &Fixture) -> (f32, Vec<f32>, Vec<Vec<f32>>) {
    let cases: Vec<&str> = f.json["batch"]["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c.as_str().unwrap())
        .collect();
    let prompts: Vec<_> = cases
        .iter()
        .map(|case| f.prompt(f.case(case), "full"))
        .collect();
    let inputs: Vec<_> = prompts.iter().map(MllamaInput::from).collect();
    let tokens = prompts.iter().map(|p| p.encoded.ids.len()).max().unwrap();
    let mut labels = Vec::new();
    for row in f.json["batch"]["labels"].as_array().unwrap() {
        // Row t predicts token t + 1; -100 is "not learned".
        let row: Vec<u32> = row
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_i64().unwrap().max(-1) as u32)
            .collect();
        assert_eq!(row.len(), tokens);
        labels.extend(row[1..].iter().copied().chain([u32::MAX]));
    }
    let counted = labels.iter().filter(|&&label| label != u32::MAX).count();
    let columns: Vec<u32> = prompts
        .iter()
        .flat_map(|p| f.model.config().map_columns(&p.images[0], 0).0[..16].to_vec())
        .collect();
    let rows = [tokens as u32 - 9, tokens as u32 + 20];
    let tap = AttentionTap {
        query_rows: Tensor::from_u32(gpu(), &rows, &[2]),
        key_columns: Tensor::from_u32(gpu(), &columns, &[2, 16]),
    };
    let hooked: Vec<usize> = (0..f.model.config().cross_layers.len()).collect();
    let (hidden, tapped) = f.model.forward(&inputs, &hooked, Some(&tap));
    let logits = f.model.logits(&hidden);
    let n = logits.value().elements() / f.model.config().vocabulary;
    let logits = logits.reshape(&[n, f.model.config().vocabulary]);
    let loss = logits.cross_entropy(&Tensor::from_u32(gpu(), &labels, &[n]), counted);
    let (value, probs) = (loss.scalar().unwrap(), tapped[0].value().to_f32().unwrap());
    let mapped = tapped
        .iter()
        .map(|p| p.square().sum_all())
        .reduce(|a, b| a.add(&b))
        .unwrap();
    let gradients = loss.add(&mapped).backward();
    let read = |p: &lavender_wgpu::nn::Parameter| match gradients.get(&p.var) {
        Some(grad) => grad.to_f32().unwrap(),
        None => panic!("{} has no gradient", p.name),
    };
    (
        value,
        probs,
        f.loader.parameters().all().iter().map(read).collect(),
    )
}

fn adapted() -> LoadOptions {
    let target_modules = vec!["q_proj".into(), "v_proj".into()];
    LoadOptions {
        lora: Some(LoraConfig {
            r: 4,
            alpha: 8.0,
            dropout: 0.0,
            target_modules,
            ..LoraConfig::default()
        }),
        ..Default::default()
    }
}

#[test]
fn a_padded_batch_has_transformers_loss_and_checkpointing_the_same_gradients() {
    for name in ["a", "b"] {
        let mut f = fixture(name, adapted());
        let expected = f.json["batch"]["loss"].as_f64().unwrap() as f32;
        // B is zero at first, which would hide the gradients of A.
        for p in f.loader.parameters().all() {
            assert!(p.name.starts_with("model."), "{}", p.name);
        }
        let (loss, _, _) = batch_loss(&f);
        assert!(
            (loss - expected).abs() <= TOLERANCE * expected,
            "{name}: {loss} {expected}"
        );
        for (seed, p) in f.loader.parameters().all().iter().enumerate() {
            let values: Vec<f32> = (0..p.var.value().elements())
                .map(|i| ((i * 37 + seed * 11) % 19) as f32 / 95.0 - 0.09)
                .collect();
            p.var.value().write_f32(&values);
        }
        let (loss, probs, gradients) = batch_loss(&f);
        // The picture encoder's factors too: their gradients come through the cross-attention states.
        let vision = f
            .loader
            .parameters()
            .all()
            .iter()
            .filter(|p| p.name.contains("vision_model"))
            .count();
        assert!(
            vision > 0 && gradients.iter().all(|g| g.iter().any(|&v| v != 0.0)),
            "{name}"
        );
        f.model.checkpointing = true;
        let (again, probs_again, recomputed) = batch_loss(&f);
        assert_eq!(
            (loss, probs),
            (again, probs_again),
            "{name}: the same kernels in the same order"
        );
        for (kept, recomputed) in gradients.iter().zip(&recomputed) {
            assert_near(name, recomputed, kept);
        }
    }
}

#[test]
fn a_sample_without_picture_is_the_same_in_any_batch() {
    let f = fixture("a", LoadOptions::default());
    let (text, wide) = (
        f.prompt(f.case("text"), "prompt"),
        f.prompt(f.case("wide"), "prompt"),
    );
    let alone = f.logits(&text);
    let both = no_grad(|| {
        let (hidden, _) = f
            .model
            .forward(&[(&text).into(), (&wide).into()], &[], None);
        f.model.logits(&hidden).value().to_f32().unwrap()
    });
    assert_near("text beside a picture", &both[..alone.len()], &alone);
}

#[test]
fn unusable_checkpoints_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let load = || MllamaConfig::load(dir.path()).unwrap_err().to_string();
    assert!(load().contains("config.json"), "{}", load());
    let text = std::fs::read_to_string(reference("mllama/a/config.json")).unwrap();
    let with = |from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        std::fs::write(dir.path().join("config.json"), text.replacen(from, to, 1)).unwrap();
    };
    with("\"model_type\": \"mllama\"", "\"model_type\": \"mistral\"");
    assert!(
        load().contains("`model_type`: \"mistral\" found, \"mllama\" expected"),
        "{}",
        load()
    );
    with("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3");
    assert!(load().contains("num_key_value_heads 3"), "{}", load());
    with("\"num_hidden_layers\": 5", "\"num_hidden_layers\": 0");
    assert!(
        load().contains("`text_config.num_hidden_layers`: 0 found"),
        "{}",
        load()
    );

    let source = reference("mllama/a");
    let weights = || Checkpoint::open(&source, "model").unwrap();
    let mut config = MllamaConfig::load(&source).unwrap();
    let build = |config: &MllamaConfig, weights: Checkpoint| {
        let loader = Loader::new(gpu(), weights, LoadOptions::default());
        Mllama::load(config, &loader).err().unwrap().to_string()
    };
    let renamed = weights().rename(|name| name.replace("cross_attn_mlp_gate", "gone"));
    let message = build(&config, renamed);
    assert!(
        message.contains("model.language_model.layers.1.cross_attn_mlp_gate"),
        "{message}"
    );
    config.intermediate += 1;
    let message = build(&config, weights());
    assert!(
        message.contains("mlp.gate_proj.weight") && message.contains("[57, 32]"),
        "{message}"
    );
}

#[test]
fn the_students_face_prepares_reads_and_answers() {
    let dir = reference("mllama/b");
    let student = Student::open(&dir, gpu(), LoadOptions::default()).unwrap();
    let f = fixture("b", LoadOptions::default());
    assert_eq!(student.hooked_layers(), f.model.config().cross_layers.len());
    let case = f.case("wide");
    let text = |key: &str| case[key].as_str().unwrap();
    let picture = ImageRef::Path(reference("mllama/images/wide.png"))
        .open()
        .unwrap();
    let question = Message::image_and_text(text("question"));
    let pictures = std::slice::from_ref(&picture);
    let prompt = student.prepare_with(
        pictures,
        std::slice::from_ref(&question),
        Tail::GenerationPrompt,
    );
    let prompt = prompt.unwrap();
    assert_eq!(prompt.ids, ids(&case["prompt_tokens"]));
    assert_eq!((prompt.grid.height, prompt.grid.width), (5, 15));
    let (expected, _) = f.tensors.values("wide.logits").unwrap();
    assert_near(
        "prompt logits",
        &student.prompt_logits(&prompt).unwrap(),
        &expected,
    );

    // The same greedy tokens, up to the end of the turn if it comes.
    let wanted = ids(&case["generated"]);
    let mut seen = Vec::new();
    let limit = wanted.len();
    let mut collect = |token: u32, _: &str| seen.push(token);
    let out = student
        .generate(&prompt, limit, Sampling::default(), &mut collect)
        .unwrap();
    assert_eq!(out.tokens, wanted[..out.tokens.len()]);
    assert_eq!(seen, out.tokens);
    assert!(out.finished || out.tokens.len() == limit);

    // Learned positions: every token of the answer and its end of turn, one row earlier.
    let turns = [question, Message::text("assistant", text("answer"))];
    let sample = student.prepare(&picture, &turns).unwrap();
    let full = ids(&case["full_tokens"]);
    assert_eq!(sample.learned(), full.len() - prompt.ids.len());
    assert_eq!(sample.labels[prompt.ids.len() - 1], full[prompt.ids.len()]);
    assert_eq!(
        student.rename_lora("language_model.model.layers.0.q_proj"),
        "model.language_model.layers.0.q_proj"
    );

    let long = Message::image_and_text("square ".repeat(600));
    let error = student
        .prepare_with(pictures, &[long], Tail::GenerationPrompt)
        .unwrap_err();
    assert!(
        error.to_string().contains("expected at most 512"),
        "{error}"
    );
}
