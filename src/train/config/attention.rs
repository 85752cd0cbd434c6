//! What does not go together among the attention's keys.

use super::Config;
use crate::align::options::{Aggregate, Parallel};

impl Config {
    /// What the types of these keys cannot say.
    pub(super) fn check_attention(&self) -> Result<(), (&'static str, String)> {
        let attention = &self.attention;
        let parallel = attention.parallel != Parallel::None;
        let wrong = |key, message: &str| Err((key, message.to_owned()));
        if parallel && attention.mirror {
            return wrong(
                "attention.mirror",
                "found beside `attention.parallel`, expected one of the two",
            );
        }
        let differs = matches!(attention.parallel, Parallel::Diff | Parallel::DiffOutput);
        if differs && attention.aggregate == Aggregate::Flow && !self.flow.sum {
            return wrong(
                "attention.parallel",
                "found a difference, whose maps have negative values, beside `attention.aggregate` \"flow\", which multiplies \
                 them; expected `flow.sum` = true, another aggregation, or \"map\"",
            );
        }
        if parallel && self.control.aligner_only {
            return wrong(
                "attention.parallel",
                "found beside `control.aligner_only`, under which its new projections would stay random; expected \"none\"",
            );
        }
        if !parallel && self.init.parallel.is_some() {
            return wrong(
                "init.parallel",
                "found without `attention.parallel`, expected \"map\", \"diff\" or \"diff-output\" there",
            );
        }
        Ok(())
    }
}
