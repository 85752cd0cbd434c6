//! Tests of the method's parts that need no GPU.

mod store;
mod words;
