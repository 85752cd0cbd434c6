//! `train`: fine-tunes a vision-language model towards its targets.

use std::path::PathBuf;

/// Options of `train`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu train                                  the embedded mini models and data\n  \
    lavender-wgpu train smolvlm.toml\n  \
    lavender-wgpu train smolvlm.toml --set loss.lambda=0 --set run.dir=runs/autor    the autoregressive baseline\n  \
    lavender-wgpu train --resume runs/autor              goes on from the last whole checkpoint")]
pub struct Args {
    /// Configuration; without one, the embedded mini models and data
    #[arg(value_name = "CONFIG.toml", conflicts_with = "resume")]
    pub config: Option<PathBuf>,
    /// Change a key of the configuration; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Go on with a stopped run, by its own resolved configuration
    #[arg(long, value_name = "RUN_DIR")]
    pub resume: Option<PathBuf>,
}
