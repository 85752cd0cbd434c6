//! What stands in for the targets in runs to compare with.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use lavender_wgpu::align::options::ControlTargets;
use lavender_wgpu::align::store::{Layout, MapType, Provenance, SIDE, TargetOptions, TargetWriter};
use lavender_wgpu::align::words::{Case, Word};
use lavender_wgpu::train::config::Config;
use lavender_wgpu::train::exchange::Exchange;
use lavender_wgpu::train::loader::Loader;
use lavender_wgpu::train::recipe::Training;
use lavender_wgpu::train::rundir::RunDir;
use lavender_wgpu::vlm::Processor;

use crate::support::{gpu, reference};
use crate::ten_steps::{Until, config, results, run, store};

/// A data set of `(image, answer)`, with a target for each word but "nothing", no two alike.
fn data(dir: &Path, samples: &[(&str, &str)]) -> Config {
    let mut lines = String::new();
    let options = TargetOptions {
        teacher_hash: "none".into(),
        mode: "ddim".into(),
        steps: 1,
        layers: "16+32".into(),
        seed: 0,
        case: Case::Lower,
        precision: "f32".into(),
        maps: MapType::U8,
    };
    let provenance = Provenance {
        teacher: "none".into(),
        adapter: "none".into(),
        driver: "none".into(),
        version: "0".into(),
    };
    let targets = dir.join("targets");
    let mut writer =
        TargetWriter::create(&targets, Layout::Shards, options, provenance, (0, 1)).unwrap();
    let mut number = 0usize;
    for (at, (image, answer)) in samples.iter().enumerate() {
        let id = format!("s{at}");
        let turns = serde_json::json!([
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": answer},
        ]);
        let entry = serde_json::json!({"id": id, "image": image, "messages": turns});
        lines += &format!("{entry}\n");
        std::fs::copy(reference("mllama/images/tiny.png"), dir.join(image)).unwrap();
        let mut words: Vec<Word> = lavender_wgpu::align::words::words(answer, Case::Lower);
        words.retain(|word| word.text != "nothing");
        let maps: Vec<f32> = words
            .iter()
            .flat_map(|_| {
                number += 1;
                // A bright place of its own on a dark map.
                let mut map = vec![0.0; SIDE * SIDE];
                map[number] = 1.0;
                map
            })
            .collect();
        writer.put(&id, None, answer, &words, &maps).unwrap();
    }
    writer.finish().unwrap();
    std::fs::write(dir.join("data.jsonl"), lines).unwrap();
    let mut config = Config::default();
    config.model.path = reference("smolvlm/a");
    config.data.path = dir.join("data.jsonl");
    config.data.targets = Some(targets);
    config
}

fn loader(config: &Config) -> Loader {
    let processor = Arc::new(Processor::open(&config.model.path).unwrap());
    Loader::new(config, processor).unwrap()
}

/// Every matched word of the data set: its sample, itself, and the number of the map it is given.
fn given(config: &Config, control: ControlTargets) -> Vec<(usize, String, usize)> {
    let mut config = config.clone();
    config.control.targets = control;
    let loader = loader(&config);
    let all: Vec<usize> = (0..loader.data().samples.len()).collect();
    let mut given = Vec::new();
    for (sample, example) in loader.examples(&all).unwrap().iter().enumerate() {
        let maps = example.targets.chunks_exact(SIDE * SIDE);
        for (word, map) in example.words.words.iter().zip(maps) {
            let bright = map.iter().position(|&v| v == 1.0).unwrap();
            given.push((sample, word.clone(), bright));
        }
    }
    given
}

/// Samples of unlike numbers of words; two captions of one image, one without a target, one word in all of them.
const SAMPLES: [(&str, &str); 7] = [
    ("a.png", "A dog on grass."),
    ("a.png", "a dog runs, a dog barks"),
    ("b.png", "nothing"),
    ("c.png", "A cat."),
    ("d.png", "a red ball beside a dog"),
    ("e.png", "two"),
    ("f.png", "The cat and the dog and nothing more."),
];

#[test]
fn shuffled_targets_exchange_all_maps_between_images() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = data(dir.path(), &SAMPLES);
    let own = given(&config, ControlTargets::Own);
    let shuffled = given(&config, ControlTargets::Shuffled);
    assert_eq!(own.len(), 21);
    let maps = |given: &[(usize, String, usize)]| -> BTreeSet<usize> {
        given.iter().map(|(_, _, map)| *map).collect()
    };
    assert_eq!(maps(&own).len(), own.len(), "the maps differ");
    assert_eq!(maps(&own), maps(&shuffled), "each map is given once");
    for ((sample, word, map), (_, _, before)) in shuffled.iter().zip(&own) {
        let (donor, ..) = own.iter().find(|(_, _, other)| other == map).unwrap();
        assert_ne!(map, before, "{word} of sample {sample} keeps its map");
        let image = |sample: usize| SAMPLES[sample].0;
        assert_ne!(image(*sample), image(*donor), "{word} of sample {sample}");
    }
    let again = given(&config, ControlTargets::Shuffled);
    assert_eq!(again, shuffled, "the seed alone decides");
    config.train.seed = 1;
    assert_ne!(given(&config, ControlTargets::Shuffled), shuffled);
}

#[test]
fn words_of_one_image_are_exchanged_among_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let config = data(dir.path(), &[("a.png", "a red ball"), ("b.png", "nothing")]);
    let own = given(&config, ControlTargets::Own);
    let shuffled = given(&config, ControlTargets::Shuffled);
    assert_eq!(own.len(), 3);
    for (a, b) in own.iter().zip(&shuffled) {
        assert_ne!(a, b, "a word keeps its map");
    }
}

#[test]
fn a_single_word_has_nothing_to_exchange() {
    let dir = tempfile::tempdir().unwrap();
    let config = data(dir.path(), &[("a.png", "ball"), ("b.png", "nothing")]);
    let loader = loader(&config);
    let error = Exchange::new(&loader, &config.word_rules(), 0).err();
    let error = error.expect("refused").to_string();
    assert!(
        error.contains("control.targets") && error.contains("1 word(s)"),
        "{error}"
    );
}

#[test]
fn uniform_targets_are_one_half_everywhere() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = data(dir.path(), &SAMPLES);
    config.control.targets = ControlTargets::Uniform;
    for example in loader(&config).examples(&[0, 4]).unwrap() {
        assert_eq!(
            example.targets.len(),
            example.words.words.len() * SIDE * SIDE
        );
        assert!(example.targets.len() > 1 && example.targets.iter().all(|&v| v == 0.5));
    }
}

#[test]
fn a_run_of_shuffled_targets_resumes_bit_equal_and_differs_from_one_of_its_own() {
    let fixture = reference("train_smolvlm");
    let dir = tempfile::tempdir().unwrap();
    store(&fixture, &dir.path().join("targets"));
    let base = config("smolvlm", &fixture, dir.path());
    let with = |name: &str, targets| {
        let mut config = base.clone();
        config.data.shuffle = true;
        config.control.targets = targets;
        config.train.steps = Some(4);
        config.run.dir = Some(dir.path().join(name));
        config
    };
    let first = run(&with("first", ControlTargets::Shuffled));
    let second = RunDir::create(&with("second", ControlTargets::Shuffled)).unwrap();
    let mut training = Training::new(gpu(), &with("second", ControlTargets::Shuffled)).unwrap();
    let stopped = training.run(gpu(), &second, &mut Until(Some(2), 0));
    assert!(stopped.is_err());
    let (second, config, checkpoint) = RunDir::open(second.root()).unwrap();
    let mut training = Training::new(gpu(), &config).unwrap();
    training.restore(&checkpoint.unwrap()).unwrap();
    training.run(gpu(), &second, &mut Until(None, 0)).unwrap();
    assert_eq!(results(&first), results(&second));
    let own = run(&with("own", ControlTargets::Own));
    let (first, own) = (results(&first).2, results(&own).2);
    assert_eq!(first[0][0], own[0][0], "the language loss is the same");
    assert_ne!(first[0][1], own[0][1], "the attention loss is not");
}
