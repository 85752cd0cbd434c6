//! Vision-language students, one file per family, and what they share.

pub mod idefics3_processor;
pub mod mllama_processor;
pub mod processor;
