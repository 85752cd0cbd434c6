//! Our layout of a target store.
//!
//! `maps-<part>of<parts>-<number>.safetensors` holds the maps of up to [`SHARD_SAMPLES`] samples, one tensor
//! `[words, 32, 32]` (f16 or u8) under each sample's id; the `.jsonl` of the same stem has a line per sample:
//! id, image, caption, words with character spans, options, provenance and a checksum. The index is written after its
//! shard, so a shard without one is half-written and its samples are made again.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use half::f16;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{MapType, Provenance, SIDE, TargetOptions, Targets, same_options, short_hex};
use crate::align::words::Word;
use crate::{Error, Result, files};

/// Samples in a full shard.
pub const SHARD_SAMPLES: usize = 64;

/// One line of the index.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    pub caption: String,
    pub words: Vec<Word>,
    /// Checksum of the sample's bytes in the shard.
    pub sha256: String,
    #[serde(flatten)]
    pub options: TargetOptions,
    #[serde(flatten)]
    pub provenance: Provenance,
}

/// A store of this layout, opened for reading.
#[derive(Debug)]
pub struct Store {
    entries: Vec<(PathBuf, Entry)>,
    by_key: HashMap<String, usize>,
    /// Shards mapped so far; a training run visits all of them many times.
    mapped: Mutex<HashMap<PathBuf, std::sync::Arc<Mmap>>>,
}

impl Store {
    /// Opens the store at `dir`; `None` where there is no index of this layout.
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let mut entries: Vec<(PathBuf, Entry)> = Vec::new();
        let indices = indices(dir)?;
        if indices.is_empty() {
            return Ok(None);
        }
        for index in indices {
            let shard = index.with_extension("safetensors");
            for entry in read_index(&index)? {
                if let Some((_, first)) = entries.first() {
                    same_options(dir, &first.options, &entry.options)?;
                }
                entries.push((shard.clone(), entry));
            }
        }
        // Ids win over image names, and the first sample of an image stands for it.
        let mut by_key = HashMap::new();
        for (place, (_, entry)) in entries.iter().enumerate() {
            by_key.insert(entry.id.clone(), place);
        }
        for (place, (_, entry)) in entries.iter().enumerate() {
            if let Some(image) = &entry.image {
                by_key.entry(image.clone()).or_insert(place);
            }
        }
        Ok(Some(Self {
            entries,
            by_key,
            mapped: Mutex::new(HashMap::new()),
        }))
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The options of every sample.
    pub fn options(&self) -> Option<&TargetOptions> {
        self.entries.first().map(|(_, e)| &e.options)
    }

    /// Whether there are targets under a sample's id or image file name.
    pub fn has(&self, key: &str) -> bool {
        self.by_key.contains_key(key)
    }

    /// The words of a sample by id or image file name.
    pub fn words(&self, key: &str) -> Option<Vec<String>> {
        let (_, entry) = &self.entries[*self.by_key.get(key)?];
        Some(entry.words.iter().map(|word| word.text.clone()).collect())
    }

    /// Where the targets were made, each place once.
    pub fn provenances(&self) -> Vec<&Provenance> {
        let mut found: Vec<&Provenance> = Vec::new();
        for (_, entry) in &self.entries {
            if !found.contains(&&entry.provenance) {
                found.push(&entry.provenance);
            }
        }
        found
    }

    /// The targets of a sample by id or image file name.
    pub fn get(&self, key: &str) -> Result<Option<Targets>> {
        let Some(&place) = self.by_key.get(key) else {
            return Ok(None);
        };
        let (shard, entry) = &self.entries[place];
        let bytes = self.map(shard)?;
        let maps = decode(shard, entry, &bytes)?;
        Ok(Some(Targets {
            id: entry.id.clone(),
            caption: entry.caption.clone(),
            words: entry.words.clone(),
            maps,
        }))
    }

    fn map(&self, shard: &Path) -> Result<std::sync::Arc<Mmap>> {
        let mut mapped = self.mapped.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(bytes) = mapped.get(shard) {
            return Ok(bytes.clone());
        }
        let file = std::fs::File::open(shard).map_err(|e| Error::io(shard, e))?;
        // SAFETY: shards are immutable once renamed into place; nobody truncates one under us.
        let bytes = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(shard, e))?;
        let bytes = std::sync::Arc::new(bytes);
        mapped.insert(shard.to_path_buf(), bytes.clone());
        Ok(bytes)
    }
}

/// The maps of one sample out of its shard's bytes, checked against the index.
fn decode(shard: &Path, entry: &Entry, bytes: &[u8]) -> Result<Vec<f32>> {
    let bytes = open(shard, bytes).and_then(|tensors| {
        // The bytes outlive the header that found them.
        checked(shard, entry, &tensors)
    });
    let stem = shard.file_stem().unwrap_or_default().to_string_lossy();
    let bytes = bytes.map_err(|damage| match damage {
        Error::Tensor {
            path,
            name,
            message,
        } => Error::Tensor {
            path,
            name,
            message: format!("{message}; {}", advice(&stem)),
        },
        other => Error::file(shard, format!("{}; {}", reason(&other), advice(&stem))),
    })?;
    Ok(values(entry.options.maps, bytes))
}

fn advice(stem: &str) -> String {
    format!("run `targets` again, which finds and replaces `{stem}`")
}

/// An error's message without its file.
fn reason(error: &Error) -> String {
    match error {
        Error::File { message, .. } => message.clone(),
        other => other.to_string(),
    }
}

fn open<'a>(shard: &Path, bytes: &'a [u8]) -> Result<SafeTensors<'a>> {
    SafeTensors::deserialize(bytes)
        .map_err(|e| Error::file(shard, format!("damaged target shard ({e})")))
}

/// The bytes of one sample's maps. Errors: the tensor is missing, has another shape, or not the index's checksum.
pub(super) fn checked<'a>(
    shard: &Path,
    entry: &Entry,
    tensors: &SafeTensors<'a>,
) -> Result<&'a [u8]> {
    let wrong = |message: String| Error::tensor(shard, &entry.id, message);
    let view = tensors
        .tensor(&entry.id)
        .map_err(|_| wrong("missing, though the index lists it".into()))?;
    let expected = [entry.words.len(), SIDE, SIDE];
    let dtype = dtype(entry.options.maps);
    if view.shape() != expected || view.dtype() != dtype {
        return Err(wrong(format!(
            "found {:?} {:?}, expected {dtype:?} {expected:?}",
            view.dtype(),
            view.shape()
        )));
    }
    if checksum(view.data()) != entry.sha256 {
        return Err(wrong("its bytes do not match the index's checksum".into()));
    }
    Ok(view.data())
}

fn dtype(maps: MapType) -> Dtype {
    match maps {
        MapType::F16 => Dtype::F16,
        MapType::U8 => Dtype::U8,
    }
}

/// The checksum of a sample's bytes that the index holds.
pub(super) fn checksum(bytes: &[u8]) -> String {
    short_hex(&Sha256::digest(bytes))
}

/// Maps 0…1 as they are stored.
pub(super) fn bytes(maps_as: MapType, maps: &[f32]) -> Vec<u8> {
    match maps_as {
        MapType::F16 => maps
            .iter()
            .flat_map(|&x| f16::from_f32(x).to_le_bytes())
            .collect(),
        MapType::U8 => maps
            .iter()
            .map(|&x| (x.clamp(0.0, 1.0) * 255.0).round() as u8)
            .collect(),
    }
}

/// Stored maps as 0…1.
pub(super) fn values(maps_as: MapType, bytes: &[u8]) -> Vec<f32> {
    match maps_as {
        MapType::F16 => bytes
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        MapType::U8 => bytes.iter().map(|&b| f32::from(b) / 255.0).collect(),
    }
}

/// A sample's bytes as the tensor that a shard holds.
pub(super) fn view<'a>(shard: &Path, entry: &Entry, bytes: &'a [u8]) -> Result<TensorView<'a>> {
    let shape = vec![entry.words.len(), SIDE, SIDE];
    TensorView::new(dtype(entry.options.maps), shape, bytes)
        .map_err(|e| Error::tensor(shard, &entry.id, e.to_string()))
}

/// The name of a shard without extension.
pub(super) fn stem(part: (usize, usize), number: usize) -> String {
    format!("maps-{}of{}-{number:05}", part.0, part.1)
}

/// The number of a shard of this part, by its file name.
pub(super) fn number(part: (usize, usize), path: &Path) -> Option<usize> {
    let stem = path.file_stem()?.to_str()?;
    stem.strip_prefix(&format!("maps-{}of{}-", part.0, part.1))?
        .parse()
        .ok()
}

/// Writes a shard's maps.
pub(super) fn write_maps(shard: &Path, samples: &[(Entry, Vec<u8>)]) -> Result<()> {
    let views = samples
        .iter()
        .map(|(entry, bytes)| Ok((entry.id.as_str(), view(shard, entry, bytes)?)))
        .collect::<Result<BTreeMap<_, _>>>()?;
    let bytes =
        safetensors::serialize(views, None).map_err(|e| Error::file(shard, e.to_string()))?;
    files::write_bytes(shard, &bytes)
}

/// Writes a shard's index, which makes it count.
pub(super) fn write_index(index: &Path, samples: &[(Entry, Vec<u8>)]) -> Result<()> {
    let mut lines = Vec::new();
    for (entry, _) in samples {
        serde_json::to_writer(&mut lines, entry).map_err(|e| Error::file(index, e.to_string()))?;
        lines.push(b'\n');
    }
    files::write_bytes(index, &lines)
}

/// Reads every sample of a shard and compares it with the index. Errors: the first difference.
pub(super) fn verify(index: &Path, entries: &[Entry]) -> Result<()> {
    let shard = index.with_extension("safetensors");
    let file = std::fs::File::open(&shard).map_err(|e| Error::io(&shard, e))?;
    // SAFETY: shards are immutable once renamed into place; nobody truncates one under us.
    let bytes = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&shard, e))?;
    let tensors = open(&shard, &bytes)?;
    entries
        .iter()
        .try_for_each(|entry| checked(&shard, entry, &tensors).map(|_| ()))
}

/// The index files of a directory, sorted by name.
pub(super) fn indices(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for item in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = item.map_err(|e| Error::io(dir, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("maps-") && name.ends_with(".jsonl") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

pub(super) fn read_index(index: &Path) -> Result<Vec<Entry>> {
    files::read_text(index)?
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(number, line)| {
            serde_json::from_str(line).map_err(|e| {
                Error::file(
                    index,
                    format!("line {}: not an entry of a target index: {e}", number + 1),
                )
            })
        })
        .collect()
}
