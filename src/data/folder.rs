//! Folders of images, each with a text beside it: `a/cat.jpg` and `a/cat.txt` (a caption) or `a/cat.json` (an entry
//! as in [`super::entry`]).
//!
//! Folders within are read too, links to folders are not followed. A sample's id is its path without the extension.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::entry::{self, Images, Place};
use super::format::{MAX_TEXT, Selection, is_image};
use super::{ImageRef, Sample};
use crate::{Error, Result, files};

/// Folders within folders that are read.
const MAX_DEPTH: usize = 16;

/// The files of one sample.
#[derive(Default)]
struct Group {
    image: Option<PathBuf>,
    text: Option<PathBuf>,
    json: Option<PathBuf>,
}

/// The samples of a folder, ordered by path.
///
/// # Errors
/// An image without a text, two images of one name, a name or text that is not UTF-8, an empty caption.
pub(super) fn load(root: &Path, selection: &Selection) -> Result<Vec<Sample>> {
    selection.none(root, "a folder of images")?;
    let mut groups = BTreeMap::new();
    gather(root, root, 0, &mut groups)?;
    let mut all = Vec::new();
    for (id, group) in groups {
        // A text without an image is a note or a list of files.
        let Some(image) = group.image else { continue };
        let place = Place {
            path: &image,
            at: format!("sample `{id}`"),
        };
        let text = group.text.as_deref().map(read).transpose()?;
        let json = group.json.as_deref().map(read).transpose()?;
        let row = row(&place, text, json)?;
        let image = Images::Given(ImageRef::Path(image.clone()));
        all.extend(entry::samples(&place, &row, &id, image, selection)?);
    }
    if all.is_empty() {
        return Err(Error::file(
            root,
            "holds no samples; expected images with a .txt or .json beside each, *.parquet, or *.tar",
        ));
    }
    Ok(all)
}

fn gather(
    root: &Path,
    dir: &Path,
    depth: usize,
    groups: &mut BTreeMap<String, Group>,
) -> Result<()> {
    if depth > MAX_DEPTH {
        return Err(Error::file(
            dir,
            format!("lies more than {MAX_DEPTH} folders deep"),
        ));
    }
    for item in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let item = item.map_err(|e| Error::io(dir, e))?;
        let path = item.path();
        if item.file_type().map_err(|e| Error::io(&path, e))?.is_dir() {
            gather(root, &path, depth + 1, groups)?;
            continue;
        }
        let extension = path
            .extension()
            .unwrap_or_default()
            .to_string_lossy()
            .to_lowercase();
        if !(is_image(&extension) || extension == "txt" || extension == "json") {
            continue;
        }
        let relative = path.strip_prefix(root).unwrap_or(&path).with_extension("");
        let Some(id) = relative.to_str().map(|id| id.replace('\\', "/")) else {
            return Err(Error::file(
                &path,
                "the file's name is not UTF-8; rename it",
            ));
        };
        let group: &mut Group = groups.entry(id).or_default();
        let slot = match extension.as_str() {
            "txt" => &mut group.text,
            "json" => &mut group.json,
            _ => &mut group.image,
        };
        if let Some(other) = slot.replace(path.clone()) {
            return Err(Error::file(
                &path,
                format!(
                    "stands beside {}, expected one image for each text",
                    other.display()
                ),
            ));
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    let size = std::fs::metadata(path)
        .map_err(|e| Error::io(path, e))?
        .len();
    if size > MAX_TEXT {
        return Err(Error::file(
            path,
            format!("has {size} bytes, expected at most {MAX_TEXT}"),
        ));
    }
    files::read_text(path)
}

/// The entry that a text and a JSON beside an image make: a conversation or question of the JSON wins, then the text
/// as a caption, then whatever the JSON has.
///
/// # Errors
/// Neither, or a JSON that is no object.
pub(super) fn row(
    place: &Place,
    text: Option<String>,
    json: Option<String>,
) -> Result<Map<String, Value>> {
    let mut row = match json {
        None => Map::new(),
        Some(json) => match serde_json::from_str(json.trim_start_matches('\u{feff}')) {
            Ok(Value::Object(row)) => row,
            Ok(other) => return Err(place.expected("json", Some(&other), "an object")),
            Err(e) => return Err(place.wrong(format!("not valid JSON: {e}"))),
        },
    };
    // The image is the file beside it, and the sample's id its name.
    for key in ["id", "image", "images"] {
        row.remove(key);
    }
    let asks = ["conversations", "messages", "texts", "question"];
    if !asks
        .iter()
        .any(|key| row.get(*key).is_some_and(|v| !v.is_null()))
    {
        match text {
            Some(text) => {
                let text = text.trim_start_matches('\u{feff}').trim().to_owned();
                row = Map::from_iter([("caption".to_owned(), Value::String(text))]);
            }
            None if row.is_empty() => {
                return Err(place.wrong(
                    "has an image and no text; expected a .txt (caption) or .json beside it, or remove the image",
                ));
            }
            None => {}
        }
    }
    Ok(row)
}
