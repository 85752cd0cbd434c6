//! Benchmarks as VLMEvalKit publishes them: tab-separated, with the image as base64.
//!
//! Columns: `index`, `question`, `answer`, `image` (base64, or the `index` of the row that has it) or `image_path`
//! (below the images' folder), and where there are any `A`, `B`, `C` … (options), `hint`, `category` (or
//! `l2-category`), `split`. An answer may be a list in Python's or JSON's notation. Rows of several images are counted
//! as unusable, not read.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::item::{Item, Skipped};
use super::multiple_choice;
use crate::data::{ImageRef, Part, Role, Turn};
use crate::error::{Error, Result};

/// An `image` field up to this length is the index of another row, as VLMEvalKit has it.
const REFERENCE: usize = 64;

/// The rows of a file as items, and those that have no usable image. `images` is the folder of `image_path`, by
/// default the file's own.
///
/// # Errors
/// A file that cannot be read, a missing column (those found are listed), a row that is cut off, no rows.
pub fn load(path: &Path, images: Option<&Path>) -> Result<(Vec<Item>, Vec<Skipped>)> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(b'\t')
        .from_path(path)
        .map_err(|e| wrong(path, e))?;
    let header = reader.headers().map_err(|e| wrong(path, e))?.clone();
    let columns = Columns::new(path, &header)?;
    let folder = images.unwrap_or(path.parent().unwrap_or(Path::new("")));
    let mut rows = Vec::new();
    for record in reader.records() {
        rows.push(record.map_err(|e| wrong(path, e))?);
    }
    if rows.is_empty() {
        return Err(Error::file(path, "holds a header and no rows"));
    }
    // Rows that others point to.
    let mut embedded: HashMap<&str, &str> = HashMap::new();
    if let (Some(image), Some(index)) = (columns.image, columns.index) {
        for row in &rows {
            let (text, index) = (row.get(image).unwrap_or(""), row.get(index).unwrap_or(""));
            if text.len() > REFERENCE {
                embedded.insert(index.trim(), text);
            }
        }
    }
    let (mut items, mut skipped) = (Vec::new(), Vec::new());
    for (number, row) in rows.iter().enumerate() {
        let index = columns.text(row, columns.index);
        let index = index.map_or_else(|| number.to_string(), String::from);
        match columns.image(row, &index, folder, &embedded) {
            Ok(image) => items.push(columns.item(row, number, index, image)),
            Err(reason) => skipped.push(Skipped { index, reason }),
        }
    }
    Ok((items, skipped))
}

fn wrong(path: &Path, error: csv::Error) -> Error {
    match error.kind() {
        csv::ErrorKind::Io(_) => Error::file(path, error.to_string()),
        csv::ErrorKind::UnequalLengths {
            pos,
            expected_len,
            len,
        } => {
            let line = pos.as_ref().map_or(0, csv::Position::line);
            let message = format!(
                "line {line}: {len} columns found, {expected_len} expected as in the header"
            );
            Error::file(path, message)
        }
        _ => Error::file(path, format!("not tab-separated text: {error}")),
    }
}

/// Where the columns stand.
struct Columns {
    index: Option<usize>,
    question: usize,
    answer: usize,
    image: Option<usize>,
    image_path: Option<usize>,
    options: Vec<(char, usize)>,
    hint: Option<usize>,
    category: Option<usize>,
    split: Option<usize>,
}

impl Columns {
    fn new(path: &Path, header: &csv::StringRecord) -> Result<Columns> {
        let find = |name: &str| {
            header
                .iter()
                .position(|h| h.trim().eq_ignore_ascii_case(name))
        };
        let needed = |name: &str| {
            find(name).ok_or_else(|| {
                let found: Vec<&str> = header.iter().collect();
                let found = found.join("`, `");
                Error::file(path, format!("column `{name}`: missing; found `{found}`"))
            })
        };
        let (image, image_path) = (find("image"), find("image_path"));
        if image.is_none() && image_path.is_none() {
            needed("image")?;
        }
        Ok(Columns {
            index: find("index"),
            question: needed("question")?,
            answer: needed("answer")?,
            image,
            image_path,
            options: ('A'..='Z')
                .map_while(|c| {
                    let at = header.iter().position(|h| h.trim() == c.to_string())?;
                    Some((c, at))
                })
                .collect(),
            hint: find("hint"),
            category: find("category").or_else(|| find("l2-category")),
            split: find("split"),
        })
    }

    /// A field that says something.
    fn text<'a>(&self, row: &'a csv::StringRecord, at: Option<usize>) -> Option<&'a str> {
        let text = row.get(at?)?.trim();
        (!text.is_empty() && text != "nan").then_some(text)
    }

    fn image(
        &self,
        row: &csv::StringRecord,
        index: &str,
        folder: &Path,
        embedded: &HashMap<&str, &str>,
    ) -> std::result::Result<ImageRef, String> {
        let Some(text) = self.text(row, self.image) else {
            let Some(file) = self.text(row, self.image_path) else {
                return Err("no image: `image` and `image_path` are empty".into());
            };
            return match list(file).as_deref() {
                Some([one]) => Ok(ImageRef::Path(folder.join(one))),
                Some(many) => Err(format!("{} images, one expected", many.len())),
                None => Ok(ImageRef::Path(folder.join(file))),
            };
        };
        let text = match text.len() <= REFERENCE {
            true => embedded
                .get(text)
                .copied()
                .ok_or_else(|| format!("field `image`: no row with index `{text}` has an image"))?,
            false => text,
        };
        let one = match list(text) {
            Some(mut many) if many.len() == 1 => many.remove(0),
            Some(many) => return Err(format!("{} images, one expected", many.len())),
            None => text.to_owned(),
        };
        let data = one
            .rsplit_once("base64,")
            .map_or(one.as_str(), |(_, data)| data);
        let bytes = STANDARD
            .decode(data.trim())
            .map_err(|e| format!("field `image`: not base64: {e}"))?;
        Ok(ImageRef::Embedded {
            name: format!("{index}.jpg"),
            bytes: Arc::from(bytes),
        })
    }

    fn item(&self, row: &csv::StringRecord, number: usize, index: String, image: ImageRef) -> Item {
        let question = row.get(self.question).unwrap_or("").to_owned();
        let answer = self.text(row, Some(self.answer)).unwrap_or("");
        let options: Vec<(char, String)> = self
            .options
            .iter()
            .filter_map(|&(letter, at)| Some((letter, self.text(row, Some(at))?.to_owned())))
            .collect();
        let hint = self.text(row, self.hint);
        let prompt = match options.is_empty() {
            true => question.clone(),
            false => multiple_choice::prompt(hint, &question, &options),
        };
        Item {
            index,
            number,
            image,
            turns: vec![Turn {
                role: Role::User,
                parts: vec![Part::Image, Part::Text(prompt)],
            }],
            question,
            answers: answers(answer),
            options,
            category: self.text(row, self.category).map(String::from),
            split: self.text(row, self.split).map(String::from),
            regions: Vec::new(),
        }
    }
}

/// The answers of a field: the elements of a list, else the field itself; none of an empty one.
pub fn answers(text: &str) -> Vec<String> {
    let all = list(text).unwrap_or_else(|| vec![text.to_owned()]);
    let said = all.into_iter().filter(|a| !a.trim().is_empty());
    said.collect()
}

/// A list of texts in JSON's or Python's notation.
fn list(text: &str) -> Option<Vec<String>> {
    let inner = text.trim().strip_prefix('[')?.strip_suffix(']')?;
    if let Ok(list) = serde_json::from_str::<Vec<String>>(text.trim()) {
        return Some(list);
    }
    let (mut list, mut rest) = (Vec::new(), inner.trim());
    while !rest.is_empty() {
        let quote = rest.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
        let (mut value, mut end, mut escaped) = (String::new(), None, false);
        for (at, c) in rest.char_indices().skip(1) {
            match c {
                _ if escaped => {
                    value.push(if c == 'n' { '\n' } else { c });
                    escaped = false;
                }
                '\\' => escaped = true,
                c if c == quote => {
                    end = Some(at + 1);
                    break;
                }
                c => value.push(c),
            }
        }
        list.push(value);
        rest = rest[end?..].trim_start();
        rest = match rest.strip_prefix(',') {
            Some(more) => more.trim_start(),
            None if rest.is_empty() => rest,
            None => return None,
        };
    }
    Some(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_may_be_lists() {
        assert_eq!(answers("red"), ["red"]);
        assert_eq!(
            answers("['red', \"it's\", 'a \\'b\\'']"),
            ["red", "it's", "a 'b'"]
        );
        assert_eq!(answers("[\"x\", \"y\"]"), ["x", "y"]);
        // No list of texts: the field itself.
        for text in ["[1, 2]", "['a' 'b']", "['a", "[brackets]"] {
            assert_eq!(answers(text), [text]);
        }
        assert!(answers("").is_empty() && answers("[]").is_empty());
    }
}
