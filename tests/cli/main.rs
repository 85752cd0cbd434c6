//! Tests of the program as a user starts it.

mod devices;
mod support;
mod teacher;
mod usage;
