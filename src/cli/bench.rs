//! `bench`: how fast this adapter is, and machines compared.

use std::fmt::Display;
use std::path::PathBuf;

use super::Context;
use crate::Result;
use crate::bench::{Report, compare, kernels, plot, training, tune, unet};
use crate::error::Error;
use crate::files::write_bytes;
use crate::gpu::{Gpu, GpuOptions, Tuning};
use crate::ops::matmul;
use crate::tensor::DType;
use crate::train::config::Precision;

/// Options of `bench`.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  \
    lavender-wgpu bench --json here.json               kernels, U-Net and training steps\n  \
    lavender-wgpu bench kernels --filter matmul\n  \
    lavender-wgpu bench unet --side 32 --precision f16\n  \
    lavender-wgpu bench --tune                         find the fastest kernels here, for later runs\n  \
    lavender-wgpu bench compare laptop.json desktop.json --plot both.svg\n\n\
    Weights and data are random: nothing is downloaded. `unet` holds 3.4 GiB in f32, 1.7 GiB in f16."
)]
pub struct Args {
    /// `compare`
    #[command(subcommand)]
    pub command: Option<Command>,
    /// What is measured [default: everything]
    #[arg(value_enum)]
    pub what: Option<What>,
    /// Only kernels and training steps whose name has this in it; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub filter: Vec<String>,
    /// Seconds that each kernel and each setting is repeated for
    #[arg(long, value_name = "S", default_value_t = 0.5)]
    pub seconds: f64,
    /// Sides of the U-Net's latents
    #[arg(long, value_name = "N", default_values_t = [64, 32])]
    pub side: Vec<usize>,
    /// Samples in one pass of the U-Net
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch: usize,
    /// Measure which kernels are fastest on this adapter and keep that for later runs; nothing else is measured.
    ///
    /// Later runs add in another order where another kernel is chosen: their numbers differ in the last places.
    #[arg(long, conflicts_with_all = ["what", "json"])]
    pub tune: bool,
    /// Also write the figures here
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl Args {
    /// Whether the filter leaves what is called `name`.
    fn names(&self, name: &str) -> bool {
        self.filter.is_empty() || self.filter.iter().any(|text| name.contains(text))
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum What {
    /// Each op at the shapes that the models have
    Kernels,
    /// Stable Diffusion v1.4's U-Net at its true size
    Unet,
    /// Training steps at the shapes of SmolLM2-135M and SmolVLM-256M
    Train,
}

/// What can be done beside measuring.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Put reports of `--json` side by side
    Compare {
        /// Reports; ratios are to the first
        #[arg(required = true, value_name = "FILE.json")]
        reports: Vec<PathBuf>,
        /// Also draw each kernel's share of its adapter's peak
        #[arg(long, value_name = "FILE.svg")]
        plot: Option<PathBuf>,
    },
}

/// Measures, prints as it goes, and writes the report.
///
/// # Errors
/// Wrong arguments, GPU errors, files that cannot be read or written, Ctrl-C.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    if let Some(Command::Compare { reports, plot }) = &args.command {
        return side_by_side(reports, plot.as_ref(), context);
    }
    if !(args.seconds > 0.0 && args.seconds.is_finite()) {
        return Err(Error::Input(format!(
            "--seconds {}: expected a positive number",
            args.seconds
        )));
    }
    if let Some(side) = args.side.iter().find(|&&s| s == 0 || s % 8 != 0) {
        return Err(Error::Input(format!(
            "--side {side}: expected a multiple of 8, such as 64"
        )));
    }
    if args.batch == 0 {
        return Err(Error::Input("--batch 0: expected at least 1".into()));
    }
    if args.tune {
        return measure_choices(args, context);
    }
    let gpu = context.gpu()?;
    let mut report = Report::new(gpu)?;
    let encoding = report.peak.record_us.zip(report.peak.replay_us);
    context.print(format_args!(
        "at best: multiply-adds {:.1} GFLOP/s, copies {:.1} GB/s{}",
        report.peak.gflops,
        report.peak.gbs,
        encoding.map_or(String::new(), |(record, replay)| format!(
            "; a dispatch takes {record:.1} µs of CPU, replayed {replay:.1}"
        ))
    ))?;
    let wanted = |what: What| args.what.is_none_or(|given| given == what);
    if wanted(What::Kernels) {
        time_kernels(args, gpu, &mut report, context)?;
    }
    if wanted(What::Unet) {
        let precision = context.common.precision.unwrap_or_default();
        report.unet = time_unet(args, gpu, precision.dtype(gpu.tier())?, context)?;
    }
    if wanted(What::Train) {
        time_training(args, gpu, &mut report, context)?;
    }
    match &args.json {
        Some(path) => {
            let text = serde_json::to_string_pretty(&report)
                .map_err(|e| Error::file(path, e.to_string()))?;
            write_bytes(path, text.as_bytes())
        }
        None => Ok(()),
    }
}

/// Ops beside products that are done in the fastest of a few ways.
const OTHERS: [&str; 2] = ["conv2d", "attention"];

fn measure_choices(args: &Args, context: &Context) -> Result<()> {
    let gpu = Gpu::new(&GpuOptions {
        tuning: Tuning::FirstUse,
        ..context.gpu_options()
    })?;
    context.say(gpu.tier());
    let mut shapes = tune::shapes(&gpu);
    let example = shapes.first().map(ToString::to_string).unwrap_or_default();
    shapes.retain(|shape| args.names(&shape.to_string()));
    let mut cases = kernels::cases(gpu.tier());
    let other = |name: &str| OTHERS.iter().any(|op| name.starts_with(op));
    cases.retain(|case| other(&case.name) && args.names(&case.name));
    if shapes.is_empty() && cases.is_empty() {
        return Err(Error::Input(format!(
            "--filter {}: no product is written so; one is `{example}`",
            args.filter.join(" ")
        )));
    }
    let mut progress = context.progress("measuring", shapes.len() + cases.len());
    let (mut lines, mut stopped) = (Vec::new(), Ok(()));
    for shape in &shapes {
        stopped = context.interrupt.check();
        if stopped.is_err() {
            break;
        }
        let tuned = matmul::tune(&gpu, shape)?;
        progress.step(format!("{shape}: {}", tuned.choice));
        gpu.set_tuned(&shape.class(), tuned.clone());
        lines.push(tuned);
    }
    // These are measured where they are met.
    for op in OTHERS.iter().filter(|_| stopped.is_ok()) {
        if cases.iter().any(|case| case.name.starts_with(op)) {
            gpu.forget_tuned(op);
        }
    }
    for case in &cases {
        stopped = stopped.and_then(|()| context.interrupt.check());
        if stopped.is_err() {
            break;
        }
        case.once(&gpu)?;
        progress.step(case.name.clone());
    }
    lines.extend(OTHERS.iter().flat_map(|op| gpu.tuned_of(op)));
    drop(progress);
    let path = gpu.save_tuning()?;
    heading(context, "op", "ms", "usual ms    gain  choice")?;
    for tuned in lines {
        context.print(format_args!(
            "{:60} {:9.3} {:10.3} {:6.2}×  {}",
            tuned.shape,
            tuned.millis,
            tuned.usual_millis,
            tuned.usual_millis / tuned.millis,
            tuned.choice
        ))?;
    }
    match path {
        Some(path) => context.say(format_args!("kept in {}", path.display())),
        None => context.say("kept nowhere: this system names no cache folder"),
    }
    stopped
}

fn time_kernels(args: &Args, gpu: &Gpu, report: &mut Report, context: &Context) -> Result<()> {
    let mut cases = kernels::cases(gpu.tier());
    cases.retain(|case| args.names(&case.name));
    // What is filtered may also be a training step.
    if cases.is_empty() && args.what.is_some() {
        return Err(Error::Input(format!(
            "--filter {}: no kernel has that in its name; `bench kernels` lists them",
            args.filter.join(" ")
        )));
    }
    heading(context, "kernel", "ms", "GFLOP/s    GB/s  of peak")?;
    for case in cases {
        context.interrupt.check()?;
        let timed = case.run(gpu, &report.peak, args.seconds)?;
        // A software driver's kernels run on the CPU: its time tells their rate on a busy machine too.
        let by_cpu = timed.timing.cpu_ms.filter(|&ms| gpu.tier().cpu && ms > 0.0);
        let by_cpu = by_cpu.map(|ms| {
            let scale = timed.timing.median_ms / ms * report.cores as f64;
            let (gflops, gbs) = (timed.gflops * scale, timed.gbs * scale);
            format!("  by CPU time {gflops:.1} GFLOP/s, {gbs:.1} GB/s")
        });
        context.print(format_args!(
            "{:60} {:9.3} {:9.1} {:7.1} {:7.0} %{}",
            timed.name,
            timed.timing.median_ms,
            timed.gflops,
            timed.gbs,
            100.0 * timed.share,
            by_cpu.unwrap_or_default()
        ))?;
        report.kernels.push(timed);
    }
    Ok(())
}

fn time_unet(
    args: &Args,
    gpu: &Gpu,
    dtype: DType,
    context: &Context,
) -> Result<Vec<unet::UnetTime>> {
    heading(
        context,
        "U-Net of Stable Diffusion v1.4",
        "ms",
        "GFLOP/s  peak MiB",
    )?;
    let mut printed = Ok(());
    let times = unet::run(gpu, dtype, &args.side, args.batch, args.seconds, |timed| {
        let gflops = timed.gflops().map_or("–".into(), |g| format!("{g:.1}"));
        let line = context.print(format_args!(
            "{:60} {:9.1} {gflops:>9} {:9}",
            format!(
                "{}² latents, batch {}, {}{}",
                timed.side,
                timed.batch,
                timed.dtype,
                if timed.capture { ", with capture" } else { "" }
            ),
            timed.timing.median_ms,
            timed.peak_bytes >> 20
        ));
        if printed.is_ok() {
            printed = line;
        }
    })?;
    printed.map(|()| times)
}

fn time_training(args: &Args, gpu: &Gpu, report: &mut Report, context: &Context) -> Result<()> {
    let dtype = match context.common.precision {
        Some(Precision::F16) => Precision::F16.dtype(gpu.tier())?,
        _ => DType::F32,
    };
    heading(
        context,
        "training step",
        "ms",
        "tokens/s  peak MiB  dispatches  replayed  CPU µs each  outside kernels",
    )?;
    let all = training::Setting::ALL.into_iter();
    for setting in all.filter(|setting| args.names(setting.name())) {
        context.interrupt.check()?;
        let timed = training::run(gpu, &context.gpu_options(), setting, dtype, args.seconds)?;
        let each = timed
            .recording_ms
            .map(|ms| 1e3 * ms / timed.dispatches as f64);
        context.print(format_args!(
            "{:60} {:9.1} {:9.1} {:9} {:11} {:9} {:>12} {:>16}",
            format!("{}, {} tokens", setting.name(), timed.tokens),
            timed.timing.median_ms,
            timed.tokens_per_second,
            timed.peak_bytes >> 20,
            timed.dispatches,
            timed.replayed,
            or_dash(each.map(|us| format!("{us:.1}"))),
            or_dash(timed.outside.map(|part| format!("{:.1} %", 100.0 * part)))
        ))?;
        report.training.push(timed);
    }
    let step = |wanted| report.training.iter().find(|s| s.setting == wanted);
    let ratio = step(training::Setting::Lavender)
        .zip(step(training::Setting::Lora))
        .map(|(guided, plain)| (guided.timing, plain.timing));
    let Some((guided, plain)) = ratio else {
        return Ok(());
    };
    let by_cpu = match (guided.cpu_ms, plain.cpu_ms, gpu.tier().cpu) {
        (Some(guided), Some(plain), true) => format!(" ({:.3} by CPU time)", guided / plain),
        _ => String::new(),
    };
    context.print(format_args!(
        "a guided step takes {:.3} times one of λ = 0{by_cpu}",
        guided.median_ms / plain.median_ms
    ))
}

fn heading(context: &Context, name: &str, time: &str, rest: &str) -> Result<()> {
    context.print(format_args!("\n{name:60} {time:>9}   {rest}"))
}

fn or_dash(text: Option<impl Display>) -> String {
    text.map_or("–".into(), |t| t.to_string())
}

fn side_by_side(paths: &[PathBuf], plot: Option<&PathBuf>, context: &Context) -> Result<()> {
    let reports: Vec<Report> = paths
        .iter()
        .map(|p| Report::read(p))
        .collect::<Result<_>>()?;
    let name = |path: &PathBuf| {
        let stem = path.file_stem().unwrap_or(path.as_os_str());
        stem.to_string_lossy().chars().take(20).collect()
    };
    let names: Vec<String> = paths.iter().map(name).collect();
    context.print(compare::table(&reports, &names).trim_end())?;
    match plot {
        Some(path) => plot::save_svg(path, &reports, &names),
        None => Ok(()),
    }
}
