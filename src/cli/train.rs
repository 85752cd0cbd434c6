//! `train`: fine-tunes a vision-language model towards its targets.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::tui::{self, Dashboard, Screen};
use super::{Context, Progress, targets};
use crate::data::drawn::write as scenes_on_disk;
use crate::data::scenes::{Scene, SceneSet, Split};
use crate::eval::drawn::{Figures, figures};
use crate::gpu::Gpu;
use crate::train::checkpoint::Checkpoint;
use crate::train::config::Mode;
use crate::train::config::{Config, EMBEDDED};
use crate::train::metrics::{self, EvalMetrics, StepMetrics};
use crate::train::recipe::{Observer, Training};
use crate::train::record::{HeldOut, Record};
use crate::train::report::RunReport;
use crate::train::rundir::RunDir;
use crate::{Result, embedded, files};

mod dry_run;

/// Seed of the embedded data set; the mini models were trained on scenes of others.
const SCENES_SEED: u64 = 20;
/// Scenes of the embedded training set.
const TRAIN_SCENES: usize = 96;
/// Questions of each that are trained on.
const QUESTIONS: usize = 2;
/// Steps of the teacher's trajectory there.
const TEACHER_STEPS: usize = 4;
/// Held-out scenes that the embedded run is measured on.
const TEST_SCENES: usize = 48;

/// Steps after the first whose time tells how long the run will take.
const TIMED_STEPS: u64 = 3;

/// Options of `train`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu train                                  the embedded mini models and data\n  \
    lavender-wgpu train smolvlm.toml\n  \
    lavender-wgpu train smolvlm.toml --set loss.lambda=0 --set run.dir=runs/autor    the autoregressive baseline\n  \
    lavender-wgpu train smolvlm.toml --tui               with live curves\n  \
    lavender-wgpu train smolvlm.toml --dry-run           what it would train, take and need; nothing is loaded\n  \
    lavender-wgpu train --resume runs/autor              goes on from the last whole checkpoint\n  \
    lavender-wgpu train --resume runs/autor --set train.steps=2000    and further than it was to go")]
pub struct Args {
    /// Configuration; without one, the embedded mini models and data
    #[arg(value_name = "CONFIG.toml")]
    pub config: Option<PathBuf>,
    /// Change a key of the configuration; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Go on with a stopped run, by its own configuration unless another is given; length, checkpoints and evaluation
    /// may change
    #[arg(long, value_name = "RUN_DIR")]
    pub resume: Option<PathBuf>,
    /// Draw live curves in the terminal; `q` stops the run after its step
    #[arg(long)]
    pub tui: bool,
    /// Print what would be trained, memory by part, compute and what is missing, by the configuration alone: neither
    /// weights, data nor an adapter are needed, and no run is made
    #[arg(long, conflicts_with_all = ["resume", "tui"])]
    pub dry_run: bool,
}

/// Trains, or goes on training, and writes the run directory.
///
/// # Errors
/// Anything wrong with the configuration or its files, GPU faults, a loss that is not finite, Ctrl-C.
/// Whole checkpoints stay and `--resume` goes on from the last.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    if args.tui {
        tui::check()?;
    }
    let (run, config, from) = match &args.resume {
        Some(dir) => resumed(dir, args, context)?,
        None => {
            let config = match &args.config {
                Some(path) => Config::load(path, &args.set)?,
                None => Config::parse(
                    embedded::text("train.toml")?,
                    "the embedded configuration",
                    &args.set,
                )?,
            };
            let config = overridden(config, context);
            if args.dry_run {
                return dry_run::run(config, context);
            }
            let run = RunDir::create(&config)?;
            (run, config, None)
        }
    };
    let gpu = context.gpu()?;
    context.say(format_args!("run directory {}", run.root().display()));
    let drawn = is_drawn(&config);
    let config = with_files(config, &run, context)?;
    let mut training = Training::new(gpu, &config)?;
    context.say(training.estimate);
    if let Some(advice) = training.estimate.advice() {
        context.say(format_args!(
            "that may not fit: {advice}; where memory runs out, a step goes on with smaller batches"
        ));
    }
    let test: Vec<Scene> = match drawn {
        true => SceneSet::new(SCENES_SEED, Split::HeldOut, TEST_SCENES)
            .iter()
            .collect(),
        false => Vec::new(),
    };
    // Before the weights of a checkpoint are put back, a resumed run stands where it once began.
    let before = measure(gpu, &training, &test, "before", context)?;
    training.keep_maps(gpu)?;
    if let Some(from) = &from {
        training.restore(from)?;
        context.say(format_args!("going on at step {}", from.step));
    }
    let mut record = Record::read(&run)?.unwrap_or_default();
    record.total_steps = training.total_steps();
    record.samples = training.data().samples.len() as u64;
    record.held_out = before.map(|before| HeldOut {
        scenes: test.len() as u64,
        before,
        after: None,
    });
    let mut observer = observer(args, context, gpu, &training, &run)?;
    record.begin(gpu.tier(), training.steps_done());
    record.write(&run)?;
    let started = Instant::now();
    let result = training.run(gpu, &run, observer.as_mut());
    drop(observer);
    record.end(
        training.steps_done(),
        started.elapsed().as_secs_f64(),
        &result,
    );
    let report = leave(&run, &record);
    if result.is_err() && report.is_ok() {
        context.say(format_args!("report: {}", run.report().display()));
    }
    result?;
    report?;
    if let (Some(before), Some(after)) = (before, measure(gpu, &training, &test, "after", context)?)
    {
        if let Some(held_out) = &mut record.held_out {
            held_out.after = Some(after);
        }
        leave(&run, &record)?;
        table(context, before, after)?;
    }
    context.print(format_args!(
        "{}, aligner {}, maps {}, report {}",
        match config.train.mode {
            Mode::Lora => format!("LoRA adapter {}", run.lora().display()),
            Mode::Full => format!("model {}", run.model().display()),
        },
        run.aligner().display(),
        run.maps().display(),
        run.report().display()
    ))
}

/// Writes the record of a run and its page.
fn leave(run: &RunDir, record: &Record) -> Result<()> {
    record.write(run)?;
    let page = RunReport::read(run.root())?.html()?;
    files::write_bytes(run.report(), page.as_bytes())
}

/// Who is told of the steps: a progress bar, or a screen of curves.
fn observer<'a>(
    args: &Args,
    context: &'a Context,
    gpu: &Gpu,
    training: &Training,
    run: &RunDir,
) -> Result<Box<dyn Observer + 'a>> {
    let (done, total) = (training.steps_done(), training.total_steps());
    if !args.tui {
        let progress = context.progress("train", total as usize);
        progress.skip(done as usize);
        return Ok(Box::new(Watch {
            done: 0,
            spent_ms: 0.0,
            progress,
            context,
        }));
    }
    // Later lines are of steps that are done again.
    let (mut steps, mut evaluations) = (Vec::new(), Vec::new());
    if done > 0 {
        steps = metrics::read(run.metrics())?;
        steps.retain(|m| m.step < done);
        evaluations = metrics::read_lines(run.evaluations())?;
        evaluations.retain(|m: &EvalMetrics| m.step <= done);
    }
    let title = format!("{} on {}", run.root().display(), gpu.tier().name);
    let dashboard = Dashboard::new(title, total, steps, evaluations);
    Ok(Box::new(Screen::open(dashboard, context)?))
}

/// The run in `dir` with its last checkpoint, and its configuration changed as the arguments say.
fn resumed(
    dir: &Path,
    args: &Args,
    context: &Context,
) -> Result<(RunDir, Config, Option<Checkpoint>)> {
    let (run, before, from) = RunDir::open(dir)?;
    let after = match &args.config {
        Some(path) => overridden(Config::load(path, &args.set)?, context),
        None => before.clone().with(&args.set)?,
    };
    let done = from.as_ref().map_or(0, |from| from.step);
    let (config, differences) = before.resumed(&after, done)?;
    for difference in &differences {
        context.say(format_args!("going on with {difference}"));
    }
    if !differences.is_empty() {
        run.rewrite(&config)?;
    }
    Ok((run, config, from))
}

/// `--precision` and `--seed` win over the configuration.
fn overridden(mut config: Config, context: &Context) -> Config {
    config.train.seed = context.seed(config.train.seed);
    config.train.precision = context.common.precision.unwrap_or(config.train.precision);
    config
}

/// The configuration with the files that it stands for: embedded models unpacked, scenes drawn,
/// targets made where a diffusion model is named and no store.
fn with_files(mut config: Config, run: &RunDir, context: &Context) -> Result<Config> {
    let models = run.root().join("models");
    if config.model.path == Path::new(EMBEDDED) {
        config.model.path = embedded::unpack("student", &models)?;
    }
    let mut captions = config.data.path.clone();
    let drawn = is_drawn(&config);
    if drawn {
        (captions, config.data.path) = embedded_scenes(&run.root().join("data"))?;
    }
    if let Some(diffusion) = &config.data.diffusion {
        let diffusion = match diffusion == Path::new(EMBEDDED) {
            true => embedded::unpack("teacher", &models)?,
            false => diffusion.clone(),
        };
        let out = run.root().join("targets");
        let make = |data, images: &Option<PathBuf>, out: PathBuf| {
            let args = targets::Args {
                steps: drawn.then_some(TEACHER_STEPS),
                ..targets::Args::new(diffusion.clone(), data, images.clone(), out.clone())
                    .with_case(config.words.case)
            };
            targets::run(&args, context).map(|()| Some(out))
        };
        if config.data.mixture.is_empty() && config.data.targets.is_none() {
            config.data.targets = make(captions, &config.data.images, out)?;
        } else {
            for (number, part) in config.data.mixture.iter_mut().enumerate() {
                if part.targets.is_none() {
                    let out = out.join(number.to_string());
                    part.targets = make(part.path.clone(), &part.images, out)?;
                }
            }
        }
    }
    Ok(config)
}

/// The embedded training set, drawn into `dir`: its captions, and those with questions.
///
/// # Errors
/// Files that cannot be written.
pub(super) fn embedded_scenes(dir: &Path) -> Result<(PathBuf, PathBuf)> {
    let scenes = SceneSet::new(SCENES_SEED, Split::Train, TRAIN_SCENES);
    scenes_on_disk(dir, scenes, QUESTIONS)
}

/// Whether the data set is the embedded one.
fn is_drawn(config: &Config) -> bool {
    config.data.mixture.is_empty() && config.data.path == Path::new(EMBEDDED)
}

fn measure(
    gpu: &Gpu,
    training: &Training,
    scenes: &[Scene],
    when: &str,
    context: &Context,
) -> Result<Option<Figures>> {
    if scenes.is_empty() {
        return Ok(None);
    }
    let mut progress = context.progress(&format!("measure {when}"), scenes.len());
    figures(gpu, &training.objective.student, scenes, || {
        progress.step("")
    })
    .map(Some)
}

fn table(context: &Context, before: Figures, after: Figures) -> Result<()> {
    context.print(format_args!(
        "{TEST_SCENES} held-out scenes      before    after"
    ))?;
    let rows = [
        (
            "answer loss (nats/token)",
            before.answer_loss,
            after.answer_loss,
        ),
        (
            "answer accuracy",
            before.answer_accuracy,
            after.answer_accuracy,
        ),
        (
            "attention entropy (nats)",
            before.attention_entropy,
            after.attention_entropy,
        ),
        ("pointing game", before.pointing, after.pointing),
    ];
    for (name, before, after) in rows {
        context.print(format_args!("{name:24} {before:9.3} {after:8.3}"))?;
    }
    context.print(format_args!(
        "{:24} {:9.3}",
        "pointing by chance", before.chance
    ))
}

/// Progress of a run, and Ctrl-C.
struct Watch<'a> {
    /// Steps since the start, and their time.
    done: u64,
    spent_ms: f64,
    progress: Progress,
    context: &'a Context,
}

impl Observer for Watch<'_> {
    fn step(&mut self, m: &StepMetrics, total: u64) {
        // The first step compiles kernels.
        self.spent_ms += if self.done > 0 { m.step_ms } else { 0.0 };
        self.done += 1;
        if self.done == TIMED_STEPS + 1 {
            let step = self.spent_ms / TIMED_STEPS as f64;
            let left = total.saturating_sub(m.step + 1) as f64 * step * 1e-3;
            let peak = m.peak_bytes >> 20;
            self.progress.say(format_args!(
                "{step:.0} ms a step, {left:.0} s for the rest; {peak} MiB of GPU memory at the most"
            ));
        }
        self.progress.step(format!(
            "loss {:.4} lm {:.4} attention {:.4} {:.0} tokens/s {} MiB",
            m.loss,
            m.lm_loss,
            m.attn_loss,
            m.tokens as f64 / (m.step_ms * 1e-3).max(1e-6),
            m.peak_bytes >> 20
        ));
    }

    fn evaluated(&mut self, m: &EvalMetrics) {
        let best = if m.best { ", the best so far" } else { "" };
        self.progress.say(format_args!(
            "evaluation after {} steps: loss {:.4} lm {:.4} attention {:.4}{best}",
            m.step, m.loss, m.lm_loss, m.attn_loss
        ));
    }

    fn note(&mut self, message: &str) {
        self.progress.say(message);
    }

    fn interrupted(&self) -> bool {
        self.context.interrupt.requested()
    }
}
