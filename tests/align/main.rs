//! Tests of the method's parts that need no GPU.

mod picture;
mod store;
mod words;
