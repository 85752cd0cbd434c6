//! Every op against an f64 reference on the CPU.

#[path = "../support/mod.rs"]
mod support;

mod conv2d;
mod matmul;
mod unary;
mod variants;
