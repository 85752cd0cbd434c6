//! `report`: the page of a run, or of several beside each other.

use std::path::PathBuf;

use super::Context;
use crate::train::report::{Comparison, RunReport};
use crate::{Result, files};

/// Where a comparison is written.
const COMPARISON: &str = "comparison.html";

/// Options of `report`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    lavender-wgpu report runs/001                          writes runs/001/report.html again\n  \
    lavender-wgpu report runs/autor runs/lavender          compares them in comparison.html\n  \
    lavender-wgpu report runs/* --out all.html")]
pub struct Args {
    /// Run directories: one, or several to compare; they may be going on
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// Where the page is written [default: report.html in the run; comparison.html here for several]
    #[arg(long, value_name = "FILE.html")]
    pub out: Option<PathBuf>,
}

/// Writes the page from what is on disk; prints the figures as a table, and where the page is.
///
/// # Errors
/// What is no run directory, logs that hold something else, a file that cannot be written.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let runs = args.runs.iter().map(RunReport::read);
    let runs: Vec<RunReport> = runs.collect::<Result<_>>()?;
    let single = match runs.as_slice() {
        [run] => Some((run.html()?, run.run.report())),
        _ => None,
    };
    let comparison = Comparison::new(runs);
    let (page, file) = match single {
        Some(single) => single,
        None => (comparison.html()?, COMPARISON.into()),
    };
    let file = args.out.clone().unwrap_or(file);
    files::write_bytes(&file, page.as_bytes())?;
    context.print(comparison.text()?)?;
    context.print(format_args!("report: {}", file.display()))
}
