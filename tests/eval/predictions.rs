//! Predictions on disk: going on after a crash, and the files for other programs.

use std::fs;
use std::io::Write;

use lavender_wgpu::eval::Benchmark;
use lavender_wgpu::eval::item::{Item, drawn};
use lavender_wgpu::eval::predictions::{Line, Predictions, missing};
use serde_json::{Value, json};

fn items() -> Vec<Item> {
    let mut items = drawn(None).unwrap();
    items.truncate(4);
    items[1].options = vec![('A', "red\t\"x\"".into()), ('B', "blue".into())];
    items[2].answers = vec!["a".into(), "b".into()];
    items[3].category = Some("last".into());
    items
}

fn line(item: &Item) -> Line {
    let reply = "two\nlines";
    let score = Benchmark::Vqa.score(item, reply).unwrap();
    Line::new(item, Benchmark::Vqa.category(item), reply, score)
}

#[test]
fn a_crash_loses_no_whole_line_and_the_next_run_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (items, settings) = (items(), json!({"model": "m", "limit": null}));
    let mut predictions = Predictions::open(dir.path(), &settings).unwrap();
    for item in &items[..2] {
        predictions.push(line(item)).unwrap();
    }
    // No close, no flush: the lines are in the file. Then half a line, as a crash leaves it.
    let path = dir.path().join("predictions.jsonl");
    assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 2);
    let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(b"{\"index\": \"scene-0").unwrap();
    drop((predictions, file));

    let mut again = Predictions::open(dir.path(), &settings).unwrap();
    assert_eq!(again.lines(), [line(&items[0]), line(&items[1])]);
    assert_eq!(missing(&items, again.lines(), dir.path()).unwrap(), [2, 3]);
    for item in [&items[3], &items[2]] {
        again.push(line(item)).unwrap();
    }
    drop(again);
    let whole = Predictions::open(dir.path(), &settings).unwrap();
    assert_eq!(whole.lines().len(), 4);
    assert!(
        missing(&items, whole.lines(), dir.path())
            .unwrap()
            .is_empty()
    );
}

#[test]
fn predictions_of_another_evaluation_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let items = items();
    let settings = json!({"model": "m", "limit": null});
    let mut predictions = Predictions::open(dir.path(), &settings).unwrap();
    predictions.push(line(&items[0])).unwrap();
    let refused = |settings: &Value| match Predictions::open(dir.path(), settings) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("opened"),
    };
    let error = refused(&json!({"model": "m", "limit": 5}));
    assert!(
        error.contains("field `limit`: null found, 5 expected"),
        "{error}"
    );
    // Other data under the same settings.
    let error = missing(&items[1..], predictions.lines(), dir.path()).unwrap_err();
    assert!(error.to_string().contains("scene-00000-q0"), "{error}");
    fs::write(dir.path().join("predictions.jsonl"), "{}\n").unwrap();
    let error = refused(&settings);
    assert!(error.contains("line 1: no prediction"), "{error}");
}

#[test]
fn other_programs_find_their_fields() {
    let dir = tempfile::tempdir().unwrap();
    let items = items();
    let mut predictions = Predictions::open(dir.path(), &json!({})).unwrap();
    for item in items.iter().rev() {
        predictions.push(line(item)).unwrap();
    }
    predictions.finish("scenes", "mini").unwrap();
    // VLMEvalKit: one row a question in the data's order, columns by name.
    let mut reader = csv::ReaderBuilder::new();
    let path = dir.path().join("predictions.tsv");
    let mut reader = reader.delimiter(b'\t').from_path(path).unwrap();
    let header: Vec<String> = reader.headers().unwrap().iter().map(String::from).collect();
    let wanted = [
        "index",
        "question",
        "answer",
        "A",
        "B",
        "category",
        "split",
        "prediction",
    ];
    assert_eq!(header, wanted);
    let rows: Vec<csv::StringRecord> = reader.records().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 4);
    assert_eq!(&rows[0][0], "scene-00000-q0");
    assert_eq!((&rows[1][3], &rows[1][4]), ("red\t\"x\"", "blue"));
    assert_eq!(&rows[2][2], "[\"a\",\"b\"]");
    assert_eq!((&rows[3][5], &rows[3][7]), ("last", "two\nlines"));
    // lmms-eval's `from_log`: response = log["logs"][i]["resps"][0][0] by doc_id.
    let text = fs::read_to_string(dir.path().join("lmms_eval.json")).unwrap();
    let log: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(log["model_configs"]["task"], "scenes");
    assert!(log["args"]["model"].is_string() && log["args"]["limit"].is_null());
    for (i, entry) in log["logs"].as_array().unwrap().iter().enumerate() {
        assert_eq!(entry["doc_id"], i);
        assert_eq!(entry["resps"][0][0], "two\nlines");
    }
    // Every line of the JSONL has both programs' fields.
    let text = fs::read_to_string(dir.path().join("predictions.jsonl")).unwrap();
    for line in text.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        for field in [
            "index",
            "question",
            "answer",
            "prediction",
            "doc_id",
            "target",
            "filtered_resps",
        ] {
            assert!(!line[field].is_null(), "{field} in {line}");
        }
    }
}
