//! `pretrain`: trains a mini model from nothing by a committed recipe.

use std::path::PathBuf;
use std::time::Instant;

use super::Context;
use super::context::Progress;
use crate::Result;
use crate::train::pretrain::{Recipe, Watch};

/// Options of `pretrain`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu pretrain models/mini/recipes/teacher.toml --out models/mini/teacher\n  \
    lavender-wgpu pretrain models/mini/recipes/teacher.toml --measure --set measure.mode=null-text\n  \
    lavender-wgpu pretrain models/mini/recipes/student.toml --out /tmp/student --set student.schedule.steps=100")]
pub struct Args {
    /// Recipe (TOML)
    #[arg(value_name = "RECIPE.toml")]
    pub recipe: PathBuf,
    /// Where the model is written [default: the recipe's `layout`]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Change a key of the recipe; may be given several times
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Measure the model that is there already instead of training one
    #[arg(long)]
    pub measure: bool,
}

/// Trains the model of a recipe, writes it and prints its held-out figures.
///
/// # Errors
/// A recipe or configuration file that cannot be used, a loss that is not finite, what the GPU reports, Ctrl-C.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let mut recipe = Recipe::load(&args.recipe, &args.set)?;
    if let Some(seed) = context.common.seed {
        recipe.set_seed(seed);
    }
    let out = args
        .out
        .clone()
        .unwrap_or_else(|| recipe.layout().to_path_buf());
    let gpu = context.gpu()?;
    let start = Instant::now();
    let mut watch = Shown {
        context,
        progress: None,
        recent: 0.0,
    };
    let figures = match args.measure {
        true => recipe.measure(gpu, &out)?,
        false => recipe.run(gpu, &out, &mut watch)?,
    };
    watch.done();
    for figure in &figures {
        context.print(format_args!("{}: {:.4}", figure.name, figure.value))?;
    }
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    context.print(format_args!("{} in {minutes:.1} min", out.display()))
}

/// Progress bars of the parts, Ctrl-C between steps.
struct Shown<'a> {
    context: &'a Context,
    progress: Option<Progress>,
    /// Mean of the latest losses.
    recent: f32,
}

impl Shown<'_> {
    fn done(&mut self) {
        self.progress = None;
    }
}

impl Watch for Shown<'_> {
    fn begin(&mut self, part: &str, steps: usize) {
        self.done();
        self.progress = Some(self.context.progress(part, steps));
        self.recent = f32::NAN;
    }

    fn step(&mut self, loss: f32) -> Result<()> {
        self.recent = match self.recent.is_nan() {
            true => loss,
            false => 0.97 * self.recent + 0.03 * loss,
        };
        if let Some(progress) = &mut self.progress {
            progress.step(format!("loss {:.4}", self.recent));
        }
        self.context.interrupt.check()
    }
}
