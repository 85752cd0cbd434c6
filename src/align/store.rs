//! The target store: every sample's word maps from the diffusion model, on disk.
//!
//! Two layouts, told apart when opened:
//! - ours ([`shards`]): safetensors shards of up to N samples and beside each a JSONL index;
//! - the published one ([`published`]): `<root>/<image>/lpm_attention/<stem>/attention_<word>.jpg`.
//!
//! Beside the maps of either stand the lists of [`failures`], and while a run is unfinished its plan and parts.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::words::{Case, Word};
use crate::{Error, Result};

pub mod failures;
mod plan;
pub mod published;
pub mod shards;
mod writer;

pub use writer::{Batch, Outcome, Planned, TargetWriter};

/// Side of every stored map, R in the method.
pub const SIDE: usize = 32;

/// How maps are stored in a shard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MapType {
    /// Half precision (the default).
    #[default]
    F16,
    /// One byte, 255 for 1.
    U8,
}

/// The layout in which targets are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Layout {
    /// Safetensors shards with a JSONL index.
    #[default]
    Shards,
    /// The public `lpm_attention` folders of JPEG files.
    Published,
}

/// What decides a target map beside the sample itself; one store holds one set of options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetOptions {
    /// Hash of the teacher's weights: see [`hash_of_files`].
    pub teacher_hash: String,
    /// `ddim`, `noised` or `null-text`.
    pub mode: String,
    /// Trajectory steps.
    pub steps: usize,
    /// Layers whose maps are averaged, `16+32` by default.
    pub layers: String,
    /// Seed of the noise.
    pub seed: u64,
    /// Case of the words.
    pub case: Case,
    /// Type of the teacher's activations, `f32` or `f16`.
    #[serde(default = "f32_name")]
    pub precision: String,
    /// Storage type of the maps.
    pub maps: MapType,
}

/// What stores that do not name their precision were made with.
fn f32_name() -> String {
    "f32".into()
}

/// Where the targets were made; recorded with each sample, and free to differ within a store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The teacher's directory or name.
    pub teacher: String,
    /// The adapter's name.
    pub adapter: String,
    /// Its driver and the driver's version.
    pub driver: String,
    /// This program's version.
    pub version: String,
}

/// The word maps of one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Targets {
    /// The sample's id, or the image's file name in the published layout.
    pub id: String,
    /// The text whose words have maps; empty in the published layout.
    pub caption: String,
    /// The words, in text order (alphabetical in the published layout, which has no text).
    pub words: Vec<Word>,
    /// One map per word, row-major `[words, 32, 32]`, each in 0…1.
    pub maps: Vec<f32>,
}

impl Targets {
    /// Word `index`'s map, `[32, 32]`.
    pub fn map(&self, index: usize) -> &[f32] {
        &self.maps[index * SIDE * SIDE..(index + 1) * SIDE * SIDE]
    }

    /// The map of a word by its text, compared as it is written in the store.
    pub fn map_of(&self, word: &str) -> Option<&[f32]> {
        self.words
            .iter()
            .position(|w| w.text == word)
            .map(|i| self.map(i))
    }
}

/// A store of targets, opened for reading.
#[derive(Debug)]
pub struct TargetStore(Inner);

#[derive(Debug)]
enum Inner {
    Shards(shards::Store),
    Published(published::Store),
}

impl TargetStore {
    /// Opens either layout. Errors: a missing directory, one that holds no targets, a damaged index.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.is_dir() {
            std::fs::read_dir(path).map_err(|e| Error::io(path, e))?;
        }
        if let Some(store) = shards::Store::open(path)? {
            return Ok(Self(Inner::Shards(store)));
        }
        if let Some(store) = published::Store::open(path)? {
            return Ok(Self(Inner::Published(store)));
        }
        if !plan::files_with_prefix(path, "plan-")?.is_empty() {
            return Err(Error::file(
                path,
                "the run that makes these targets has not finished a shard yet; start the same `targets` command again",
            ));
        }
        Err(Error::file(
            path,
            "no targets here: expected `maps-*.jsonl` as written by `lavender-wgpu targets`, \
             or `<image>/lpm_attention/<stem>/attention_<word>.jpg`",
        ))
    }

    /// The targets of a sample by its id or by its image's file name; `None` where the store has none.
    ///
    /// Errors: a shard that is damaged or does not agree with its index.
    pub fn get(&self, key: &str) -> Result<Option<Targets>> {
        match &self.0 {
            Inner::Shards(store) => store.get(key),
            Inner::Published(store) => store.get(key),
        }
    }

    /// [`Self::get`] by `id`, then by the file name of `image`.
    pub fn find(&self, id: &str, image: Option<&str>) -> Result<Option<Targets>> {
        match (self.get(id)?, image) {
            (None, Some(image)) => self.get(image),
            (found, _) => Ok(found),
        }
    }

    /// Whether [`Self::find`] would find targets, without reading them.
    pub fn has(&self, id: &str, image: Option<&str>) -> bool {
        let has = |key: &str| match &self.0 {
            Inner::Shards(store) => store.has(key),
            Inner::Published(store) => store.has(key),
        };
        has(id) || image.is_some_and(has)
    }

    /// The words that [`Self::find`] would find maps of, without reading them.
    ///
    /// # Errors
    /// A folder of the published layout that cannot be read.
    pub fn words(&self, id: &str, image: Option<&str>) -> Result<Vec<String>> {
        let of = |key: &str| match &self.0 {
            Inner::Shards(store) => Ok(store.words(key)),
            Inner::Published(store) => store.words(key),
        };
        match (of(id)?, image) {
            (None, Some(image)) => Ok(of(image)?.unwrap_or_default()),
            (found, _) => Ok(found.unwrap_or_default()),
        }
    }

    /// Number of samples with targets.
    pub fn len(&self) -> usize {
        match &self.0 {
            Inner::Shards(store) => store.len(),
            Inner::Published(store) => store.len(),
        }
    }

    /// Whether the store holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The options that the targets were made with; `None` where the published layout has no record of them.
    pub fn options(&self) -> Option<&TargetOptions> {
        match &self.0 {
            Inner::Shards(store) => store.options(),
            Inner::Published(store) => store.options(),
        }
    }

    /// Where the targets were made, each place once.
    pub fn provenances(&self) -> Vec<&Provenance> {
        match &self.0 {
            Inner::Shards(store) => store.provenances(),
            Inner::Published(store) => store.provenance().into_iter().collect(),
        }
    }
}

/// Removes a file; no error where there is none.
fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, e)),
        _ => Ok(()),
    }
}

/// Whether a sample belongs to part `(I, N)` of a run that is split over machines: by a hash of its id, so that the
/// split does not depend on the order of the data set.
pub fn belongs(id: &str, part: (usize, usize)) -> bool {
    let digest = Sha256::digest(id.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_be_bytes(first) % part.1.max(1) as u64 == part.0 as u64
}

/// SHA-256 (first 16 hex digits) over the names and contents of files, in the order given.
///
/// With a teacher's weight files it is the identity that [`TargetOptions::teacher_hash`] records.
pub fn hash_of_files<P: AsRef<Path>>(files: &[P]) -> Result<String> {
    let mut hasher = Sha256::new();
    for path in files {
        let path = path.as_ref();
        hasher.update(
            path.file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .as_bytes(),
        );
        let mut file = std::fs::File::open(path).map_err(|e| Error::io(path, e))?;
        std::io::copy(&mut file, &mut Sink(&mut hasher)).map_err(|e| Error::io(path, e))?;
    }
    Ok(short_hex(&hasher.finalize()))
}

struct Sink<'a>(&'a mut Sha256);

impl std::io::Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The first 16 hex digits of a digest.
fn short_hex(digest: &[u8]) -> String {
    digest.iter().take(8).map(|b| format!("{b:02x}")).collect()
}

/// Refuses options that differ from those that the store at `dir` was made with, naming every difference.
fn same_options(dir: &Path, old: &TargetOptions, new: &TargetOptions) -> Result<()> {
    if old == new {
        return Ok(());
    }
    // The fields' names and values as they stand in the index; both serialise to objects of the same keys.
    let value = |o| serde_json::to_value(o).unwrap_or_default();
    let (old, new) = (value(old), value(new));
    let mut differences = Vec::new();
    for (key, was) in old.as_object().into_iter().flatten() {
        if new.get(key) != Some(was) {
            differences.push(format!(
                "{key} was {was}, now {}",
                new.get(key).unwrap_or_default()
            ));
        }
    }
    Err(Error::file(
        dir,
        format!(
            "holds targets made with other options ({}); use another --out directory",
            differences.join("; ")
        ),
    ))
}
