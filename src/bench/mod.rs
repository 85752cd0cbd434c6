//! What `lavender-wgpu bench` measures: kernels, Stable Diffusion's U-Net at its true size, training steps.
//!
//! All figures of a report are of one adapter and one process; kernels are told as shares of what the same adapter
//! reached on multiply-adds and on copies moments before.

pub mod compare;
pub mod kernels;
pub mod plot;
pub mod training;
pub mod tune;
pub mod unet;

use std::path::Path;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::read_text;
use crate::gpu::{Arena, Gpu, Tier};
use crate::ops::fma_probe::fma_probe;
use crate::tensor::{DType, Tensor};

/// One machine's figures, as `--json` writes them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Version of this program.
    pub version: String,
    /// The adapter.
    pub tier: Tier,
    /// Cores of the machine.
    pub cores: usize,
    /// What the adapter reaches at best.
    pub peak: Peak,
    /// Ops.
    #[serde(default)]
    pub kernels: Vec<kernels::KernelTime>,
    /// The U-Net.
    #[serde(default)]
    pub unet: Vec<unet::UnetTime>,
    /// Training steps.
    #[serde(default)]
    pub training: Vec<training::StepTime>,
}

/// What an adapter reaches at best: the yardstick of its kernels.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Peak {
    /// Multiply-adds in registers, f32 GFLOP/s.
    pub gflops: f64,
    /// Copying a tensor four elements at a time, bytes read and written, GB/s.
    pub gbs: f64,
    /// CPU microseconds of the recording thread for a dispatch that repeats an earlier one, where the system tells:
    /// our bookkeeping, wgpu's encoding and the submission.
    #[serde(default)]
    pub record_us: Option<f64>,
    /// The same for a dispatch of a plan.
    #[serde(default)]
    pub replay_us: Option<f64>,
}

impl Report {
    /// A report on `gpu` with its peaks measured and nothing else yet.
    ///
    /// # Errors
    /// Any GPU error.
    pub fn new(gpu: &Gpu) -> Result<Report> {
        let [record_us, replay_us] = encode_us(gpu)?;
        Ok(Report {
            version: env!("CARGO_PKG_VERSION").into(),
            tier: gpu.tier().clone(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            peak: Peak {
                gflops: fma_probe(gpu)? * 1e-9,
                gbs: copy_rate(gpu)?,
                record_us,
                replay_us,
            },
            ..Report::default()
        })
    }

    /// Reads what `--json` wrote.
    ///
    /// # Errors
    /// A file that cannot be read or is no report.
    pub fn read(path: &Path) -> Result<Report> {
        serde_json::from_str(&read_text(path)?).map_err(|e| {
            let message =
                format!("no report of `bench --json`: {e}; write one with `bench --json FILE`");
            Error::file(path, message)
        })
    }

    /// Adapter and driver in a line.
    pub fn machine(&self) -> String {
        format!("{} [{}]", self.tier.name, self.tier.driver)
    }
}

/// GB/s of an f32 copy kernel over 64 MiB (or what a binding holds), reads and writes counted.
fn copy_rate(gpu: &Gpu) -> Result<f64> {
    use crate::ops::unary::{Unary, unary};
    let bytes = (64 << 20).min(gpu.tier().max_binding);
    let x = Tensor::zeros(gpu, DType::F32, &[bytes as usize / 4]);
    let timing = time(gpu, 0.3, &mut || {
        unary(&x, Unary::Affine(1.0, 0.0));
    })?;
    Ok(2.0 * bytes as f64 / timing.median_ms * 1e-6)
}

/// CPU microseconds for a dispatch of a small kernel, of many thousand that take turns between two pipelines: recorded
/// each, and replayed.
fn encode_us(gpu: &Gpu) -> Result<[Option<f64>; 2]> {
    use crate::ops::binary::{Binary, binary};
    use crate::ops::unary::{Unary, unary};
    const ROUNDS: usize = 64;
    const OPS: usize = 64;
    let x = Tensor::zeros(gpu, DType::F32, &[64]);
    let round = || {
        let mut y = x.clone();
        for _ in 0..OPS / 2 {
            y = binary(&unary(&y, Unary::Square), &x, Binary::Add);
        }
    };
    let (_, plan) = gpu.plan(&Arena::new(gpu), round);
    let replay = || plan.iter().for_each(|plan| gpu.replay(plan));
    let mut taken = [None; 2];
    for (taken, round) in taken.iter_mut().zip([&round as &dyn Fn(), &replay]) {
        round();
        gpu.wait()?;
        let before = thread_cpu_seconds();
        (0..ROUNDS).for_each(|_| round());
        gpu.flush();
        let spent = before.zip(thread_cpu_seconds());
        gpu.wait()?;
        *taken = spent.map(|(before, after)| (after - before) * 1e6 / (ROUNDS * OPS) as f64);
    }
    Ok(taken)
}

/// How long something took, over several runs after one that compiles.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Timing {
    /// Wall milliseconds of the run in the middle.
    pub median_ms: f64,
    /// Of the shortest.
    pub best_ms: f64,
    /// Runs.
    pub runs: usize,
    /// The first run, which compiles kernels.
    pub first_ms: f64,
    /// CPU milliseconds of a run, all threads, where the system tells: on a software driver they are the kernel's own,
    /// and a busy machine distorts them less than the clock.
    #[serde(default)]
    pub cpu_ms: Option<f64>,
}

/// Times `run`, waiting for the device after each, for about `seconds`: at least three times, or for ten times as long.
///
/// # Errors
/// Any GPU error.
pub fn time(gpu: &Gpu, seconds: f64, run: &mut dyn FnMut()) -> Result<Timing> {
    let mut once = || -> Result<f64> {
        let start = Instant::now();
        run();
        gpu.wait()?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    };
    let first_ms = once()?;
    let (begin, cpu, mut times) = (Instant::now(), process_cpu_seconds(), Vec::new());
    while again(begin.elapsed().as_secs_f64(), seconds, times.len()) {
        times.push(once()?);
    }
    let spent = cpu.zip(process_cpu_seconds());
    times.sort_by(f64::total_cmp);
    Ok(Timing {
        cpu_ms: spent.map(|(before, after)| (after - before) * 1e3 / times.len() as f64),
        median_ms: times[times.len() / 2],
        best_ms: times[0],
        runs: times.len(),
        first_ms,
    })
}

/// Whether a measurement that has taken `elapsed` seconds for `runs` runs goes on.
fn again(elapsed: f64, seconds: f64, runs: usize) -> bool {
    elapsed < seconds || (runs < 3 && elapsed < 10.0 * seconds)
}

/// Seconds of CPU that this process has used, in steps of ten milliseconds, where the system tells.
fn process_cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    Some(ticks / 100.0)
}

/// Seconds of CPU that this thread has used, where the system tells.
fn thread_cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanos: f64 = stat.split_whitespace().next()?.parse().ok()?;
    Some(nanos * 1e-9)
}
