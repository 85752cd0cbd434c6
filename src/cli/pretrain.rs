//! `pretrain`: trains a mini model from nothing by a committed recipe.

use std::path::PathBuf;

/// Options of `pretrain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu pretrain models/mini/teacher.toml --out models/mini/teacher\n  \
    lavender-wgpu pretrain models/mini/student.toml --out /tmp/student --set train.steps=100")]
pub struct Args {
    /// Recipe (TOML)
    #[arg(value_name = "RECIPE.toml")]
    pub recipe: PathBuf,
    /// Where the model is written [default: the recipe's]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Change a key of the recipe; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}
