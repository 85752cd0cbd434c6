//! Yes-or-no questions, as POPE asks and counts them.

/// What a reply says: the first `yes` or `no` of its first sentence that says a word of the kind; "not" and "…n't"
/// count as no. `None` where it says neither.
pub fn parse(reply: &str) -> Option<bool> {
    let sentences = reply.split(['.', '!', '?', '\n']);
    sentences.map(sentence).find(Option::is_some).flatten()
}

fn sentence(text: &str) -> Option<bool> {
    let text = text.to_lowercase().replace('\u{2019}', "'");
    let words = text.split(|c: char| !c.is_alphanumeric() && c != '\'');
    let said = |word: &str| match word {
        "yes" | "yeah" | "yep" => Some(true),
        "no" | "not" | "nope" | "cannot" => Some(false),
        other => other.ends_with("n't").then_some(false),
    };
    words.into_iter().find_map(said)
}

/// Counts of expected and given answers; `yes` is the positive class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Yes expected, yes said.
    pub true_positive: usize,
    /// No expected, yes said.
    pub false_positive: usize,
    /// No expected, no said.
    pub true_negative: usize,
    /// Yes expected, no said.
    pub false_negative: usize,
    /// Yes expected, neither said: missed and wrong.
    pub unparsed_yes: usize,
    /// No expected, neither said: wrong.
    pub unparsed_no: usize,
}

impl Counts {
    /// Adds one question.
    pub fn add(&mut self, expected: bool, said: Option<bool>) {
        let count = match (expected, said) {
            (true, Some(true)) => &mut self.true_positive,
            (false, Some(true)) => &mut self.false_positive,
            (false, Some(false)) => &mut self.true_negative,
            (true, Some(false)) => &mut self.false_negative,
            (true, None) => &mut self.unparsed_yes,
            (false, None) => &mut self.unparsed_no,
        };
        *count += 1;
    }

    /// Accuracy, precision, recall, F1, yes-rate and the share of replies that say neither, in that order; precision,
    /// recall and F1 are 0 where nothing is to be divided by.
    pub fn metrics(&self) -> [(&'static str, f64); 6] {
        let share = |n: usize, of: usize| n as f64 / of.max(1) as f64;
        let unparsed = self.unparsed_yes + self.unparsed_no;
        let said_yes = self.true_positive + self.false_positive;
        let yes = self.true_positive + self.false_negative + self.unparsed_yes;
        let all = said_yes + self.true_negative + self.false_negative + unparsed;
        let precision = share(self.true_positive, said_yes);
        let recall = share(self.true_positive, yes);
        let f1 = match precision + recall {
            0.0 => 0.0,
            sum => 2.0 * precision * recall / sum,
        };
        [
            (
                "accuracy",
                share(self.true_positive + self.true_negative, all),
            ),
            ("precision", precision),
            ("recall", recall),
            ("f1", f1),
            ("yes_rate", share(said_yes, all)),
            ("unparsed", share(unparsed, all)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read() {
        for (reply, wanted) in [
            ("Yes", Some(true)),
            ("yes, there is a dog. No cat though.", Some(true)),
            ("No.", Some(false)),
            ("There is not a dog in the picture.", Some(false)),
            ("There isn\u{2019}t one", Some(false)),
            ("Well. Yes!", Some(true)),
            ("A dog on a lawn", None),
            ("nothing", None),
            ("", None),
        ] {
            assert_eq!(parse(reply), wanted, "{reply:?}");
        }
    }

    #[test]
    fn counts_give_pope_s_figures() {
        let mut counts = Counts::default();
        for (expected, said, n) in [
            (true, Some(true), 3),
            (false, Some(true), 1),
            (false, Some(false), 4),
            (true, Some(false), 1),
            (true, None, 1),
        ] {
            (0..n).for_each(|_| counts.add(expected, said));
        }
        let metrics = counts.metrics();
        let wanted = [0.7, 0.75, 0.6, 2.0 * 0.75 * 0.6 / 1.35, 0.4, 0.1];
        for ((name, value), wanted) in metrics.iter().zip(wanted) {
            assert!((value - wanted).abs() < 1e-12, "{name}: {value}, {wanted}");
        }
        assert_eq!(Counts::default().metrics()[3], ("f1", 0.0));
    }
}
