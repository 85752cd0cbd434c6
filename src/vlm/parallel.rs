//! Parallel attention: a layer's second attention, over the picture alone, for the word maps.

use super::decoder::attend;
use crate::Result;
use crate::align::options::Parallel;
use crate::autograd::Var;
use crate::nn::{Init, Linear, Loader};
use crate::ops::attention::{AttentionMask, AttentionShape};
use crate::ops::attention_tap::AttentionTap;

/// λ of a new difference.
const LAMBDA: f32 = 0.8;

/// New projections `q_proj`, `k_proj` and, where the output changes too, `v_proj` beside those of a layer, with the
/// layer's heads, norms of queries and keys, and positions; `lambda_d` `[1]` where maps are subtracted. No biases.
///
/// The softmax runs over the tokens of the sample's pictures: no causal mask, none between a row and a picture. The hidden
/// states that it reads are not detached: what the targets ask for reaches the layers below, and through them the
/// student, while this layer's own attention is left alone (but for the differences, which its maps are part of).
pub struct ParallelAttention {
    query: Linear,
    key: Linear,
    value: Option<Linear>,
    lambda: Option<Var>,
    shape: AttentionShape,
}

impl ParallelAttention {
    /// Loads the projections at `l`; queries, keys and values are all made from states `hidden` wide.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn load(
        l: &Loader,
        kind: Parallel,
        hidden: usize,
        head_dim: usize,
        shape: AttentionShape,
    ) -> Result<Self> {
        let (queries, keys) = (shape.heads * head_dim, shape.kv_heads * head_dim);
        let differs = matches!(kind, Parallel::Diff | Parallel::DiffOutput);
        let value = || {
            let weight = l.sub("v_proj");
            let weight = weight.matrix("weight", &[keys, hidden], Init::Zeros)?;
            Ok(Linear::from_weights(weight, None))
        };
        let lambda = || l.vector("lambda_d", &[1], Init::Constant(LAMBDA));
        Ok(Self {
            query: Linear::load(&l.sub("q_proj"), hidden, queries, false)?,
            key: Linear::load(&l.sub("k_proj"), hidden, keys, false)?,
            value: (kind == Parallel::DiffOutput).then(value).transpose()?,
            lambda: differs.then(lambda).transpose()?,
            shape,
        })
    }

    /// Whether anything reads it: the layer's output, or `tap`.
    pub fn is_read(&self, tap: Option<&AttentionTap>) -> bool {
        self.value.is_some() || tap.is_some()
    }

    /// Queries of hidden states, before norm and positions.
    pub fn query(&self, x: &Var) -> Var {
        self.query.forward(x)
    }

    /// Keys, likewise.
    pub fn key(&self, x: &Var) -> Var {
        self.key.forward(x)
    }

    /// Values; where no output is made of them, the keys in their place.
    pub fn value(&self, x: &Var, keys: &Var) -> Var {
        let value = self.value.as_ref().map(|value| value.forward(x));
        value.unwrap_or_else(|| keys.clone())
    }

    /// What becomes of the layer's attention output `[batch, tokens, heads · head_dim]` and tapped probabilities
    /// `[rows, heads, columns]`, given queries, keys and values and the mask that leaves the picture's tokens.
    pub fn join(
        &self,
        (attended, probs): (Var, Option<Var>),
        [q, k, v]: [&Var; 3],
        picture: &AttentionMask,
        tap: Option<&AttentionTap>,
    ) -> (Var, Option<Var>) {
        let (out, new) = attend(q, k, v, self.shape, picture, tap);
        let Some(lambda) = &self.lambda else {
            return (attended, new);
        };
        let attended = match self.value {
            Some(_) => attended.sub(&out.mul(&lambda.cast(out.value().dtype()))),
            None => attended,
        };
        let less = |(own, new): (Var, Var)| own.sub(&new.mul(lambda));
        (attended, probs.zip(new).map(less))
    }
}
