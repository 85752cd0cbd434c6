//! Tiles, tokens and labels against transformers' `Idefics3Processor`; see `tests/reference/smolvlm.py`.

use lavender_wgpu::tensor::Checkpoint;
use lavender_wgpu::vlm::idefics3_processor::{Idefics3Processor, Tiles};
use lavender_wgpu::vlm::processor::labels::{IGNORE, Tail, predicting_rows};

use crate::smolvlm_fixture::{expected, messages, numbers, picture, strings};
use crate::support::reference;

/// Checkpoint `a` has tiles of 64 and 16 tokens, `b` of 48 and 4.
pub fn processor(name: &str) -> Idefics3Processor {
    let tokens = move |side: usize| match (name, side) {
        ("a", 64) => 16,
        ("b", 48) => 4,
        other => panic!("tile side read wrongly: {other:?}"),
    };
    Idefics3Processor::load(reference(&format!("smolvlm/{name}")), tokens).expect("fixture")
}

/// The tiles' bytes: mean and standard deviation are 0.5 in both checkpoints.
fn bytes(tiles: &Tiles) -> Vec<f32> {
    let byte = |v: &f32| ((v * 0.5 + 0.5) * 255.0).round();
    tiles.pixels.iter().map(byte).collect()
}

#[test]
fn tiles_are_equal_to_the_last_byte() {
    for name in ["a", "b"] {
        let processor = processor(name);
        let file = reference(&format!("smolvlm/{name}/expected.safetensors"));
        let raw = std::fs::read(&file).expect("fixture");
        let stored = safetensors::SafeTensors::deserialize(&raw).expect("fixture");
        let file = Checkpoint::open(&file, "expected").expect("fixture");
        // Sums of a row's bytes weighted by their places: any wrong byte shows.
        let sums = |tiles: &Tiles| -> Vec<i32> {
            bytes(tiles)
                .chunks_exact(tiles.side)
                .map(|row| row.iter().zip(1..).map(|(&v, x)| v as i32 * x).sum())
                .collect()
        };
        let wanted = |path: &str| -> Vec<i32> {
            let view = stored.tensor(path).expect("fixture");
            let number = |b: &[u8]| i32::from_le_bytes(b.try_into().expect("four bytes"));
            view.data().chunks_exact(4).map(number).collect()
        };
        let mut whole = processor.split.clone();
        whole.split = false;
        for (key, image) in expected(name)["images"].as_object().expect("a map") {
            let tiles = processor.split.tiles(&picture(key));
            let grid = [tiles.grid.0 as u32, tiles.grid.1 as u32];
            assert_eq!(numbers(&image["grid"]), grid, "{name} {key}");
            let same = sums(&tiles) == wanted(&format!("image.{key}.sums"));
            assert!(same, "{name} {key}: a pixel differs");
            let same = sums(&whole.tiles(&picture(key))) == wanted(&format!("image.{key}.whole"));
            assert!(same, "{name} {key}: a pixel of the uncut picture differs");
        }
        let (normalized, _) = file.values("image.tiny.normalized").expect("fixture");
        let tiles = processor.split.tiles(&picture("tiny"));
        assert!(
            tiles.pixels[..normalized.len()] == normalized,
            "{name}: normalisation differs"
        );
    }
}

#[test]
fn tokens_labels_and_word_rows_are_equal() {
    for name in ["a", "b"] {
        let processor = processor(name);
        for case in expected(name)["cases"].as_array().expect("a list") {
            let label = format!("{name} {}", case["name"]);
            let pictures: Vec<_> = strings(&case["images"]).into_iter().map(picture).collect();
            let answer = case["answer"].as_str().expect("a string");
            let prompt = processor
                .conversation(&messages(case, false), &pictures, Tail::GenerationPrompt)
                .expect(&label);
            assert_eq!(
                prompt.encoded.ids,
                numbers(&case["prompt_tokens"]),
                "{label}"
            );
            let tail = format!(" {answer}");
            let full = processor
                .conversation(&messages(case, false), &pictures, Tail::Answer(&tail))
                .expect(&label);
            assert_eq!(full.encoded.ids, numbers(&case["full_tokens"]), "{label}");
            let text = &full.rendered.text;
            for word in case["words"].as_array().expect("a list") {
                let wanted: Vec<Vec<usize>> =
                    serde_json::from_value(word["rows"].clone()).expect("rows");
                let word = word["word"].as_str().expect("a string");
                let start = full.rendered.answers[0].start;
                let lower = text[start..].to_lowercase();
                // Whole words only: "the" is not in "there".
                let inside = |at: usize| {
                    lower[at..]
                        .chars()
                        .next()
                        .is_some_and(char::is_alphanumeric)
                };
                let rows: Vec<Vec<usize>> = lower
                    .match_indices(word)
                    .filter(|&(at, _)| !inside(at - 1) && !inside(at + word.len()))
                    .map(|(at, _)| {
                        predicting_rows(&full.encoded, &(start + at..start + at + word.len()))
                    })
                    .collect();
                assert_eq!(rows, wanted, "{label} {word}");
            }
            let chat = processor
                .conversation(&messages(case, true), &pictures, Tail::None)
                .expect(&label);
            assert_eq!(chat.encoded.ids, numbers(&case["chat_tokens"]), "{label}");
            let labels: Vec<i64> = chat
                .labels
                .iter()
                .map(|&id| if id == IGNORE { -100 } else { i64::from(id) })
                .collect();
            let wanted: Vec<i64> = serde_json::from_value(case["labels"].clone()).expect("labels");
            assert_eq!(labels, wanted, "{label}");
            for (tiles, global) in chat.images.iter().zip(&chat.global) {
                assert_eq!(global.len(), processor.tile_tokens);
                assert!(
                    chat.encoded.ids[global.clone()]
                        .iter()
                        .all(|&id| id == processor.image_token)
                );
                assert_eq!(tiles.side, processor.split.side);
            }
        }
    }
}

#[test]
fn a_wrong_token_count_names_the_file_and_both_numbers() {
    let error = Idefics3Processor::load(reference("smolvlm/a"), |_| 9)
        .err()
        .expect("refused");
    let text = error.to_string();
    assert!(
        text.contains("processor_config.json") && text.contains("16 found, 9 expected"),
        "{text}"
    );
}
