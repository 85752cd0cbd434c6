//! `data`: looking at a data set before any GPU time is spent.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::Context;
use crate::align::store::TargetStore;
use crate::train::check::{Check, Fault, Report, Spread};
use crate::train::config::{Config, EMBEDDED};
use crate::vlm::Processor;
use crate::{Error, Result, embedded, files};

/// Samples and words of each kind that the table names.
const NAMED: usize = 5;

/// Options of `data`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu data check smolvlm.toml\n  \
    lavender-wgpu data check --data train.json --images pictures")]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands of `data`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Read a data set once and report what a run would meet in it; needs no GPU
    Check(CheckArgs),
}

/// Options of `data check`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu data check smolvlm.toml\n  \
    lavender-wgpu data check --data train.json --images pictures --model SmolVLM-256M-Instruct --targets targets\n  \
    lavender-wgpu data check --data 'dataset_flickr30k.json#train' --images flickr30k-images\n  \
    lavender-wgpu data check --data 'shards/train-{000..031}.tar' --json report.json\n\n\
    The exit code is 1 if something would stop a run.")]
pub struct CheckArgs {
    /// Configuration whose data set, model and targets are checked
    #[arg(
        value_name = "CONFIG.toml",
        required_unless_present = "data",
        conflicts_with_all = ["data", "images", "model", "targets"]
    )]
    pub config: Option<PathBuf>,
    /// Change a key of the configuration; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    pub set: Vec<String>,
    /// Data set: JSON, JSONL, parquet, WebDataset tar, or a folder; `#SPLIT` chooses a split
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Folder that image paths are relative to [default: the data set's]
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// Model whose tokens are counted; its weights are not read
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Target store whose words are compared
    #[arg(long, value_name = "DIR")]
    pub targets: Option<PathBuf>,
    /// Write everything that was found, every sample by its id
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Runs a subcommand of `data`.
///
/// # Errors
/// As the subcommand's.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    match &args.command {
        Command::Check(args) => check(args, context),
    }
}

/// Reads the data set and prints the table.
///
/// # Errors
/// A data set, model or store that cannot be opened; samples that would stop a run.
fn check(args: &CheckArgs, context: &Context) -> Result<()> {
    let mut config = match &args.config {
        Some(path) => Config::load(path, &args.set)?,
        None => Config::default(),
    };
    let mut model = Some(config.model.path.clone());
    if let Some(data) = &args.data {
        config.data.path = data.clone();
        config.data.images = args.images.clone();
        config.data.targets = args.targets.clone();
        model = args.model.clone();
    }
    let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
    if config.data.mixture.is_empty() && config.data.path == Path::new(EMBEDDED) {
        config.data.path = super::train::embedded_scenes(scratch.path())?.1;
    }
    if let Some(model) = model
        .as_mut()
        .filter(|m| m.as_path() == Path::new(EMBEDDED))
    {
        *model = embedded::unpack("student", scratch.path())?;
    }
    let open = |model: PathBuf| Processor::open(model)?.cut_at(config.data.max_tokens);
    let processor = model.map(open).transpose()?;
    let data = config.data.load()?;
    let stores = config.data.stores().into_iter();
    let stores: Vec<Option<TargetStore>> = stores
        .map(|path| path.map(TargetStore::open).transpose())
        .collect::<Result<_>>()?;
    let progress = Mutex::new(context.progress("check", data.samples.len()));
    let report = Check {
        data: &data,
        stores: &stores,
        processor: processor.as_ref(),
        rules: config.word_rules(),
    }
    .run(|sample| {
        context.interrupt.check()?;
        progress
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .step(sample.id.clone());
        Ok(())
    })?;
    drop(progress);
    if let Some(path) = &args.json {
        let text =
            serde_json::to_vec_pretty(&report).map_err(|e| Error::file(path, e.to_string()))?;
        files::write_bytes(path, &text)?;
    }
    table(&report, context)?;
    match report.problems.is_empty() {
        true => Ok(()),
        false => Err(Error::Input(format!(
            "{} would stop a run: {}",
            data.path.display(),
            report.problems.join("; ")
        ))),
    }
}

fn table(report: &Report, context: &Context) -> Result<()> {
    let line = |name: &str, text: String| context.print(format_args!("{name:18} {text}"));
    for share in &report.data {
        let targets = share.targets.map(|count| {
            format!(
                ", {} without targets (store of {count})",
                share.without_targets
            )
        });
        let weight = match report.data.len() {
            1 => String::new(),
            _ => format!(", weight {}", share.weight),
        };
        let text = format!(
            "{}: {} samples{weight}{}",
            share.path.display(),
            share.samples,
            targets.unwrap_or_default()
        );
        line("data set", text)?;
    }
    let answers: Vec<String> = report
        .answers
        .iter()
        .map(|(n, count)| format!("{n}: {count}"))
        .collect();
    line("answers a sample", answers.join(", "))?;
    let spreads = [
        ("image width", report.image_width),
        ("image height", report.image_height),
        ("prompt tokens", report.prompt_tokens),
        ("answer tokens", report.answer_tokens),
        ("all tokens", report.tokens),
    ];
    line(
        "",
        format!("{:>8} {:>8} {:>8} {:>8}", "min", "median", "p95", "max"),
    )?;
    for (name, spread) in spreads {
        if let Some(Spread {
            min,
            median,
            p95,
            max,
        }) = spread
        {
            line(name, format!("{min:8} {median:8} {p95:8} {max:8}"))?;
        }
    }
    match report.context {
        Some(context) => line("context", format!("{context:8}"))?,
        None => line("tokens", "not counted: give --model".into())?,
    }
    if report.data.iter().any(|share| share.targets.is_some()) {
        let share = 100.0 * report.matched_words as f64 / report.words.max(1) as f64;
        line(
            "words",
            format!(
                "{} in samples with targets, {share:.1} % matched",
                report.words
            ),
        )?;
        let listed: Vec<String> = report
            .unmatched
            .iter()
            .take(2 * NAMED)
            .map(|(w, n)| format!("{w} ({n})"))
            .collect();
        some("unmatched", &listed, report.unmatched.len(), context)?;
        some(
            "without targets",
            &report.without_targets,
            report.without_targets.len(),
            context,
        )?;
    }
    let groups: Vec<String> = report
        .duplicates
        .iter()
        .map(|ids| ids.join(" = "))
        .collect();
    some("same content", &groups, groups.len(), context)?;
    faults("bad images", &report.bad_images, context)?;
    faults("too long", &report.too_long, context)?;
    some("cut", &report.cut, report.cut.len(), context)?;
    faults("refused", &report.refused, context)?;
    some(
        "nothing to learn",
        &report.nothing_to_learn,
        report.nothing_to_learn.len(),
        context,
    )
}

/// A count and the first few.
fn some(name: &str, listed: &[String], count: usize, context: &Context) -> Result<()> {
    if count == 0 {
        return Ok(());
    }
    let first: Vec<&str> = listed.iter().take(2 * NAMED).map(String::as_str).collect();
    let more = if count > first.len() { " …" } else { "" };
    context.print(format_args!(
        "{name:18} {count}: {}{more}",
        first.join(", ")
    ))
}

fn faults(name: &str, faults: &[Fault], context: &Context) -> Result<()> {
    for fault in faults.iter().take(NAMED) {
        context.print(format_args!("{name:18} `{}`: {}", fault.id, fault.message))?;
    }
    match faults.len().checked_sub(NAMED) {
        Some(more) if more > 0 => context.print(format_args!(
            "{name:18} and {more} more; --json FILE has all"
        )),
        _ => Ok(()),
    }
}
