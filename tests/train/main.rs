//! Tests of training, and of what a run writes.

mod checkpoint;
mod config;
mod events;
mod metrics;
mod rundir;
