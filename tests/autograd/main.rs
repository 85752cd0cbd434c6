//! Gradients: every function against PyTorch and finite differences, the tape, checkpointing.

#[path = "../support/mod.rs"]
mod support;

mod attention;
mod checkpoint;
mod differences;
mod pytorch;
mod replayed;
mod tape;
