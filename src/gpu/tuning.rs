//! Which kernel an op takes for which shape: measured choices, kept between runs. What the choices mean is the ops' affair.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use super::{Gpu, Tier, lock};
use crate::error::{Error, Result};
use crate::files::{read_text, write_bytes};

/// Whether ops take measured choices. Another kernel adds in another order: with the same choices the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tuning {
    /// No: the same choices everywhere and always.
    #[default]
    Off,
    /// Those that `bench --tune` has measured on this adapter; shapes that it had not are noted for the next time.
    Cached,
    /// Those, and a new shape is measured when it is met.
    Measure,
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

    /// The file's content if it is of this program, adapter and driver; an error says why it is of no use.
    fn read(path: &Path, tier: &Tier) -> Result<Cache> {
        let refused = |message: String| Error::file(path, message);
        let bytes = std::fs::metadata(path)
            .map_err(|e| Error::io(path, e))?
            .len();
        if bytes > MAX_BYTES {
            return Err(refused(format!("{bytes} bytes are no tuning cache")));
        }
        let cache: Cache =
            serde_json::from_str(&read_text(path)?).map_err(|e| refused(e.to_string()))?;
        let expected = Cache::empty(tier);
        for (what, found, expected) in [
            ("format", cache.format.to_string(), FORMAT.to_string()),
            ("version", cache.version.clone(), expected.version),
            ("adapter", cache.adapter.clone(), expected.adapter),
            ("driver", cache.driver.clone(), expected.driver),
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

#[derive(Default)]
struct State {
    cache: Cache,
    changed: bool,
    decisions: FxHashMap<[u32; 5], u64>,
}

pub(crate) struct Tuner {
    mode: Tuning,
    path: Option<PathBuf>,
    state: Mutex<State>,
}

impl Tuner {
    /// Reads the cache of this adapter in `dir`. One that is of no use is left aside with a warning, and replaced.
    pub fn new(mode: Tuning, dir: Option<PathBuf>, tier: &Tier) -> Tuner {
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
            match Cache::read(path, tier) {
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
        let Some(path) = self.path.as_ref().filter(|_| state.changed) else {
            return Ok(());
        };
        let text = serde_json::to_string_pretty(&state.cache)
            .map_err(|e| Error::file(path, e.to_string()))?;
        write_bytes(path, text.as_bytes())?;
        state.changed = false;
        Ok(())
    }
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

    /// What it was opened with.
    pub fn tuning(&self) -> Tuning {
        self.tuner().mode
    }

    /// The choice measured for a class of shapes.
    pub fn tuned(&self, class: &str) -> Option<Tuned> {
        lock(&self.tuner().state).cache.choices.get(class).cloned()
    }

    /// Keeps the choice measured for a class, in this run from the next op of the class on.
    pub fn set_tuned(&self, class: &str, tuned: Tuned) {
        let mut state = lock(&self.tuner().state);
        state.cache.missing.remove(class);
        state.cache.choices.insert(class.into(), tuned);
        state.decisions.clear();
        state.changed = true;
    }

    /// Notes that a run has met a class that has no choice, and a shape of it.
    pub(crate) fn note_untuned(&self, class: &str, shape: &str) {
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
