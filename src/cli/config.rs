//! `config`: writing and checking configurations.

use std::path::PathBuf;

use super::Context;
use crate::train::config::Config;
use crate::{Error, Result, files};

/// Options of `config`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu config init --out run.toml\n  \
    lavender-wgpu config check run.toml --set train.batch=2")]
pub struct Args {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands of `config`.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Write a configuration with every key, its documentation and its default
    Init(InitArgs),
    /// Read a configuration and print it with all defaults, or say what is wrong with it
    Check(CheckArgs),
}

/// Options of `config init`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu config init                            to standard output\n  \
    lavender-wgpu config init --out run.toml --model SmolVLM-256M-Instruct --data train.json --images pictures \\\n    \
    --targets targets --set train.precision=f16")]
pub struct InitArgs {
    /// File to write [default: standard output]
    #[arg(long, value_name = "FILE.toml")]
    pub out: Option<PathBuf>,
    /// Write over a file that is there
    #[arg(long, requires = "out")]
    pub force: bool,
    /// Model directory: model.path
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Data set: data.path
    #[arg(long, value_name = "PATH")]
    pub data: Option<PathBuf>,
    /// Folder that image paths are relative to: data.images
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// Target store: data.targets
    #[arg(long, value_name = "DIR")]
    pub targets: Option<PathBuf>,
    /// Another key's value; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// Options of `config check`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu config check run.toml\n  \
    lavender-wgpu config check run.toml --set loss.lambda=0 > autor.toml\n\n\
    `train --dry-run` looks at the model and the data as well.")]
pub struct CheckArgs {
    /// Configuration to read
    #[arg(value_name = "CONFIG.toml")]
    pub config: PathBuf,
    /// Change a key of the configuration; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// Runs a subcommand of `config`.
///
/// # Errors
/// A bad key or value; a file that is there already, or cannot be read or written.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    match &args.command {
        Command::Init(args) => init(args, context),
        Command::Check(args) => {
            let config = Config::load(&args.config, &args.set)?;
            context.print(config.to_toml()?.trim_end())
        }
    }
}

fn init(args: &InitArgs, context: &Context) -> Result<()> {
    let mut config = Config::default().with(&args.set)?;
    if let Some(model) = &args.model {
        config.model.path.clone_from(model);
    }
    if let Some(data) = &args.data {
        config.data.path.clone_from(data);
    }
    config.data.images = args.images.clone().or(config.data.images);
    config.data.targets = args.targets.clone().or(config.data.targets);
    let text = config.commented()?;
    // What is written has to be read again: a path that is no UTF-8, a mixture beside a path.
    let name = args
        .out
        .clone()
        .unwrap_or_else(|| "the new configuration".into());
    Config::parse(&text, &name, &[])?;
    let Some(out) = &args.out else {
        return context.print(text.trim_end());
    };
    if out.exists() && !args.force {
        return Err(Error::file(
            out,
            "is there already; use --force to write over it, or another --out",
        ));
    }
    files::write_bytes(out, text.as_bytes())?;
    context.say(format_args!("wrote {}", out.display()));
    Ok(())
}
