//! Every op against an f64 reference on the CPU.

#[path = "../support/mod.rs"]
mod support;

mod adamw;
mod attention;
mod attention_cooperative;
mod attention_tap;
mod binary;
mod cast;
mod concat;
mod conv2d;
mod cross_entropy;
mod division;
mod dropout;
mod embedding;
mod finite;
mod gather_rows;
mod geglu;
mod grad_norm;
mod group_norm;
mod in_place;
mod layer_norm;
mod linear_cross_entropy;
mod loss_scale;
mod matmul;
mod matmul_cooperative;
mod matmul_quantized;
mod matmul_tune;
mod permute;
mod reduce;
mod replace_rows;
mod resize_bicubic;
mod resize_bilinear;
mod rms_norm;
mod rotary;
mod slice;
mod softmax;
mod swiglu;
mod unary;
mod upsample_nearest2x;
mod variants;
mod ways;
