//! WebDataset: tar archives in which the members `KEY.jpg` and `KEY.txt` (or `.json`) make a sample.
//!
//! KEY is the name up to the first dot after the last slash, and the sample's id. One archive, a folder of them, or a
//! pattern such as `shard-{000..003}.tar`. Texts are read at once; images are read from their places when they are
//! used. Nothing is written to disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tar::{Archive, EntryType};

use super::entry::{self, Images, Place};
use super::folder::row;
use super::format::{MAX_IMAGE, MAX_TEXT, Selection, inside, is_image};
use super::sample::ImageFile;
use super::{ImageRef, Sample};
use crate::{Error, Result};

/// Most archives that a pattern may name.
const MAX_SHARDS: u64 = 100_000;

/// An archive and where its images lie.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    /// Offset and length of each image in bytes.
    images: Vec<(u64, u64)>,
}

impl ImageFile for Shard {
    fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self, at: u64) -> Result<Vec<u8>> {
        let fault = |e| Error::io(&self.path, e);
        let (offset, length) = self.images[at as usize];
        let mut file = File::open(&self.path).map_err(fault)?;
        file.seek(SeekFrom::Start(offset)).map_err(fault)?;
        let mut bytes = vec![0; length as usize];
        file.read_exact(&mut bytes).map_err(fault)?;
        Ok(bytes)
    }
}

/// The members of one sample.
#[derive(Default)]
struct Group {
    /// The image's file name and its number in its shard.
    image: Option<(String, u64)>,
    text: Option<String>,
    json: Option<String>,
}

/// The samples of an archive, or of those that a pattern names.
pub(super) fn load(
    path: &Path,
    images: Option<&Path>,
    selection: &Selection,
) -> Result<Vec<Sample>> {
    load_shards(path, &expand(path)?, images, selection)
}

/// The samples of several archives of the data set `path`, in order.
///
/// # Errors
/// A damaged or cut archive; a member that is a link, is too large, leaves the archive or is named in something other
/// than UTF-8; a sample without image or text.
pub(super) fn load_shards(
    path: &Path,
    shards: &[PathBuf],
    _: Option<&Path>,
    selection: &Selection,
) -> Result<Vec<Sample>> {
    selection.none(path, "WebDataset")?;
    let mut all = Vec::new();
    for shard in shards {
        let (groups, images) = index(shard)?;
        let file: Arc<dyn ImageFile> = Arc::new(Shard {
            path: shard.clone(),
            images,
        });
        for (key, group) in groups {
            let place = Place {
                path: shard,
                at: format!("sample `{key}`"),
            };
            let Some((name, at)) = group.image else {
                return Err(place.wrong(
                    "has no image; expected a .jpg, .png or .webp of the same name in the archive",
                ));
            };
            let row = row(&place, group.text, group.json)?;
            let file = file.clone();
            let image = Images::Given(ImageRef::Stored { name, file, at });
            all.extend(entry::samples(&place, &row, &key, image, selection)?);
        }
    }
    Ok(all)
}

type Index = (Vec<(String, Group)>, Vec<(u64, u64)>);

/// The samples of an archive in the order in which they begin, and the places of its images.
fn index(path: &Path) -> Result<Index> {
    let fault = |e: std::io::Error| {
        Error::file(
            path,
            format!("not a whole tar archive: {e}; was it cut off, or is it compressed?"),
        )
    };
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let length = file.metadata().map_err(|e| Error::io(path, e))?.len();
    let mut archive = Archive::new(file);
    let (mut groups, mut images): Index = Default::default();
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    let mut end = 0;
    for (number, member) in archive.entries_with_seek().map_err(fault)?.enumerate() {
        let mut member = member.map_err(fault)?;
        let (offset, size) = (member.raw_file_position(), member.size());
        let data_end = offset.saturating_add(size);
        let shown = String::from_utf8_lossy(&member.path_bytes()).into_owned();
        let wrong = |message: String| {
            Err(Error::file(
                path,
                format!("member {number} `{}`: {message}", shown.escape_debug()),
            ))
        };
        if data_end > length {
            return wrong(format!(
                "claims {size} bytes, but the archive ends {} bytes after its header; was it cut off?",
                length.saturating_sub(offset)
            ));
        }
        end = data_end.next_multiple_of(512);
        let kind = member.header().entry_type();
        if matches!(kind, EntryType::Directory | EntryType::XGlobalHeader) {
            continue;
        }
        let Ok(name) = std::str::from_utf8(&member.path_bytes()).map(str::to_owned) else {
            return wrong("the name is not UTF-8; pack the archive with other names".into());
        };
        if inside(Path::new(""), &name).is_err() {
            return wrong(
                "the name leads out of the archive, expected a relative one without `..`".into(),
            );
        }
        if !matches!(kind, EntryType::Regular | EntryType::Continuous) {
            return wrong("is a link or a special file, expected the file itself".into());
        }
        let name = name.trim_start_matches("./");
        let (folder, file) = name.rsplit_once('/').unwrap_or(("", name));
        let Some((stem, extension)) = file.split_once('.').filter(|(stem, _)| !stem.is_empty())
        else {
            continue;
        };
        let extension = extension.to_lowercase();
        let last = extension.rsplit('.').next().unwrap_or_default().to_owned();
        let limit = match last.as_str() {
            "txt" | "json" => MAX_TEXT,
            _ if is_image(&last) => MAX_IMAGE,
            _ => continue,
        };
        if size > limit {
            return wrong(format!("has {size} bytes, expected at most {limit}"));
        }
        let key = match folder {
            "" => stem.to_owned(),
            folder => format!("{folder}/{stem}"),
        };
        let place = *places.entry(key.clone()).or_insert_with(|| {
            groups.push((key, Group::default()));
            groups.len() - 1
        });
        let group = &mut groups[place].1;
        let twice = match last.as_str() {
            "txt" | "json" => {
                let mut text = String::new();
                if let Err(e) = member.read_to_string(&mut text) {
                    return wrong(format!("cannot be read as UTF-8 text: {e}"));
                }
                let slot = match last.as_str() {
                    "txt" => &mut group.text,
                    _ => &mut group.json,
                };
                slot.replace(text).is_some()
            }
            _ => {
                images.push((offset, size));
                let at = images.len() as u64 - 1;
                group.image.replace((file.to_owned(), at)).is_some()
            }
        };
        if twice {
            return wrong(format!(
                "a second {last} of this sample, expected one image and one text each"
            ));
        }
    }
    // Every writer ends an archive with blocks of zeros.
    if end + 512 > length {
        return Err(Error::file(
            path,
            "ends without the empty block that closes a tar archive; was it cut off?",
        ));
    }
    Ok((groups, images))
}

/// The archives that `path` names: itself, or one for each number of its `{000..003}`.
fn expand(path: &Path) -> Result<Vec<PathBuf>> {
    let whole = path.to_string_lossy();
    let Some((before, rest)) = whole.split_once('{') else {
        return Ok(vec![path.to_path_buf()]);
    };
    let range = rest.split_once('}').and_then(|(range, after)| {
        let (from, to) = range.split_once("..")?;
        let (first, last): (u64, u64) = (from.parse().ok()?, to.parse().ok()?);
        let sensible = first <= last && last - first < MAX_SHARDS && !after.contains('{');
        sensible.then_some((first..=last, from.len(), after))
    });
    match range {
        Some((range, width, after)) => Ok(range
            .map(|number| PathBuf::from(format!("{before}{number:0width$}{after}")))
            .collect()),
        // A file may have a brace in its name.
        None if path.exists() => Ok(vec![path.to_path_buf()]),
        None => Err(Error::file(
            path,
            "found a brace, expected a range of numbers such as shard-{000..003}.tar",
        )),
    }
}
