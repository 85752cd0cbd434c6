//! From the data set to the examples of a step, without the GPU.

use std::sync::{Arc, OnceLock};

use super::batch::Example;
use super::config::{Config, WithoutTargets};
use super::exchange::Exchange;
use crate::align::filter::WordRules;
use crate::align::options::ControlTargets;
use crate::align::store::{SIDE, TargetStore};
use crate::data::DataSet;
use crate::data::prefetch::Prefetch;
use crate::error::{Error, Result};
use crate::vlm::Processor;

/// Most worker threads by default; beyond it the disk or the memory is what is waited for.
const MOST_WORKERS: usize = 8;

/// The data set with its targets and the student's processor. Safe to share between threads; what a step gets depends
/// on the configuration, the seed and the step alone.
pub struct Loader {
    data: DataSet,
    /// A store for each share of the data set.
    stores: Vec<Option<TargetStore>>,
    processor: Arc<Processor>,
    rules: WordRules,
    seed: u64,
    shuffle: bool,
    batch: usize,
    bucket: usize,
    /// Which words' maps are exchanged under `control.targets = "shuffled"`, found out when it is first asked for.
    exchange: OnceLock<Exchange>,
}

impl Loader {
    /// Loads the data set and opens the target stores that `config` names.
    ///
    /// # Errors
    /// A data set or store that cannot be read; a store without a target for any sample; no sample left where
    /// those without targets are skipped.
    pub fn new(config: &Config, processor: Arc<Processor>) -> Result<Self> {
        let data = config.data.load()?;
        let open = |path: Option<std::path::PathBuf>| path.map(TargetStore::open).transpose();
        let stores = config.data.stores().into_iter().map(open);
        let mut loader = Self {
            data,
            stores: stores.collect::<Result<_>>()?,
            processor,
            rules: config.word_rules(),
            seed: config.train.seed,
            shuffle: config.data.shuffle,
            batch: config.effective_batch(),
            bucket: config.train.bucket,
            exchange: OnceLock::new(),
        };
        loader.check_stores(config)?;
        if config.data.without_targets == WithoutTargets::Skip {
            loader.skip_without_targets(config)?;
        }
        Ok(loader)
    }

    fn check_stores(&self, config: &Config) -> Result<()> {
        for (share, store) in self.data.shares.iter().zip(&self.stores) {
            let Some(store) = store else { continue };
            let samples = &self.data.samples[share.samples.clone()];
            if samples
                .iter()
                .any(|s| store.has(&s.id, Some(&s.image.file_name())))
            {
                continue;
            }
            let targets = config.data.targets.iter().chain(
                config
                    .data
                    .mixture
                    .iter()
                    .filter_map(|part| part.targets.as_ref()),
            );
            let named: Vec<String> = targets.map(|t| t.display().to_string()).collect();
            return Err(Error::Config(format!(
                "data.targets ({}) holds targets for none of the {} samples of {}, by id or by image file name; \
                 were they made for another data set?",
                named.join(", "),
                samples.len(),
                share.path.display()
            )));
        }
        Ok(())
    }

    fn skip_without_targets(&mut self, config: &Config) -> Result<()> {
        let kept: Vec<bool> = (0..self.data.samples.len())
            .map(|index| {
                let sample = &self.data.samples[index];
                let store = self.store(index);
                store.is_some_and(|s| s.has(&sample.id, Some(&sample.image.file_name())))
            })
            .collect();
        self.data.keep(&kept);
        if self.data.samples.is_empty() {
            return Err(Error::Config(format!(
                "data.without_targets = \"skip\" leaves no sample of {}: expected targets, by data.targets or data.diffusion",
                config.data.path.display()
            )));
        }
        Ok(())
    }

    /// Leaves the samples out that `kept` is false for.
    pub fn keep(&mut self, kept: &[bool]) {
        self.data.keep(kept);
    }

    /// The data set, without skipped samples.
    pub fn data(&self) -> &DataSet {
        &self.data
    }

    /// The target store of sample `index`.
    pub fn store(&self, index: usize) -> Option<&TargetStore> {
        self.stores[self.data.share_of(index)].as_ref()
    }

    /// Number of batches in an epoch.
    pub fn steps_per_epoch(&self) -> u64 {
        self.data.epoch_len().div_ceil(self.batch) as u64
    }

    /// The epoch and the samples of step `step`, by their place in the data set.
    pub fn order(&self, step: u64) -> (u64, Vec<usize>) {
        let per_epoch = self.steps_per_epoch();
        let (epoch, within) = (step / per_epoch, (step % per_epoch) as usize);
        let order = self.data.order(self.seed, epoch, self.shuffle);
        let from = within * self.batch;
        (
            epoch,
            order[from..(from + self.batch).min(order.len())].to_vec(),
        )
    }

    /// Reads, tokenises and matches samples, by their place in the data set.
    ///
    /// # Errors
    /// The first bad sample's; see [`Example::prepare`]. Shuffled targets of too few words; see [`Exchange::new`].
    pub fn examples(&self, order: &[usize]) -> Result<Vec<Example>> {
        let prepare = |&i: &usize| {
            let mut example = Example::prepare(
                &self.data.samples[i],
                &self.processor,
                self.store(i),
                &self.rules,
            )?;
            match self.rules.control {
                ControlTargets::Own => {}
                ControlTargets::Uniform => example.targets.fill(0.5),
                ControlTargets::Shuffled => self.shuffle(i, &mut example)?,
            }
            Ok(example)
        };
        let padded = |example: Result<Example>| {
            let mut example = example?;
            example.prepared.pad(self.bucket);
            Ok(example)
        };
        order.iter().map(prepare).map(padded).collect()
    }

    /// Gives each word of sample `index` the map that the exchange has for it.
    fn shuffle(&self, index: usize, example: &mut Example) -> Result<()> {
        if example.words.words.is_empty() {
            return Ok(());
        }
        let exchange = match self.exchange.get() {
            Some(exchange) => exchange,
            None => {
                let made = Exchange::new(self, &self.rules, self.seed)?;
                self.exchange.get_or_init(|| made)
            }
        };
        let maps = example.targets.chunks_exact_mut(SIDE * SIDE);
        for (word, map) in example.words.words.iter().zip(maps) {
            map.copy_from_slice(&exchange.map(self, index, word)?);
        }
        Ok(())
    }

    /// The examples of `steps`, made ahead on `workers` threads (by default one for each core but one, at most eight).
    pub fn prefetch(
        self: &Arc<Self>,
        steps: std::ops::Range<u64>,
        workers: Option<usize>,
    ) -> Prefetch<Result<Vec<Example>>> {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let workers = workers.unwrap_or((cores - 1).clamp(1, MOST_WORKERS));
        let loader = self.clone();
        Prefetch::new(steps, workers, workers + 1, move |step| {
            loader.examples(&loader.order(step).1)
        })
    }
}
