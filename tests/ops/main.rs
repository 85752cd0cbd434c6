//! Every op against an f64 reference on the CPU.

#[path = "../support/mod.rs"]
mod support;

mod matmul;
mod unary;
mod variants;
