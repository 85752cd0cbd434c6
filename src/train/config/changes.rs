//! What may change when a run goes on.

use toml::{Table, Value};

use super::Config;
use crate::{Error, Result};

/// Keys that may: how long, what is kept, what is measured, what is drawn, how samples are read.
const ALLOWED: [&str; 12] = [
    "train.steps",
    "train.epochs",
    "train.checkpoint_every",
    "train.keep",
    "train.early_stop",
    "eval.path",
    "eval.images",
    "eval.targets",
    "eval.every",
    "data.workers",
    "run.pictures",
    "run.pictures_every",
];

/// A key with another value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Table and key.
    pub key: String,
    /// The value before, as TOML; `none` where the key was not set.
    pub before: String,
    /// The value after.
    pub after: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} → {}", self.key, self.before, self.after)
    }
}

impl Config {
    /// The keys that `after` has other values for, in the order of their names; `run.dir` is not looked at.
    ///
    /// # Errors
    /// A configuration that cannot be written as TOML.
    pub fn differences(&self, after: &Config) -> Result<Vec<Difference>> {
        let mut differences = self.all_differences(after)?;
        differences.retain(|d| d.key != "run.dir");
        Ok(differences)
    }

    /// [`Config::differences`] with `run.dir`.
    pub(super) fn all_differences(&self, after: &Config) -> Result<Vec<Difference>> {
        let (before, after) = (leaves(self)?, leaves(after)?);
        let value = |table: &Table, key: &str| {
            let value = table.get(key);
            value.map_or("none".to_owned(), Value::to_string)
        };
        let mut keys: Vec<&String> = before.keys().chain(after.keys()).collect();
        keys.sort();
        keys.dedup();
        let differences = keys.into_iter().map(|key| Difference {
            key: key.clone(),
            before: value(&before, key),
            after: value(&after, key),
        });
        Ok(differences.filter(|d| d.before != d.after).collect())
    }

    /// The configuration of a run of `done` steps that goes on as `after`, with what that changes.
    ///
    /// # Errors
    /// Changes of what the steps done depend on, all of them; fewer steps than are done.
    pub fn resumed(&self, after: &Config, done: u64) -> Result<(Config, Vec<Difference>)> {
        let differences = self.differences(after)?;
        let refused: Vec<String> = differences
            .iter()
            .filter(|d| !ALLOWED.contains(&d.key.as_str()))
            .map(Difference::to_string)
            .collect();
        if !refused.is_empty() {
            return Err(Error::Config(format!(
                "--resume: the run has another configuration: {}; a run may go on with other values of {} alone; \
                 for anything else start a new one, from its weights by init.lora and init.aligner",
                refused.join("; "),
                ALLOWED.join(", ")
            )));
        }
        if let Some(steps) = after.train.steps.filter(|&steps| steps < done) {
            return Err(Error::Config(format!(
                "--resume: train.steps = {steps}, but {done} steps are done; expected at least {done}"
            )));
        }
        let mut config = after.clone();
        config.run.dir.clone_from(&self.run.dir);
        Ok((config, differences))
    }
}

/// Every value by `table.key`.
pub(super) fn leaves(config: &Config) -> Result<Table> {
    let tables = Table::try_from(config).map_err(|e| Error::Config(e.to_string()))?;
    let mut leaves = Table::new();
    for (table, keys) in tables {
        let Value::Table(keys) = keys else { continue };
        for (key, value) in keys {
            leaves.insert(format!("{table}.{key}"), value);
        }
    }
    Ok(leaves)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(sets: &[&str]) -> Config {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        Config::default().with(&sets).expect("good arguments")
    }

    #[test]
    fn a_longer_run_and_other_evaluations_are_applied() {
        let before = changed(&["run.dir=a"]);
        let after = changed(&["train.steps=9", "eval.path=e.json", "eval.every=2"]);
        let (config, differences) = before.resumed(&after, 9).expect("allowed");
        let shown: Vec<String> = differences.iter().map(Difference::to_string).collect();
        assert_eq!(
            shown,
            [
                "eval.every: 0 → 2",
                "eval.path: none → \"e.json\"",
                "train.steps: none → 9"
            ]
        );
        assert_eq!((config.train.steps, config.run), (Some(9), before.run));
    }

    #[test]
    fn what_the_steps_done_depend_on_is_refused_with_all_of_it() {
        let after = changed(&["optimizer.lr=0.5", "train.batch=2", "train.keep=1"]);
        let error = Config::default().resumed(&after, 0).expect_err("refused");
        let error = error.to_string();
        for part in ["optimizer.lr: 0.0001 → 0.5", "train.batch: 4 → 2"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(!error.contains("train.keep: "), "{error}");
        let error = Config::default().resumed(&changed(&["train.steps=4"]), 5);
        let error = error.expect_err("refused").to_string();
        assert!(error.contains("5 steps are done"), "{error}");
    }
}
