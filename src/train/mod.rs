//! Training: configuration, run directory, checkpoints, metrics, the recipe.

pub mod batch;
pub mod check;
pub mod checkpoint;
pub mod config;
pub mod evaluation;
pub mod events;
pub mod exchange;
pub mod loader;
pub mod memory;
pub mod metrics;
pub mod objective;
pub mod optimizer;
pub mod pictures;
pub mod plan;
mod predicted;
pub mod pretrain;
pub mod recipe;
pub mod record;
pub mod report;
pub mod rundir;
pub mod schedule;
pub mod trained;
