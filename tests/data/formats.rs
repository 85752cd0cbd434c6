//! The same samples in every format, written by the libraries that people write them with.

use std::path::{Path, PathBuf};

use lavender_wgpu::data::{DataSet, Sample};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference/formats")
        .join(name)
}

fn load(name: &str) -> DataSet {
    DataSet::load(file(name), None).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Same ids, turns and pixels.
fn assert_same(name: &str, found: &[Sample], expected: &[Sample]) {
    let ids =
        |samples: &[Sample]| -> Vec<String> { samples.iter().map(|s| s.id.clone()).collect() };
    assert_eq!(ids(found), ids(expected), "{name}");
    for (a, b) in found.iter().zip(expected) {
        assert_eq!(a.turns, b.turns, "{name}: {}", a.id);
        assert_eq!(
            a.image.open().unwrap(),
            b.image.open().unwrap(),
            "{name}: {}",
            a.id
        );
    }
}

#[test]
fn captions_are_the_same_in_every_format() {
    let expected = load("captions.json").samples;
    assert_eq!(expected.len(), 5);
    for name in [
        "caption.parquet",
        "lists.parquet",
        "wds",
        "wds/captions-{000..001}.tar",
        "folder",
    ] {
        let found = load(name).samples;
        assert_same(name, &found, &expected);
        for sample in &found {
            assert_eq!(
                sample.image.file_name(),
                format!("{}.png", sample.id),
                "{name}"
            );
        }
    }
    for name in ["bytes.parquet", "path.parquet"] {
        assert_same(name, &load(name).samples, &expected);
    }
    assert_same(
        "null_bytes",
        &load("null_bytes.parquet").samples,
        &expected[..2],
    );
    assert_same(
        "one shard",
        &load("wds/captions-001.tar").samples,
        &expected[3..],
    );
}

#[test]
fn conversations_are_the_same_in_every_format() {
    let expected = load("chat.json").samples;
    assert_eq!(expected[0].turns.len(), 4);
    for name in [
        "chat.jsonl",
        "chat.parquet",
        "wds-chat.tar",
        "pairs.parquet",
    ] {
        let mut found = load(name).samples;
        if name.starts_with("pairs") {
            // Their questions have no mark where the image stands; it goes first all the same.
            assert!(found.iter().all(|s| s.turns.len() == 4));
        }
        found.truncate(5);
        assert_same(name, &found, &expected);
    }
}

#[test]
fn a_list_of_captions_is_a_sample_each_and_splits_are_chosen() {
    let ids =
        |name: &str| -> Vec<String> { load(name).samples.into_iter().map(|s| s.id).collect() };
    let train = [
        "s0.png#0", "s0.png#1", "s1.png#0", "s1.png#1", "s4.png#0", "s4.png#1",
    ];
    let images = file("images");
    let karpathy = |fragment: &str| {
        let name = format!("{}{fragment}", file("karpathy.json").display());
        DataSet::load(name, Some(&images))
            .map(|set| set.samples)
            .map_err(|e| e.to_string())
    };
    let found = karpathy("").unwrap();
    assert_eq!(
        found.iter().map(|s| s.id.as_str()).collect::<Vec<_>>(),
        train
    );
    assert_eq!(found[0].answer(), "a red cat");
    assert_eq!(found[1].answer(), "a cat, red");
    assert_eq!(
        found[1].image.open().unwrap(),
        load("captions.json").samples[0].image.open().unwrap()
    );
    let ids_of = |samples: Vec<Sample>| samples.into_iter().map(|s| s.id).collect::<Vec<_>>();
    assert_eq!(
        ids_of(karpathy("#val+test,first").unwrap()),
        ["s2.png#0", "s3.png#0"]
    );
    assert_eq!(karpathy("#all").unwrap().len(), 10);
    let error = karpathy("#dev").unwrap_err();
    assert!(
        error.contains("`dev`") && error.contains("test, train, val"),
        "{error}"
    );
    let error = karpathy("#a,b").unwrap_err();
    assert!(error.contains("#train,first"), "{error}");

    // The same table as parquet, its rows told apart by a column.
    assert_eq!(ids("captions.parquet").len(), 6);
    let first = load("captions.parquet#test,first").samples;
    assert_eq!(first.len(), 1);
    assert_eq!(
        (first[0].id.as_str(), first[0].answer().as_str()),
        ("3#0", "a \"quoted\" sign")
    );
    // Shards of the hub, told apart by their names.
    assert_eq!(ids("hub"), ["s0", "s1"]);
    assert_eq!(ids("hub#test"), ["s2"]);
    assert_eq!(ids("hub/data#all").len(), 3);
    let error = DataSet::load(file("folder#test"), None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no splits"), "{error}");
}

#[test]
fn of_several_answers_the_most_frequent_is_learned() {
    let answers: Vec<String> = load("answers.parquet")
        .samples
        .iter()
        .map(Sample::answer)
        .collect();
    assert_eq!(answers, ["dog", "2", "left"]);
}

#[test]
fn rows_of_question_and_caption_are_read_from_json_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.jsonl");
    let text = concat!(
        r#"{"image":"1.png","question":"what?","answer":"a cat"}"#,
        "\n",
        r#"{"image":"1.png","caption":["one","two"]}"#,
        "\n",
        r#"{"id":"v","image":"1.png","question":"how many?","answers":[{"answer":"3"},{"answer":"3"},{"answer":"4"}]}"#,
    );
    std::fs::write(&path, text).unwrap();
    let set = DataSet::load(&path, None).unwrap();
    let found: Vec<(&str, String)> = set
        .samples
        .iter()
        .map(|s| (s.id.as_str(), s.answer()))
        .collect();
    let expected = [("0", "a cat"), ("1#0", "one"), ("1#1", "two"), ("v", "3")];
    assert_eq!(found, expected.map(|(id, answer)| (id, answer.to_owned())));
}
