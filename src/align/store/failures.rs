//! The samples that got no targets, and why: `failures-<part>of<parts>.jsonl` beside a store's maps.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, files};

/// What kept a sample from getting targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cause {
    /// The image is missing, damaged, empty or too large.
    Image,
    /// The text has no word to map.
    Text,
    /// The maps hold NaN or infinity.
    Maps,
}

impl Cause {
    /// The cause in words, for a summary.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Image => "image that cannot be read",
            Self::Text => "text without a word",
            Self::Maps => "maps that are not finite",
        }
    }
}

/// One line of the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The sample's id.
    pub id: String,
    /// Its image's file name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Why, in short.
    pub cause: Cause,
    /// Why, as the error said it.
    pub reason: String,
    /// Number of the shard whose making it failed in; none in the published layout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shard: Option<usize>,
}

/// The failures of every part that has written to the store at `dir`, by id.
///
/// A sample may be listed that another part has made since. Errors: a list that cannot be read.
pub fn read_all(dir: &Path) -> Result<Vec<Failure>> {
    let mut all = BTreeMap::new();
    for item in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = item.map_err(|e| Error::io(dir, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("failures-") && name.ends_with(".jsonl") {
            all.extend(read(&path)?);
        }
    }
    Ok(all.into_values().collect())
}

/// One part's list.
pub(super) fn path(dir: &Path, part: (usize, usize)) -> PathBuf {
    dir.join(format!("failures-{}of{}.jsonl", part.0, part.1))
}

/// A list by id; empty where there is no file.
pub(super) fn read(path: &Path) -> Result<BTreeMap<String, Failure>> {
    if !path.exists() {
        return Ok(BTreeMap::new());
    }
    files::read_text(path)?
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(number, line)| {
            let failure: Failure = serde_json::from_str(line).map_err(|e| {
                Error::file(
                    path,
                    format!(
                        "line {}: not an entry of a list of failures: {e}; delete the file",
                        number + 1
                    ),
                )
            })?;
            Ok((failure.id.clone(), failure))
        })
        .collect()
}

/// Writes a list, sorted by id; an empty one is removed.
pub(super) fn write(path: &Path, failures: &BTreeMap<String, Failure>) -> Result<()> {
    if failures.is_empty() {
        return super::remove(path);
    }
    let mut lines = Vec::new();
    for failure in failures.values() {
        serde_json::to_writer(&mut lines, failure).map_err(|e| Error::file(path, e.to_string()))?;
        lines.push(b'\n');
    }
    files::write_bytes(path, &lines)
}
