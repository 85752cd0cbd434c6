//! `train --dry-run`: what a run would be, from configurations alone.

use std::path::Path;
use std::time::Instant;

use super::{embedded_scenes, is_drawn};
use crate::cli::Context;
use crate::gpu::Gpu;
use crate::ops::matmul::{MatmulOptions, matmul};
use crate::tensor::{DType, Tensor};
use crate::train::config::{Config, EMBEDDED, Precision};
use crate::train::plan::Plan;
use crate::{Error, Result, embedded};

/// Rows, columns and depth of the products that the adapter's rate is measured by.
const SIDE: usize = 1024;
/// Seconds that are measured at least.
const MEASURED: f64 = 0.1;

/// Prints the plan of `config`; a GPU adapter, weights and data are looked at where they are there.
///
/// # Errors
/// As [`Plan::new`]'s; an adapter that `--adapter` names and there is not; weights that do not fit the memory.
pub(super) fn run(mut config: Config, context: &Context) -> Result<()> {
    let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    let (model, drawn) = (config.model.path == Path::new(EMBEDDED), is_drawn(&config));
    if model {
        config.model.path = embedded::unpack("student", scratch.path())?;
    }
    if drawn {
        config.data.path = embedded_scenes(scratch.path())?.1;
    }
    let gpu = match context.gpu() {
        Err(Error::NoAdapter(_)) if context.common.adapter.is_none() => None,
        other => Some(other?),
    };
    let dtype = match (gpu, config.train.precision) {
        (Some(gpu), precision) => precision.dtype(gpu.tier())?,
        (None, Precision::F32) => DType::F32,
        (None, Precision::F16) => DType::F16,
    };
    let limit = context.common.max_memory.map(|limit| limit.0);
    let mut plan = Plan::new(&config, dtype, gpu.map_or(limit, Gpu::room))?;
    let embedded = "embedded".to_owned();
    if model {
        plan.model.clone_from(&embedded);
    }
    if drawn {
        plan.data = embedded;
    }
    context.print(plan.to_string().trim_end())?;
    let rate = gpu.map(|gpu| rate(gpu, dtype));
    match rate {
        Some(Ok(rate)) => {
            let step = plan.operations as f64 / rate;
            let all = plan.steps.1.map(|steps| step * steps as f64);
            let all = all.map_or(String::new(), |all| format!(", {} in all", duration(all)));
            context.print(format_args!(
                "time           about {} a step{all}, at the {:.0} GFLOP/s that this adapter just multiplied matrices at; \
                 not measured in training",
                duration(step),
                rate * 1e-9
            ))?;
        }
        Some(Err(error)) => context.print(format_args!("time           not measured: {error}"))?,
        None => context.print("time           not measured: there is no GPU adapter")?,
    }
    if let Some(advice) = plan.estimate.advice() {
        context.print(format_args!("advice         it does not fit; {advice}"))?;
    }
    plan.estimate.check()
}

/// Seconds as a person reads them.
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.2} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}

/// Floating-point operations a second of square matrix products.
fn rate(gpu: &Gpu, dtype: DType) -> Result<f64> {
    let a = Tensor::zeros(gpu, dtype, &[SIDE, SIDE]);
    // The first compiles the kernel; then as many at once as take long enough to be measured.
    for count in [1, 4, 16, 64, 256, 1024, 4096] {
        let started = Instant::now();
        for _ in 0..count {
            matmul(&a, &a, &MatmulOptions::default());
        }
        gpu.wait()?;
        let seconds = started.elapsed().as_secs_f64();
        if seconds > MEASURED && count > 1 {
            return Ok(2.0 * (SIDE as f64).powi(3) * f64::from(count) / seconds);
        }
    }
    Err(Error::Gpu("too fast to be measured".into()))
}
