//! What is measured of each sample, and the figures over many.

use serde::{Deserialize, Serialize};

use super::item::Item;
use super::yes_no::Counts;
use super::{multiple_choice, vqa, yes_no};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Benchmark {
    /// Short answers: exact match and agreement with several people
    Vqa,
    /// Loss of the expected answers in nats a token, and perplexity
    Caption,
    /// POPE: accuracy, precision, recall, F1, yes-rate
    YesNo,
    /// The letter of the right option
    MultipleChoice,
    /// Entropy of the answers' word maps; pointing game and IoU where words have masks
    Attention,
}

impl Benchmark {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vqa => "vqa",
            Self::Caption => "caption",
            Self::YesNo => "yes-no",
            Self::MultipleChoice => "multiple-choice",
            Self::Attention => "attention",
        }
    }

    /// Whether the model writes replies; else its expected answers are read (teacher-forced).
    pub fn generates(self) -> bool {
        matches!(self, Self::Vqa | Self::YesNo | Self::MultipleChoice)
    }

    /// The benchmark that fits the data's shape, and why.
    pub fn fitting(items: &[Item]) -> (Self, &'static str) {
        let all = |holds: &dyn Fn(&Item) -> bool| items.iter().all(holds);
        let lettered = |item: &Item| {
            item.options.len() >= 2 && item.answers.iter().all(|a| Self::letter(item, a).is_some())
        };
        let yes_no = |item: &Item| {
            let word = |a: &String| matches!(vqa::normalise(a).as_str(), "yes" | "no");
            item.answers.iter().all(word)
        };
        let words = |item: &Item| {
            let counts = item.answers.iter().map(|a| a.split_whitespace().count());
            counts.max().unwrap_or(0)
        };
        let long = items.iter().filter(|item| words(item) > 5).count();
        if all(&lettered) {
            (Self::MultipleChoice, "every question has options")
        } else if all(&yes_no) {
            (Self::YesNo, "every answer is yes or no")
        } else if long * 2 > items.len() {
            (Self::Caption, "most answers have more than five words")
        } else {
            (Self::Vqa, "most answers are short")
        }
    }

    fn letter(item: &Item, answer: &str) -> Option<char> {
        multiple_choice::expected(answer, &item.options)
    }

    /// Why `item` cannot be part of this benchmark; `None` if it can.
    pub fn unusable(self, item: &Item) -> Option<String> {
        let Some(answer) = item.answers.first() else {
            return Some("no answer".into());
        };
        match self {
            Self::YesNo if yes_no::parse(answer).is_none() => {
                Some(format!("the answer `{answer}` is neither yes nor no"))
            }
            Self::MultipleChoice if Self::letter(item, answer).is_none() => Some(format!(
                "the answer `{answer}` is no option's letter or text"
            )),
            _ => None,
        }
    }

    /// Scores a reply; `None` for benchmarks without replies and for an item that is [`Benchmark::unusable`].
    pub fn score(self, item: &Item, reply: &str) -> Option<Score> {
        let answer = item.answers.first()?;
        match self {
            Self::Vqa => Some(Score::Vqa {
                exact: vqa::exact(reply, &item.answers),
                soft: vqa::soft(reply, &item.answers),
            }),
            Self::YesNo => Some(Score::YesNo {
                expected: yes_no::parse(answer)?,
                said: yes_no::parse(reply),
            }),
            Self::MultipleChoice => Some(Score::MultipleChoice {
                expected: Self::letter(item, answer)?,
                said: multiple_choice::letter(reply, &item.options),
            }),
            Self::Caption | Self::Attention => None,
        }
    }

    /// What `item` is reported by: its category, for VQA else the answer's type.
    pub fn category(self, item: &Item) -> Option<String> {
        let answer_type = || {
            let answer = item.answers.first().filter(|_| self == Self::Vqa)?;
            Some(vqa::answer_type(answer).to_owned())
        };
        item.category.clone().or_else(answer_type)
    }
}

/// One word's map.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WordScore {
    /// The word.
    pub word: String,
    /// Entropy of its map in nats.
    pub entropy: f64,
    /// With a mask: whether the map's maximum is inside.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub hit: Option<bool>,
    /// With a mask: intersection over union at the best threshold.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub iou: Option<f64>,
    /// With a mask: its share of the image, what pointing at random reaches.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub area: Option<f64>,
}

/// What was measured of one sample.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// A short answer.
    Vqa {
        /// Whether it is one of the answers.
        exact: bool,
        /// Agreement with several people.
        soft: Option<f64>,
    },
    /// A yes-or-no question.
    YesNo {
        /// What is right.
        expected: bool,
        /// What the reply says.
        said: Option<bool>,
    },
    /// A multiple-choice question.
    MultipleChoice {
        /// What is right.
        expected: char,
        /// What the reply says.
        said: Option<char>,
    },
    /// An answer's loss.
    Caption {
        /// Sum over its tokens, the end-of-turn token included.
        nats: f64,
        /// How many.
        tokens: usize,
    },
    /// The answer's words.
    Attention(Vec<WordScore>),
}

/// The figures of a benchmark over `scores`, by name, in a fixed order; NaN where nothing defines one.
pub fn metrics<'a>(scores: impl IntoIterator<Item = &'a Score>) -> Vec<(&'static str, f64)> {
    let mut counts = Counts::default();
    let (mut exact, mut soft, mut choice, mut unparsed) = <[Mean; 4]>::default().into();
    let (mut entropy, mut hits, mut iou, mut area) = <[Mean; 4]>::default().into();
    let (mut nats, mut tokens) = (0.0, 0);
    for score in scores {
        match score {
            Score::Vqa { exact: e, soft: s } => {
                exact.add(f64::from(u8::from(*e)));
                s.iter().for_each(|s| soft.add(*s));
            }
            Score::YesNo { expected, said } => counts.add(*expected, *said),
            Score::MultipleChoice { expected, said } => {
                choice.add(f64::from(u8::from(Some(*expected) == *said)));
                unparsed.add(f64::from(u8::from(said.is_none())));
            }
            Score::Caption { nats: n, tokens: t } => {
                nats += n;
                tokens += t;
            }
            Score::Attention(words) => {
                for word in words {
                    entropy.add(word.entropy);
                    word.hit
                        .iter()
                        .for_each(|h| hits.add(f64::from(u8::from(*h))));
                    word.iou.iter().for_each(|v| iou.add(*v));
                    word.area.iter().for_each(|v| area.add(*v));
                }
            }
        }
    }
    let mut out = Vec::new();
    let mut mean = |name, mean: Mean| {
        if mean.count > 0 {
            out.push((name, mean.sum / mean.count as f64));
        }
    };
    mean("exact", exact);
    mean("soft", soft);
    mean("accuracy", choice);
    mean("unparsed", unparsed);
    mean("entropy", entropy);
    mean("pointing", hits);
    mean("iou", iou);
    mean("chance", area);
    if counts != Counts::default() {
        out.extend(counts.metrics());
    }
    if tokens > 0 {
        let loss = nats / tokens as f64;
        out.extend([("loss", loss), ("perplexity", loss.exp())]);
    }
    out
}

/// A running mean.
#[derive(Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: usize,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_means_over_what_defines_them() {
        let scores = [
            Score::Caption {
                nats: 6.0,
                tokens: 2,
            },
            Score::Caption {
                nats: 0.0,
                tokens: 4,
            },
        ];
        assert_eq!(
            metrics(&scores),
            [("loss", 1.0), ("perplexity", std::f64::consts::E)]
        );
        let vqa = |exact, soft| Score::Vqa { exact, soft };
        let scores = [
            vqa(true, None),
            vqa(false, Some(0.5)),
            vqa(false, None),
            vqa(true, Some(1.0)),
        ];
        assert_eq!(metrics(&scores), [("exact", 0.5), ("soft", 0.75)]);
        let choice = |said| Score::MultipleChoice {
            expected: 'B',
            said,
        };
        let scores = [
            choice(Some('B')),
            choice(None),
            choice(Some('A')),
            choice(Some('B')),
        ];
        assert_eq!(metrics(&scores), [("accuracy", 0.5), ("unparsed", 0.25)]);
        let word = |entropy, hit: Option<bool>| WordScore {
            word: "w".into(),
            entropy,
            hit,
            iou: hit.map(|_| 0.5),
            area: hit.map(|_| 0.1),
        };
        let scores = [Score::Attention(vec![
            word(1.0, None),
            word(3.0, Some(true)),
        ])];
        let wanted = [
            ("entropy", 2.0),
            ("pointing", 1.0),
            ("iou", 0.5),
            ("chance", 0.1),
        ];
        assert_eq!(metrics(&scores), wanted);
        assert!(metrics(&[]).is_empty());
    }
}
