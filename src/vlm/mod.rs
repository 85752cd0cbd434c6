//! Vision-language students, one file per family, and what they share.

pub mod processor;
