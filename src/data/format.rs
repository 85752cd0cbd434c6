//! Telling a data set's format by its path, and loading it.
//!
//! | path | format |
//! |---|---|
//! | `.json`, `.jsonl` | conversations or rows ([`super::conversations`]), or the captions of Flickr30k and COCO ([`super::karpathy`]) |
//! | `.parquet`, a folder of them (or of a `data/` of them) | Hugging Face parquet ([`super::parquet`]) |
//! | `.tar`, `shard-{000..003}.tar`, a folder of them | WebDataset ([`super::webdataset`]) |
//! | any other folder | images, each with a `.txt` or `.json` beside it ([`super::folder`]) |
//!
//! `PATH#SPLIT` chooses a split where the format has them (`train` by default, `train+restval` two, `all` every one);
//! `PATH#first` or `PATH#SPLIT,first` takes the first of an image's captions alone.

use std::path::{Path, PathBuf};

use super::{Sample, conversations, folder, parquet, webdataset};
use crate::{Error, Result};

/// Most bytes of one text: a row, a caption file, a `.json` beside an image.
pub const MAX_TEXT: u64 = 16 << 20;

/// Most bytes of one encoded image.
pub const MAX_IMAGE: u64 = 256 << 20;

/// Which part of a data set is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Names of splits; empty for the format's default.
    pub splits: Vec<String>,
    /// The first of an image's captions alone.
    pub first: bool,
}

impl Selection {
    /// Parts a path from its `#…`. A file whose own name has a `#` is taken as it is.
    ///
    /// # Errors
    /// Nothing, or what is no name, after the `#`.
    pub fn of(path: &Path) -> Result<(PathBuf, Self)> {
        let whole = path.to_string_lossy();
        let Some((before, after)) = whole.rsplit_once('#') else {
            return Ok((path.to_path_buf(), Self::default()));
        };
        if path.exists() {
            return Ok((path.to_path_buf(), Self::default()));
        }
        let mut selection = Self::default();
        for word in after.split(',') {
            let names: Vec<String> = word.split('+').map(str::to_owned).collect();
            let good = |n: &String| {
                !n.is_empty() && n.chars().all(|c| c.is_alphanumeric() || "_-.".contains(c))
            };
            match word {
                "first" => selection.first = true,
                _ if selection.splits.is_empty() && names.iter().all(good) => {
                    selection.splits = names;
                }
                _ => {
                    return Err(Error::file(
                        path,
                        format!(
                            "after `#`: found {after:?}, expected a split such as #train, #first, or #train,first"
                        ),
                    ));
                }
            }
        }
        Ok((PathBuf::from(before), selection))
    }

    /// Whether a sample of split `name` is wanted, where `available` are the splits that there are.
    ///
    /// Without a choice that is `train` where there is one, else every split.
    pub fn wants(&self, name: &str, available: &[String]) -> bool {
        match self.splits.is_empty() {
            true => name == "train" || !available.iter().any(|s| s == "train"),
            false => self.splits.iter().any(|s| s == name || s == "all"),
        }
    }

    /// That every split asked for is among those `available`.
    pub fn check(&self, path: &Path, available: &[String]) -> Result<()> {
        match self
            .splits
            .iter()
            .find(|s| *s != "all" && !available.contains(s))
        {
            Some(missing) => Err(Error::file(
                path,
                format!(
                    "split `{missing}` found nowhere, expected one of: {}",
                    available.join(", ")
                ),
            )),
            None => Ok(()),
        }
    }

    /// That no split is asked for, of a format without splits.
    pub fn none(&self, path: &Path, format: &str) -> Result<()> {
        match self.splits.first() {
            Some(split) => Err(Error::file(
                path,
                format!(
                    "split `{split}` was asked for, but {format} has no splits; leave out `#{split}`"
                ),
            )),
            None => Ok(()),
        }
    }
}

/// The samples of the data set at `path`, in order; `images` is the folder that image paths are relative to.
///
/// # Errors
/// A path of no known format, and what is wrong in the file.
pub fn load(path: &Path, images: Option<&Path>) -> Result<Vec<Sample>> {
    let (path, selection) = Selection::of(path)?;
    let path = path.as_path();
    if path.is_dir() {
        return folder_of(path, images, &selection);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.to_lowercase();
    let refused =
        |what: &str, advice: &str| Err(Error::file(path, format!("{what} is not read; {advice}")));
    match name.rsplit('.').next().unwrap_or_default() {
        "tar" => webdataset::load(path, images, &selection),
        "parquet" => parquet::load(path, &[path.to_path_buf()], images, &selection),
        "gz" | "tgz" | "zst" | "xz" if name.contains(".tar") || name.ends_with(".tgz") => refused(
            "a compressed tar",
            "images are read from their places in it, so unpack it to a .tar first (gunzip, unzstd, unxz)",
        ),
        "arrow" => refused(
            "Arrow",
            "write the data set by `to_parquet` of the datasets library",
        ),
        "csv" | "tsv" => refused(
            "CSV",
            "expected JSONL, parquet, WebDataset tar, or a folder",
        ),
        "zip" => refused("a zip archive", "unpack it and give the folder"),
        _ => conversations::load(path, images, &selection),
    }
}

fn folder_of(path: &Path, images: Option<&Path>, selection: &Selection) -> Result<Vec<Sample>> {
    for dir in [path.to_path_buf(), path.join("data")] {
        if !dir.is_dir() {
            continue;
        }
        let found = |extension: &str| -> Result<Vec<PathBuf>> { files_of(&dir, extension) };
        let shards = found("parquet")?;
        if !shards.is_empty() {
            return parquet::load(path, &shards, images, selection);
        }
        let shards = found("tar")?;
        if !shards.is_empty() {
            return webdataset::load_shards(path, &shards, images, selection);
        }
        if !found("arrow")?.is_empty() {
            return Err(Error::file(
                path,
                "Arrow (`save_to_disk`) is not read; write the data set by `to_parquet` of the datasets library",
            ));
        }
    }
    folder::load(path, selection)
}

/// The files of a folder with an extension, sorted by name.
fn files_of(dir: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for item in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = item.map_err(|e| Error::io(dir, e))?.path();
        if path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case(extension))
            && path.is_file()
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// `name` below `root`, where it stays below it.
///
/// # Errors
/// What is wrong with the name: absolute, or with `..`.
pub(super) fn inside(root: &Path, name: &str) -> std::result::Result<PathBuf, String> {
    use std::path::Component;
    let path = Path::new(name);
    let plain = |c: Component| matches!(c, Component::Normal(_) | Component::CurDir);
    // What another system takes for a drive or a separator is refused on every system.
    if name.is_empty()
        || !path.components().all(plain)
        || name.contains('\\')
        || name.contains(":/")
    {
        return Err(format!(
            "found the path {name:?}, expected one inside the folder of images (relative, without `..`)"
        ));
    }
    Ok(root.join(path))
}

/// Whether a file name's extension is of an image that is read.
pub(super) fn is_image(extension: &str) -> bool {
    ["jpg", "jpeg", "png", "webp", "bmp", "gif"].contains(&extension.to_ascii_lowercase().as_str())
}
