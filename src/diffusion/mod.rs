//! Stable Diffusion v1 as a teacher: CLIP text encoder, VAE, U-Net, DDIM inversion, word-map capture.
//!
//! Every model reads the directory layout that `diffusers` writes and names its tensors as the checkpoint does.
//! Activations are channels-last, `[batch, height, width, channels]`, in the U-Net and the VAE.

pub mod checkpoint;
pub mod clip_text;
pub mod clip_tokenizer;
pub mod config;
pub mod ddim;
pub mod diagnose;
pub mod maps;
pub mod memory;
pub mod null_text;
pub mod pipeline;
pub mod resnet;
pub mod sampler;
pub mod single_file;
pub mod transformer;
pub mod unet;
pub mod vae;
pub mod vae_tiling;

pub use checkpoint::{TeacherFiles, TeacherOptions, is_diffusion};
pub use clip_text::{ClipText, ClipTextConfig};
pub use clip_tokenizer::{ClipTokenizer, TextChunk};
pub use ddim::{NoiseSchedule, SchedulerConfig};
pub use maps::{Capture, MapLayers, TokenMaps};
pub use memory::Plan;
pub use null_text::{NullText, NullTextOptions};
pub use pipeline::{StableDiffusion, Trajectory};
pub use sampler::{GenerateOptions, Sampler};
pub use unet::{Unet, UnetConfig};
pub use vae::{Vae, VaeConfig};
