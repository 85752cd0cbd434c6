//! One entry of a data set, whatever file it stands in, as samples.

use std::path::Path;

use serde_json::{Map, Value};

use super::drawn::CAPTION_PROMPT;
use super::format::Selection;
use super::{ImageRef, Part, Role, Sample, Turn};
use crate::{Error, Result};

/// Where in a file an entry stands, for messages.
pub(super) struct Place<'a> {
    /// The file.
    pub path: &'a Path,
    /// The entry, line, row or member.
    pub at: String,
}

impl Place<'_> {
    pub(super) fn wrong(&self, message: impl std::fmt::Display) -> Error {
        Error::file(self.path, format!("{}: {message}", self.at))
    }

    pub(super) fn expected(&self, field: &str, found: Option<&Value>, expected: &str) -> Error {
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

/// How an entry's image is found.
pub(super) enum Images<'a> {
    /// By the entry's own path, relative to a folder; `confined` where it may not lead out of it.
    Named { root: &'a Path, confined: bool },
    /// It is given beside the entry.
    Given(ImageRef),
}

/// The samples of an entry: one, or one for each of its captions.
///
/// In order of preference its text is `conversations` or `messages`, `texts` of pairs `user` and `assistant`,
/// `question` and `answer` (or `answers`: the most frequent), or `caption`, `captions` or `text` as the answer to
/// [`CAPTION_PROMPT`]. `id` is its own where it has none; captions of a list get `#0`, `#1` … after it.
pub(super) fn samples(
    place: &Place,
    entry: &Map<String, Value>,
    id: &str,
    images: Images,
    selection: &Selection,
) -> Result<Vec<Sample>> {
    let id = match entry.get("id") {
        None | Some(Value::Null) => id.to_owned(),
        Some(Value::String(id)) if !id.is_empty() => id.clone(),
        Some(Value::Number(id)) => id.to_string(),
        other => return Err(place.expected("id", other, "a text or a number")),
    };
    let given = |key: &str| entry.get(key).filter(|v| !v.is_null());
    let mut named = match images {
        Images::Named { .. } => image_at_top(place, entry)?,
        Images::Given(_) => None,
    };
    let question = |text: &Value, field: &str, answer: String| match text {
        Value::String(text) => Ok(asked(text, answer)),
        other => Err(place.expected(field, Some(other), "a text")),
    };
    let conversations: Vec<Vec<Turn>> = if let Some(list) = given("conversations") {
        vec![turns(place, "conversations", list, &mut named)?]
    } else if let Some(list) = given("messages") {
        vec![turns(place, "messages", list, &mut named)?]
    } else if let Some(list) = given("texts") {
        vec![pairs(place, list)?]
    } else if let Some(text) = given("question") {
        vec![question(text, "question", answer(place, entry)?)?]
    } else if let Some((key, value)) = ["caption", "captions", "text"]
        .iter()
        .find_map(|key| Some((*key, given(key)?)))
    {
        return captions(place, &id, key, value, selection)?
            .into_iter()
            .map(|(id, caption)| {
                let image = resolve(place, &images, named.clone())?;
                finish(place, id, image, asked(CAPTION_PROMPT, caption))
            })
            .collect();
    } else {
        return Err(place.wrong(
            "has neither `conversations` (LLaVA/ShareGPT) nor `messages`, `question` and `answer`, or `caption`",
        ));
    };
    conversations
        .into_iter()
        .map(|turns| {
            finish(
                place,
                id.clone(),
                resolve(place, &images, named.clone())?,
                turns,
            )
        })
        .collect()
}

/// One question and its answer.
fn asked(question: &str, answer: String) -> Vec<Turn> {
    vec![
        Turn {
            role: Role::User,
            parts: with_image_marks(Role::User, question),
        },
        Turn {
            role: Role::Assistant,
            parts: vec![Part::Text(answer)],
        },
    ]
}

/// Captions with the ids of their samples.
fn captions(
    place: &Place,
    id: &str,
    field: &str,
    value: &Value,
    selection: &Selection,
) -> Result<Vec<(String, String)>> {
    let wrong = || place.expected(field, Some(value), "a text or a list of texts");
    match value {
        Value::String(text) => Ok(vec![(id.to_owned(), text.trim().to_owned())]),
        Value::Array(list) if !list.is_empty() => list
            .iter()
            .take(if selection.first { 1 } else { usize::MAX })
            .enumerate()
            .map(|(number, text)| {
                let text = text.as_str().ok_or_else(wrong)?;
                Ok((format!("{id}#{number}"), text.trim().to_owned()))
            })
            .collect(),
        _ => Err(wrong()),
    }
}

/// `answer`, else the most frequent of `answers` (the first of equals), texts or objects with `answer`.
fn answer(place: &Place, entry: &Map<String, Value>) -> Result<String> {
    let text = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Object(object) => object.get("answer")?.as_str().map(str::to_owned),
        _ => None,
    };
    let (field, value) = match (entry.get("answer"), entry.get("answers")) {
        (Some(value), _) if !value.is_null() => ("answer", value),
        (_, value) => ("answers", value.unwrap_or(&Value::Null)),
    };
    let wrong = || place.expected(field, Some(value), "a text or a list of texts");
    let rows = rows_of(value);
    let Some(Value::Array(list)) = rows.as_ref().or(Some(value)) else {
        return text(value).ok_or_else(wrong);
    };
    let texts: Vec<String> = list
        .iter()
        .map(|v| text(v).ok_or_else(wrong))
        .collect::<Result<_>>()?;
    let count = |wanted: &String| texts.iter().filter(|t| *t == wanted).count();
    // `max_by_key` takes the last of equals.
    let most = texts.iter().rev().max_by_key(|t| count(t));
    most.cloned().ok_or_else(wrong)
}

/// A list of objects that was stored as an object of lists, as parquet files of the datasets library have it.
fn rows_of(value: &Value) -> Option<Value> {
    let columns = value.as_object()?;
    let lists: Vec<(&String, &Vec<Value>)> = columns
        .iter()
        .map(|(key, list)| Some((key, list.as_array()?)))
        .collect::<Option<_>>()?;
    let length = lists.first()?.1.len();
    lists.iter().all(|(_, list)| list.len() == length).then(|| {
        let row = |at: usize| {
            let pairs = lists
                .iter()
                .map(|(k, list)| ((*k).clone(), list[at].clone()));
            Value::Object(pairs.collect())
        };
        Value::Array((0..length).map(row).collect())
    })
}

/// Turns in either dialect: `from` and `value`, or `role` and `content`.
fn turns(
    place: &Place,
    field: &str,
    list: &Value,
    image: &mut Option<String>,
) -> Result<Vec<Turn>> {
    let rows = rows_of(list);
    let list = rows.as_ref().unwrap_or(list);
    let Value::Array(turns) = list else {
        return Err(place.expected(field, Some(list), "a list"));
    };
    let dialect = turns.iter().find_map(|turn| {
        let has = |key: &str| turn.get(key).is_some();
        match (has("from"), has("role")) {
            (false, false) => None,
            (from, _) => Some(from),
        }
    });
    match dialect.unwrap_or(field == "conversations") {
        true => llava(place, field, turns),
        false => messages(place, field, turns, image),
    }
}

/// `texts` of pairs `user` and `assistant`.
fn pairs(place: &Place, list: &Value) -> Result<Vec<Turn>> {
    let rows = rows_of(list);
    let list = rows.as_ref().unwrap_or(list);
    let Value::Array(pairs) = list else {
        return Err(place.expected("texts", Some(list), "a list of `user` and `assistant`"));
    };
    let mut turns = Vec::with_capacity(2 * pairs.len());
    for (number, pair) in pairs.iter().enumerate() {
        for (key, role) in [("user", Role::User), ("assistant", Role::Assistant)] {
            let field = format!("texts[{number}].{key}");
            let Some(Value::String(text)) = pair.get(key) else {
                return Err(place.expected(&field, pair.get(key), "a text"));
            };
            turns.push(Turn {
                role,
                parts: with_image_marks(role, text),
            });
        }
    }
    Ok(turns)
}

/// What holds for every format: an image part in the first user turn, an answer at the end.
fn finish(place: &Place, id: String, image: ImageRef, mut turns: Vec<Turn>) -> Result<Sample> {
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
    Ok(Sample { id, image, turns })
}

fn resolve(place: &Place, images: &Images, named: Option<String>) -> Result<ImageRef> {
    let (root, confined) = match images {
        Images::Given(image) => return Ok(image.clone()),
        Images::Named { root, confined } => (root, *confined),
    };
    let Some(name) = named else {
        return Err(place.expected("image", None, "a file name (every sample needs an image)"));
    };
    if name.starts_with("http:") || name.starts_with("https:") {
        let found = Value::String(name);
        return Err(place.expected(
            "image",
            Some(&found),
            "a local file (nothing is downloaded)",
        ));
    }
    match confined {
        true => super::format::inside(root, &name)
            .map(ImageRef::Path)
            .map_err(|e| place.wrong(format!("field `image`: {e}"))),
        // An absolute name stays as it is.
        false => Ok(ImageRef::Path(root.join(name))),
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

fn llava(place: &Place, list_field: &str, list: &[Value]) -> Result<Vec<Turn>> {
    list.iter()
        .enumerate()
        .map(|(number, turn)| {
            let field = |name: &str| format!("{list_field}[{number}].{name}");
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

fn messages(
    place: &Place,
    list_field: &str,
    list: &[Value],
    image: &mut Option<String>,
) -> Result<Vec<Turn>> {
    let mut turns = Vec::with_capacity(list.len());
    for (number, message) in list.iter().enumerate() {
        let role = match message.get("role").and_then(Value::as_str) {
            Some("user") => Role::User,
            Some("assistant") => Role::Assistant,
            Some("system") => Role::System,
            _ => {
                return Err(place.expected(
                    &format!("{list_field}[{number}].role"),
                    message.get("role"),
                    "`user`, `assistant` or `system`",
                ));
            }
        };
        let field = format!("{list_field}[{number}].content");
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
