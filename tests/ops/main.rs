//! Every op against an f64 reference on the CPU.

#[path = "../support/mod.rs"]
mod support;

mod conv2d;
mod matmul;
mod binary;
mod cast;
mod concat;
mod gather_rows;
mod permute;
mod reduce;
mod replace_rows;
mod slice;
mod unary;
mod variants;
