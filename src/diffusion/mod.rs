//! Stable Diffusion v1 as a teacher: CLIP text encoder, VAE, U-Net, DDIM inversion, word-map capture.
//!
//! Every model reads the directory layout that `diffusers` writes and names its tensors as the checkpoint does.
//! Activations are channels-last, `[batch, height, width, channels]`, in the U-Net and the VAE.

pub mod clip_tokenizer;
pub mod config;

pub use clip_tokenizer::{ClipTokenizer, TextChunk};
