//! Measures of a model: how sharp its word maps are, whether they point at the right region.

pub mod attention;
pub mod drawn;
