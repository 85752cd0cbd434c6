//! The captions of Flickr30k and COCO in Karpathy's JSON.
//!
//! `{"dataset", "images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}`. Every sentence is a sample,
//! `FILENAME#0`, `FILENAME#1` …, the answer to the method's prompt ([`super::drawn::CAPTION_PROMPT`]).

use std::path::Path;

use serde_json::{Map, Value};

use super::Sample;
use super::entry::{self, Images, Place};
use super::format::Selection;
use crate::Result;

/// The samples of the wanted splits, `train` by default.
///
/// # Errors
/// An image without a file name, split or sentence; a split that there is not; a path out of the images' folder.
pub(super) fn samples(
    path: &Path,
    whole: &Map<String, Value>,
    root: &Path,
    selection: &Selection,
) -> Result<Vec<Sample>> {
    let top = Place {
        path,
        at: "Karpathy's captions".into(),
    };
    let Some(Value::Array(images)) = whole.get("images") else {
        return Err(top.expected("images", whole.get("images"), "a list"));
    };
    let place = |number: usize| Place {
        path,
        at: format!("images[{number}]"),
    };
    let text = |number: usize, image: &Value, field: &str| match image.get(field) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text.clone()),
        other => Err(place(number).expected(field, other, "a text")),
    };
    let mut available: Vec<String> = Vec::new();
    for (number, image) in images.iter().enumerate() {
        let split = text(number, image, "split")?;
        if !available.contains(&split) {
            available.push(split);
        }
    }
    available.sort();
    selection.check(path, &available)?;
    let mut all = Vec::new();
    for (number, image) in images.iter().enumerate() {
        if !selection.wants(&text(number, image, "split")?, &available) {
            continue;
        }
        let (place, file) = (place(number), text(number, image, "filename")?);
        let name = match image.get("filepath") {
            None | Some(Value::Null) => file.clone(),
            Some(Value::String(folder)) => format!("{folder}/{file}"),
            other => return Err(place.expected("filepath", other, "a text")),
        };
        let Some(Value::Array(sentences)) = image.get("sentences") else {
            return Err(place.expected("sentences", image.get("sentences"), "a list"));
        };
        let captions: Vec<Value> = sentences
            .iter()
            .enumerate()
            .map(|(n, sentence)| match sentence.get("raw") {
                Some(Value::String(raw)) => Ok(Value::String(raw.clone())),
                other => Err(place.expected(&format!("sentences[{n}].raw"), other, "a text")),
            })
            .collect::<Result<_>>()?;
        let row = Map::from_iter([
            ("image".to_owned(), Value::String(name)),
            ("captions".to_owned(), Value::Array(captions)),
        ]);
        let images = Images::Named {
            root,
            confined: true,
        };
        all.extend(entry::samples(&place, &row, &file, images, selection)?);
    }
    Ok(all)
}
