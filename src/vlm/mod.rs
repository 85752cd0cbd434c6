//! Vision-language students, one file per family, and what they share.

pub mod mllama_processor;
pub mod processor;
