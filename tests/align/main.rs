//! Tests of the method's parts that need no GPU.

mod picture;
mod report;
mod store;
mod words;
