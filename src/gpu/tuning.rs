//! Which kernel an op takes for which shape: measured choices, kept between runs. What the choices mean is the ops' affair.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use super::{Gpu, Tier, lock};
use crate::error::{Error, Result};
use crate::files::{create_dir, read_text, write_bytes};

/// Whether ops take measured choices. Another kernel adds in another order: with the same choices the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Tuning {
    /// No: the usual choice always
    #[default]
    Off,
    /// Those that are kept; what is met without one is noted for `bench --tune`
    Cached,
    /// Those, and what is met without one is measured there and then, and kept
    FirstUse,
    /// `FirstUse` on a GPU; `Cached` on a driver that runs on the CPU, where the usual choice is mostly the best.
    #[value(skip)]
    ByAdapter,
}

/// The choice measured for a class of shapes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuned {
    /// What the op calls its choice.
    pub choice: String,
    /// The shape that was measured for the class.
    pub shape: String,
    /// Milliseconds of the choice.
    pub millis: f64,
    /// Milliseconds of what is chosen without measuring.
    pub usual_millis: f64,
}

/// The file's content.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Cache {
    format: u32,
    version: String,
    adapter: String,
    driver: String,
    choices: BTreeMap<String, Tuned>,
    /// Classes that runs have met without a choice, and a shape of each.
    missing: BTreeMap<String, String>,
}

/// Of this module's own making.
const FORMAT: u32 = 1;
/// A few hundred classes take 100 KB.
const MAX_BYTES: u64 = 4 << 20;
/// Classes noted as missing at the most.
const MAX_MISSING: usize = 1000;

impl Cache {
    fn empty(tier: &Tier) -> Cache {
        Cache {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").into(),
            adapter: tier.name.clone(),
            driver: tier.driver.clone(),
            ..Cache::default()
        }
    }

    /// The file's content if it is of the program, adapter and driver of `expected`; an error says why it is of no use.
    fn read(path: &Path, expected: &Cache) -> Result<Cache> {
        let refused = |message: String| Error::file(path, message);
        let bytes = std::fs::metadata(path)
            .map_err(|e| Error::io(path, e))?
            .len();
        if bytes > MAX_BYTES {
            return Err(refused(format!("{bytes} bytes are no tuning cache")));
        }
        let cache: Cache =
            serde_json::from_str(&read_text(path)?).map_err(|e| refused(e.to_string()))?;
        let format = [cache.format, FORMAT].map(|format| format.to_string());
        for (what, found, expected) in [
            ("format", &format[0], &format[1]),
            ("version", &cache.version, &expected.version),
            ("adapter", &cache.adapter, &expected.adapter),
            ("driver", &cache.driver, &expected.driver),
        ] {
            if found != expected {
                return Err(refused(format!(
                    "measured with {what} `{found}`, this is `{expected}`"
                )));
            }
        }
        Ok(cache)
    }
}

/// What a run has measured at first use.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TuningSpent {
    /// Classes that have a choice now.
    pub classes: usize,
    /// Classes that could not be measured.
    pub failed: usize,
    /// Time that it took.
    pub time: Duration,
}

#[derive(Default)]
struct State {
    cache: Cache,
    changed: bool,
    /// Classes whose choice replaces the file's; else the file's, which an earlier run obeys, stays.
    replaced: BTreeSet<String>,
    decisions: FxHashMap<[u32; 5], u64>,
    /// Whether the file can be written; unknown before the first measurement.
    keeps: Option<bool>,
    /// Classes that are not measured in this run any more.
    failed: HashSet<String>,
    spent: TuningSpent,
}

impl State {
    /// Writes what has changed, together with what other runs have kept meanwhile.
    fn save(&mut self, path: &Path) -> Result<()> {
        let _held = hold(path)?;
        if let Ok(file) = Cache::read(path, &self.cache) {
            for (class, tuned) in file.choices {
                if !self.replaced.contains(&class) {
                    self.cache.choices.insert(class, tuned);
                }
            }
            self.cache.missing.extend(file.missing);
        }
        let Cache {
            choices, missing, ..
        } = &mut self.cache;
        missing.retain(|class, _| !choices.contains_key(class));
        let text = serde_json::to_string_pretty(&self.cache)
            .map_err(|e| Error::file(path, e.to_string()))?;
        write_bytes(path, text.as_bytes())?;
        self.replaced.clear();
        self.changed = false;
        Ok(())
    }
}

/// Keeps other runs from writing the cache while the file lives; none where the file system has no locks.
fn hold(path: &Path) -> Result<Option<File>> {
    create_dir(path.parent().unwrap_or(path))?;
    let Ok(file) = File::create(path.with_extension("lock")) else {
        return Ok(None);
    };
    // Others write for milliseconds; one that is stopped while it does is not waited for.
    for _ in 0..200 {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
            Err(TryLockError::Error(_)) => break,
        }
    }
    Ok(None)
}

pub(crate) struct Tuner {
    mode: Tuning,
    path: Option<PathBuf>,
    state: Mutex<State>,
}

impl Tuner {
    /// Reads the cache of this adapter in `dir`. One that is of no use is left aside with a warning, and replaced.
    pub fn new(mode: Tuning, dir: Option<PathBuf>, tier: &Tier) -> Tuner {
        let mode = match mode {
            Tuning::ByAdapter if tier.cpu => Tuning::Cached,
            Tuning::ByAdapter => Tuning::FirstUse,
            mode => mode,
        };
        let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
        let name: String = tier.name.chars().take(80).map(plain).collect();
        let path = dir
            .filter(|_| mode != Tuning::Off)
            .map(|dir| dir.join(format!("tuning-{name}.json")));
        let mut state = State {
            cache: Cache::empty(tier),
            ..State::default()
        };
        if let Some(path) = path.as_ref().filter(|path| path.exists()) {
            match Cache::read(path, &state.cache) {
                Ok(cache) => state.cache = cache,
                Err(error) => {
                    tracing::warn!(
                        "tuning cache left aside: {error}; `lavender-wgpu bench --tune` measures again"
                    );
                    state.changed = true;
                }
            }
        }
        Tuner {
            mode,
            path,
            state: Mutex::new(state),
        }
    }

    fn save(&self) -> Result<()> {
        let mut state = lock(&self.state);
        match &self.path {
            Some(path) if state.changed => state.save(path),
            _ => Ok(()),
        }
    }

    /// Whether what is measured now can be kept. If not, nothing is: each run would choose, and add, in its own way.
    fn keeps(&self) -> bool {
        let mut state = lock(&self.state);
        if self.mode != Tuning::FirstUse {
            return false;
        }
        if state.keeps.is_none() {
            let written = match &self.path {
                Some(path) => state.save(path),
                None => Err(Error::Input("this system names no cache folder".into())),
            };
            state.keeps = Some(written.is_ok());
            if let Err(error) = written {
                unkept(&error);
            }
        }
        state.keeps == Some(true)
    }

    /// Keeps what was measured for a class, on disk before the first product obeys it, and gives what to obey: another
    /// run may have been first.
    fn keep(&self, state: &mut State, class: &str, tuned: Tuned) -> Option<Tuned> {
        let path = self.path.as_ref()?;
        state.cache.choices.insert(class.into(), tuned);
        if let Err(error) = state.save(path) {
            state.cache.choices.remove(class);
            state.keeps = Some(false);
            unkept(&error);
        }
        state.cache.choices.get(class).cloned()
    }
}

fn unkept(error: &Error) {
    tracing::warn!(
        "kernels are not measured on this adapter, the usual ones are taken: what is found could not be kept: {error}; \
         make room or let it be written, name another cache folder in XDG_CACHE_HOME, or give `--tuning cached`"
    );
}

impl Drop for Tuner {
    fn drop(&mut self) {
        if let Err(error) = self.save() {
            tracing::debug!("tuning cache not saved: {error}");
        }
    }
}

impl Gpu {
    fn tuner(&self) -> &Tuner {
        &self.inner().tuner
    }

    /// What it was opened with; never [`Tuning::ByAdapter`].
    pub fn tuning(&self) -> Tuning {
        self.tuner().mode
    }

    /// The choice measured for a class of shapes.
    pub fn tuned(&self, class: &str) -> Option<Tuned> {
        lock(&self.tuner().state).cache.choices.get(class).cloned()
    }

    /// The choice for a class: the one that is kept, else the one that `measure` finds, where this run measures. A class
    /// that has none is noted with `shape`, one of it from which it can be measured later, if there is one.
    pub(crate) fn tuned_or(
        &self,
        class: &str,
        shape: Option<&str>,
        measure: impl FnOnce() -> Result<Tuned>,
    ) -> Option<Tuned> {
        let tuned = self.tuned(class).or_else(|| self.first_use(class, measure));
        if let (None, Some(shape)) = (&tuned, shape) {
            self.note_untuned(class, shape);
        }
        tuned
    }

    /// Measures a class in the middle of a run, which goes on as it was whatever comes of it.
    fn first_use(&self, class: &str, measure: impl FnOnce() -> Result<Tuned>) -> Option<Tuned> {
        let tuner = self.tuner();
        if lock(&tuner.state).failed.contains(class) || !tuner.keeps() {
            return None;
        }
        // What was recorded before is not to be timed, and its errors are not the measurement's.
        if let Err(error) = self.wait() {
            self.fault(error);
            return None;
        }
        let (start, before) = (Instant::now(), self.inner().pool.made());
        let measured = self.unrecorded(measure);
        self.trim_since(before);
        let mut state = lock(&tuner.state);
        state.spent.time += start.elapsed();
        match measured {
            Ok(tuned) => {
                let kept = tuner.keep(&mut state, class, tuned);
                state.spent.classes += usize::from(kept.is_some());
                kept
            }
            Err(error @ Error::DeviceLost(_)) => {
                self.fault(error);
                None
            }
            Err(error) => {
                if state.failed.is_empty() {
                    let why = match error {
                        Error::OutOfMemory { .. } => "there is no GPU memory left for it".into(),
                        error => error.to_string(),
                    };
                    tracing::warn!(
                        "{class}: not measured: {why}; the usual kernel is taken in this run, and a later one measures"
                    );
                }
                state.failed.insert(class.into());
                state.spent.failed += 1;
                None
            }
        }
    }

    /// What measuring at first use has taken so far.
    pub fn tuning_spent(&self) -> TuningSpent {
        lock(&self.tuner().state).spent
    }

    /// Where what is measured at first use will be kept, if this adapter has nothing kept yet.
    pub fn tuning_anew(&self) -> Option<&Path> {
        let tuner = self.tuner();
        let empty = || lock(&tuner.state).cache.choices.is_empty();
        let anew = tuner.mode == Tuning::FirstUse && empty() && tuner.keeps();
        tuner.path.as_deref().filter(|_| anew)
    }

    /// The choices of classes whose name begins so.
    pub fn tuned_of(&self, op: &str) -> Vec<Tuned> {
        let state = lock(&self.tuner().state);
        let all = state.cache.choices.iter();
        let of_op = all.filter(|(class, _)| class.starts_with(op));
        of_op.map(|(_, tuned)| tuned.clone()).collect()
    }

    /// Forgets those choices, so that they are measured again at the next use.
    pub fn forget_tuned(&self, op: &str) {
        let mut state = lock(&self.tuner().state);
        let classes = state.cache.choices.keys();
        let classes: Vec<String> = classes
            .filter(|class| class.starts_with(op))
            .cloned()
            .collect();
        state
            .cache
            .choices
            .retain(|class, _| !class.starts_with(op));
        // The file's are not taken over when it is written.
        state.replaced.extend(classes);
        state.decisions.clear();
        state.changed = true;
    }

    /// Keeps the choice measured for a class, in this run from the next op of the class on.
    pub fn set_tuned(&self, class: &str, tuned: Tuned) {
        let mut state = lock(&self.tuner().state);
        state.cache.missing.remove(class);
        state.cache.choices.insert(class.into(), tuned);
        state.replaced.insert(class.into());
        state.decisions.clear();
        state.changed = true;
    }

    fn note_untuned(&self, class: &str, shape: &str) {
        let mut state = lock(&self.tuner().state);
        let missing = &mut state.cache.missing;
        if missing.len() < MAX_MISSING && !missing.contains_key(class) {
            missing.insert(class.into(), shape.into());
            state.changed = true;
        }
    }

    /// A shape of each class that has a choice, or that a run has met without one.
    pub fn tuning_shapes(&self) -> Vec<String> {
        let state = lock(&self.tuner().state);
        let tuned = state.cache.choices.values().map(|tuned| &tuned.shape);
        tuned.chain(state.cache.missing.values()).cloned().collect()
    }

    /// Writes the choices for later runs, whole or not at all, and tells where; `None` where there is no place for it.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn save_tuning(&self) -> Result<Option<PathBuf>> {
        self.tuner().save()?;
        Ok(self.tuner().path.clone())
    }

    /// What an op has decided for `key` since it was opened: ops ask before they think.
    pub(crate) fn decision(&self, key: [u32; 5]) -> Option<u64> {
        lock(&self.tuner().state).decisions.get(&key).copied()
    }

    pub(crate) fn decide(&self, key: [u32; 5], decision: u64) {
        lock(&self.tuner().state).decisions.insert(key, decision);
    }
}
