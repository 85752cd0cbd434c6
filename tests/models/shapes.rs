//! Names and shapes of a model's tensors from its configuration alone, against what `transformers` saves and counts; see
//! `tests/reference/recipes.py`.

use std::collections::BTreeMap;

use image::RgbImage;
use lavender_wgpu::tensor::Checkpoint;
use lavender_wgpu::vlm::idefics3::Idefics3Config;
use lavender_wgpu::vlm::idefics3_processor::{Idefics3Processor, SplitConfig, prompt_tokens};
use lavender_wgpu::vlm::mllama::canonical;
use lavender_wgpu::vlm::{Shapes, shapes};
use serde_json::Value;

use crate::support::reference;

#[test]
fn shapes_are_those_of_saved_checkpoints() {
    for name in ["smolvlm/a", "smolvlm/b", "mllama/a", "mllama/b"] {
        let dir = reference(name);
        let saved = Checkpoint::open(&dir, "model").unwrap();
        let saved = match name.starts_with("mllama") {
            true => saved.rename(canonical),
            false => saved,
        };
        let shape = |name: &str| saved.shape(name).unwrap().to_vec();
        let saved: Shapes = saved.names().map(|n| (n.to_owned(), shape(n))).collect();
        assert_eq!(shapes(&dir).unwrap(), saved, "{name}");
    }
}

#[test]
fn published_models_have_their_published_number_of_weights() {
    // As their model cards have it.
    let published = BTreeMap::from([
        ("SmolVLM-256M-Instruct", 256_484_928),
        ("SmolVLM-500M-Instruct", 507_482_304),
        ("SmolVLM-Instruct", 2_246_272_880),
        ("Llama-3.2-11B-Vision-Instruct", 10_670_220_835),
    ]);
    let text = std::fs::read_to_string(reference("recipes/parameters.json")).unwrap();
    let counted: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(counted.as_object().unwrap().len(), published.len());
    for (name, weights) in published {
        let shapes = shapes(&reference(&format!("recipes/{name}"))).unwrap();
        let found: usize = shapes.values().map(|s| s.iter().product::<usize>()).sum();
        assert_eq!(found, weights, "{name}");
        assert_eq!(counted[name]["parameters"], found, "{name}");
        assert_eq!(counted[name]["tensors"], shapes.len(), "{name}");
    }
}

#[test]
fn tiles_that_are_no_whole_patches_lose_the_rest() {
    // SmolVLM of 2.2 G weights: 384 pixels are 27 patches of 14 and 6 pixels.
    let dir = reference("recipes/SmolVLM-Instruct");
    let config = Idefics3Config::load(&dir).unwrap();
    let split = SplitConfig::load(&dir).unwrap();
    config.check_tile(&dir, split.side).unwrap();
    assert_eq!(config.tile_side(split.side), 9);
    let error = config.check_tile(&dir, 400).unwrap_err().to_string();
    for part in ["400 found", "28 patches", "scale_factor 3"] {
        assert!(error.contains(part), "{error}");
    }
    // A large square picture, as the published processor tiles it: 16 tiles and the global one, 81 tokens each.
    assert_eq!(split.grid(640, 640), (4, 4));
    assert_eq!(split.grid(500, 333), (3, 4));
    assert_eq!(prompt_tokens((4, 4), 81), 17 * 81 + 2 * 16 + 5 + 3);
}

#[test]
fn a_pictures_tokens_are_known_without_a_tokenizer() {
    for name in ["smolvlm/a", "smolvlm/b"] {
        let dir = reference(name);
        let config = Idefics3Config::load(&dir).unwrap();
        let side = |tile| config.tile_side(tile) * config.tile_side(tile);
        let processor = Idefics3Processor::load(&dir, side).unwrap();
        for (width, height) in [(640, 640), (500, 100), (9, 9), (20, 70)] {
            let picture = RgbImage::new(width, height);
            let prompt = processor.text("<image>", &[picture]).unwrap();
            let grid = processor.split.grid(width, height);
            let (found, expected) = (
                prompt.encoded.ids.len(),
                prompt_tokens(grid, processor.tile_tokens),
            );
            let tiles = prompt.images[0].count();
            assert_eq!(tiles, grid.0 * grid.1 + 1, "{name} {width}x{height}");
            // Two line breaks may be one token.
            assert!(
                found.abs_diff(expected) <= 1,
                "{name} {width}x{height}: {found}, {expected} expected"
            );
        }
    }
}
