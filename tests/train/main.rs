//! Tests of training, and of what a run writes.

#[path = "../support/mod.rs"]
mod support;

mod checkpoint;
mod config;
mod controls;
mod events;
mod metrics;
mod parallel;
mod plan;
mod predicted;
mod pretrain;
mod qlora;
mod recipe;
mod report;
mod rundir;
mod strategies;
mod ten_steps;
