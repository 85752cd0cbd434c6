//! CLIP's tokenizer against `transformers`, and texts longer than its context.

use lavender_wgpu::diffusion::ClipTokenizer;
use lavender_wgpu::diffusion::config::ConfigFile;

use crate::support::reference;
use crate::teacher_fixture::{CHECKPOINTS, Expected};

#[test]
fn tokens_and_chunks_are_those_of_transformers() {
    for name in CHECKPOINTS {
        let expected = Expected::open(name);
        let config = reference(&format!("teacher/{name}/text_encoder/config.json"));
        let vocabulary = ConfigFile::read(config)
            .unwrap()
            .required("vocab_size")
            .unwrap();
        let dir = reference(&format!("teacher/{name}/tokenizer"));
        let tokenizer = ClipTokenizer::load(&dir, 77, vocabulary).unwrap();
        for (text, which) in expected.texts().iter().zip(["short", "long"]) {
            let chunks = tokenizer.chunks(text).unwrap();
            let texts: Vec<&str> = chunks.iter().map(|c| c.text.as_str()).collect();
            assert_eq!(
                texts,
                expected.strings(&format!("{which}.chunks")),
                "{name} {which}"
            );
            let ids: Vec<u32> = chunks.iter().flat_map(|c| c.ids.clone()).collect();
            assert_eq!(ids, expected.ids(&format!("{which}.ids")), "{name} {which}");
            let characters: Vec<char> = text.chars().collect();
            for chunk in &chunks {
                for &(start, end) in &chunk.offsets {
                    let part: String = characters[start..end].iter().collect();
                    assert!(!part.trim().is_empty(), "{name}: an offset on white space");
                }
            }
        }
    }
}

#[test]
fn a_sentence_or_word_too_long_for_the_context_is_cut() {
    let dir = reference("teacher/a/tokenizer");
    let tokenizer = ClipTokenizer::load(&dir, 77, 601).unwrap();
    let sentence = "red circle ".repeat(60);
    let chunks = tokenizer.chunks(&sentence).unwrap();
    assert!(chunks.len() > 1);
    for chunk in &chunks {
        assert_eq!(chunk.ids.len(), 77);
        assert!(chunk.offsets.len() <= 75);
        assert!(chunk.text.starts_with("red") || chunk.text.starts_with("circle"));
    }
    let covered: usize = chunks
        .iter()
        .map(|c| c.text.split_whitespace().count())
        .sum();
    assert_eq!(covered, 120, "no word is lost between chunks");
    let word = "qx".repeat(100);
    let chunks = tokenizer.chunks(&format!("a {word} circle")).unwrap();
    assert!(
        chunks.iter().any(|c| c.offsets.len() == 75),
        "the first 75 tokens of the word stay"
    );
    assert!(chunks.iter().all(|c| c.ids.len() == 77));
    assert!(
        tokenizer
            .chunks("  ")
            .unwrap_err()
            .to_string()
            .contains("empty")
    );
}
