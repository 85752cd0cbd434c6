//! Every op against an f64 reference on the CPU.

#[path = "../support/mod.rs"]
mod support;

mod unary;
mod variants;
