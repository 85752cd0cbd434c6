//! Whole models against the libraries that published them, on tiny random checkpoints.

mod resize;
