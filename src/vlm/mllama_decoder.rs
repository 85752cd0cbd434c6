//! The decoder of Llama-3.2-Vision: self-attention layers and gated cross-attention layers.

use std::rc::Rc;

use super::decoder::{KvCache, Mlp, Positions, SelfAttention, attend};
use super::mllama_config::MllamaConfig;
use super::parallel::ParallelAttention;
use crate::Result;
use crate::autograd::Var;
use crate::nn::{Init, Linear, Loader, RmsNorm, recomputed};
use crate::ops::attention::{AttentionMask, AttentionShape};
use crate::ops::attention_tap::AttentionTap;
use crate::tensor::{DType, Tensor};

struct SelfLayer {
    input_norm: RmsNorm,
    attention: SelfAttention,
    post_norm: RmsNorm,
    mlp: Mlp,
}

struct CrossLayer {
    input_norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    query_norm: RmsNorm,
    key_norm: RmsNorm,
    attention_gate: Var,
    post_norm: RmsNorm,
    mlp: Mlp,
    mlp_gate: Var,
    shape: AttentionShape,
    parallel: Option<ParallelAttention>,
    activations: DType,
}

enum Layer {
    Text(Box<SelfLayer>),
    Cross(Box<CrossLayer>),
}

/// What cross-attention layers need beside the hidden states.
#[derive(Clone)]
pub(super) struct Pictures {
    /// Projected tile states `[batch, keys, hidden]`; `None` once the layers' caches hold them.
    pub states: Option<Var>,
    pub mask: AttentionMask,
    /// The real tiles alone, whichever picture a row belongs to, which a parallel attention reads.
    pub tiles: AttentionMask,
    /// 1 for text rows that see a picture, `[batch, tokens, 1]`; `None` if all do.
    pub seeing: Option<Var>,
    /// 1 for samples with a picture, `[batch, 1, 1]`; `None` if all have.
    pub present: Option<Var>,
}

impl Pictures {
    /// All but what a parallel attention reads, as inputs of a plan.
    pub fn inputs(&self) -> [Option<Var>; 5] {
        let bits = |bits: &Option<Tensor>| bits.clone().map(Var::constant);
        [
            self.states.clone(),
            bits(&self.mask.query_bits),
            bits(&self.mask.key_bits),
            self.seeing.clone(),
            self.present.clone(),
        ]
    }

    /// What [`Pictures::inputs`] gave; `None` where there were none.
    pub fn of_inputs([states, query, key, seeing, present]: [Option<Var>; 5]) -> Option<Self> {
        let bits = |bits: Option<Var>| bits.map(|bits| bits.value().clone());
        Some(Self {
            states: Some(states?),
            mask: AttentionMask {
                query_bits: bits(query),
                key_bits: bits(key),
                ..AttentionMask::default()
            },
            tiles: AttentionMask::default(),
            seeing,
            present,
        })
    }
}

impl SelfLayer {
    fn load(config: &MllamaConfig, l: &Loader) -> Result<Self> {
        let (hidden, heads) = (config.hidden, config.heads);
        let head_dim = hidden / heads;
        Ok(Self {
            input_norm: RmsNorm::load(&l.sub("input_layernorm"), hidden, config.eps)?,
            attention: SelfAttention::load(
                &l.sub("self_attn"),
                hidden,
                heads,
                config.kv_heads,
                head_dim,
            )?,
            post_norm: RmsNorm::load(&l.sub("post_attention_layernorm"), hidden, config.eps)?,
            mlp: Mlp::load(&l.sub("mlp"), hidden, config.intermediate)?,
        })
    }

    fn forward(&self, x: &Var, positions: &Positions, cache: Option<&mut KvCache>) -> Var {
        let normed = self.input_norm.forward(x);
        let attention = &self.attention;
        let (x, _) = attention.forward_onto(&normed, x, positions, cache, None);
        self.mlp.forward_onto(&self.post_norm.forward(&x), &x)
    }
}

impl CrossLayer {
    fn load(config: &MllamaConfig, l: &Loader) -> Result<Self> {
        let (hidden, attention) = (config.hidden, l.sub("cross_attn"));
        let head_dim = hidden / config.heads;
        let kv = config.kv_heads * head_dim;
        let projection = |name: &str, from, to| Linear::load(&attention.sub(name), from, to, false);
        let norm = |name: &str| RmsNorm::load(&l.sub(name), hidden, config.eps);
        let gate = |name: &str| l.vector(name, &[1], Init::Zeros);
        Ok(Self {
            input_norm: norm("input_layernorm")?,
            query: projection("q_proj", hidden, hidden)?,
            key: projection("k_proj", hidden, kv)?,
            value: projection("v_proj", hidden, kv)?,
            output: projection("o_proj", hidden, hidden)?,
            query_norm: RmsNorm::load(&attention.sub("q_norm"), head_dim, config.eps)?,
            key_norm: RmsNorm::load(&attention.sub("k_norm"), head_dim, config.eps)?,
            attention_gate: gate("cross_attn_attn_gate")?,
            post_norm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(&l.sub("mlp"), hidden, config.intermediate)?,
            mlp_gate: gate("cross_attn_mlp_gate")?,
            shape: config.attention(),
            parallel: None,
            activations: l.activations(),
        })
    }

    fn forward(
        &self,
        x: &Var,
        pictures: &Pictures,
        mut cache: Option<&mut KvCache>,
        tap: Option<&AttentionTap>,
    ) -> (Var, Option<Var>) {
        let per_head = |x: Var, heads: usize, norm: &RmsNorm| {
            let [b, t, c] = [x.dim(0), x.dim(1), x.dim(2)];
            norm.forward(&x.reshape(&[b, t, heads, c / heads]))
                .reshape(&[b, t, c])
        };
        let queries = |x: Var| per_head(x, self.shape.heads, &self.query_norm);
        let keys = |x: Var| per_head(x, self.shape.kv_heads, &self.key_norm);
        let normed = self.input_norm.forward(x);
        let q = queries(self.query.forward(&normed));
        let project = |states: &Var| {
            let k = keys(self.key.forward(states));
            (k, self.value.forward(states))
        };
        let cached = cache.as_ref().and_then(|cache| cache.get().cloned());
        let (k, v) = match (cached, &pictures.states) {
            (Some((k, v)), _) => (Var::constant(k), Var::constant(v)),
            (None, Some(states)) => project(states),
            (None, None) => unreachable!("a cross-attention layer without states is skipped"),
        };
        if let Some(cache) = &mut cache
            && cache.get().is_none()
        {
            cache.append(k.value(), v.value());
        }
        let (mut attended, mut probs) = attend(&q, &k, &v, self.shape, &pictures.mask, tap);
        if let Some(parallel) = self.parallel.as_ref().filter(|p| p.is_read(tap)) {
            let q = queries(parallel.query(&normed));
            let project = || {
                let states = pictures.states.as_ref().expect("the prompt's, or cached");
                let k = keys(parallel.key(states));
                let v = parallel.value(states, &k);
                (k, v)
            };
            let (k, v) = match cache {
                Some(cache) => cache.parallel(project),
                None => project(),
            };
            let tiles = &pictures.tiles;
            (attended, probs) = parallel.join((attended, probs), [&q, &k, &v], tiles, tap);
        }
        let gate = |gate: &Var| gate.tanh().cast(self.activations);
        let update = self
            .output
            .forward(&attended)
            .mul(&gate(&self.attention_gate));
        let x = x.add(&masked(update, &pictures.present));
        let update = self.mlp.forward(&self.post_norm.forward(&x));
        let update = masked(update, &pictures.seeing).mul(&gate(&self.mlp_gate));
        (x.add(&update), probs)
    }
}

fn masked(x: Var, mask: &Option<Var>) -> Var {
    match mask {
        Some(mask) => x.mul(mask),
        None => x,
    }
}

/// The layers and the norm behind them.
pub(super) struct Decoder {
    layers: Vec<Rc<Layer>>,
    norm: RmsNorm,
}

impl Decoder {
    /// Loads the decoder at `text` (`model.language_model`).
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn load(config: &MllamaConfig, text: &Loader) -> Result<Self> {
        let layer = |i: usize| -> Result<Rc<Layer>> {
            let l = text.sub("layers").sub(i);
            Ok(Rc::new(if config.cross_layers.contains(&i) {
                Layer::Cross(Box::new(CrossLayer::load(config, &l)?))
            } else {
                Layer::Text(Box::new(SelfLayer::load(config, &l)?))
            }))
        };
        Ok(Self {
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            norm: RmsNorm::load(&text.sub("norm"), config.hidden, config.eps)?,
        })
    }

    /// Puts a parallel attention beside that of the cross-attention layer `index`. To be done before the first forward.
    pub fn add_parallel(&mut self, index: usize, parallel: ParallelAttention) {
        match Rc::get_mut(&mut self.layers[index]).expect("no tape holds it yet") {
            Layer::Cross(layer) => layer.parallel = Some(parallel),
            Layer::Text(_) => unreachable!("the configuration lists cross-attention layers"),
        }
    }

    /// Hidden states of embeddings `x`, and the probabilities of each of `layers`, which count cross-attention layers
    /// alone.
    pub fn forward(
        &self,
        mut x: Var,
        pictures: Option<&Pictures>,
        positions: &Rc<Positions>,
        mut caches: Option<&mut [KvCache]>,
        (layers, tap): (&[usize], Option<&AttentionTap>),
        recompute: bool,
    ) -> (Var, Vec<Var>) {
        let mut found = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let cache = caches.as_mut().map(|caches| &mut caches[index]);
            let recompute = recompute && cache.is_none();
            match (&**layer, pictures) {
                // A text without pictures passes by the cross-attention layers.
                (Layer::Cross(_), None) => {}
                (Layer::Text(_), _) if recompute => x = recomputed_text(layer, x, positions),
                (Layer::Text(layer), _) => x = layer.forward(&x, positions, cache),
                (Layer::Cross(cross), Some(pictures)) => {
                    let tap = tap.filter(|_| layers.contains(&found.len()));
                    let probs;
                    (x, probs) = match recompute {
                        true => recomputed_cross(layer, x, pictures, tap),
                        false => cross.forward(&x, pictures, cache, tap),
                    };
                    found.push(probs);
                }
            }
        }
        let probs = layers
            .iter()
            .filter_map(|&layer| found.get_mut(layer)?.take());
        (self.norm.forward(&x), probs.collect())
    }
}

fn recomputed_text(layer: &Rc<Layer>, x: Var, positions: &Rc<Positions>) -> Var {
    let (layer, positions) = (layer.clone(), positions.clone());
    let mut outputs = recomputed(&[x], move |inputs| match &*layer {
        Layer::Text(layer) => vec![layer.forward(&inputs[0], &positions, None)],
        Layer::Cross(_) => unreachable!("called for text layers"),
    });
    outputs.remove(0)
}

fn recomputed_cross(
    layer: &Rc<Layer>,
    x: Var,
    pictures: &Pictures,
    tap: Option<&AttentionTap>,
) -> (Var, Option<Var>) {
    let (layer, pictures, tap) = (layer.clone(), pictures.clone(), tap.cloned());
    let inputs: Vec<Var> = [x].into_iter().chain(pictures.states.clone()).collect();
    // The tape of the encoder must not be entered from within: its states come in as an input.
    let pictures = Pictures {
        states: None,
        ..pictures
    };
    let mut outputs = recomputed(&inputs, move |inputs| match &*layer {
        Layer::Cross(layer) => {
            let pictures = Pictures {
                states: inputs.get(1).cloned(),
                ..pictures.clone()
            };
            let (x, probs) = layer.forward(&inputs[0], &pictures, None, tap.as_ref());
            [x].into_iter().chain(probs).collect()
        }
        Layer::Text(_) => unreachable!("called for cross-attention layers"),
    });
    let x = outputs.remove(0);
    (x, outputs.pop())
}
