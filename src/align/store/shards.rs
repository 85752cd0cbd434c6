//! Our layout of a target store.
//!
//! `maps-<part>of<parts>-<number>.safetensors` holds the maps of up to [`SHARD_SAMPLES`] samples, one tensor
//! `[words, 32, 32]` (f16 or u8) under each sample's id; the `.jsonl` of the same stem has a line per sample:
//! id, image, caption, words with character spans, options, provenance and a checksum. The index is written after its
//! shard, so a shard without one is half-written and its samples are made again.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

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

/// A shard is also written when its oldest sample has waited this long, so that a crash loses little.
const FLUSH_AFTER: Duration = Duration::from_secs(300);

/// One line of the index.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    image: Option<String>,
    caption: String,
    words: Vec<Word>,
    /// Checksum of the sample's bytes in the shard.
    sha256: String,
    #[serde(flatten)]
    options: TargetOptions,
    #[serde(flatten)]
    provenance: Provenance,
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
    let advice = || {
        let stem = shard
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        format!("delete `{stem}.safetensors` and `{stem}.jsonl` and run `targets` again")
    };
    let tensors = SafeTensors::deserialize(bytes)
        .map_err(|e| Error::file(shard, format!("damaged target shard ({e}); {}", advice())))?;
    let wrong =
        |message: String| Error::tensor(shard, &entry.id, format!("{message}; {}", advice()));
    let view = tensors
        .tensor(&entry.id)
        .map_err(|_| wrong("missing, though the index lists it".into()))?;
    let expected = [entry.words.len(), SIDE, SIDE];
    let dtype = match entry.options.maps {
        MapType::F16 => Dtype::F16,
        MapType::U8 => Dtype::U8,
    };
    if view.shape() != expected || view.dtype() != dtype {
        return Err(wrong(format!(
            "found {:?} {:?}, expected {dtype:?} {expected:?}",
            view.dtype(),
            view.shape()
        )));
    }
    if short_hex(&Sha256::digest(view.data())) != entry.sha256 {
        return Err(wrong("its bytes do not match the index's checksum".into()));
    }
    Ok(match entry.options.maps {
        MapType::F16 => view
            .data()
            .chunks_exact(2)
            .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect(),
        MapType::U8 => view.data().iter().map(|&b| f32::from(b) / 255.0).collect(),
    })
}

/// The index files of a directory, sorted by name.
fn indices(dir: &Path) -> Result<Vec<PathBuf>> {
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

fn read_index(index: &Path) -> Result<Vec<Entry>> {
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

/// Writes this layout.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    options: TargetOptions,
    provenance: Provenance,
    part: (usize, usize),
    /// Ids on disk or waiting.
    known: std::collections::HashSet<String>,
    /// Encoded samples of the shard that is being filled.
    waiting: Vec<(Entry, Vec<u8>)>,
    since: Instant,
    next: usize,
}

impl Writer {
    /// See [`super::TargetWriter::create`].
    pub fn create(
        dir: &Path,
        options: TargetOptions,
        provenance: Provenance,
        part: (usize, usize),
    ) -> Result<Self> {
        files::create_dir(dir)?;
        let mut known = std::collections::HashSet::new();
        let mut next = 0;
        let prefix = format!("maps-{}of{}-", part.0, part.1);
        for index in indices(dir)? {
            for entry in read_index(&index)? {
                same_options(dir, &entry.options, &options)?;
                known.insert(entry.id);
            }
            let stem = index
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if let Some(number) = stem
                .strip_prefix(&prefix)
                .and_then(|n| n.parse::<usize>().ok())
            {
                next = next.max(number + 1);
            }
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            options,
            provenance,
            part,
            known,
            waiting: Vec::new(),
            since: Instant::now(),
            next,
        })
    }

    /// Whether the sample is on disk or waiting.
    pub fn has(&self, id: &str) -> bool {
        self.known.contains(id)
    }

    /// See [`super::TargetWriter::put`].
    pub fn put(
        &mut self,
        id: &str,
        image: Option<&str>,
        caption: &str,
        words: &[Word],
        maps: &[f32],
    ) -> Result<()> {
        if !self.known.insert(id.to_owned()) {
            return Ok(());
        }
        let bytes: Vec<u8> = match self.options.maps {
            MapType::F16 => maps
                .iter()
                .flat_map(|&x| f16::from_f32(x).to_le_bytes())
                .collect(),
            MapType::U8 => maps
                .iter()
                .map(|&x| (x.clamp(0.0, 1.0) * 255.0).round() as u8)
                .collect(),
        };
        if self.waiting.is_empty() {
            self.since = Instant::now();
        }
        self.waiting.push((
            Entry {
                id: id.to_owned(),
                image: image.map(str::to_owned),
                caption: caption.to_owned(),
                words: words.to_vec(),
                sha256: short_hex(&Sha256::digest(&bytes)),
                options: self.options.clone(),
                provenance: self.provenance.clone(),
            },
            bytes,
        ));
        if self.waiting.len() >= SHARD_SAMPLES || self.since.elapsed() >= FLUSH_AFTER {
            self.flush()?;
        }
        Ok(())
    }

    /// Writes the shard that is being filled, then its index.
    pub fn flush(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let stem = format!("maps-{}of{}-{:05}", self.part.0, self.part.1, self.next);
        let shard = self.dir.join(format!("{stem}.safetensors"));
        let dtype = match self.options.maps {
            MapType::F16 => Dtype::F16,
            MapType::U8 => Dtype::U8,
        };
        let mut views = BTreeMap::new();
        let mut lines = Vec::new();
        for (entry, bytes) in &self.waiting {
            let view = TensorView::new(dtype, vec![entry.words.len(), SIDE, SIDE], bytes)
                .map_err(|e| Error::tensor(&shard, &entry.id, e.to_string()))?;
            views.insert(entry.id.as_str(), view);
            serde_json::to_writer(&mut lines, entry)
                .map_err(|e| Error::file(&shard, e.to_string()))?;
            lines.push(b'\n');
        }
        let bytes =
            safetensors::serialize(views, None).map_err(|e| Error::file(&shard, e.to_string()))?;
        files::write_bytes(&shard, &bytes)?;
        files::write_bytes(self.dir.join(format!("{stem}.jsonl")), &lines)?;
        self.waiting.clear();
        self.next += 1;
        Ok(())
    }
}
