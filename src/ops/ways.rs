//! Ops that can be done in a few ways: which one, as it was measured for the class of their shapes.

use std::time::{Duration, Instant};

use crate::error::Result;
use crate::gpu::{Gpu, Tier, Tuned, Tuning};

/// Timed runs of a way, after one that compiles and warms up.
pub(super) const RUNS: usize = 3;

/// A way slower than the best so far by this is not timed again.
const HOPELESS: f64 = 1.5;

/// A run that takes so long is timed once: its time is far above the clock's and the dispatches' noise.
const LONG_MILLIS: f64 = 20.0;

/// FLOPs of a run at the most, where so many ways are measured: those that are [`LONG_MILLIS`] run twice, the first and the
/// fastest twice more.
pub(super) fn per_run(tier: &Tier, ways: usize) -> usize {
    budget(tier) / (2 * (ways + 2))
}

/// FLOPs that measuring a class may take: half a second of a slow software driver, or of a slow GPU.
pub(super) fn budget(tier: &Tier) -> usize {
    if tier.cpu {
        5_000_000_000
    } else {
        500_000_000_000
    }
}

/// A size to half a power of two, small ones exactly: sizes of a class are as near as that.
pub(super) fn near(size: usize) -> usize {
    match size {
        0..=8 => size,
        _ => 2f64
            .powf((2.0 * (size as f64).log2()).round() / 2.0)
            .round() as usize,
    }
}

/// An op whose way is asked for.
pub(super) struct Question<'a> {
    /// Tells it from any other that is decided on its own.
    pub key: [u32; 5],
    /// The ways that there are, the usual one first.
    pub ways: &'a [&'static str],
    /// What it is measured with.
    pub class: &'a dyn Fn() -> String,
    /// The shape that is measured.
    pub shape: &'a dyn Fn() -> String,
}

/// The way to take, as an index: the one that is kept, else where this run measures the fastest, else the usual one.
/// `run` does the op in one of them.
pub(super) fn fastest(gpu: &Gpu, question: &Question<'_>, run: &dyn Fn(usize)) -> usize {
    if question.ways.len() < 2 || gpu.tuning() == Tuning::Off {
        return 0;
    }
    if let Some(way) = gpu.decision(question.key) {
        return way as usize;
    }
    let class = (question.class)();
    let way = match gpu.tuned_or(&class, None, || measure(gpu, question, run)) {
        None => 0,
        Some(tuned) => {
            let found = question.ways.iter().position(|way| *way == tuned.choice);
            if found.is_none() {
                tracing::warn!(
                    "{class}: the tuned choice `{}` is none of {:?}; the usual kernel is taken",
                    tuned.choice,
                    question.ways
                );
            }
            found.unwrap_or(0)
        }
    };
    // With an error pending nothing was measured: whoever comes after it decides.
    if !gpu.failing() {
        gpu.decide(question.key, way as u64);
    }
    way
}

fn measure(gpu: &Gpu, question: &Question<'_>, run: &dyn Fn(usize)) -> Result<Tuned> {
    let time = |way: usize, best: f64| shortest(gpu, best, &|| run(way));
    let mut usual = time(0, f64::INFINITY)?;
    let mut best = (0, usual);
    for way in 1..question.ways.len() {
        let millis = time(way, best.1)?;
        if millis < best.1 {
            best = (way, millis);
        }
    }
    if best.0 != 0 {
        // Something else may have kept the machine busy during the first: both again.
        usual = usual.min(time(0, f64::INFINITY)?);
        best.1 = best.1.min(time(best.0, f64::INFINITY)?);
    }
    // What is hardly faster is not worth another order of the sums.
    if best.1 > 0.95 * usual {
        best = (0, usual);
    }
    Ok(Tuned {
        choice: question.ways[best.0].into(),
        shape: (question.shape)(),
        millis: best.1,
        usual_millis: usual,
    })
}

/// Milliseconds of the shortest of a few runs, by timestamps, or by the clock where there are none.
///
/// # Errors
/// Any GPU error.
pub(super) fn shortest(gpu: &Gpu, best: f64, run: &dyn Fn()) -> Result<f64> {
    let once = || -> Result<f64> {
        let (mut elapsed, mut done) = (Duration::ZERO, Ok(()));
        let kernels = gpu.device_millis(|| {
            let start = Instant::now();
            run();
            done = gpu.wait();
            elapsed = start.elapsed();
        });
        done?;
        Ok(match kernels {
            0.0 => elapsed.as_secs_f64() * 1e3,
            millis => millis,
        })
    };
    // Compiles and warms up.
    once()?;
    let mut shortest = f64::INFINITY;
    for _ in 0..RUNS {
        shortest = shortest.min(once()?);
        if shortest > (HOPELESS * best).min(LONG_MILLIS) {
            break;
        }
    }
    Ok(shortest)
}
