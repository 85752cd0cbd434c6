//! Data sets: samples of an image and a conversation, whatever file they come from.

pub mod conversations;
pub mod drawn;
pub mod entry;
pub mod folder;
pub mod format;
pub mod karpathy;
pub mod parquet;
pub mod picture;
pub mod prefetch;
mod sample;
pub mod scenes;
pub mod webdataset;

pub use sample::{DataSet, ImageFile, ImageRef, Part, Role, Sample, Share, Turn};
