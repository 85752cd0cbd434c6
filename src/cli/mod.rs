//! The command line: one file per subcommand.
//!
//! A subcommand is an argument struct and `run(&Args, &Context) -> Result<()>`. What goes wrong is printed as one
//! `error: …` line; exit codes are 0, 1 (an error), 2 (wrong usage) and 130 (stopped by Ctrl-C).

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::{Error, Result};

mod context;
mod student;

pub mod ask;
pub mod attention;
pub mod bench;
pub mod config;
pub mod data;
pub mod devices;
pub mod eval;
pub mod generate;
pub mod merge;
pub mod pretrain;
pub mod report;
pub mod targets;
pub mod train;
pub mod tui;

pub use context::{Common, Context, Interrupt, Progress};

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "lavender-wgpu",
    version,
    about = "Diffusion Instruction Tuning: fine-tunes a vision-language model towards the word maps of a \
             text-to-image diffusion model, on any GPU",
    after_help = "Examples:\n  \
        lavender-wgpu devices\n  \
        lavender-wgpu train                              the embedded mini models and data\n  \
        lavender-wgpu targets --diffusion sd-v1-4 --data data.json --out targets\n  \
        lavender-wgpu train smolvlm.toml --set train.steps=100\n\n\
        `lavender-wgpu COMMAND -h` shows a command's options and examples.",
    subcommand_required = true,
    arg_required_else_help = true
)]
pub struct Cli {
    /// Options that every command takes.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write the word maps of one image and text
    Attention(attention::Args),
    /// Measure this adapter's speed, or compare machines
    Bench(bench::Args),
    /// Write or check a configuration of a run
    Config(config::Args),
    /// Look at a data set before training on it
    Data(data::Args),
    /// List the adapters of this machine, their drivers, tiers and limits
    Devices(devices::Args),
    /// Paint a picture of a text with a diffusion model
    Generate(generate::Args),
    /// Measure a vision-language model on a benchmark, or compare evaluations
    Eval(eval::Args),
    /// Merge a LoRA adapter into the weights of its model
    Merge(merge::Args),
    /// Train a mini model from nothing by a recipe
    Pretrain(pretrain::Args),
    /// Write the page of a run, or compare several
    Report(report::Args),
    /// Make the word maps of every sample of a data set, from a diffusion model
    Targets(targets::Args),
    /// Ask a vision-language model about an image
    Ask(ask::Args),
    /// Fine-tune a vision-language model towards its targets
    Train(train::Args),
}

impl Command {
    fn run(&self, context: &Context) -> Result<()> {
        match self {
            Self::Attention(args) => attention::run(args, context),
            Self::Bench(args) => bench::run(args, context),
            Self::Config(args) => config::run(args, context),
            Self::Data(args) => data::run(args, context),
            Self::Devices(args) => devices::run(args, context),
            Self::Generate(args) => generate::run(args, context),
            Self::Eval(args) => eval::run(args, context),
            Self::Merge(args) => merge::run(args, context),
            Self::Pretrain(args) => pretrain::run(args, context),
            Self::Report(args) => report::run(args, context),
            Self::Targets(args) => targets::run(args, context),
            Self::Ask(args) => ask::run(args, context),
            Self::Train(args) => train::run(args, context),
        }
    }
}

/// Parses the program's arguments, runs the command and gives the exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version count as success; a closed pipe is no reason to complain.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    context::start_logging(&cli.common);
    let result = Context::new(cli.common).and_then(|context| {
        let result = cli.command.run(&context);
        context.print_profile();
        context.print_tuning();
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::Interrupted) => {
            eprintln!("interrupted");
            ExitCode::from(130)
        }
        // Whoever read our output has enough of it (`| head`).
        Err(Error::Io { path, source })
            if source.kind() == ErrorKind::BrokenPipe
                && path.as_os_str() == context::STANDARD_OUTPUT =>
        {
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {}", one_line(&error.to_string()));
            ExitCode::from(1)
        }
    }
}

/// A message in one line, as scripts expect it.
fn one_line(message: &str) -> String {
    let lines: Vec<&str> = message
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines.join(" ")
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }

    #[test]
    fn messages_become_one_line() {
        assert_eq!(super::one_line("a\n   b\n\nc\n"), "a b c");
    }
}
