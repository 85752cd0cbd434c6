//! `run.json`: what a run's configuration and metrics do not say.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::rundir::RunDir;
use crate::eval::drawn::Figures;
use crate::gpu::Tier;
use crate::{Error, Result, files};

/// Where, when and how far a run went.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// Steps that it is to have.
    pub total_steps: u64,
    /// Samples that it is trained on.
    pub samples: u64,
    /// Each start of the program, in order.
    pub stretches: Vec<Stretch>,
    /// Figures on held-out scenes, of a run on the embedded data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub held_out: Option<HeldOut>,
}

/// What one start of the program did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stretch {
    /// The program's version.
    pub version: String,
    /// The adapter's name.
    pub adapter: String,
    /// Its backend, driver and driver version.
    pub driver: String,
    /// When it began, in seconds since 1970 (UTC).
    pub started: u64,
    /// Steps that were done before it.
    pub from: u64,
    /// And after it.
    pub to: u64,
    /// Wall-clock time of the training in seconds.
    pub seconds: f64,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, where it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// How a stretch of a run ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It has not, or the program was killed.
    #[default]
    Running,
    /// All steps are done.
    Finished,
    /// Evaluations did not improve any more.
    EarlyStop,
    /// By Ctrl-C.
    Stopped,
    /// By an error.
    Failed,
    /// The program was killed, as a later start found.
    Killed,
}

/// Figures before and after training.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct HeldOut {
    /// Scenes.
    pub scenes: u64,
    /// Before the first step.
    pub before: Figures,
    /// After the last; none where the run has not come so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Figures>,
}

impl Outcome {
    /// In words.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Finished => "finished",
            Self::EarlyStop => "stopped early",
            Self::Stopped => "stopped by Ctrl-C",
            Self::Failed => "failed",
            Self::Killed => "killed",
        }
    }
}

impl Record {
    /// The record of `run`; none where it was made by a program that kept none.
    ///
    /// # Errors
    /// A file that is not a record.
    pub fn read(run: &RunDir) -> Result<Option<Self>> {
        let path = run.record();
        if !path.is_file() {
            return Ok(None);
        }
        let wrong = |e: serde_json::Error| Error::file(&path, format!("not a run's record: {e}"));
        serde_json::from_str(&files::read_text(&path)?)
            .map(Some)
            .map_err(wrong)
    }

    /// Writes it.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, run: &RunDir) -> Result<()> {
        let path = run.record();
        let text =
            serde_json::to_vec_pretty(self).map_err(|e| Error::file(&path, e.to_string()))?;
        files::write_bytes(&path, &text)
    }

    /// Adds a stretch that begins now after `from` steps, on the adapter of `tier`.
    pub fn begin(&mut self, tier: &Tier, from: u64) {
        for stretch in &mut self.stretches {
            if stretch.outcome == Outcome::Running {
                // How far it came is known to its last checkpoint, from which this one goes on.
                (stretch.outcome, stretch.to) = (Outcome::Killed, from);
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.stretches.push(Stretch {
            version: env!("CARGO_PKG_VERSION").into(),
            adapter: tier.name.clone(),
            driver: tier.driver.clone(),
            started: now.unwrap_or_default().as_secs(),
            from,
            to: from,
            ..Stretch::default()
        });
    }

    /// Ends the last stretch after `to` steps and `seconds`, as `result` says.
    pub fn end(&mut self, to: u64, seconds: f64, result: &Result<()>) {
        let total = self.total_steps;
        let Some(stretch) = self.stretches.last_mut() else {
            return;
        };
        (stretch.to, stretch.seconds) = (to, seconds);
        stretch.outcome = match result {
            Ok(()) if to < total => Outcome::EarlyStop,
            Ok(()) => Outcome::Finished,
            Err(Error::Interrupted) => Outcome::Stopped,
            Err(_) => Outcome::Failed,
        };
        stretch.reason = match result {
            Err(error) if stretch.outcome == Outcome::Failed => Some(error.to_string()),
            _ => None,
        };
    }

    /// Wall-clock time of the training in seconds; that of a stretch which was killed is not known.
    pub fn seconds(&self) -> f64 {
        self.stretches.iter().map(|stretch| stretch.seconds).sum()
    }
}

/// A time of [`Stretch::started`] as date and time, UTC.
pub fn date(seconds: u64) -> String {
    // Days since 1 March of year 0, in cycles of 400 years (Howard Hinnant, "chrono-compatible low-level date
    // algorithms").
    let days = seconds / 86_400 + 719_468;
    let (cycle, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, later) = match month {
        0..10 => (month + 3, 0),
        _ => (month - 9, 1),
    };
    let year = year + cycle * 400 + later;
    let (hour, minute) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_of_leap_years_and_ends_of_years() {
        // From `date -u -d @N`.
        for (seconds, expected) in [
            (0, "1970-01-01 00:00 UTC"),
            (951_782_399, "2000-02-28 23:59 UTC"),
            (951_782_400, "2000-02-29 00:00 UTC"),
            (1_735_689_599, "2024-12-31 23:59 UTC"),
            (1_772_323_200, "2026-03-01 00:00 UTC"),
        ] {
            assert_eq!(date(seconds), expected);
        }
    }

    #[test]
    fn a_stretch_that_never_ended_was_killed() {
        let mut record = Record {
            total_steps: 9,
            ..Record::default()
        };
        record.begin(&Tier::default(), 0);
        record.begin(&Tier::default(), 4);
        record.end(9, 1.5, &Ok(()));
        let ends: Vec<_> = record
            .stretches
            .iter()
            .map(|s| (s.from, s.to, s.outcome))
            .collect();
        assert_eq!(ends, [(0, 4, Outcome::Killed), (4, 9, Outcome::Finished)]);
        record.end(5, 1.0, &Ok(()));
        assert_eq!(record.stretches[1].outcome, Outcome::EarlyStop);
        record.end(5, 1.0, &Err(Error::Input("no".into())));
        assert_eq!(record.stretches[1].reason.as_deref(), Some("no"));
    }
}
