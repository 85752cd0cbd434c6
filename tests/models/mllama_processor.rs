//! Tiles, tokens and masks against transformers' `MllamaProcessor`; see `tests/reference/mllama.py`.

use lavender_wgpu::data::ImageRef;
use lavender_wgpu::tensor::Checkpoint;
use lavender_wgpu::vlm::mllama_processor::{MllamaProcessor, TilingConfig};
use lavender_wgpu::vlm::processor::labels::{IGNORE, Tail};
use lavender_wgpu::vlm::processor::template::{Message, Part};
use serde_json::Value;

use crate::support::reference;

/// An image of the fixture.
fn picture(name: &str) -> image::RgbImage {
    ImageRef::Path(reference(&format!("mllama/images/{name}.png")))
        .open()
        .expect("fixture")
}

fn expected(name: &str) -> Value {
    let text = std::fs::read_to_string(reference(&format!("mllama/{name}/expected.json")))
        .expect("fixture");
    serde_json::from_str(&text).expect("JSON")
}

fn numbers(json: &Value) -> Vec<u32> {
    json.as_array()
        .expect("a list")
        .iter()
        .map(|v| v.as_u64().expect("a number") as u32)
        .collect()
}

fn strings(json: &Value) -> Vec<&str> {
    json.as_array()
        .expect("a list")
        .iter()
        .map(|v| v.as_str().expect("a string"))
        .collect()
}

/// Question with its images, and the answer as the next turn.
fn messages(case: &Value, answered: bool) -> Vec<Message> {
    let mut parts = vec![Part::Image; strings(&case["images"]).len()];
    parts.push(Part::Text(
        case["question"].as_str().expect("a string").into(),
    ));
    let mut out = vec![Message {
        role: "user".into(),
        parts,
    }];
    if answered {
        out.push(Message::text(
            "assistant",
            case["answer"].as_str().expect("a string"),
        ));
    }
    out
}

#[test]
fn tiles_are_pillows_to_the_bit() {
    for name in ["a", "b"] {
        let dir = reference(&format!("mllama/{name}"));
        let config = TilingConfig::load(&dir).unwrap();
        let stored = safetensors(name);
        for (image, fields) in expected(name)["images"].as_object().unwrap() {
            let tiles = config.tiles(&picture(image));
            let grid = numbers(&fields["grid"]);
            assert_eq!(
                (tiles.grid.0 as u32, tiles.grid.1 as u32),
                (grid[0], grid[1]),
                "{image}"
            );
            assert_eq!(
                u64::from(tiles.aspect_ratio_id),
                fields["aspect_ratio_id"].as_u64().unwrap(),
                "{image}"
            );
            let view = safetensors::SafeTensors::deserialize(&stored).unwrap();
            let bytes = view
                .tensor(&format!("image.{image}"))
                .unwrap()
                .data()
                .to_vec();
            assert_eq!(bytes.len(), tiles.pixels.len(), "{image}");
            let plane = tiles.side * tiles.side;
            for (at, (&value, &byte)) in tiles.pixels.iter().zip(&bytes).enumerate() {
                let channel = at / plane % 3;
                let expected =
                    (f64::from(byte) / 255.0 - config.mean[channel]) / config.std[channel];
                // One f32 rounding; a neighbouring byte would be 0.014 away.
                assert!(
                    (f64::from(value) - expected).abs() < 1e-6,
                    "{name} {image}[{at}]: {value} {expected}"
                );
            }
        }
        let (normalized, _) = checkpoint(name).values("image.tiny.normalized").unwrap();
        let tiny = config.tiles(&picture("tiny"));
        for (ours, theirs) in tiny.pixels.iter().zip(&normalized) {
            assert!((ours - theirs).abs() < 1e-6, "{ours} {theirs}");
        }
    }
}

fn safetensors(name: &str) -> Vec<u8> {
    std::fs::read(reference(&format!("mllama/{name}/expected.safetensors"))).expect("fixture")
}

fn checkpoint(name: &str) -> Checkpoint {
    Checkpoint::open(
        &reference(&format!("mllama/{name}/expected.safetensors")),
        "expected",
    )
    .expect("fixture")
}

#[test]
fn prompts_tokens_labels_and_masks_are_transformers() {
    for name in ["a", "b"] {
        let processor = MllamaProcessor::load(reference(&format!("mllama/{name}"))).unwrap();
        for case in expected(name)["cases"].as_array().unwrap() {
            let label = case["name"].as_str().unwrap();
            let images = strings(&case["images"]);
            let pictures: Vec<_> = images.iter().map(|image| picture(image)).collect();
            let (prompt, full) = if images.is_empty() {
                // The template dates a prompt without image; the text is taken as it was rendered then.
                let text = |key: &str| {
                    processor
                        .text(case[key].as_str().unwrap(), &pictures)
                        .unwrap()
                };
                (text("prompt"), text("full"))
            } else {
                let ask = processor.conversation(
                    &messages(case, false),
                    &pictures,
                    Tail::GenerationPrompt,
                );
                (
                    ask.unwrap(),
                    processor
                        .conversation(&messages(case, true), &pictures, Tail::None)
                        .unwrap(),
                )
            };
            assert_eq!(
                prompt.rendered.text,
                case["prompt"].as_str().unwrap(),
                "{name} {label}"
            );
            assert_eq!(
                full.rendered.text,
                case["full"].as_str().unwrap(),
                "{name} {label}"
            );
            assert_eq!(
                prompt.encoded.ids,
                numbers(&case["prompt_tokens"]),
                "{name} {label}"
            );
            assert_eq!(
                full.encoded.ids,
                numbers(&case["full_tokens"]),
                "{name} {label}"
            );
            if images.is_empty() {
                continue;
            }
            // Learned: all that follows the prompt, the end of the turn included.
            let start = prompt.encoded.ids.len();
            for (token, &label) in full.labels.iter().enumerate() {
                let learned = if token < start {
                    IGNORE
                } else {
                    full.encoded.ids[token]
                };
                assert_eq!(label, learned, "{name} token {token}");
            }
            let tail = Tail::Answer(case["answer"].as_str().unwrap());
            let tailed = processor
                .conversation(&messages(case, false), &pictures, tail)
                .unwrap();
            let length = tailed.encoded.ids.len();
            assert_eq!(
                tailed.encoded.ids[..],
                full.encoded.ids[..length],
                "one string, tokenised once"
            );
            for (token, row) in case["cross_attention_mask"]
                .as_array()
                .unwrap()
                .iter()
                .enumerate()
            {
                for (slot, &seen) in numbers(row).iter().enumerate() {
                    let (image, tile) = (slot / 4, slot % 4);
                    let ours = full.image_bits[token] >> image & 1 == 1
                        && tile < full.images[image].count();
                    assert_eq!(
                        ours,
                        seen == 1,
                        "{name} {label}: token {token}, image {image}, tile {tile}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_second_bos_is_never_added() {
    let processor = MllamaProcessor::load(reference("mllama/a")).unwrap();
    let bos = processor
        .tokenizer
        .required_id("<|begin_of_text|>")
        .unwrap();
    let count = |text: &str| {
        let ids = processor.text(text, &[]).unwrap().encoded.ids;
        (ids.iter().filter(|&&id| id == bos).count(), ids[0] == bos)
    };
    assert_eq!(count("hello"), (1, true));
    assert_eq!(count("<|begin_of_text|>hello"), (1, true));
}

#[test]
fn bad_input_is_refused_by_name() {
    let processor = MllamaProcessor::load(reference("mllama/a")).unwrap();
    let ask = |text: &str, pictures: &[image::RgbImage]| {
        let message = Message::image_and_text(text);
        processor
            .conversation(&[message], pictures, Tail::GenerationPrompt)
            .unwrap_err()
            .to_string()
    };
    assert!(ask("what is it?", &[]).contains("1 `<|image|>`"));
    assert!(ask("what is <|image|> ?", &[picture("tiny")]).contains("2 `<|image|>`"));

    let dir = tempfile::tempdir().unwrap();
    let write =
        |text: &str| std::fs::write(dir.path().join("preprocessor_config.json"), text).unwrap();
    let error = || TilingConfig::load(dir.path()).unwrap_err().to_string();
    assert!(error().contains("preprocessor_config.json"));
    write(r#"{"size": {"height": 28, "width": 30}}"#);
    assert!(error().contains("`size`"), "{}", error());
    write(r#"{"size": {"height": 28, "width": 28}, "max_image_tiles": 0}"#);
    assert!(
        error().contains("`max_image_tiles`: 0 found"),
        "{}",
        error()
    );
    write(r#"{"size": {"height": 28, "width": 28}, "do_pad": false}"#);
    assert!(error().contains("`do_pad`"), "{}", error());
}
