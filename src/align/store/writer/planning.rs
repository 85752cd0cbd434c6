//! Settling what a run has to do, from what is there and what an unfinished run has left.

use std::collections::{BTreeSet, HashMap, HashSet};

use rayon::prelude::*;

use super::{Batch, Damaged, Planned, TargetWriter};
use crate::align::store::plan::{self, Lock, Part, Plan, PlanShard, files_with_prefix};
use crate::align::store::shards::SHARD_SAMPLES;
use crate::align::store::{Layout, published, remove};
use crate::{Error, Result};

impl TargetWriter {
    /// Settles what is to be done for `samples`, the run's part of the data set in its order, and in which batches of
    /// at most `batch`; what is there or was done by a run that did not finish is left out.
    ///
    /// Samples that failed before are tried again. Damaged shards are removed, to be filled with the same samples.
    /// Errors: what the file system reports; a sample without an image name for the published layout.
    pub fn plan(&mut self, samples: Vec<Planned>, batch: usize) -> Result<Vec<Batch>> {
        let batch = batch.max(1);
        if self.layout == Layout::Published {
            self.check_images(&samples)?;
        }
        let places: HashMap<&str, usize> = samples
            .iter()
            .enumerate()
            .map(|(place, sample)| (sample.id.as_str(), place))
            .collect();
        let path = plan::path(&self.dir, self.part);
        let mut plan = Plan {
            options: self.options.clone(),
            samples: String::new(),
            shards: Vec::new(),
        };
        match self.plan.take() {
            Some(old) if fits(&old, &samples, &places) => plan.shards = old.shards,
            Some(old) => {
                self.gather(&old, &samples, &places)?;
                remove(&path)?;
            }
            None => {}
        }
        let continued = plan.shards.len();
        self.extend(&mut plan, &samples, &places, batch);
        if plan.shards.len() > continued {
            plan.samples = fingerprint(&plan, &samples, &places);
            plan.write(&path)?;
        }
        self.clear(&plan)?;
        let mut batches = Vec::new();
        let mut ready = Vec::new();
        for shard in &plan.shards {
            if self.whole.contains(&shard.number) {
                self.remove_parts(shard.number)?;
                continue;
            }
            let parts = plan::parts(&self.dir, self.part, shard.number)?;
            let done: HashSet<&str> = parts.iter().flat_map(|(_, part)| part.ids()).collect();
            let mut left = 0;
            for (group, ids) in shard.ids.chunks(batch).enumerate() {
                let open = |id: &str| {
                    let image = samples[places[id]].image.as_deref();
                    !done.contains(id) && !self.has(id, image)
                };
                let places_left: Vec<(usize, usize)> = (group * batch.min(shard.ids.len())..)
                    .zip(ids)
                    .filter(|(_, id)| open(id))
                    .map(|(first, id)| (first, places[id.as_str()]))
                    .collect();
                left += places_left.len();
                if let Some(&(first, _)) = places_left.first() {
                    batches.push(Batch {
                        samples: places_left.into_iter().map(|(_, place)| place).collect(),
                        shard: shard.number,
                        first,
                    });
                }
            }
            match left {
                0 => ready.push(shard.number),
                _ => {
                    self.left.insert(shard.number, left);
                }
            }
        }
        self.plan = (!plan.shards.is_empty()).then_some(plan);
        for number in ready {
            self.close(number)?;
        }
        self.samples = samples;
        Ok(batches)
    }

    /// In the published layout: images of `samples` that are there, but not as readable maps.
    fn check_images(&mut self, samples: &[Planned]) -> Result<()> {
        if let Some(sample) = samples.iter().find(|sample| sample.image.is_none()) {
            return Err(Error::Input(format!(
                "sample `{}` has no image file name, which the lpm_attention layout is ordered by; \
                 write the safetensors layout instead",
                sample.id
            )));
        }
        let images: BTreeSet<&str> = samples
            .iter()
            .filter_map(|sample| sample.image.as_deref())
            .filter(|image| self.there.contains(*image))
            .collect();
        let damaged: Vec<(&str, Error)> = images
            .into_par_iter()
            .filter_map(|image| Some((image, published::read(&self.dir, image).err()?)))
            .collect();
        for (image, damage) in damaged {
            self.there.remove(image);
            self.damaged.push(Damaged {
                path: published::maps_of(&self.dir, image),
                message: damage.to_string(),
                number: None,
                ids: Vec::new(),
            });
        }
        Ok(())
    }

    /// Adds to a plan what it lacks: damaged shards as they were, samples that have not been tried, and at the start
    /// of a run those that failed in shards that are whole.
    fn extend(
        &self,
        plan: &mut Plan,
        samples: &[Planned],
        places: &HashMap<&str, usize>,
        batch: usize,
    ) {
        let continued = !plan.shards.is_empty();
        let mut taken: HashSet<String> = plan.ids().map(str::to_owned).collect();
        let mut numbers: BTreeSet<usize> = self.whole.clone();
        numbers.extend(plan.shards.iter().map(|shard| shard.number));
        for damaged in &self.damaged {
            let Some(number) = damaged.number.filter(|number| !numbers.contains(number)) else {
                continue;
            };
            // With an index that cannot be read the samples count as never made.
            if damaged.ids.is_empty() {
                continue;
            }
            let failed = self.failures.values().filter(|f| f.shard == Some(number));
            let mut ids: Vec<String> = damaged
                .ids
                .iter()
                .chain(failed.map(|failure| &failure.id))
                .filter(|id| places.contains_key(id.as_str()) && !self.there.contains(*id))
                .filter(|id| !taken.contains(*id))
                .cloned()
                .collect();
            ids.sort_by_key(|id| places[id.as_str()]);
            if !ids.is_empty() {
                numbers.insert(number);
                taken.extend(ids.iter().cloned());
                plan.shards.push(PlanShard { number, ids });
            }
        }
        let mut images: HashSet<&str> = taken
            .iter()
            .filter_map(|id| samples[places[id.as_str()]].image.as_deref())
            .collect();
        let (mut fresh, mut again) = (Vec::new(), Vec::new());
        for sample in samples {
            let image = sample.image.as_deref();
            if taken.contains(&sample.id) || self.has(&sample.id, image) {
                continue;
            }
            // An image's first sample stands for it in the published layout.
            let first = image.is_none_or(|image| images.insert(image));
            if self.layout == Layout::Published && !first {
                continue;
            }
            let failed = self.failures.get(&sample.id);
            let tried = failed.is_some_and(|f| f.shard.is_none_or(|n| self.whole.contains(&n)));
            if tried { &mut again } else { &mut fresh }.push(sample.id.clone());
        }
        if continued {
            again.clear();
        }
        let size = match self.layout {
            Layout::Shards => SHARD_SAMPLES,
            Layout::Published => batch,
        };
        let free = (0..).filter(|number| !numbers.contains(number));
        let shards = fresh.chunks(size).chain(again.chunks(size));
        let shards = shards.zip(free).map(|(ids, number)| PlanShard {
            number,
            ids: ids.to_vec(),
        });
        let shards: Vec<PlanShard> = shards.collect();
        plan.shards.extend(shards);
    }

    /// Keeps what an unfinished plan that no longer fits has made of the samples that are still the same: its parts
    /// become short shards.
    fn gather(
        &mut self,
        old: &Plan,
        samples: &[Planned],
        places: &HashMap<&str, usize>,
    ) -> Result<()> {
        for shard in &old.shards {
            if self.whole.contains(&shard.number) {
                continue;
            }
            let parts = plan::parts(&self.dir, self.part, shard.number)?;
            let same = |id: &str, image: &Option<String>| {
                let place = places.get(id).map(|&place| &samples[place]);
                place.filter(|sample| sample.image == *image)
            };
            let parts = parts.into_iter().map(|(_, mut part)| {
                part.made.retain(|(entry, _)| {
                    same(&entry.id, &entry.image).is_some_and(|s| s.caption == entry.caption)
                });
                part.failed.retain(|f| same(&f.id, &f.image).is_some());
                part
            });
            let parts: Vec<Part> = parts.collect();
            self.assemble(shard, parts)?;
        }
        Ok(())
    }

    /// Removes what the plan replaces: damaged shards, shards without an index, parts of no shard of the plan.
    fn clear(&mut self, plan: &Plan) -> Result<()> {
        for damaged in &self.damaged {
            if self.layout == Layout::Published {
                std::fs::remove_dir_all(&damaged.path).map_err(|e| Error::io(&damaged.path, e))?;
                continue;
            }
            // Another part's shard is removed under its lock; a run that holds it sees to the damage itself.
            let own = damaged.number.is_some();
            let lock = (!own).then(|| Lock::of_file(&damaged.path)).flatten();
            if own || lock.is_some() {
                remove(&damaged.path)?;
                remove(&damaged.path.with_extension("safetensors"))?;
            }
        }
        self.damaged.clear();
        let (part, parts) = self.part;
        for path in files_with_prefix(&self.dir, &format!("maps-{part}of{parts}-"))? {
            if !path.with_extension("jsonl").exists() {
                remove(&path)?;
            }
        }
        let prefix = format!("part-{part}of{parts}-");
        for path in files_with_prefix(&self.dir, &prefix)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let number = name[prefix.len()..].split('-').next();
            let number = number.and_then(|n| n.parse().ok());
            if !plan.shards.iter().any(|shard| Some(shard.number) == number) {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

/// Whether an unfinished plan is one of these samples as they are.
fn fits(plan: &Plan, samples: &[Planned], places: &HashMap<&str, usize>) -> bool {
    plan.ids().all(|id| places.contains_key(id))
        && plan.samples == fingerprint(plan, samples, places)
}

fn fingerprint(plan: &Plan, samples: &[Planned], places: &HashMap<&str, usize>) -> String {
    plan::fingerprint(plan.ids().map(|id| &samples[places[id]]))
}
