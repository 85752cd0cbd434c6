//! Benchmarks: reading them, keeping predictions, comparing runs; losses and maps against other computations.

#[path = "../support/mod.rs"]
mod support;

mod compare;
mod forced;
mod items;
mod predictions;
