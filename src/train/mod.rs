//! Training: configuration, run directory, checkpoints, metrics, the recipe.

pub mod config;
