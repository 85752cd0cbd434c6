//! Tests of the program as a user starts it.

mod bad_input;
mod bench;
mod config;
mod data;
mod devices;
mod eval;
mod merge;
mod paint;
mod recipes;
mod report;
mod resume;
mod student;
mod support;
mod targets;
mod teacher;
mod tui;
mod tuning;
mod usage;
