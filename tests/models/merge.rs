//! LoRA adapters as peft applies and merges them; see `tests/reference/merge.py`.

use std::path::{Path, PathBuf};

use lavender_wgpu::Error;
use lavender_wgpu::nn::{LoadOptions, load_lora, lora_config, save_lora};
use lavender_wgpu::tensor::{Checkpoint, DType};
use lavender_wgpu::vlm::merge::{Merged, merge};
use lavender_wgpu::vlm::processor::labels::Tail;
use lavender_wgpu::vlm::processor::template::Message;
use lavender_wgpu::vlm::{Pictures, Prepared, Student};
use serde_json::Value;

use crate::support::{gpu, reference};

const ADAPTERS: [&str; 5] = [
    "smolvlm-rslora",
    "smolvlm-dora",
    "smolvlm-patterns",
    "mllama-rslora",
    "mllama-old",
];

fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).expect("fixture");
    serde_json::from_str(&text).expect("JSON")
}

fn folder(adapter: &str) -> PathBuf {
    reference(&format!("merge/{adapter}"))
}

/// Family name and directory of an adapter's base.
fn base(adapter: &str) -> (String, PathBuf) {
    let json = json(&folder(adapter).join("expected.json"));
    let base = json["base"].as_str().expect("a string");
    (base.to_owned(), reference(base))
}

fn open(dir: &Path, lora: Option<&Path>) -> Student {
    let options = LoadOptions {
        lora: lora.map(|lora| lora_config(lora).expect("a configuration")),
        ..LoadOptions::default()
    };
    let student = Student::open(dir, gpu(), options).expect("a model");
    if let Some(lora) = lora {
        let rename = |name: &str| student.rename_lora(name);
        load_lora(lora, &student.parameters(), rename).expect("an adapter");
    }
    student
}

/// The text-only case's prompt with transformers' tokens: Llama's template writes today's date into it.
fn prompt(student: &Student, base: &str) -> Prepared {
    let cases = json(&reference(base).join("expected.json"));
    let mut cases = cases["cases"].as_array().expect("a list").iter();
    let case = cases.find(|c| c["name"] == "text").expect("a text case");
    let turns = [Message::text(
        "user",
        case["question"].as_str().expect("text"),
    )];
    let tail = Tail::GenerationPrompt;
    let mut prompt = student.prepare_with(&[], &turns, tail).expect("fixture");
    prompt.ids = serde_json::from_value(case["prompt_tokens"].clone()).expect("numbers");
    if let Pictures::Mllama(inner) = &mut prompt.pictures {
        inner.encoded.ids.clone_from(&prompt.ids);
        inner.image_bits = vec![0; prompt.ids.len()];
    }
    prompt
}

fn logits(student: &Student, base: &str) -> Vec<f32> {
    let prompt = prompt(student, base);
    student.prompt_logits(&prompt).expect("readable")
}

/// Largest difference over the largest expected value.
#[track_caller]
fn assert_near(what: &str, actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len(), "{what}: lengths");
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let pairs = actual.iter().zip(expected);
    let error = pairs.fold(0.0f32, |m, (a, e)| m.max((a - e).abs())) / largest;
    assert!(error <= tolerance, "{what}: {error}");
}

fn merged(adapter: &str, out: &Path, dtype: Option<DType>) -> Merged {
    let (_, dir) = base(adapter);
    merge(&dir, &folder(adapter), out, dtype, &mut |_, _, _| Ok(())).expect("merges")
}

#[test]
fn adapters_of_peft_give_its_logits_before_and_after_merging() {
    for adapter in ADAPTERS {
        let (base, dir) = base(adapter);
        let adapted = logits(&open(&dir, Some(&folder(adapter))), &base);
        let plain = logits(&open(&dir, None), &base);
        let out = tempfile::tempdir().expect("a directory");
        let out = out.path().join("merged");
        let report = merged(adapter, &out, None);
        let expected = folder(adapter);
        let modules = json(&expected.join("expected.json"))["modules"]
            .as_array()
            .map(Vec::len);
        assert_eq!(Some(report.modules), modules);
        let expected = Checkpoint::open(&expected, "expected").expect("fixture");
        let (wanted, _) = expected.values("logits").expect("fixture");
        // f32 sums in another order.
        let tail = &adapted[adapted.len() - wanted.len()..];
        assert_near(adapter, tail, &wanted, 1e-4);
        assert_near(adapter, &logits(&open(&out, None), &base), &adapted, 1e-4);
        let change = plain.iter().zip(&adapted).map(|(p, a)| (p - a).abs());
        assert!(
            change.fold(0.0f32, f32::max) > 0.1,
            "{adapter} changes nothing"
        );
        // A few weights after peft's merge_and_unload: one product and one sum in f32.
        let weights = Checkpoint::open(&out, "model").expect("written");
        for name in expected.names().filter_map(|n| n.strip_prefix("merged.")) {
            let (wanted, _) = expected.values(&format!("merged.{name}")).expect("fixture");
            let (found, _) = weights.values(name).expect(name);
            assert_near(name, &found, &wanted, 1e-6);
        }
    }
}

#[test]
fn a_merged_directory_has_the_files_names_and_types_of_its_base() {
    let dir = tempfile::tempdir().expect("a directory");
    let (out, half) = (dir.path().join("a/merged"), dir.path().join("half"));
    let (_, base) = base("smolvlm-rslora");
    merged("smolvlm-rslora", &out, None);
    let names = |dir: &Path| {
        let entries = std::fs::read_dir(dir).expect("a directory");
        let mut names: Vec<_> = entries.map(|e| e.expect("an entry").file_name()).collect();
        names.sort();
        names
    };
    let mut wanted = names(&base);
    wanted.retain(|name| name != "expected.safetensors");
    assert_eq!(names(&out), wanted);
    for file in ["config.json", "tokenizer.json", "preprocessor_config.json"] {
        let read = |dir: &Path| std::fs::read(dir.join(file)).expect(file);
        assert_eq!(read(&out), read(&base), "{file}");
    }
    let report = merged("smolvlm-rslora", &half, Some(DType::Bf16));
    let (before, after) = (
        Checkpoint::open(&base, "model").expect("fixture"),
        Checkpoint::open(&half, "model").expect("written"),
    );
    assert_eq!(
        before.names().collect::<Vec<_>>(),
        after.names().collect::<Vec<_>>()
    );
    assert_eq!(after.stored_bytes() * 2, before.stored_bytes());
    assert_eq!(report.bytes, after.stored_bytes());
    assert_eq!(json(&half.join("config.json"))["torch_dtype"], "bfloat16");
    // Nothing is left beside the result.
    assert_eq!(names(dir.path()).len(), 2);
}

#[test]
fn shards_stay_shards_and_stopping_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let (base, out) = (dir.path().join("base"), dir.path().join("merged"));
    std::fs::create_dir(&base).expect("a directory");
    let (_, whole) = self::base("smolvlm-rslora");
    for file in ["config.json", "tokenizer.json"] {
        std::fs::copy(whole.join(file), base.join(file)).expect(file);
    }
    // The fixture's tensors in two files, every other one in the second.
    let checkpoint = Checkpoint::open(&whole, "model").expect("fixture");
    let shard = |number: usize| format!("model-0000{}-of-00002.safetensors", number + 1);
    let mut weight_map = serde_json::Map::new();
    for number in 0..2 {
        let names = checkpoint
            .names()
            .enumerate()
            .filter(|(i, _)| i % 2 == number);
        let tensors: Vec<_> = names
            .map(|(_, name)| {
                weight_map.insert(name.to_owned(), shard(number).into());
                let (values, shape) = checkpoint.values(name).expect("fixture");
                let tensor = lavender_wgpu::tensor::HostTensor::f32(&shape, &values);
                (name.to_owned(), tensor)
            })
            .collect();
        let path = base.join(shard(number));
        lavender_wgpu::tensor::save_safetensors(&path, &tensors, None).expect("written");
    }
    let index = serde_json::json!({ "weight_map": weight_map });
    std::fs::write(base.join("model.safetensors.index.json"), index.to_string()).expect("written");

    let adapter = folder("smolvlm-rslora");
    let stop = merge(&base, &adapter, &out, None, &mut |at, _, _| match at {
        40 => Err(Error::Interrupted),
        _ => Ok(()),
    });
    assert!(matches!(stop, Err(Error::Interrupted)));
    let left = std::fs::read_dir(dir.path()).expect("a directory").count();
    assert_eq!(left, 1, "only the base is there");

    merge(&base, &adapter, &out, None, &mut |_, _, _| Ok(())).expect("merges");
    let index = json(&out.join("model.safetensors.index.json"));
    assert_eq!(
        index["weight_map"].as_object().map(|m| m.len()),
        Some(weight_map.len())
    );
    let single = dir.path().join("single");
    merged("smolvlm-rslora", &single, None);
    let (a, b) = (
        Checkpoint::open(&out, "model").expect("written"),
        Checkpoint::open(&single, "model").expect("written"),
    );
    assert_eq!(index["metadata"]["total_size"], a.stored_bytes());
    for name in b.names() {
        assert_eq!(index["weight_map"][name], weight_map[name]);
        assert_eq!(a.values(name).expect(name), b.values(name).expect(name));
    }
}

#[test]
fn what_is_saved_is_peft_s_configuration_and_loads_again() {
    let dir = tempfile::tempdir().expect("a directory");
    for adapter in ["smolvlm-rslora", "smolvlm-patterns", "smolvlm-dora"] {
        let (base, model) = base(adapter);
        let config = lora_config(&folder(adapter)).expect("fixture");
        let student = open(&model, Some(&folder(adapter)));
        let saved = dir.path().join(adapter);
        save_lora(&saved, &student.parameters(), &config, "x").expect("saves");
        assert_eq!(lora_config(&saved).expect("readable"), config);
        let again = logits(&open(&model, Some(&saved)), &base);
        assert_eq!(again, logits(&student, &base), "{adapter}");
        let written = json(&saved.join("adapter_config.json"));
        assert_eq!(written["use_rslora"], adapter.ends_with("rslora"));
        assert_eq!(written["use_dora"], adapter.ends_with("dora"));
    }
}

#[test]
fn an_adapter_of_another_base_is_refused_with_the_first_difference() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("merged");
    // SmolVLM `b` has two text layers of 48 channels, `a` three of 32.
    let other = reference("smolvlm/b");
    let adapter = folder("smolvlm-rslora");
    let error =
        merge(&other, &adapter, &out, None, &mut |_, _, _| Ok(())).expect_err("another base");
    let first = "model.text_model.layers.0.self_attn.o_proj.lora_A.weight";
    for part in [
        first,
        "[4, 32] in the adapter",
        "[4, 96] in this base",
        "smolvlm/a",
    ] {
        assert!(error.to_string().contains(part), "{error} lacks {part}");
    }
    assert!(!out.exists());
    let options = LoadOptions {
        lora: Some(lora_config(&adapter).expect("fixture")),
        ..LoadOptions::default()
    };
    let student = Student::open(&other, gpu(), options).expect("fixture");
    let rename = |name: &str| student.rename_lora(name);
    let loaded = load_lora(&adapter, &student.parameters(), rename).expect_err("another base");
    assert_eq!(loaded.to_string(), error.to_string());
}
