//! Predictions on disk: JSONL written line by line, and the same as other programs read it.
//!
//! Each line of `predictions.jsonl` has the fields of a VLMEvalKit result (`index`, `question`, `answer`,
//! `prediction`, options, `category`, `split`) and of lmms-eval's sample log (`doc_id`, `target`, `resps`,
//! `filtered_resps`), and our score. When all are there, `predictions.tsv` is VLMEvalKit's result file
//! (`PRED_FORMAT=tsv`) and `lmms_eval.json` the log that lmms-eval's model `from_log` replays.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::item::Item;
use super::score::Score;
use crate::error::{Error, Result};
use crate::files::{create_dir, read_text, write_bytes};

/// One sample's reply and score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Its name in the data set.
    pub index: String,
    /// Its place there.
    pub doc_id: usize,
    /// The question as the data set has it.
    pub question: String,
    /// The expected answer; of several, a JSON list.
    pub answer: String,
    /// The same, as lmms-eval names it.
    pub target: String,
    /// The model's reply; empty where the expected answer was read.
    pub prediction: String,
    /// The reply, one list a request.
    pub resps: Vec<Vec<String>>,
    /// The reply.
    pub filtered_resps: Vec<String>,
    /// What it is reported by.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub category: Option<String>,
    /// Part of the benchmark.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub split: Option<String>,
    /// What was measured.
    pub score: Score,
    /// Options, each under its letter.
    #[serde(flatten)]
    pub options: Map<String, Value>,
}

impl Line {
    /// The line of an item.
    pub fn new(item: &Item, category: Option<String>, reply: &str, score: Score) -> Line {
        let answer = match &item.answers[..] {
            [one] => one.clone(),
            many => json!(many).to_string(),
        };
        let options = item.options.iter();
        Line {
            index: item.index.clone(),
            doc_id: item.number,
            question: item.question.clone(),
            target: answer.clone(),
            answer,
            prediction: reply.to_owned(),
            resps: vec![vec![reply.to_owned()]],
            filtered_resps: vec![reply.to_owned()],
            category,
            split: item.split.clone(),
            score,
            options: options
                .map(|(c, text)| (c.to_string(), json!(text)))
                .collect(),
        }
    }
}

/// The predictions of one evaluation: in memory, and in a directory if there is one.
pub struct Predictions {
    lines: Vec<Line>,
    file: Option<(PathBuf, File)>,
}

impl Predictions {
    /// Predictions that are not kept.
    pub fn in_memory() -> Predictions {
        Predictions {
            lines: Vec::new(),
            file: None,
        }
    }

    /// Opens `dir`, going on with the lines that are there. `settings` have to be those that the lines were made
    /// with. A last line that was cut off by a crash is dropped.
    ///
    /// # Errors
    /// Other settings (the first difference), a damaged line, a directory that cannot be written.
    pub fn open(dir: &Path, settings: &Value) -> Result<Predictions> {
        create_dir(dir)?;
        let kept = dir.join("settings.json");
        let path = dir.join("predictions.jsonl");
        if path.is_file() && kept.is_file() {
            let before: Value = serde_json::from_str(&read_text(&kept)?)
                .map_err(|e| Error::file(&kept, format!("not JSON: {e}")))?;
            if let Some(field) = first_difference(&before, settings) {
                let message = format!(
                    "field `{field}`: {} found, {} expected; these predictions are of another evaluation: give --out a \
                     new directory",
                    before[&field], settings[&field]
                );
                return Err(Error::file(&kept, message));
            }
        } else {
            let text = serde_json::to_vec_pretty(settings).unwrap_or_default();
            write_bytes(&kept, &text)?;
        }
        let io = |e| Error::io(&path, e);
        let mut file = OpenOptions::new();
        let file = file.read(true).write(true).create(true).truncate(false);
        let mut file = file.open(&path).map_err(io)?;
        let bytes = std::fs::read(&path).map_err(io)?;
        let whole = bytes
            .iter()
            .rposition(|&b| b == b'\n')
            .map_or(0, |at| at + 1);
        let mut lines = Vec::new();
        for (number, line) in bytes[..whole].split(|&b| b == b'\n').enumerate() {
            if line.is_empty() {
                continue;
            }
            let line = serde_json::from_slice(line).map_err(|e| {
                Error::file(&path, format!("line {}: no prediction: {e}", number + 1))
            })?;
            lines.push(line);
        }
        file.set_len(whole as u64).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        Ok(Predictions {
            lines,
            file: Some((path, file)),
        })
    }

    /// The lines so far.
    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Adds a line; it is in the file when this returns.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn push(&mut self, line: Line) -> Result<()> {
        if let Some((path, file)) = &mut self.file {
            let mut text = serde_json::to_vec(&line)
                .map_err(|e| Error::file(&*path, format!("cannot be written as JSON: {e}")))?;
            text.push(b'\n');
            // One write without a buffer: a crash of the program loses no whole line.
            file.write_all(&text).map_err(|e| Error::io(&*path, e))?;
        }
        self.lines.push(line);
        Ok(())
    }

    /// Puts the lines into the items' order and writes the files for other programs: VLMEvalKit's result, and if the
    /// model wrote replies lmms-eval's log of task `task` by model `model`.
    ///
    /// # Errors
    /// Files that cannot be written.
    pub fn finish(&mut self, task: &str, model: &str) -> Result<()> {
        self.lines.sort_by_key(|line| line.doc_id);
        let Some((path, file)) = &mut self.file else {
            return Ok(());
        };
        file.sync_all().map_err(|e| Error::io(&*path, e))?;
        let dir = path.parent().unwrap_or(Path::new("."));
        write_bytes(dir.join("predictions.tsv"), &tsv(&self.lines, path)?)?;
        let line = |line: &Line| json!({"doc_id": line.doc_id, "target": line.target, "resps": line.resps});
        let log = json!({
            "args": {"model": "lavender-wgpu", "model_args": model, "limit": null},
            "model_configs": {"task": task},
            "logs": self.lines.iter().map(line).collect::<Vec<_>>(),
        });
        write_bytes(dir.join("lmms_eval.json"), log.to_string().as_bytes())
    }
}

/// The lines as VLMEvalKit's result file.
fn tsv(lines: &[Line], path: &Path) -> Result<Vec<u8>> {
    let mut letters: Vec<&String> = lines.iter().flat_map(|l| l.options.keys()).collect();
    letters.sort();
    letters.dedup();
    let mut writer = csv::WriterBuilder::new()
        .delimiter(b'\t')
        .quote_style(csv::QuoteStyle::Always)
        .from_writer(Vec::new());
    let mut header = vec!["index", "question", "answer"];
    header.extend(letters.iter().map(|l| l.as_str()));
    header.extend(["category", "split", "prediction"]);
    let failed = |e: csv::Error| Error::file(path, e.to_string());
    writer.write_record(&header).map_err(failed)?;
    for line in lines {
        let option = |l: &&String| line.options.get(*l).and_then(Value::as_str).unwrap_or("");
        let mut record = vec![line.index.as_str(), &line.question, &line.answer];
        record.extend(letters.iter().map(option));
        record.push(line.category.as_deref().unwrap_or(""));
        record.push(line.split.as_deref().unwrap_or(""));
        record.push(&line.prediction);
        writer.write_record(&record).map_err(failed)?;
    }
    writer
        .into_inner()
        .map_err(|e| Error::file(path, e.to_string()))
}

/// The first field that differs between two objects.
fn first_difference(a: &Value, b: &Value) -> Option<String> {
    let (Value::Object(a), Value::Object(b)) = (a, b) else {
        return (a != b).then(String::new);
    };
    let mut names = a.keys().chain(b.keys());
    names.find(|name| a.get(*name) != b.get(*name)).cloned()
}

/// Which of `items` have no line yet, as indices.
///
/// # Errors
/// A line of a sample that the items do not have: the data changed.
pub fn missing(items: &[Item], lines: &[Line], dir: &Path) -> Result<Vec<usize>> {
    let places: HashMap<usize, &Item> = items.iter().map(|item| (item.number, item)).collect();
    let mut done = std::collections::HashSet::new();
    for line in lines {
        match places.get(&line.doc_id) {
            Some(item) if item.index == line.index && item.question == line.question => {
                done.insert(line.doc_id);
            }
            _ => {
                let message = format!(
                    "predictions.jsonl: sample `{}` is not in the data; give --out a new directory",
                    line.index
                );
                return Err(Error::file(dir, message));
            }
        }
    }
    let left = (0..items.len()).filter(|&i| !done.contains(&items[i].number));
    Ok(left.collect())
}
