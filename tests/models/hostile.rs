//! Files of a checkpoint with nonsense in them: refused or read, never a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use lavender_wgpu::nn::LoadOptions;
use lavender_wgpu::vlm::processor::labels::Tail;
use lavender_wgpu::vlm::processor::template::Message;
use lavender_wgpu::vlm::{Processor, Student};
use serde_json::{Value, json};

use crate::support::{gpu, reference};

/// Every way from the top of a document to a value in it, objects and lists included.
fn paths(value: &Value, at: &str, all: &mut Vec<String>) {
    all.push(at.to_owned());
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let key = key.replace('~', "~0").replace('/', "~1");
                paths(value, &format!("{at}/{key}"), all);
            }
        }
        // The first of a list stands for the others.
        Value::Array(list) if !list.is_empty() => paths(&list[0], &format!("{at}/0"), all),
        _ => {}
    }
}

fn nonsense() -> Vec<Value> {
    vec![
        Value::Null,
        json!(0),
        json!(-1.5),
        json!(7),
        json!(u64::MAX),
        json!(""),
        json!([]),
        json!({}),
    ]
}

/// Changes each value of `file` in a copy of a checkpoint's files; the paths and values that `used` panics on.
fn panics(checkpoint: &str, file: &str, nonsense: &[Value], used: impl Fn(&Path)) -> Vec<String> {
    let dir = tempfile::tempdir().expect("a directory");
    let from = reference(checkpoint);
    for entry in std::fs::read_dir(&from).expect("fixture").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("expected") {
            std::fs::copy(entry.path(), dir.path().join(&name)).expect("copied");
        }
    }
    let Ok(text) = std::fs::read_to_string(from.join(file)) else {
        return Vec::new();
    };
    let whole: Value = serde_json::from_str(&text).expect("fixture");
    let mut places = Vec::new();
    paths(&whole, "", &mut places);
    let mut found = Vec::new();
    for place in places {
        for value in nonsense {
            let mut changed = whole.clone();
            *changed.pointer_mut(&place).expect("a place in it") = value.clone();
            std::fs::write(dir.path().join(file), changed.to_string()).expect("written");
            if catch_unwind(AssertUnwindSafe(|| used(dir.path()))).is_err() {
                found.push(format!("{checkpoint}/{file} {place} = {value}"));
            }
        }
    }
    found
}

#[test]
fn no_value_of_a_processors_files_is_a_panic() {
    let picture = image::RgbImage::new(5, 3);
    let messages = [
        Message::image_and_text("?"),
        Message::text("assistant", "two"),
    ];
    let mut found = Vec::new();
    for checkpoint in ["smolvlm/a", "mllama/b"] {
        for file in [
            "config.json",
            "processor_config.json",
            "preprocessor_config.json",
            "tokenizer_config.json",
            "chat_template.json",
        ] {
            found.extend(panics(checkpoint, file, &nonsense(), |dir| {
                if let Ok(processor) = Processor::open(dir) {
                    let pictures = std::slice::from_ref(&picture);
                    let _ = processor.prepare(pictures, &messages, Tail::None);
                }
            }));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn no_number_of_a_models_configuration_is_a_panic() {
    let mut found = Vec::new();
    let numbers = [json!(0), json!(1), json!(7), json!(2_147_483_647)];
    let picture = image::RgbImage::new(5, 3);
    let messages = [Message::image_and_text("?")];
    for checkpoint in ["smolvlm/a", "mllama/a"] {
        found.extend(panics(checkpoint, "config.json", &numbers, |dir| {
            let Ok(student) = Student::open(dir, gpu(), LoadOptions::default()) else {
                return;
            };
            let pictures = std::slice::from_ref(&picture);
            let tail = Tail::GenerationPrompt;
            if let Ok(prepared) = student.prepare_with(pictures, &messages, tail) {
                let _ = student.prompt_logits(&prepared);
            }
        }));
    }
    assert!(found.is_empty(), "{found:#?}");
}
