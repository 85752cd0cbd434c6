//! What of a run's logs is shown: series over its steps, and figures of the whole.

use super::RunReport;
use crate::train::metrics::{EvalMetrics, StepMetrics};

/// Share of the steps at the end whose mean a run is told by: a single step's loss says little.
const LAST: f64 = 0.1;

/// What changes from step to step.
#[derive(Clone, Debug)]
pub struct Series {
    /// What it is.
    pub name: &'static str,
    /// Its unit, empty for none.
    pub unit: &'static str,
    /// Which values are good ones.
    pub better: Better,
    /// Whether it has a chart of its own.
    pub plotted: bool,
    /// Step and value.
    pub points: Vec<(u64, f64)>,
}

/// Which values are good ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// Low ones.
    Lower,
    /// High ones.
    Higher,
    /// It is not of that kind.
    Neither,
}

/// A figure of a whole run.
#[derive(Clone, Debug)]
pub struct Figure {
    /// What it is.
    pub name: &'static str,
    /// Its unit, empty for none.
    pub unit: &'static str,
    /// Which values are good ones.
    pub better: Better,
    /// Its value, where the run has one.
    pub value: Option<f64>,
    /// Whether it is the sum that is minimised, which runs of another λ have another of.
    pub total: bool,
    show: fn(f64) -> String,
}

impl Series {
    /// The series of a run, those of evaluations last.
    pub fn all(report: &RunReport) -> Vec<Self> {
        use Better::{Higher, Lower, Neither};
        type Of<T> = fn(&T) -> f64;
        let of_steps: [(&str, &str, Better, bool, Of<StepMetrics>); 9] = [
            ("loss", "", Lower, true, |m| m.loss),
            ("language loss", "nats/token", Lower, true, |m| m.lm_loss),
            ("attention loss", "", Lower, true, |m| m.attn_loss),
            ("learning rate", "", Neither, true, |m| m.lr),
            ("gradient norm", "", Neither, true, |m| m.grad_norm),
            ("tokens/s", "", Higher, true, tokens_per_second),
            ("step time", "ms", Lower, false, |m| m.step_ms),
            ("matched words", "", Neither, false, |m| {
                m.matched_words as f64
            }),
            ("GPU memory", "MiB", Lower, false, mebibytes),
        ];
        let of_evaluations: [(&str, &str, Of<EvalMetrics>); 3] = [
            ("evaluation loss", "", |m| m.loss),
            ("evaluation language loss", "nats/token", |m| m.lm_loss),
            ("evaluation attention loss", "", |m| m.attn_loss),
        ];
        let steps = of_steps.map(|(name, unit, better, plotted, value)| Self {
            name,
            unit,
            better,
            plotted,
            points: report.steps.iter().map(|m| (m.step, value(m))).collect(),
        });
        let evaluations = of_evaluations.map(|(name, unit, value)| Self {
            name,
            unit,
            better: Lower,
            plotted: false,
            points: report
                .evaluations
                .iter()
                .map(|m| (m.step, value(m)))
                .collect(),
        });
        steps.into_iter().chain(evaluations).collect()
    }

    /// Name, first, last, best with its step, and mean, as texts; none for an empty series.
    pub fn row(&self) -> Option<Vec<String>> {
        let (first, last) = (self.points.first()?.1, self.points.last()?.1);
        let best = match self.better {
            Better::Lower => self.points.iter().min_by(|a, b| a.1.total_cmp(&b.1)),
            // The first of equal ones.
            Better::Higher => self.points.iter().rev().max_by(|a, b| a.1.total_cmp(&b.1)),
            Better::Neither => None,
        };
        let best = best.map_or("–".into(), |(step, value)| {
            format!("{} (step {step})", number(*value))
        });
        let name = match self.unit {
            "" => self.name.to_owned(),
            unit => format!("{}, {unit}", self.name),
        };
        let mean = mean(self.points.iter().map(|p| p.1))?;
        Some(vec![name, number(first), number(last), best, number(mean)])
    }
}

impl Figure {
    /// The figures of a run, all of them; a run need not have each.
    pub fn all(report: &RunReport) -> Vec<Self> {
        use Better::{Higher, Lower, Neither};
        let steps = &report.steps;
        let count = ((steps.len() as f64 * LAST).ceil() as usize).max(1);
        let last = &steps[steps.len().saturating_sub(count)..];
        let of_last = |value: fn(&StepMetrics) -> f64| mean(last.iter().map(value));
        // The first step compiles kernels.
        let timed = &steps[usize::from(steps.len() > 1)..];
        let seconds: f64 = timed.iter().map(|m| m.step_ms * 1e-3).sum();
        let tokens: u64 = timed.iter().map(|m| m.tokens).sum();
        let speed = (seconds > 0.0).then(|| tokens as f64 / seconds);
        let best = report
            .evaluations
            .iter()
            .min_by(|a, b| a.loss.total_cmp(&b.loss));
        let (before, after) = (report.maps.first(), report.maps.last());
        let held = report.record.as_ref().and_then(|r| r.held_out?.after);
        let wall = report.record.as_ref().map(super::Record::seconds);
        let memory = steps.iter().map(mebibytes).reduce(f64::max);
        let words = steps.iter().map(|m| m.matched_words).sum::<u64>() as f64;
        let plain = |name, unit, better, value| Self {
            name,
            unit,
            better,
            value,
            total: matches!(name, "loss" | "best evaluation"),
            show: number,
        };
        let done = steps.last().map(|m| m.step as f64 + 1.0);
        vec![
            plain("steps", "", Neither, done),
            plain("loss", "", Lower, of_last(|m| m.loss)),
            plain("language loss", "nats/token", Lower, of_last(|m| m.lm_loss)),
            plain("attention loss", "", Lower, of_last(|m| m.attn_loss)),
            plain("best evaluation", "loss", Lower, best.map(|m| m.loss)),
            plain(
                "its language loss",
                "nats/token",
                Lower,
                best.map(|m| m.lm_loss),
            ),
            plain("its attention loss", "", Lower, best.map(|m| m.attn_loss)),
            plain("its step", "", Neither, best.map(|m| m.step as f64)),
            plain(
                "attention entropy before",
                "nats",
                Neither,
                before.map(|m| m.entropy),
            ),
            plain(
                "attention entropy after",
                "nats",
                Lower,
                after.map(|m| m.entropy),
            ),
            plain(
                "error of drawn maps after",
                "",
                Lower,
                after.map(|m| m.distance),
            ),
            plain(
                "held-out answer loss",
                "nats/token",
                Lower,
                held.map(|f| f.answer_loss),
            ),
            plain(
                "held-out answer accuracy",
                "",
                Higher,
                held.map(|f| f.answer_accuracy),
            ),
            plain(
                "held-out attention entropy",
                "nats",
                Lower,
                held.map(|f| f.attention_entropy),
            ),
            plain(
                "held-out pointing game",
                "",
                Higher,
                held.map(|f| f.pointing),
            ),
            plain(
                "matched words",
                "",
                Neither,
                (!steps.is_empty()).then_some(words),
            ),
            plain(
                "step time",
                "ms, median",
                Lower,
                median(timed.iter().map(|m| m.step_ms)),
            ),
            plain("tokens/s", "", Higher, speed),
            plain("GPU memory", "MiB", Lower, memory),
            Self {
                show: duration,
                ..plain(
                    "wall time",
                    "",
                    Lower,
                    wall.filter(|&seconds| seconds > 0.0),
                )
            },
        ]
    }

    /// Name and unit.
    pub fn title(&self) -> String {
        match self.unit {
            "" => self.name.to_owned(),
            unit => format!("{}, {unit}", self.name),
        }
    }

    /// Its value as text; a dash where there is none.
    pub fn text(&self) -> String {
        self.value.map_or("–".into(), self.show)
    }
}

fn tokens_per_second(m: &StepMetrics) -> f64 {
    m.tokens as f64 / (m.step_ms * 1e-3).max(1e-6)
}

fn mebibytes(m: &StepMetrics) -> f64 {
    m.peak_bytes as f64 / f64::from(1 << 20)
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> Option<f64> {
    let count = values.len();
    (count > 0).then(|| values.sum::<f64>() / count as f64)
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// A number with four digits that count, or all before the point.
pub fn number(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    if !(1e-3..1e7).contains(&size) {
        let text = format!("{value:.3e}");
        // 1.000e-4 is 1e-4.
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let digits = digits.trim_end_matches('0').trim_end_matches('.');
        return format!("{digits}e{exponent}");
    }
    if value.fract() == 0.0 {
        return format!("{value:.0}");
    }
    let before = size.log10().floor() as i32;
    format!("{value:.*}", (3 - before).clamp(0, 6) as usize)
}

/// A time in seconds as people say it.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_times_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (3.0, "3"),
            (1e-4, "1e-4"),
            (1.25e-5, "1.25e-5"),
            (0.0123456, "0.01235"),
            (4.56789, "4.568"),
            (123.456, "123.5"),
            (12345.6, "12346"),
            (-2.5, "-2.500"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(number(value), text);
        }
        for (seconds, text) in [
            (3.21, "3.2 s"),
            (61.0, "1 min 01 s"),
            (3725.0, "1 h 02 min"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }
}
