//! The method: words and spans, target store, word maps, aggregation, aligner, loss.

pub mod aligner;
pub mod filter;
pub mod loss;
pub mod maps;
pub mod options;
pub mod picture;
pub mod preview;
pub mod report;
pub mod store;
pub mod targets;
pub mod words;
