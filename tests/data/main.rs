//! Tests of reading data sets and images.

mod conversations;
mod picture;
mod scenes;
