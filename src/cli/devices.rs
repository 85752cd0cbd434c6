//! `devices`: the adapters of this machine.

use super::Context;
use crate::gpu::list_adapters;
use crate::{Error, Result};

/// Options of `devices`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  lavender-wgpu devices\n  lavender-wgpu devices --json | jq '.[0].name'"
)]
pub struct Args {
    /// One JSON array with every limit
    #[arg(long)]
    pub json: bool,
}

/// Prints one line per adapter. Errors: there is none.
pub fn run(args: &Args, context: &Context) -> Result<()> {
    let adapters = list_adapters();
    if args.json {
        let text =
            serde_json::to_string_pretty(&adapters).map_err(|e| Error::Gpu(e.to_string()))?;
        return context.print(text);
    }
    if adapters.is_empty() {
        return Err(Error::no_adapter());
    }
    for adapter in adapters {
        context.print(format_args!(
            "{}: {} {}",
            adapter.index, adapter.kind, adapter.tier
        ))?;
    }
    Ok(())
}
