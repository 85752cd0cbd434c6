//! `eval`: benchmarks of a vision-language model, and evaluations compared.

use std::path::{Path, PathBuf};

use serde_json::json;

use super::{Context, student};
use crate::eval::compare::{compare, read};
use crate::eval::item::{self, Item, Skipped};
use crate::eval::predictions::{Predictions, missing};
use crate::eval::report::{Report, groups};
use crate::eval::run::{Options, evaluate};
use crate::eval::{Benchmark, compare::Comparison};
use crate::files::{read_text, write_bytes};
use crate::train::config::{EMBEDDED, Quantize};
use crate::{Error, Result};

/// Unusable samples that are printed; all of them are in the JSON.
const SHOWN: usize = 5;

/// Options of `eval`.
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "Examples:\n  \
    lavender-wgpu eval --model mini --data mini\n  \
    lavender-wgpu eval --model SmolVLM-256M-Instruct --lora runs/001 --data test.json --out eval/001\n  \
    lavender-wgpu eval --model SmolVLM-256M-Instruct --data MMBench_DEV_EN.tsv --max-tokens 8 --out eval/mmbench\n  \
    lavender-wgpu eval --model SmolVLM-256M-Instruct --data captions.json --benchmark attention --masks masks\n  \
    lavender-wgpu eval compare eval/autor-0 eval/autor-1 eval/lavender-0 eval/lavender-1\n\n\
    A stopped evaluation with --out goes on where it was when the same command is given again."
)]
pub struct Args {
    /// `compare`
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Model in transformers layout, or `mini`
    #[arg(long, value_name = "DIR", required = true)]
    pub model: Option<PathBuf>,
    /// Run directory or PEFT folder whose LoRA adapter is applied
    #[arg(long, value_name = "DIR")]
    pub lora: Option<PathBuf>,
    /// Data set as in training, VLMEvalKit's TSV, or `mini` (drawn scenes, none of them trained on)
    #[arg(long, required = true)]
    pub data: Option<PathBuf>,
    /// Folder that image paths are relative to [default: the data's]
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// What is measured [default: what fits the data's answers]
    #[arg(long, value_enum, value_name = "NAME")]
    pub benchmark: Option<Benchmark>,
    /// Masks of words, `<id>/<word>.png`, bright inside (attention)
    #[arg(long, value_name = "DIR")]
    pub masks: Option<PathBuf>,
    /// Text added after every question, such as "Answer with one word."
    #[arg(long, value_name = "TEXT")]
    pub instruction: Option<String>,
    /// Only the first N samples
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Samples in one forward (caption, attention)
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub batch: usize,
    /// Most tokens of a reply
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub max_tokens: usize,
    /// Hold the model's linear weights in fewer bits [default: as the run of --lora did, else none]
    #[arg(long, value_enum)]
    pub quantize: Option<Quantize>,
    /// Where predictions and figures are kept [default: nowhere]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Also write the figures here
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// What the run is grouped by in `eval compare` [default: the training run's control, or `lambda=…`]
    #[arg(long, value_name = "TEXT")]
    pub label: Option<String>,
}

/// What can be done beside measuring.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Put evaluations side by side: a row a label, mean ± 95 % interval over seeds
    #[command(after_help = "Examples:\n  \
        lavender-wgpu eval compare eval/*\n  \
        lavender-wgpu eval compare eval/* --baseline lambda=0 --json table.json")]
    Compare {
        /// Directories that `eval --out` wrote, or files that `eval --json` wrote
        #[arg(required = true, value_name = "DIR")]
        runs: Vec<PathBuf>,
        /// Label that differences are taken to [default: lambda=0, if there]
        #[arg(long, value_name = "LABEL")]
        baseline: Option<String>,
        /// Also write the comparison here
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

/// Measures a model on a data set, or compares evaluations; prints a Markdown table.
///
/// # Errors
/// A model, adapter or data that cannot be read, data without a usable sample, GPU errors, Ctrl-C.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    if let Some(Command::Compare {
        runs,
        baseline,
        json,
    }) = &args.command
    {
        let comparison: Comparison = compare(&read(runs)?, baseline.as_deref())?;
        if let Some(path) = json {
            write_json(path, &comparison)?;
        }
        return context.print(comparison.table().trim_end());
    }
    let (Some(model), Some(data)) = (&args.model, &args.data) else {
        return Err(Error::Input("--model and --data are needed".into()));
    };
    for (name, value) in [
        ("--limit", args.limit.unwrap_or(1)),
        ("--batch", args.batch),
        ("--max-tokens", args.max_tokens),
    ] {
        if value == 0 {
            return Err(Error::Input(format!(
                "{name}: 0 found, at least 1 expected"
            )));
        }
    }
    let (items, benchmark, mut skipped) = items(args, data, context)?;
    let settings = json!({
        "model": model,
        "lora": args.lora,
        "data": data,
        "images": args.images,
        "masks": args.masks,
        "benchmark": benchmark,
        "limit": args.limit,
        "max_tokens": args.max_tokens,
        "instruction": args.instruction,
        "quantize": args.quantize,
    });
    let mut predictions = match &args.out {
        Some(dir) => Predictions::open(dir, &settings)?,
        None => Predictions::in_memory(),
    };
    let origin = args.out.as_deref().unwrap_or(data);
    let left = missing(&items, predictions.lines(), origin)?;
    let left: Vec<&Item> = left.into_iter().map(|i| &items[i]).collect();
    if !left.is_empty() {
        let student = student::open(model, args.lora.as_deref(), args.quantize, context)?;
        let mut progress = context.progress("eval", items.len());
        progress.skip(items.len() - left.len());
        let options = Options {
            benchmark,
            max_tokens: args.max_tokens,
            batch: args.batch,
        };
        let mut after = |shown: String| {
            progress.step(shown);
            context.interrupt.check()
        };
        evaluate(
            &student,
            &left,
            options,
            &mut predictions,
            &mut skipped,
            &mut after,
        )
        .inspect_err(|_| {
            let done = predictions.lines().len();
            if args.out.is_some() && done > 0 {
                context.say(format_args!(
                    "{done} of {} predictions are kept; the same command goes on from there",
                    items.len()
                ));
            }
        })?;
    }
    tell_skipped(&skipped, context);
    if predictions.lines().is_empty() {
        return Err(item::none_left(data, &skipped));
    }
    let task = data.file_stem().unwrap_or_default().to_string_lossy();
    predictions.finish(&task, &model.display().to_string())?;
    let (overall, categories) = groups(predictions.lines(), context.seed(0));
    let (label, seed) = trained_as(args.lora.as_deref());
    let report = Report {
        benchmark,
        label: args.label.clone().unwrap_or(label),
        seed,
        settings,
        overall,
        categories,
        skipped,
    };
    if report.overall.figures.is_empty() {
        let message = "no word of its answers has a map, so there is nothing to measure";
        return Err(Error::file(data, message));
    }
    if let Some(dir) = &args.out {
        write_json(&dir.join("figures.json"), &report)?;
        let table = report.table();
        write_bytes(dir.join("figures.md"), table.as_bytes())?;
    }
    if let Some(path) = &args.json {
        write_json(path, &report)?;
    }
    context.print(report.table().trim_end())
}

/// The samples that are measured, by which benchmark, and those that cannot be.
fn items(
    args: &Args,
    data: &Path,
    context: &Context,
) -> Result<(Vec<Item>, Benchmark, Vec<Skipped>)> {
    let drawn = data == Path::new(EMBEDDED);
    let (mut items, mut skipped) = match drawn {
        true => (item::drawn(args.benchmark)?, Vec::new()),
        false => item::load(data, args.images.as_deref())?,
    };
    // Rows without an answer (a hidden test split) say nothing about the benchmark.
    let answered = |item: &Item| !item.answers.is_empty();
    let benchmark = match args.benchmark {
        Some(benchmark) => benchmark,
        None => {
            let kept: Vec<Item> = items.iter().filter(|i| answered(i)).cloned().collect();
            let (benchmark, why) = Benchmark::fitting(&kept);
            context.say(format_args!(
                "benchmark {}: {why}; choose another with --benchmark",
                benchmark.name()
            ));
            benchmark
        }
    };
    items.retain(|item| match benchmark.unusable(item) {
        Some(reason) => {
            skipped.push(Skipped {
                index: item.index.clone(),
                reason,
            });
            false
        }
        None => true,
    });
    items.truncate(args.limit.unwrap_or(usize::MAX));
    if items.is_empty() {
        return Err(item::none_left(data, &skipped));
    }
    for item in &mut items {
        if let Some(text) = &args.instruction {
            item.instruct(text);
        }
        if let (Some(masks), Benchmark::Attention) = (&args.masks, benchmark) {
            item.read_regions(masks)?;
        }
    }
    let regions = items.iter().any(|item| !item.regions.is_empty());
    if let (Some(masks), Benchmark::Attention, false) = (&args.masks, benchmark, regions) {
        let first = &items[0].index;
        let message = format!("holds no mask of any sample; expected such as `{first}/<word>.png`");
        return Err(Error::file(masks, message));
    }
    Ok((items, benchmark, skipped))
}

fn tell_skipped(skipped: &[Skipped], context: &Context) {
    if skipped.is_empty() {
        return;
    }
    context.say(format_args!(
        "{} samples cannot be used and are left out:",
        skipped.len()
    ));
    for one in skipped.iter().take(SHOWN) {
        context.say(format_args!("  `{}`: {}", one.index, one.reason));
    }
    if skipped.len() > SHOWN {
        context.say(format_args!(
            "  … and {} more, all in the JSON",
            skipped.len() - SHOWN
        ));
    }
}

/// Label and seed of the run that trained an adapter: the control that it is, else its λ.
fn trained_as(lora: Option<&Path>) -> (String, Option<u64>) {
    let Some(lora) = lora else {
        return ("base".into(), None);
    };
    let beside = lora.parent().unwrap_or(Path::new(""));
    let files = [lora.join("config.toml"), beside.join("config.toml")];
    let texts = files.iter().find_map(|file| read_text(file).ok());
    let config = texts.and_then(|text| toml::from_str::<toml::Table>(&text).ok());
    let Some(config) = config else {
        return (lora.display().to_string(), None);
    };
    let find = |table: &str, key: &str| config.get(table)?.as_table()?.get(key);
    let targets = find("control", "targets").and_then(toml::Value::as_str);
    let alone = find("control", "aligner_only").and_then(toml::Value::as_bool);
    let control = match (targets, alone) {
        (_, Some(true)) => Some("aligner only".to_owned()),
        (Some(targets), _) if targets != "own" => Some(targets.to_owned()),
        _ => None,
    };
    let lambda = find("loss", "lambda").and_then(|v| v.as_float().or(Some(v.as_integer()? as f64)));
    let label = control.or_else(|| Some(format!("lambda={}", lambda?)));
    let seed = find("train", "seed").and_then(toml::Value::as_integer);
    (
        label.unwrap_or_else(|| lora.display().to_string()),
        seed.map(|seed| seed as u64),
    )
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|e| Error::file(path, e.to_string()))?;
    write_bytes(path, &text)
}
