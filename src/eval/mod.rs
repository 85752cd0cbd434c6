//! Measures of a model: benchmarks of question and answer, the loss of captions, how sharp its word maps are and
//! whether they point at the right region; figures with intervals, and runs compared.

pub mod attention;
pub mod compare;
pub mod drawn;
pub mod forced;
pub mod intervals;
pub mod item;
pub mod multiple_choice;
pub mod predictions;
pub mod report;
pub mod run;
mod score;
pub mod tsv;
pub mod vqa;
pub mod yes_no;

pub use score::{Benchmark, Score, WordScore, metrics};
