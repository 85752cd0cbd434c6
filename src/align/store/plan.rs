//! What a run has to do and what of it is done: the plan, the parts, and the lock that keeps a second run out.
//!
//! A run's plan names the samples of every shard before the first is made, so that what stands in which shard and
//! which samples share a batch depends on the data alone, not on when a run was stopped. A batch that is finished is
//! written as a part; a shard's parts become the shard when all of its batches are there.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::failures::Failure;
use super::shards::{self, Entry};
use super::{Planned, TargetOptions, short_hex};
use crate::{Error, Result, files};

/// `plan-<part>of<parts>.json`: there while a run is unfinished.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Plan {
    /// The options of the run.
    pub options: TargetOptions,
    /// [`fingerprint`] of the samples in the order of the shards.
    pub samples: String,
    /// The shards to fill.
    pub shards: Vec<PlanShard>,
}

/// The samples of one shard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct PlanShard {
    /// The shard's number.
    pub number: usize,
    /// Ids, in the order of the data set.
    pub ids: Vec<String>,
}

impl Plan {
    /// Ids of all shards, in order.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.shards
            .iter()
            .flat_map(|shard| shard.ids.iter().map(String::as_str))
    }

    /// The unfinished plan of a part, if there is one. Errors: a file that cannot be read.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let plan = serde_json::from_str(&files::read_text(path)?)
            .map_err(|e| Error::file(path, format!("not a plan of targets: {e}; delete it")))?;
        Ok(Some(plan))
    }

    /// Writes the plan.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(|e| Error::file(path, e.to_string()))?;
        files::write_bytes(path, &text)
    }
}

/// The plan of a part.
pub(super) fn path(dir: &Path, part: (usize, usize)) -> PathBuf {
    dir.join(format!("plan-{}of{}.json", part.0, part.1))
}

/// Hash of what decides the maps of `samples`, but for the pixels.
pub(super) fn fingerprint<'a>(samples: impl Iterator<Item = &'a Planned>) -> String {
    let mut hasher = Sha256::new();
    for sample in samples {
        for text in [
            &sample.id,
            sample.image.as_deref().unwrap_or_default(),
            &sample.caption,
        ] {
            hasher.update((text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
    }
    short_hex(&hasher.finalize())
}

/// The outcome of one batch: `part-<part>of<parts>-<shard>-<first place>.safetensors`.
#[derive(Debug, Default)]
pub(super) struct Part {
    /// What was made, with the bytes of its maps.
    pub made: Vec<(Entry, Vec<u8>)>,
    /// What was not.
    pub failed: Vec<Failure>,
}

/// The metadata of a part's file.
#[derive(Serialize, Deserialize)]
struct Header {
    made: Vec<Entry>,
    failed: Vec<Failure>,
}

/// The name under which [`Header`] stands in a part.
const HEADER: &str = "part";

impl Part {
    /// Writes the part of the batch at place `first` of shard `number`.
    pub fn write(
        self,
        dir: &Path,
        part: (usize, usize),
        number: usize,
        first: usize,
    ) -> Result<()> {
        let path = dir.join(format!("{}{first:03}.safetensors", prefix(part, number)));
        let (made, bytes): (Vec<Entry>, Vec<Vec<u8>>) = self.made.into_iter().unzip();
        let header = Header {
            made,
            failed: self.failed,
        };
        let text = serde_json::to_string(&header).map_err(|e| Error::file(&path, e.to_string()))?;
        let views = header
            .made
            .iter()
            .zip(&bytes)
            .map(|(entry, bytes)| Ok((entry.id.as_str(), shards::view(&path, entry, bytes)?)))
            .collect::<Result<Vec<(&str, TensorView)>>>()?;
        let metadata = HashMap::from([(HEADER.to_owned(), text)]);
        let bytes = safetensors::serialize(views, Some(metadata))
            .map_err(|e| Error::file(&path, e.to_string()))?;
        files::write_bytes(&path, &bytes)
    }

    /// Reads a part; `None` for one that is damaged, whose batch is then made again.
    fn read(path: &Path) -> Option<Self> {
        let file = File::open(path).ok()?;
        // SAFETY: parts are immutable once renamed into place, and the lock keeps other runs away.
        let bytes = unsafe { Mmap::map(&file) }.ok()?;
        let (_, metadata) = SafeTensors::read_metadata(&bytes).ok()?;
        let header: Header =
            serde_json::from_str(metadata.metadata().as_ref()?.get(HEADER)?).ok()?;
        let tensors = SafeTensors::deserialize(&bytes).ok()?;
        let made = header
            .made
            .into_iter()
            .map(|entry| {
                let bytes = shards::checked(path, &entry, &tensors).ok()?.to_vec();
                Some((entry, bytes))
            })
            .collect::<Option<Vec<_>>>()?;
        Some(Self {
            made,
            failed: header.failed,
        })
    }

    /// Ids of the batch's samples.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        let made = self.made.iter().map(|(entry, _)| entry.id.as_str());
        made.chain(self.failed.iter().map(|failure| failure.id.as_str()))
    }
}

/// How the names of a shard's parts begin.
pub(super) fn prefix(part: (usize, usize), number: usize) -> String {
    format!("part-{}of{}-{number:05}-", part.0, part.1)
}

/// The parts of a shard that are whole, with their files.
pub(super) fn parts(
    dir: &Path,
    part: (usize, usize),
    number: usize,
) -> Result<Vec<(PathBuf, Part)>> {
    let prefix = prefix(part, number);
    let found = files_with_prefix(dir, &prefix)?;
    Ok(found
        .into_iter()
        .filter_map(|path| Part::read(&path).map(|part| (path, part)))
        .collect())
}

/// Files of `dir` whose names begin with `prefix`, sorted.
pub(super) fn files_with_prefix(dir: &Path, prefix: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for item in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let item = item.map_err(|e| Error::io(dir, e))?;
        if item.file_name().to_string_lossy().starts_with(prefix) {
            found.push(item.path());
        }
    }
    found.sort();
    Ok(found)
}

const LOCK: &str = ".lock-";

/// How long a lock is asked for.
const PATIENCE: Duration = Duration::from_millis(300);

/// Held while a run writes one part of a store; the system releases it with the process.
#[derive(Debug)]
pub(super) struct Lock {
    path: PathBuf,
    _file: Option<File>,
}

impl Lock {
    /// Takes the lock of a part. Errors: another run has it.
    pub fn take(dir: &Path, part: (usize, usize)) -> Result<Self> {
        let path = dir.join(format!("{LOCK}{}of{}", part.0, part.1));
        let start = Instant::now();
        loop {
            let file = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
                .map_err(|e| Error::io(&path, e))?;
            match file.try_lock() {
                // The run before may have removed the file between our opening and our locking it.
                Ok(()) if !is_at(&file, &path) => continue,
                Ok(()) => {
                    return Ok(Self {
                        path,
                        _file: Some(file),
                    });
                }
                // A run that cleans up looks at every lock for a moment.
                Err(TryLockError::WouldBlock) if start.elapsed() < PATIENCE => {
                    std::thread::sleep(PATIENCE / 10);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::file(
                        dir,
                        format!(
                            "another run is writing `--shard {}/{}` of this store; wait for it, or take another \
                             --shard or --out",
                            part.0, part.1
                        ),
                    ));
                }
                Err(TryLockError::Error(e)) => {
                    // Some network file systems have no locks; that is no reason not to write there.
                    tracing::warn!("{}: cannot lock: {e}", path.display());
                    return Ok(Self { path, _file: None });
                }
            }
        }
    }

    /// Takes the lock of the part that a file `maps-<part>of<parts>-…` belongs to, if no run holds it.
    pub fn of_file(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let (part, parts) = name
            .strip_prefix("maps-")?
            .split('-')
            .next()?
            .split_once("of")?;
        Self::take(path.parent()?, (part.parse().ok()?, parts.parse().ok()?)).ok()
    }

    /// Removes the temporary files that killed runs left in `dir`, unless other runs are at work there.
    pub fn clean(&self, dir: &Path) -> Result<()> {
        // Listed before the locks are looked at: whoever wrote one of these and lives still holds its lock then.
        let left = files_with_prefix(dir, ".writing-")?;
        let alone = left.is_empty()
            || files_with_prefix(dir, LOCK)?
                .iter()
                .filter(|path| **path != self.path)
                .all(|path| File::open(path).is_ok_and(|file| file.try_lock().is_ok()));
        if alone {
            left.iter().try_for_each(|path| super::remove(path))?;
        }
        Ok(())
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Still locked, so nobody else can have taken it.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.exists()
}
