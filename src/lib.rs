//! Diffusion Instruction Tuning on any GPU that wgpu reaches.
//!
//! The floors of the house, each importing only floors below it:
//! [`gpu`] → [`tensor`] → [`ops`] → [`autograd`] → [`nn`] → models → method → training → command line.

pub mod align;
pub mod autograd;
pub mod bench;
pub mod cli;
pub mod data;
pub mod diffusion;
pub mod embedded;
pub mod error;
pub mod eval;
pub mod files;
pub mod gpu;
pub mod nn;
pub mod ops;
pub mod tensor;
pub mod train;
pub mod vlm;

pub use error::{Error, Result};
