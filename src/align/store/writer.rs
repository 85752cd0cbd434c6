//! Writing a target store: by a plan, in parts, restartable at any moment.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::failures::{self, Cause, Failure};
use super::plan::{self, Lock, Part, Plan, PlanShard, files_with_prefix};
use super::shards::{self, Entry, SHARD_SAMPLES};
use super::{Layout, Provenance, SIDE, TargetOptions, belongs, published, remove, same_options};
use crate::align::words::Word;
use crate::{Error, Result, files};

mod planning;

/// A sample as the store knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// Its id.
    pub id: String,
    /// Its image's file name, which the published layout is ordered by.
    pub image: Option<String>,
    /// The text whose words get maps.
    pub caption: String,
}

/// What became of a sample.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It has word maps.
    Made {
        /// The words, in text order.
        words: Vec<Word>,
        /// `[words, 32, 32]` in 0…1.
        maps: Vec<f32>,
    },
    /// It has none.
    Failed {
        /// Why, in short.
        cause: Cause,
        /// Why, as the error says it.
        reason: String,
    },
}

/// Samples that are made together and written together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Places in the list that [`TargetWriter::plan`] was given.
    pub samples: Vec<usize>,
    shard: usize,
    first: usize,
}

/// Writes targets in either layout.
///
/// A run is [`TargetWriter::plan`], then [`TargetWriter::write`] for every batch in any order, then
/// [`TargetWriter::finish`]. A batch that was written survives whatever ends the process, and the next run with the
/// same samples goes on from there to the same bytes. Targets at hand are written by [`TargetWriter::put`] and
/// [`TargetWriter::finish`].
#[derive(Debug)]
pub struct TargetWriter {
    dir: PathBuf,
    layout: Layout,
    options: TargetOptions,
    provenance: Provenance,
    part: (usize, usize),
    /// Ids (images in the published layout) that have targets.
    there: HashSet<String>,
    /// Numbers of this part's whole shards.
    whole: BTreeSet<usize>,
    damaged: Vec<Damaged>,
    failures: BTreeMap<String, Failure>,
    plan: Option<Plan>,
    samples: Vec<Planned>,
    /// Samples that are still to be written, by shard.
    left: HashMap<usize, usize>,
    waiting: Vec<(Planned, Outcome)>,
    _lock: Lock,
}

/// A shard or an image's folder whose bytes are not what they were.
#[derive(Debug)]
struct Damaged {
    path: PathBuf,
    message: String,
    /// The shard's number, where it is one of this part.
    number: Option<usize>,
    ids: Vec<String>,
}

impl TargetWriter {
    /// Opens `dir` for writing, making it where needed, and looks for damage.
    ///
    /// `part` is `(I, N)` of `--shard I/N` with I from 0 (`(0, 1)` for everything); see [`belongs`]. Errors: another
    /// run is writing this part, targets already there are in the other layout or were made with other options (each
    /// difference is named).
    pub fn create(
        dir: impl AsRef<Path>,
        layout: Layout,
        options: TargetOptions,
        provenance: Provenance,
        part: (usize, usize),
    ) -> Result<Self> {
        let dir = dir.as_ref();
        files::create_dir(dir)?;
        let lock = Lock::take(dir, part)?;
        lock.clean(dir)?;
        let plan = Plan::read(&plan::path(dir, part))?;
        if let Some(plan) = &plan {
            same_options(dir, &plan.options, &options)?;
        }
        let mut writer = Self {
            dir: dir.to_path_buf(),
            layout,
            part,
            there: HashSet::new(),
            whole: BTreeSet::new(),
            damaged: Vec::new(),
            failures: failures::read(&failures::path(dir, part))?,
            plan,
            samples: Vec::new(),
            left: HashMap::new(),
            waiting: Vec::new(),
            _lock: lock,
            options,
            provenance,
        };
        match layout {
            Layout::Shards => writer.open_shards()?,
            Layout::Published => writer.open_published()?,
        }
        Ok(writer)
    }

    fn open_shards(&mut self) -> Result<()> {
        if published::has_record(&self.dir) {
            return Err(Error::file(
                &self.dir,
                "holds targets in the lpm_attention layout; go on with that layout, or use another --out directory",
            ));
        }
        let read: Vec<(PathBuf, Result<Vec<Entry>>)> = shards::indices(&self.dir)?
            .into_par_iter()
            .map(|index| {
                let entries = shards::read_index(&index);
                (index, entries)
            })
            .collect();
        for entry in read.iter().flat_map(|(_, entries)| entries).flatten() {
            same_options(&self.dir, &entry.options, &self.options)?;
        }
        let part = self.part;
        let checked: Vec<_> = read
            .into_par_iter()
            .map(|(index, entries)| {
                let number = shards::number(part, &index);
                let (entries, damage) = match entries {
                    // What other parts hold is theirs to look after, unless this run would make it.
                    Ok(entries)
                        if number.is_some() || entries.iter().any(|e| belongs(&e.id, part)) =>
                    {
                        let damage = shards::verify(&index, &entries).err();
                        (entries, damage)
                    }
                    Ok(entries) => (entries, None),
                    Err(damage) => (Vec::new(), Some(damage)),
                };
                let ids: Vec<String> = entries.into_iter().map(|entry| entry.id).collect();
                (index, number, ids, damage)
            })
            .collect();
        for (path, number, ids, damage) in checked {
            match damage {
                None => {
                    self.there.extend(ids);
                    self.whole.extend(number);
                }
                Some(damage) => self.damaged.push(Damaged {
                    path,
                    message: damage.to_string(),
                    number,
                    ids,
                }),
            }
        }
        Ok(())
    }

    fn open_published(&mut self) -> Result<()> {
        if !shards::indices(&self.dir)?.is_empty() {
            return Err(Error::file(
                &self.dir,
                "holds targets in safetensors shards; go on with that layout, or use another --out directory",
            ));
        }
        published::record(&self.dir, &self.options, &self.provenance)?;
        self.there.extend(published::images(&self.dir)?);
        Ok(())
    }

    /// What was found damaged, and is made again: a message for each shard or image.
    pub fn damaged(&self) -> impl Iterator<Item = &str> {
        self.damaged.iter().map(|damaged| damaged.message.as_str())
    }

    /// Whether the sample's targets are there already (on disk and whole, or waiting for [`TargetWriter::finish`]).
    pub fn has(&self, id: &str, image: Option<&str>) -> bool {
        let waiting = || self.waiting.iter().any(|(sample, _)| sample.id == id);
        self.key(id, image)
            .is_some_and(|key| self.there.contains(key))
            || waiting()
    }

    /// What the layout finds a sample by.
    fn key<'a>(&self, id: &'a str, image: Option<&'a str>) -> Option<&'a str> {
        match self.layout {
            Layout::Shards => Some(id),
            Layout::Published => image,
        }
    }

    /// Writes what became of a batch, one outcome a sample; with a shard's last batch the shard. On disk on return.
    ///
    /// Panics if there are more or fewer outcomes than samples, or maps do not fit their words.
    pub fn write(&mut self, batch: &Batch, outcomes: Vec<Outcome>) -> Result<()> {
        assert_eq!(outcomes.len(), batch.samples.len(), "outcomes of a batch");
        let count = outcomes.len();
        let mut part = Part::default();
        for (&place, outcome) in batch.samples.iter().zip(outcomes) {
            let Planned { id, image, caption } = self.samples[place].clone();
            match outcome {
                Outcome::Made { words, maps } => {
                    let fit = maps.len() == words.len() * SIDE * SIDE;
                    assert!(fit, "targets of `{id}`: maps do not fit words");
                    let bytes = shards::bytes(self.options.maps, &maps);
                    let entry = Entry {
                        id,
                        image,
                        caption,
                        words,
                        sha256: shards::checksum(&bytes),
                        options: self.options.clone(),
                        provenance: self.provenance.clone(),
                    };
                    part.made.push((entry, bytes));
                }
                Outcome::Failed { cause, reason } => part.failed.push(Failure {
                    id,
                    image,
                    cause,
                    reason,
                    shard: None,
                }),
            }
        }
        part.write(&self.dir, self.part, batch.shard, batch.first)?;
        let left = self.left.get_mut(&batch.shard).map(|left| {
            *left = left.saturating_sub(count);
            *left
        });
        if left == Some(0) {
            self.left.remove(&batch.shard);
            self.close(batch.shard)?;
        }
        Ok(())
    }

    /// Makes a shard of its parts.
    fn close(&mut self, number: usize) -> Result<()> {
        let shards = self.plan.iter().flat_map(|plan| &plan.shards);
        let Some(shard) = shards.into_iter().find(|s| s.number == number).cloned() else {
            return Ok(());
        };
        let parts = plan::parts(&self.dir, self.part, number)?;
        let parts = parts.into_iter().map(|(_, part)| part).collect();
        self.assemble(&shard, parts)
    }

    /// Writes `parts` as shard `shard`: maps, failures, then the index; then the parts go.
    fn assemble(&mut self, shard: &PlanShard, parts: Vec<Part>) -> Result<()> {
        let mut order = HashMap::new();
        for (place, id) in shard.ids.iter().enumerate() {
            order.insert(id.as_str(), place);
        }
        let (mut made, mut failed) = (Vec::new(), Vec::new());
        for part in parts {
            made.extend(part.made);
            failed.extend(part.failed);
        }
        made.sort_by_key(|(entry, _)| order.get(entry.id.as_str()).copied());
        let stem = shards::stem(self.part, shard.number);
        let index = self.dir.join(format!("{stem}.jsonl"));
        match self.layout {
            Layout::Shards if made.is_empty() => {}
            Layout::Shards => shards::write_maps(&index.with_extension("safetensors"), &made)?,
            Layout::Published => {
                for (entry, bytes) in &made {
                    let image = entry.image.as_deref().unwrap_or(&entry.id);
                    let maps = shards::values(self.options.maps, bytes);
                    published::write(&self.dir, self.part, image, &entry.words, &maps)?;
                }
            }
        }
        self.list(&made, failed, shard.number)?;
        if self.layout == Layout::Shards && !made.is_empty() {
            shards::write_index(&index, &made)?;
            self.whole.insert(shard.number);
        }
        for (entry, _) in made {
            let key = match self.layout {
                Layout::Shards => Some(entry.id),
                Layout::Published => entry.image,
            };
            self.there.extend(key);
        }
        self.remove_parts(shard.number)
    }

    /// Brings the list of failures up to date.
    fn list(
        &mut self,
        made: &[(Entry, Vec<u8>)],
        failed: Vec<Failure>,
        number: usize,
    ) -> Result<()> {
        let before = self.failures.clone();
        for (entry, _) in made {
            self.failures.remove(&entry.id);
        }
        for mut failure in failed {
            // A sample that fails again stays where it failed first, so that trying again changes nothing.
            let first = before.get(&failure.id).and_then(|failure| failure.shard);
            let first = first.filter(|first| self.whole.contains(first));
            failure.shard = match self.layout {
                Layout::Shards => Some(first.unwrap_or(number)),
                Layout::Published => None,
            };
            self.failures.insert(failure.id.clone(), failure);
        }
        if self.failures != before {
            failures::write(&failures::path(&self.dir, self.part), &self.failures)?;
        }
        Ok(())
    }

    fn remove_parts(&self, number: usize) -> Result<()> {
        let prefix = plan::prefix(self.part, number);
        let parts = files_with_prefix(&self.dir, &prefix)?;
        parts.iter().try_for_each(|path| remove(path))
    }

    /// Adds a sample whose maps are at hand: `maps` is `[words, 32, 32]` in 0…1. On disk after
    /// [`TargetWriter::finish`]; nothing where it is there already.
    ///
    /// `image` is the image's file name, needed by the published layout. Panics if `maps` does not fit `words`.
    pub fn put(
        &mut self,
        id: &str,
        image: Option<&str>,
        caption: &str,
        words: &[Word],
        maps: &[f32],
    ) -> Result<()> {
        if !self.has(id, image) {
            let sample = Planned {
                id: id.to_owned(),
                image: image.map(str::to_owned),
                caption: caption.to_owned(),
            };
            let outcome = Outcome::Made {
                words: words.to_vec(),
                maps: maps.to_vec(),
            };
            self.waiting.push((sample, outcome));
        }
        Ok(())
    }

    /// Writes what [`TargetWriter::put`] gathered; ends a run whose batches are all written.
    pub fn finish(&mut self) -> Result<()> {
        if !self.waiting.is_empty() {
            let waiting = std::mem::take(&mut self.waiting);
            let (samples, mut outcomes): (_, Vec<_>) =
                waiting.into_iter().map(|(s, o)| (s, Some(o))).unzip();
            for batch in self.plan(samples, SHARD_SAMPLES)? {
                let places = batch.samples.iter();
                let outcomes = places.filter_map(|&place| outcomes[place].take()).collect();
                self.write(&batch, outcomes)?;
            }
        }
        if self.left.is_empty() && self.plan.take().is_some() {
            remove(&plan::path(&self.dir, self.part))?;
        }
        files::sync_dir(&self.dir);
        Ok(())
    }

    /// Where a run's failures are listed.
    pub fn failures_path(&self) -> PathBuf {
        failures::path(&self.dir, self.part)
    }
}
