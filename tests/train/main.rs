//! Tests of training, and of what a run writes.

mod config;
