//! Conversations in JSON: LLaVA/ShareGPT arrays and JSONL with `messages`.
//!
//! LLaVA/ShareGPT is one array of `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`; the
//! human's leading (or trailing) `<image>` line is the image part. JSONL has on each line
//! `{"id", "image", "messages": [{"role", "content"}]}`, content a string or a list of
//! `{"type": "text", "text"}` and `{"type": "image", "image"}`; the image may stand at the top, in `images`, or in
//! its part. Either form of entry, and the others of [`super::entry`], are accepted in either kind of file. An entry
//! without an id gets its number.

use std::path::Path;

use serde_json::Value;

use super::entry::{Images, Place, samples};
use super::format::Selection;
use super::{Sample, karpathy};
use crate::{Error, Result, files};

/// The samples of a file, in order.
pub(super) fn load(
    path: &Path,
    images: Option<&Path>,
    selection: &Selection,
) -> Result<Vec<Sample>> {
    let root = images.unwrap_or_else(|| path.parent().unwrap_or(Path::new("")));
    let text = files::read_text(path)?;
    let text = text.trim_start_matches('\u{feff}');
    let mut all = Vec::new();
    let mut add = |at: String, entry: &Value, number: usize| -> Result<()> {
        let place = Place { path, at };
        let Value::Object(entry) = entry else {
            return Err(place.expected("", Some(entry), "an object"));
        };
        let images = Images::Named {
            root,
            confined: false,
        };
        all.extend(samples(
            &place,
            entry,
            &number.to_string(),
            images,
            selection,
        )?);
        Ok(())
    };
    if text.trim_start().starts_with('[') {
        let entries: Vec<Value> = serde_json::from_str(text)
            .map_err(|e| Error::file(path, format!("line {}: not valid JSON: {e}", e.line())))?;
        for (number, entry) in entries.iter().enumerate() {
            add(format!("entry {number}"), entry, number)?;
        }
    } else {
        // The published splits of Flickr30k and COCO are one JSON object, on one line or on several.
        if let Ok(Value::Object(whole)) = serde_json::from_str::<Value>(text) {
            let of_objects = |list: &Vec<Value>| list.first().is_some_and(Value::is_object);
            let images = whole.get("images").and_then(Value::as_array);
            if whole.contains_key("dataset") && images.is_some() || images.is_some_and(of_objects) {
                return karpathy::samples(path, &whole, root, selection);
            }
            if text.trim_end().lines().count() != 1 {
                return Err(Error::file(
                    path,
                    "found one JSON object, expected an array of conversations or one object a line",
                ));
            }
        }
        for (number, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let at = format!("line {}", number + 1);
            let entry: Value = serde_json::from_str(line)
                .map_err(|e| Error::file(path, format!("{at}: not valid JSON: {e}")))?;
            add(at, &entry, number)?;
        }
    }
    selection.none(path, "a file of conversations")?;
    Ok(all)
}
