//! Conversations in JSON: LLaVA/ShareGPT arrays and JSONL with `messages`.
//!
//! LLaVA/ShareGPT is one array of `{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}`; the
//! human's leading (or trailing) `<image>` line is the image part. JSONL has on each line
//! `{"id", "image", "messages": [{"role", "content"}]}`, content a string or a list of
//! `{"type": "text", "text"}` and `{"type": "image", "image"}`; the image may stand at the top, in `images`, or in
//! its part. Either form of entry is accepted in either kind of file. An entry without an id gets its number.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{ImageRef, Part, Role, Sample, Turn};
use crate::{Error, Result, files};

/// Formats that another program can turn into one of ours, and how they are told.
const REFUSED: [(&str, &str); 6] = [
    ("parquet", "Hugging Face parquet"),
    ("arrow", "Arrow"),
    ("tar", "WebDataset tar"),
    ("csv", "CSV"),
    ("tsv", "TSV"),
    ("zip", "a zip archive"),
];

/// The samples of a file, in order.
pub fn load(path: &Path, images: Option<&Path>) -> Result<Vec<Sample>> {
    let extension = path
        .extension()
        .unwrap_or_default()
        .to_string_lossy()
        .to_lowercase();
    if let Some((_, name)) = REFUSED.iter().find(|(e, _)| *e == extension) {
        return Err(Error::file(
            path,
            format!("{name} is not read; expected LLaVA/ShareGPT JSON or JSONL with `messages`"),
        ));
    }
    if path.is_dir() {
        return Err(Error::file(
            path,
            "is a directory; expected a .json or .jsonl file",
        ));
    }
    let root = match images {
        Some(root) => root.to_path_buf(),
        None => path.parent().unwrap_or(Path::new("")).to_path_buf(),
    };
    let text = files::read_text(path)?;
    let text = text.trim_start_matches('\u{feff}');
    let mut samples = Vec::new();
    if text.trim_start().starts_with('[') {
        let entries: Vec<Value> = serde_json::from_str(text)
            .map_err(|e| Error::file(path, format!("line {}: not valid JSON: {e}", e.line())))?;
        if entries
            .iter()
            .any(|e| e.get("imgid").is_some() || e.get("sentids").is_some())
        {
            return Err(karpathy(path));
        }
        for (number, entry) in entries.iter().enumerate() {
            let place = Place {
                path,
                at: format!("entry {number}"),
            };
            samples.push(sample(&place, entry, number, &root)?);
        }
    } else {
        // A JSON object over several lines is no JSONL; the published splits of Flickr30k and COCO look like that.
        if let Ok(Value::Object(whole)) = serde_json::from_str::<Value>(text)
            && text.trim_end().lines().count() != 1
        {
            if whole.contains_key("images") && whole.contains_key("dataset") {
                return Err(karpathy(path));
            }
            return Err(Error::file(
                path,
                "found one JSON object, expected an array of conversations or one object a line",
            ));
        }
        for (number, line) in text.lines().enumerate() {
            if line.trim().is_empty() {
                continue;
            }
            let place = Place {
                path,
                at: format!("line {}", number + 1),
            };
            let entry: Value = serde_json::from_str(line)
                .map_err(|e| place.wrong(format!("not valid JSON: {e}")))?;
            if entry.get("dataset").is_some() && entry.get("images").is_some() {
                return Err(karpathy(path));
            }
            samples.push(sample(&place, &entry, number, &root)?);
        }
    }
    Ok(samples)
}

fn karpathy(path: &Path) -> Error {
    Error::file(
        path,
        "Karpathy's caption JSON is not read; expected LLaVA/ShareGPT JSON or JSONL with `messages`",
    )
}

/// Where in a file an entry stands, for messages.
struct Place<'a> {
    path: &'a Path,
    at: String,
}

impl Place<'_> {
    fn wrong(&self, message: impl std::fmt::Display) -> Error {
        Error::file(self.path, format!("{}: {message}", self.at))
    }

    fn expected(&self, field: &str, found: Option<&Value>, expected: &str) -> Error {
        let found = match found {
            None => "nothing".to_owned(),
            Some(value) => {
                let text = value.to_string();
                let cut: String = text.chars().take(60).collect();
                if cut.len() < text.len() {
                    format!("{cut}…")
                } else {
                    cut
                }
            }
        };
        self.wrong(format!(
            "field `{field}`: found {found}, expected {expected}"
        ))
    }
}

fn sample(place: &Place, entry: &Value, number: usize, root: &Path) -> Result<Sample> {
    let Value::Object(entry) = entry else {
        return Err(place.expected("", Some(entry), "an object"));
    };
    let id = match entry.get("id") {
        None | Some(Value::Null) => number.to_string(),
        Some(Value::String(id)) if !id.is_empty() => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        other => return Err(place.expected("id", other, "a text or a number")),
    };
    let mut image = image_at_top(place, entry)?;
    let turns = match (entry.get("conversations"), entry.get("messages")) {
        (Some(list), _) => llava(place, list)?,
        (None, Some(list)) => messages(place, list, &mut image)?,
        (None, None) => {
            return Err(place.wrong("has neither `conversations` (LLaVA/ShareGPT) nor `messages`"));
        }
    };
    let Some(image) = image else {
        return Err(place.expected("image", None, "a file name (every sample needs an image)"));
    };
    finish(place, id, resolve(root, &image), turns)
}

/// What holds for every format: an image part in the first user turn, an answer at the end.
fn finish(place: &Place, id: String, image: PathBuf, mut turns: Vec<Turn>) -> Result<Sample> {
    let images = turns
        .iter()
        .flat_map(|t| &t.parts)
        .filter(|p| **p == Part::Image)
        .count();
    if images > 1 {
        return Err(place.wrong(format!(
            "has {images} image parts, expected one image a sample"
        )));
    }
    let Some(first) = turns.iter_mut().find(|t| t.role == Role::User) else {
        return Err(place.wrong("has no user's turn"));
    };
    if images == 0 {
        first.parts.insert(0, Part::Image);
    }
    match turns.last() {
        Some(last) if last.role == Role::Assistant => {}
        _ => {
            return Err(
                place.wrong("does not end with an assistant's turn, so there is nothing to learn")
            );
        }
    }
    for turn in turns.iter().filter(|t| t.role == Role::Assistant) {
        if turn.text().trim().is_empty() {
            return Err(place.wrong("an assistant's turn is empty, expected an answer or caption"));
        }
    }
    Ok(Sample {
        id,
        image: ImageRef::Path(image),
        turns,
    })
}

fn resolve(root: &Path, image: &str) -> PathBuf {
    let path = Path::new(image);
    if path.is_absolute() {
        path.to_path_buf()
    } else {
        root.join(path)
    }
}

fn image_at_top(place: &Place, entry: &Map<String, Value>) -> Result<Option<String>> {
    let value = match (entry.get("image"), entry.get("images")) {
        (Some(Value::Null) | None, None | Some(Value::Null)) => return Ok(None),
        (Some(Value::String(name)), _) if !name.is_empty() => return Ok(Some(name.clone())),
        (Some(Value::Array(list)), _) | (None | Some(Value::Null), Some(Value::Array(list))) => {
            list
        }
        (image, images) => {
            let field = if image.is_some() { "image" } else { "images" };
            return Err(place.expected(field, image.or(images), "a file name"));
        }
    };
    match value.as_slice() {
        [] => Ok(None),
        [Value::String(name)] if !name.is_empty() => Ok(Some(name.clone())),
        _ => Err(place.expected(
            "images",
            Some(&Value::Array(value.clone())),
            "one file name",
        )),
    }
}

fn llava(place: &Place, list: &Value) -> Result<Vec<Turn>> {
    let Value::Array(list) = list else {
        return Err(place.expected("conversations", Some(list), "a list"));
    };
    list.iter()
        .enumerate()
        .map(|(number, turn)| {
            let field = |name: &str| format!("conversations[{number}].{name}");
            let role = match turn.get("from").and_then(Value::as_str) {
                Some("human" | "user") => Role::User,
                Some("gpt" | "assistant" | "model") => Role::Assistant,
                Some("system") => Role::System,
                _ => {
                    return Err(place.expected(
                        &field("from"),
                        turn.get("from"),
                        "`human`, `gpt` or `system`",
                    ));
                }
            };
            let Some(Value::String(text)) = turn.get("value") else {
                return Err(place.expected(&field("value"), turn.get("value"), "a text"));
            };
            Ok(Turn {
                role,
                parts: with_image_marks(role, text),
            })
        })
        .collect()
}

fn messages(place: &Place, list: &Value, image: &mut Option<String>) -> Result<Vec<Turn>> {
    let Value::Array(list) = list else {
        return Err(place.expected("messages", Some(list), "a list"));
    };
    let mut turns = Vec::with_capacity(list.len());
    for (number, message) in list.iter().enumerate() {
        let role = match message.get("role").and_then(Value::as_str) {
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            Some("system") => Role::System,
            _ => {
                return Err(place.expected(
                    &format!("messages[{number}].role"),
                    message.get("role"),
                    "`user`, `assistant` or `system`",
                ));
            }
        };
        let field = format!("messages[{number}].content");
        let parts = match message.get("content") {
            Some(Value::String(text)) => with_image_marks(role, text),
            Some(Value::Array(parts)) => parts
                .iter()
                .enumerate()
                .map(|(n, part)| content_part(place, &format!("{field}[{n}]"), part, image))
                .collect::<Result<_>>()?,
            other => return Err(place.expected(&field, other, "a text or a list of parts")),
        };
        turns.push(Turn { role, parts });
    }
    Ok(turns)
}

fn content_part(
    place: &Place,
    field: &str,
    part: &Value,
    image: &mut Option<String>,
) -> Result<Part> {
    match part.get("type").and_then(Value::as_str) {
        Some("text") => match part.get("text") {
            Some(Value::String(text)) => Ok(Part::Text(text.clone())),
            other => Err(place.expected(&format!("{field}.text"), other, "a text")),
        },
        Some("image") => {
            let named = ["image", "path", "url"]
                .iter()
                .find_map(|key| part.get(key));
            match named {
                None | Some(Value::Null) => {}
                Some(Value::String(name))
                    if name.starts_with("http:") || name.starts_with("https:") =>
                {
                    return Err(place.expected(
                        field,
                        named,
                        "a local file (nothing is downloaded)",
                    ));
                }
                Some(Value::String(name)) if image.as_ref().is_none_or(|i| i == name) => {
                    *image = Some(name.clone());
                }
                other => return Err(place.expected(field, other, "one file name a sample")),
            }
            Ok(Part::Image)
        }
        _ => Err(place.expected(
            &format!("{field}.type"),
            part.get("type"),
            "`text` or `image`",
        )),
    }
}

/// A user's text whose first or last line is `<image>` as an image part and the rest.
fn with_image_marks(role: Role, text: &str) -> Vec<Part> {
    const MARK: &str = "<image>";
    let text = text.to_owned();
    if role == Role::User {
        if let Some(rest) = text.trim_start().strip_prefix(MARK) {
            return with_text(
                Some(Part::Image),
                rest.strip_prefix('\n').unwrap_or(rest),
                None,
            );
        }
        if let Some(rest) = text.trim_end().strip_suffix(MARK) {
            return with_text(
                None,
                rest.strip_suffix('\n').unwrap_or(rest),
                Some(Part::Image),
            );
        }
    }
    vec![Part::Text(text)]
}

fn with_text(before: Option<Part>, text: &str, after: Option<Part>) -> Vec<Part> {
    let text = (!text.is_empty()).then(|| Part::Text(text.to_owned()));
    [before, text, after].into_iter().flatten().collect()
}
