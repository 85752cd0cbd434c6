//! Floor 5: layers with weights. Knows checkpoints and LoRA, not which model it builds.

mod conv2d;
mod dropout;
mod embedding;
mod freeze;
mod linear;
mod loader;
mod lora;
mod norm;
mod parameters;
mod peft;

pub use conv2d::Conv2d;
pub use dropout::{recomputed, replayed, with_dropout};
pub use embedding::Embedding;
pub use freeze::Freeze;
pub use linear::Linear;
pub use loader::{Init, LoadOptions, Loader};
pub use lora::{LoraConfig, MOST_RANK};
pub use norm::{GroupNorm, LayerNorm, RmsNorm};
pub use parameters::{Kind, Layout, Parameter, Parameters};
pub use peft::{another_base, load_lora, lora_config, lora_factors, save_lora};
