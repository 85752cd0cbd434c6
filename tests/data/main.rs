//! Tests of reading data sets and images.

mod conversations;
mod formats;
mod hostile;
mod mixture;
mod picture;
mod prefetch;
mod scenes;
