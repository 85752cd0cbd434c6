//! Data sets: samples of an image and a conversation, whatever file they come from.

pub mod conversations;
pub mod drawn;
pub mod picture;
mod sample;
pub mod scenes;

pub use sample::{DataSet, ImageRef, Part, Role, Sample, Turn};
