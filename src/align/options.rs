//! The method's choices, by the names that configurations use.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Which of a vision-language model's words are looked up among the targets: `words.source`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WordSource {
    /// Words of the answer's text with all their sub-word tokens; the row of token t is t − 1.
    #[default]
    Labels,
    /// The student's own first choices: row t is filed under the token that the model predicts there, decoded alone;
    /// only words of one token are found. Costs a forward more.
    Predicted,
}

/// How maps of layers and heads become one: `attention.aggregate`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregate {
    /// Heads are the aligner's channels, the aligner runs on each layer, then the mean over layers.
    #[default]
    Learned,
    /// Mean over layers, heads are channels.
    MeanLayer,
    /// Maximum over layers, heads are channels.
    MaxLayer,
    /// Maximum over heads, then over layers; one channel.
    MaxMax,
    /// Mean over heads and layers; one channel.
    MeanMean,
    /// Attention flow: the product over layers, per head; see [`Flow`].
    Flow,
}

impl FromStr for Aggregate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "learned" => Self::Learned,
            "mean-layer" => Self::MeanLayer,
            "max-layer" => Self::MaxLayer,
            "max-max" => Self::MaxMax,
            "mean-mean" => Self::MeanMean,
            "flow" => Self::Flow,
            _ => {
                return Err(format!(
                    "found `{text}`, expected learned, mean-layer, max-layer, max-max, mean-mean or flow"
                ));
            }
        })
    }
}

/// A second attention beside that of each aligned layer: `attention.parallel`.
///
/// New projections read the same hidden states with queries and keys of their own; their softmax runs over the picture's
/// tokens alone, without the layer's mask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Parallel {
    /// None: the layer's own maps are aligned.
    #[default]
    None,
    /// The new maps are aligned in place of the layer's own; nothing else reads them.
    Map,
    /// A − λ·A′ is aligned, of the layer's map A and the new map A′; λ is learned, from 0.8 on.
    Diff,
    /// [`Parallel::Diff`], and the layer's output is that of the difference too: A·V − λ·A′·V′ goes to `o_proj`. V′ begins
    /// at 0, so that training sets out from the model as it was.
    DiffOutput,
}

/// What is done over layers after the aligner has seen each: `attention.over_layers` of `learned`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OverLayers {
    /// Their mean.
    #[default]
    Mean,
    /// Their maximum.
    Max,
}

/// `[flow]`: how `attention.aggregate = "flow"` joins layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Flow {
    /// The sum over layers instead of the product; default false.
    pub sum: bool,
    /// Heads weighted by the mean over patches of the maximum over the sample's words, then their mean, before
    /// layers are joined; leaves one channel. Default false.
    pub head_weights: bool,
    /// Maps weighted by the word's place in its text, (j + 1) / W. Default false.
    pub token_weight: bool,
}

/// How maps [words, R, R, heads] of several layers become one map a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aggregation {
    /// `attention.aggregate`.
    pub rule: Aggregate,
    /// `attention.over_layers`.
    pub over_layers: OverLayers,
    /// `[flow]`.
    pub flow: Flow,
}

impl From<Aggregate> for Aggregation {
    fn from(rule: Aggregate) -> Self {
        Self {
            rule,
            ..Self::default()
        }
    }
}

impl Aggregation {
    /// Channels that it leaves for the aligner, of a model with `heads` heads.
    pub fn channels(&self, heads: usize) -> usize {
        match self.rule {
            Aggregate::Learned | Aggregate::MeanLayer | Aggregate::MaxLayer => heads,
            Aggregate::Flow if self.flow.head_weights => 1,
            Aggregate::Flow => heads,
            Aggregate::MaxMax | Aggregate::MeanMean => 1,
        }
    }

    /// Whether it gives one map a word without an aligner.
    pub fn stands_alone(&self) -> bool {
        matches!(
            self.rule,
            Aggregate::MaxMax | Aggregate::MeanMean | Aggregate::Flow
        )
    }
}

/// Which attention layers are tapped: `attention.layers`, written `"all"`, `"last:N"` or a list of indices.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Layers {
    /// Every layer that can be.
    #[default]
    All,
    /// The last N of them.
    Last(usize),
    /// These, counted from 0 among the model's decoder layers.
    List(Vec<usize>),
}

impl Layers {
    /// The chosen ones of `available` (ascending layer indices). Errors: a layer that is not among them, or none.
    pub fn choose(&self, available: &[usize]) -> Result<Vec<usize>, String> {
        let chosen = match self {
            Self::All => available.to_vec(),
            Self::Last(n) if *n <= available.len() => available[available.len() - n..].to_vec(),
            Self::Last(n) => {
                return Err(format!(
                    "field `attention.layers`: found `last:{n}`, but the model has {} such layers",
                    available.len()
                ));
            }
            Self::List(list) => {
                if let Some(missing) = list.iter().find(|l| !available.contains(l)) {
                    return Err(format!(
                        "field `attention.layers`: found layer {missing}, expected some of {available:?}"
                    ));
                }
                list.clone()
            }
        };
        if chosen.is_empty() {
            return Err("field `attention.layers`: chooses no layer".into());
        }
        Ok(chosen)
    }
}

impl FromStr for Layers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("found `{text}`, expected all, last:N or a list such as 3,7");
        if text == "all" {
            return Ok(Self::All);
        }
        if let Some(n) = text.strip_prefix("last:") {
            return match n.parse() {
                Ok(n) if n > 0 => Ok(Self::Last(n)),
                _ => Err(wrong()),
            };
        }
        let list: Result<Vec<usize>, _> = text.split(',').map(|n| n.trim().parse()).collect();
        list.map(Self::List).map_err(|_| wrong())
    }
}

impl fmt::Display for Layers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Last(n) => write!(f, "last:{n}"),
            Self::List(list) => {
                let list: Vec<String> = list.iter().map(usize::to_string).collect();
                f.write_str(&list.join(","))
            }
        }
    }
}

impl Serialize for Layers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::List(list) => list.serialize(serializer),
            other => serializer.collect_str(other),
        }
    }
}

impl<'de> Deserialize<'de> for Layers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "expected \"all\", \"last:N\" or a list of layer numbers"
        )]
        enum Written {
            Text(String),
            List(Vec<usize>),
        }
        match Written::deserialize(deserializer)? {
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
            Written::List(list) => Ok(Self::List(list)),
        }
    }
}

/// The network between the model's maps and the targets: `aligner.kind`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlignerKind {
    /// Three blocks of 3×3 convolution, norm and activation, then 1×1 to one channel.
    #[default]
    #[serde(alias = "sim")]
    Conv,
    /// Two such blocks.
    Light,
    /// Five; only the first two and the last have a norm.
    Deep,
    /// Two linear layers over each pixel's channels with the activation, then 1×1 to one channel; no norm.
    Mlp,
    /// None: the aggregated map itself (only where the aggregation gives one map: max-max, mean-mean, flow).
    None,
}

/// The aligner's norm: `aligner.norm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlignerNorm {
    /// Instance norm without affine parameters.
    #[default]
    Instance,
    /// Batch norm by the batch's own statistics, without affine parameters.
    Batch,
    /// Group norm without affine parameters, in as many groups as divide the channels, at most 8.
    Group,
    /// None.
    None,
}

/// The aligner's activation: `aligner.activation`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlignerActivation {
    /// ReLU6.
    #[default]
    Relu6,
    /// LeakyReLU with slope 0.1.
    LeakyRelu,
}

/// How λ changes over a run: `loss.schedule`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LambdaSchedule {
    /// λ throughout.
    #[default]
    Constant,
    /// λ·exp(−decay·step/total).
    Exponential,
    /// λ / (1 + decay·step/total).
    Inverse,
}

/// The distance between the student's maps and the targets: `loss.kind`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LossKind {
    /// Mean squared error.
    #[default]
    Mse,
    /// Kullback-Leibler divergence of the student's map from the target, both divided by their sums.
    Kl,
    /// 1 − cosine similarity.
    Cosine,
}

/// What stands in for the targets: `control.targets`. A gain that shuffled targets also give is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ControlTargets {
    /// The targets themselves.
    #[default]
    Own,
    /// The maps of all matched words, exchanged: each goes to a word of another image where that is possible, to
    /// another word of the same image else; the same exchange in every epoch, chosen by `train.seed`.
    Shuffled,
    /// 0.5 everywhere.
    Uniform,
}

/// Which of the matched words count: `words.filter`, by part of speech.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WordFilter {
    /// All.
    #[default]
    All,
    /// Nouns and proper nouns.
    Nouns,
    /// Adjectives.
    Adjectives,
    /// Nouns, adjectives and verbs.
    #[serde(rename = "nouns+adjectives+verbs")]
    NounsAdjectivesVerbs,
    /// Heads of noun phrases: what a sentence speaks of, as subject or object.
    #[serde(rename = "subjects+objects")]
    SubjectsObjects,
}
