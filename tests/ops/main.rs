//! Every op against an f64 reference on the CPU.

#[path = "../support/mod.rs"]
mod support;

mod binary;
mod cast;
mod concat;
mod conv2d;
mod cross_entropy;
mod embedding;
mod gather_rows;
mod group_norm;
mod layer_norm;
mod matmul;
mod permute;
mod reduce;
mod replace_rows;
mod rms_norm;
mod rotary;
mod slice;
mod softmax;
mod adamw;
mod dropout;
mod finite;
mod grad_norm;
mod in_place;
mod resize_bilinear;
mod swiglu;
mod upsample_nearest2x;
mod unary;
mod variants;
