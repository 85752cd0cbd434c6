//! Awkward conversations against transformers' processors; see `tests/reference/conversations.py`.

use std::path::Path;

use image::RgbImage;
use lavender_wgpu::data::{DataSet, ImageRef};
use lavender_wgpu::ops::cross_entropy::IGNORE;
use lavender_wgpu::train::batch::message;
use lavender_wgpu::vlm::idefics3_processor::SplitConfig;
use lavender_wgpu::vlm::mllama_processor::TilingConfig;
use lavender_wgpu::vlm::processor::labels::Tail;
use lavender_wgpu::vlm::processor::template::{Message, Part};
use lavender_wgpu::vlm::{Pictures, Prepared, Processor};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::reference;

const CHECKPOINTS: [&str; 4] = ["smolvlm-a", "smolvlm-b", "mllama-a", "mllama-b"];

/// transformers learns the end of the turn alone; we want an answer.
const NO_ANSWER: [&str; 4] = [
    "an empty answer",
    "an empty answer among others",
    "an answer of spaces",
    "an answer without parts",
];

fn json(name: &str) -> Value {
    let text = std::fs::read_to_string(reference(&format!("conversations/{name}.json")));
    serde_json::from_str(&text.expect("fixture")).expect("JSON")
}

fn list(value: &Value) -> &[Value] {
    value.as_array().expect("a list")
}

fn text(value: &Value) -> &str {
    value.as_str().expect("a text")
}

/// `[value, how often, …]`, at length.
fn unrolled(value: &Value) -> Vec<u32> {
    let number = |v: &Value| v.as_u64().expect("a number") as u32;
    let runs = list(value).chunks_exact(2);
    runs.flat_map(|run| std::iter::repeat_n(number(&run[0]), number(&run[1]) as usize))
        .collect()
}

/// A file of the fixtures, or a drawn picture of `WIDTHxHEIGHT`.
fn picture(name: &str) -> RgbImage {
    let size = name.split_once('x').map(|(w, h)| (w.parse(), h.parse()));
    if let Some((Ok(width), Ok(height))) = size {
        return RgbImage::from_fn(width, height, |x, y| {
            let value = |c: u32| ((x * 7 + y * 13 + c * 31 + x * y % 11 * 9) % 256) as u8;
            image::Rgb([value(0), value(1), value(2)])
        });
    }
    let path = reference(&format!("mllama/images/{name}.png"));
    ImageRef::Path(path).open().expect("fixture")
}

fn conversation(case: &Value) -> (Vec<Message>, Vec<RgbImage>) {
    let mut pictures = Vec::new();
    let mut part = |part: &Value| match part.get("image") {
        Some(name) => {
            pictures.push(picture(text(name)));
            Part::Image
        }
        None => Part::Text(text(&part["text"]).into()),
    };
    let turns = list(&case["turns"]).iter().map(|turn| Message {
        role: text(&turn["role"]).into(),
        parts: list(&turn["content"]).iter().map(&mut part).collect(),
    });
    (turns.collect(), pictures)
}

/// A checkpoint's folder without its weights, with the template that the expectations were made with.
fn checkpoint(name: &str, expected: &Value) -> TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let from = reference(&name.replace('-', "/"));
    for file in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "processor_config.json",
    ] {
        if from.join(file).exists() {
            std::fs::copy(from.join(file), dir.path().join(file)).expect("copied");
        }
    }
    let template = dir.path().join("chat_template.jinja");
    std::fs::write(template, text(&expected["template"])).expect("written");
    dir
}

/// The runs of learned tokens, `[first, after the last, …]`; labels stand a place before their tokens.
fn learned(prepared: &Prepared) -> Vec<usize> {
    let mut edges = Vec::new();
    let mut before = false;
    for (token, &label) in prepared.labels.iter().enumerate() {
        let is = label != IGNORE;
        if is {
            assert_eq!(label, prepared.ids[token + 1], "a label is the next token");
        }
        if is != before {
            edges.push(token + 1);
        }
        before = is;
    }
    assert!(!before, "the last token predicts nothing");
    edges
}

fn compare(label: &str, wanted: &Value, prepared: &Prepared) {
    assert_eq!(prepared.ids, unrolled(&wanted["ids"]), "{label}: tokens");
    let ours = json!(learned(prepared));
    assert_eq!(ours, wanted["learned"], "{label}: learned tokens");
    if let Pictures::Mllama(prompt) = &prepared.pictures
        && wanted.get("seen").is_some()
    {
        let seen = unrolled(&wanted["seen"]);
        assert_eq!(prompt.image_bits, seen, "{label}: pictures seen");
    }
    for answer in &prepared.answers {
        assert_eq!(answer.spans.len(), prepared.ids.len(), "{label}");
        let characters = answer.text.chars().count();
        assert!(
            answer.spans.iter().all(|&(s, e)| s <= e && e <= characters),
            "{label}"
        );
    }
}

/// What a refusal has to say.
fn reason(name: &str) -> &'static str {
    match name {
        _ if NO_ANSWER.contains(&name) => "the text is empty",
        _ if name.starts_with("an image token") || name.starts_with("image tokens") => {
            "must not contain"
        }
        _ if name.starts_with("a system prompt") => "incompatible with system messages",
        "cut in the picture" => "hold its pictures",
        other => panic!("{other}: no refusal is expected"),
    }
}

#[test]
fn tokens_masks_and_refusals_are_transformers() {
    let cases = json("cases");
    for checkpoint_name in CHECKPOINTS {
        let expected = json(checkpoint_name);
        let dir = checkpoint(checkpoint_name, &expected);
        let mut wrong = Vec::new();
        for case in list(&cases) {
            let name = text(&case["name"]);
            let label = format!("{checkpoint_name}, {name}");
            let wanted = &expected["cases"][name];
            let keep = case.get("keep").and_then(Value::as_u64);
            let processor = Processor::open(dir.path()).expect("fixture");
            let processor = processor.cut_at(keep.map(|n| n as usize)).expect("short");
            let (messages, pictures) = conversation(case);
            let result = match keep {
                Some(_) => processor.prepare(&pictures, &messages, Tail::None),
                None => processor.prepare_any_length(&pictures, &messages, Tail::None),
            };
            let refused = wanted.get("refused").is_some() || NO_ANSWER.contains(&name);
            match (result, refused) {
                (Ok(prepared), false) => {
                    let check = || compare(&label, wanted, &prepared);
                    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).is_err() {
                        wrong.push(label);
                    }
                }
                (Err(error), true) => {
                    let error = error.to_string();
                    assert!(error.contains(reason(name)), "{label}: {error}");
                    assert!(!error.contains('\n'), "more than one line: {error}");
                }
                (Ok(_), true) => wrong.push(format!("{label}: taken, expected a refusal")),
                (Err(error), false) => wrong.push(format!("{label}: {error}")),
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

#[test]
fn a_sample_longer_than_the_context_is_refused_with_what_to_do() {
    let cases = json("cases");
    let named = |c: &&Value| c["name"] == "longer than the context";
    let case = list(&cases).iter().find(named).expect("a case");
    let (messages, pictures) = conversation(case);
    for name in CHECKPOINTS {
        let dir = checkpoint(name, &json(name));
        let processor = Processor::open(dir.path()).expect("fixture");
        let context = processor.context();
        let error = processor.prepare(&pictures, &messages, Tail::None);
        let error = error.expect_err("too long").to_string();
        let wanted = format!("expected at most {context}");
        assert!(
            error.contains(&wanted) && error.contains("data.max_tokens"),
            "{error}"
        );
        let whole = processor.cut_at(Some(context)).expect("fits");
        let cut = whole.prepare(&pictures, &messages, Tail::None);
        assert_eq!(cut.expect("cut").tokens(), context);
        let error = whole.cut_at(Some(context + 1)).err().expect("refused");
        assert!(error.to_string().contains("data.max_tokens"), "{error}");
    }
}

#[test]
fn pictures_of_odd_sizes_are_cut_as_transformers_cuts_them() {
    /// Per tile the sum over its bytes of byte × (1 + place % 251).
    fn sums(pixels: &[f32], size: usize, byte: impl Fn(f32, usize) -> f64) -> Vec<i64> {
        let tile = |tile: &[f32]| {
            let bytes = tile.iter().enumerate().map(|(at, &v)| {
                let channel = at / (size / 3);
                byte(v, channel).round() as i64 * (1 + at as i64 % 251)
            });
            bytes.sum()
        };
        pixels.chunks_exact(size).map(tile).collect()
    }
    for name in CHECKPOINTS {
        let expected = json(name);
        let dir = reference(&name.replace('-', "/"));
        for (image, wanted) in expected["images"].as_object().expect("a map") {
            let picture = picture(image);
            let (grid, ours) = if name.starts_with("smolvlm") {
                let tiles = SplitConfig::load(&dir).expect("fixture").tiles(&picture);
                let size = 3 * tiles.side * tiles.side;
                // Mean and standard deviation are 0.5 in both checkpoints.
                let sums = sums(&tiles.pixels, size, |v, _| {
                    (f64::from(v) * 0.5 + 0.5) * 255.0
                });
                (tiles.grid, sums)
            } else {
                let config = TilingConfig::load(&dir).expect("fixture");
                let tiles = config.tiles(&picture);
                let size = 3 * tiles.side * tiles.side;
                let sums = sums(&tiles.pixels, size, |v, c| {
                    (f64::from(v) * config.std[c] + config.mean[c]) * 255.0
                });
                (tiles.grid, sums)
            };
            assert_eq!(json!([grid.0, grid.1]), wanted["grid"], "{name} {image}");
            assert_eq!(json!(ours), wanted["sums"], "{name} {image}");
        }
    }
}

/// Every conversation as JSON, read as a data set is: what is read is what was written, or is refused by its place.
#[test]
fn data_sets_hold_the_same_conversations() {
    let cases = json("cases");
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("data.jsonl");
    let (mut read, mut refused) = (0, 0);
    for case in list(&cases) {
        let name = text(&case["name"]);
        let content = |part: &Value| match part.get("image") {
            Some(image) => json!({"type": "image", "image": image}),
            None => json!({"type": "text", "text": part["text"]}),
        };
        let turn = |turn: &Value| {
            let parts: Vec<Value> = list(&turn["content"]).iter().map(content).collect();
            json!({"role": turn["role"], "content": parts})
        };
        let turns: Vec<Value> = list(&case["turns"]).iter().map(turn).collect();
        let mut entry = json!({"id": name, "messages": turns});
        let (messages, pictures) = conversation(case);
        if pictures.is_empty() {
            entry["image"] = "wide".into();
        }
        std::fs::write(&path, entry.to_string()).expect("written");
        let set = DataSet::load(&path, Some(Path::new("pictures")));
        let last = turns.last().map(|turn| turn["role"] == "assistant");
        let refusal = match name {
            _ if NO_ANSWER.contains(&name) => Some("turn is empty"),
            _ if last != Some(true) => Some("does not end with an assistant's turn"),
            _ if pictures.len() > 1 => Some("one"),
            _ => None,
        };
        match (set, refusal) {
            (Ok(set), None) => {
                let mut wanted = messages;
                if pictures.is_empty() {
                    let mut turns = wanted.iter_mut();
                    let user = turns.find(|turn| turn.role == "user").expect("a user");
                    user.parts.insert(0, Part::Image);
                }
                let ours: Vec<Message> = set.samples[0].turns.iter().map(message).collect();
                assert_eq!(ours, wanted, "{name}");
                read += 1;
            }
            (Err(error), Some(part)) => {
                let error = error.to_string();
                assert!(
                    error.contains("line 1") && error.contains(part),
                    "{name}: {error}"
                );
                refused += 1;
            }
            (Ok(_), Some(part)) => panic!("{name} is taken, expected `{part}`"),
            (Err(error), None) => panic!("{name}: {error}"),
        }
    }
    assert!(read >= 60 && refused >= 8, "{read} read, {refused} refused");
}
