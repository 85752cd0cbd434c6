//! Words that the student itself says.

use std::collections::BTreeMap;

use lavender_wgpu::align::filter::WordRules;
use lavender_wgpu::align::maps::SampleWords;
use lavender_wgpu::align::options::WordSource;
use lavender_wgpu::align::store::{SIDE, Targets};
use lavender_wgpu::align::words::Word;
use lavender_wgpu::train::batch::Example;
use lavender_wgpu::train::recipe::Training;
use lavender_wgpu::vlm::processor::template::Message;

use crate::support::{gpu, reference};
use crate::ten_steps::{config, store};

#[test]
fn rows_are_filed_under_the_token_that_is_predicted_there() {
    let fixture = reference("train_smolvlm");
    let dir = tempfile::tempdir().unwrap();
    store(&fixture, &dir.path().join("targets"));
    let mut config = config("smolvlm", &fixture, dir.path());
    config.words.source = WordSource::Predicted;
    let training = Training::new(gpu(), &config).unwrap();
    let student = &training.objective.student;
    let picture = image::open(reference("mllama/images/wide.png"))
        .unwrap()
        .to_rgb8();
    let turns = [
        Message::image_and_text("Describe the picture."),
        Message::text("assistant", "A green circle is left of the red circle."),
    ];
    let prepared = student.prepare(&picture, &turns).unwrap();
    // Every position's first choice, from the logits of the whole sequence.
    let logits = student.prompt_logits(&prepared).unwrap();
    let vocabulary = student.vocabulary();
    let image = student.processor().image_token();
    let mut said: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let ids = &prepared.ids;
    for t in (0..ids.len() - 1).filter(|&t| ids[t] != image) {
        let row = &logits[t * vocabulary..(t + 1) * vocabulary];
        let top = (0..vocabulary)
            .max_by(|&a, &b| row[a].total_cmp(&row[b]))
            .unwrap();
        let text = student.tokenizer().decode(&[top as u32], true).unwrap();
        let text = text.trim().to_lowercase();
        if !text.is_empty() && text.chars().all(char::is_alphanumeric) {
            said.entry(text).or_default().push(t);
        }
    }
    assert!(said.len() > 2, "{said:?}");
    // Targets for all of them but the first, and for a word that is not said; the last one's is empty.
    let kept: Vec<String> = said.keys().skip(1).cloned().collect();
    let mut words: Vec<Word> = Vec::new();
    let mut maps = Vec::new();
    for (i, text) in kept
        .iter()
        .cloned()
        .chain(["unsaid".to_owned()])
        .enumerate()
    {
        words.push(Word {
            text,
            spans: Vec::new(),
        });
        let value = if i + 1 == kept.len() {
            0.0
        } else {
            (i + 1) as f32 / 100.0
        };
        maps.extend(vec![value; SIDE * SIDE]);
    }
    let known = Targets {
        id: "s".into(),
        caption: String::new(),
        words,
        maps,
    };
    let example = Example {
        id: "s".into(),
        prepared,
        words: SampleWords::new(&[]),
        targets: Vec::new(),
        known: Some(known),
    };
    let mut examples = [example];
    training
        .objective
        .predict_words(gpu(), &mut examples, &WordRules::default())
        .unwrap();
    let [example] = &examples;
    assert_eq!(example.words.words, kept[..kept.len() - 1]);
    let mut rows: Vec<usize> = kept[..kept.len() - 1]
        .iter()
        .flat_map(|w| said[w].clone())
        .collect();
    rows.sort_unstable();
    assert_eq!(example.words.rows, rows);
    for (i, targets) in example.targets.chunks(SIDE * SIDE).enumerate() {
        assert_eq!(targets[0], (i + 1) as f32 / 100.0);
    }
    assert!(training.objective.maps(gpu(), example).unwrap().is_some());
}
