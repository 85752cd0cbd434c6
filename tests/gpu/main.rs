//! The GPU and tensor floors: memory, views, ordering, faults, adapters, checkpoints.

#[path = "../support/mod.rs"]
mod support;

mod adapter;
mod checkpoint;
mod faults;
mod memory;
mod plan;
mod save;
mod stream;
mod tuning;
mod views;
