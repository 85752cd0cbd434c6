//! Data sets: samples of an image and a conversation, whatever file they come from.

pub mod conversations;
pub mod drawn;
pub mod picture;
pub mod scenes;
mod sample;

pub use sample::{DataSet, ImageRef, Part, Role, Sample, Turn};
