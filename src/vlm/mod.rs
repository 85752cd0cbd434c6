//! Vision-language students, one file per family, and what they share.

pub mod decoder;
pub mod generate;
pub mod idefics3;
mod idefics3_config;
pub mod idefics3_processor;
pub mod merge;
pub mod mirror;
pub mod mllama;
mod mllama_config;
mod mllama_decoder;
pub mod mllama_processor;
mod mllama_vision;
pub mod parallel;
mod prepare;
pub mod processor;
mod sample;
mod shapes;
mod siglip;
mod student;

pub use decoder::Rope;
pub use generate::{Generated, Sampling};
pub use idefics3::{Idefics3, Idefics3Config, Idefics3Input};
pub use idefics3_config::SiglipConfig;
pub use idefics3_processor::Tiles;
pub use prepare::Processor;
pub use sample::{Answer, Grid, Pictures, Prepared};
pub use shapes::{Shapes, shapes};
pub use student::{Output, Student, Taps, check_freeze};
