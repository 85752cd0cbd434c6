//! The blocks of a Llama text decoder that several families share: rotary positions, causal
//! grouped-query self-attention with a key-value cache and a tap, and the gated feed-forward.

use std::path::Path;

use serde_json::Value;

use super::mirror::Mirror;
use super::parallel::ParallelAttention;
use crate::align::options::Parallel;
use crate::autograd::{Replayed, Var, attention, attention_tapped};
use crate::gpu::Gpu;
use crate::nn::{Linear, Loader, replayed};
use crate::ops::attention::{AttentionMask, AttentionShape};
use crate::ops::attention_tap::AttentionTap;
use crate::ops::concat::concat;
use crate::tensor::Tensor;
use crate::{Error, Result};

/// A positive whole number `section.key` of a configuration file.
///
/// # Errors
/// Names file, field, found and expected.
pub fn size(json: &Value, section: &str, key: &str, path: &Path) -> Result<usize> {
    let found = json.get(key);
    let number = found
        .and_then(Value::as_u64)
        .filter(|n| (1..1 << 31).contains(n));
    number.map(|n| n as usize).ok_or_else(|| {
        let found = found.map_or("nothing".to_string(), Value::to_string);
        let message =
            format!("field `{section}.{key}`: {found} found, a positive whole number expected");
        Error::file(path, message)
    })
}

/// A number `key` of a configuration, or `default` where it is absent.
pub fn number(json: &Value, key: &str, default: f64) -> f64 {
    json.get(key).and_then(Value::as_f64).unwrap_or(default)
}

/// Rotary position embedding: inverse frequencies per pair of channels.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    frequencies: Vec<f32>,
}

impl Rope {
    /// Reads `rope_parameters`, or `rope_theta` and `rope_scaling`, of a text configuration.
    ///
    /// The types `default` and `llama3` (Llama 3's stretching of low frequencies) are known.
    ///
    /// # Errors
    /// Another type, or a missing field of `llama3`, naming file and field.
    pub fn parse(json: &Value, section: &str, head_dim: usize, path: &Path) -> Result<Self> {
        let fields = |key: &str| json.get(key).filter(|v| v.is_object());
        let parameters = fields("rope_parameters").or_else(|| fields("rope_scaling"));
        let theta = parameters
            .and_then(|p| p.get("rope_theta"))
            .or_else(|| json.get("rope_theta"))
            .and_then(Value::as_f64)
            .unwrap_or(10_000.0);
        // The published model computes these in f32.
        let theta = theta as f32;
        let power = |i: usize| 1.0 / theta.powf((2 * i) as f32 / head_dim as f32);
        let frequencies: Vec<f32> = (0..head_dim / 2).map(power).collect();
        let Some(parameters) = parameters else {
            return Ok(Self { frequencies });
        };
        let kind = parameters
            .get("rope_type")
            .or_else(|| parameters.get("type"));
        match kind.and_then(Value::as_str).unwrap_or("default") {
            "default" => Ok(Self { frequencies }),
            "llama3" => {
                let field = |key: &str| {
                    let value = parameters.get(key).and_then(Value::as_f64);
                    value.map(|v| v as f32).ok_or_else(|| {
                        let message =
                            format!("field `{section}.rope_scaling.{key}`: a number expected");
                        Error::file(path, message)
                    })
                };
                let (factor, low) = (field("factor")?, field("low_freq_factor")?);
                let high = field("high_freq_factor")?;
                let context = field("original_max_position_embeddings")?;
                let stretch = |frequency: &f32| {
                    let wavelength = 2.0 * std::f32::consts::PI / frequency;
                    if wavelength < context / high {
                        return *frequency;
                    }
                    if wavelength > context / low {
                        return frequency / factor;
                    }
                    let smooth = (context / wavelength - low) / (high - low);
                    (1.0 - smooth) * (frequency / factor) + smooth * frequency
                };
                Ok(Self {
                    frequencies: frequencies.iter().map(stretch).collect(),
                })
            }
            other => {
                let message = format!(
                    "field `{section}.rope_scaling.rope_type`: {other:?} found, \"default\" or \
                     \"llama3\" expected"
                );
                Err(Error::file(path, message))
            }
        }
    }

    /// Cosines and sines `[1, count, head_dim / 2]` of positions `start..start + count`.
    pub fn tables(&self, gpu: &Gpu, start: usize, count: usize) -> (Tensor, Tensor) {
        let angles: Vec<f32> = (start..start + count)
            .flat_map(|position| self.frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        let shape = [1, count, self.frequencies.len()];
        let table = |f: fn(f32) -> f32| {
            let values: Vec<f32> = angles.iter().map(|&angle| f(angle)).collect();
            Tensor::from_f32(gpu, &values, &shape)
        };
        (table(f32::cos), table(f32::sin))
    }
}

/// Keys and values of the tokens so far, of one layer: `[1, tokens, kv_heads · head_dim]` each.
#[derive(Clone, Default)]
pub struct KvCache {
    own: Option<(Tensor, Tensor)>,
    /// Those of the parallel attention, which only the prompt has.
    parallel: Option<(Tensor, Tensor)>,
}

impl KvCache {
    /// Adds tokens and returns all keys and values.
    pub fn append(&mut self, key: &Tensor, value: &Tensor) -> (Tensor, Tensor) {
        let all = match self.own.take() {
            Some((keys, values)) => (concat(&[&keys, key], 1), concat(&[&values, value], 1)),
            None => (key.clone(), value.clone()),
        };
        self.own = Some(all.clone());
        all
    }

    /// What it holds.
    pub fn get(&self) -> Option<&(Tensor, Tensor)> {
        self.own.as_ref()
    }

    /// Keys and values of the parallel attention: the prompt's, from `project` the first time.
    pub fn parallel(&mut self, project: impl FnOnce() -> (Var, Var)) -> (Var, Var) {
        let (k, v) = self.parallel.get_or_insert_with(|| {
            let (k, v) = project();
            (k.value().clone(), v.value().clone())
        });
        (Var::constant(k.clone()), Var::constant(v.clone()))
    }
}

/// What a causal self-attention needs beside its hidden states.
pub struct Positions {
    /// Cosines and sines of [`Rope::tables`].
    pub tables: (Tensor, Tensor),
    /// Causal mask; its `query_offset` is the number of cached tokens.
    pub mask: AttentionMask,
    /// The picture's tokens alone, which a parallel attention reads.
    pub picture: Option<AttentionMask>,
    /// What is added to a tapped layer's probabilities.
    pub mirror: Option<Mirror>,
}

impl Positions {
    /// Positions of `count` tokens after `past` cached ones.
    pub fn new(gpu: &Gpu, rope: &Rope, past: usize, count: usize) -> Self {
        Self {
            tables: rope.tables(gpu, past, count),
            mask: AttentionMask {
                causal: true,
                query_offset: past,
                ..Default::default()
            },
            picture: None,
            mirror: None,
        }
    }
}

/// Causal grouped-query self-attention with rotary positions; tensors `q_proj`, `k_proj`, `v_proj`,
/// `o_proj` without bias. A parallel attention's queries and keys are turned by the same positions.
pub struct SelfAttention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    shape: AttentionShape,
    parallel: Option<ParallelAttention>,
}

impl SelfAttention {
    /// Loads the projections at `l`.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn load(
        l: &Loader,
        hidden: usize,
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self> {
        Ok(Self {
            query: Linear::load(&l.sub("q_proj"), hidden, heads * head_dim, false)?,
            key: Linear::load(&l.sub("k_proj"), hidden, kv_heads * head_dim, false)?,
            value: Linear::load(&l.sub("v_proj"), hidden, kv_heads * head_dim, false)?,
            output: Linear::load(&l.sub("o_proj"), heads * head_dim, hidden, false)?,
            shape: AttentionShape {
                heads,
                kv_heads,
                scale: (head_dim as f32).powf(-0.5),
            },
            parallel: None,
        })
    }

    /// Puts a parallel attention beside it, with the weights at `parallel` of `l`.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn add_parallel(
        &mut self,
        l: &Loader,
        kind: Parallel,
        hidden: usize,
        head_dim: usize,
    ) -> Result<()> {
        let l = l.sub("parallel");
        let parallel = ParallelAttention::load(&l, kind, hidden, head_dim, self.shape)?;
        self.parallel = Some(parallel);
        Ok(())
    }

    /// What normed hidden states `x` `[batch, tokens, hidden]` give, added to `onto`, with the tapped probabilities if
    /// asked.
    pub fn forward_onto(
        &self,
        x: &Var,
        onto: &Var,
        positions: &Positions,
        mut cache: Option<&mut KvCache>,
        tap: Option<&AttentionTap>,
    ) -> (Var, Option<Var>) {
        let (cos, sin) = &positions.tables;
        let heads = [self.shape.heads, self.shape.kv_heads];
        let (q, k) = (self.query.forward(x), self.key.forward(x));
        let [q, mut k] = Var::rotary_pair([&q, &k], cos, sin, heads);
        let mut v = self.value.forward(x);
        if let Some(cache) = &mut cache {
            let (keys, values) = cache.append(k.value(), v.value());
            (k, v) = (Var::constant(keys), Var::constant(values));
        }
        let (mut attended, mut probs) = attend(&q, &k, &v, self.shape, &positions.mask, tap);
        if let (Some(mirror), Some(own)) = (&positions.mirror, &probs) {
            probs = Some(mirror.add_to(own, &q, &k, self.shape));
        }
        if let (Some(parallel), Some(picture)) = (&self.parallel, &positions.picture)
            && parallel.is_read(tap)
        {
            let q = parallel.query(x).rotary(cos, sin, heads[0]);
            let project = || {
                let k = parallel.key(x).rotary(cos, sin, heads[1]);
                let v = parallel.value(x, &k);
                (k, v)
            };
            let (k, v) = match cache {
                Some(cache) => cache.parallel(project),
                None => project(),
            };
            (attended, probs) = parallel.join((attended, probs), [&q, &k, &v], picture, tap);
        }
        (self.output.forward_onto(&attended, onto), probs)
    }
}

/// What `f` makes of `inputs`, whose first are embeddings, replayed where the GPU was opened so: hidden states and the
/// tapped layers' probabilities `[rows, heads, columns]`.
pub fn replayed_decoder(
    plans: &Replayed,
    own: &[usize],
    mut inputs: Vec<Var>,
    tap: Option<&AttentionTap>,
    f: impl Fn(&[Var], Option<&AttentionTap>) -> (Var, Vec<Var>) + 'static,
) -> (Var, Vec<Var>) {
    let (count, rows) = (inputs.len(), tap.map(|tap| tap.query_rows.elements()));
    if let Some(tap) = tap {
        let tensors = [few(&tap.query_rows), tap.key_columns.clone()];
        inputs.extend(tensors.map(Var::constant));
    }
    let mut outputs = replayed(plans, own, &inputs, move |inputs| {
        let (inputs, tensors) = inputs.split_at(count);
        let tap = match tensors {
            [rows, columns] => Some(AttentionTap {
                query_rows: rows.value().clone(),
                key_columns: columns.value().clone(),
            }),
            _ => None,
        };
        let (hidden, taps) = f(inputs, tap.as_ref());
        [hidden].into_iter().chain(taps).collect()
    });
    let hidden = outputs.remove(0);
    let own_rows = |probs: Var| match rows {
        Some(rows) if rows < probs.dim(0) => probs.narrow(0, 0, rows),
        _ => probs,
    };
    (hidden, outputs.into_iter().map(own_rows).collect())
}

/// A tap's rows, where plans are replayed filled up to a power of two with rows that give nothing: few numbers of rows
/// have few plans.
fn few(rows: &Tensor) -> Tensor {
    let (gpu, count) = (rows.gpu(), rows.elements());
    if !gpu.replays() {
        return rows.clone();
    }
    let filled = vec![u32::MAX; count.next_power_of_two().max(8)];
    let filled = Tensor::from_u32(gpu, &filled, &[filled.len()]);
    filled.narrow(0, count).copy_from(rows);
    filled
}

/// [`attention`] with or without a tap.
pub fn attend(
    q: &Var,
    k: &Var,
    v: &Var,
    shape: AttentionShape,
    mask: &AttentionMask,
    tap: Option<&AttentionTap>,
) -> (Var, Option<Var>) {
    match tap {
        None => (attention(q, k, v, shape, mask), None),
        Some(tap) => {
            let (out, probs) = attention_tapped(q, k, v, shape, mask, tap);
            (out, Some(probs))
        }
    }
}

/// The gated feed-forward block: tensors `gate_proj`, `up_proj`, `down_proj` without bias.
pub struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    /// Loads the projections at `l`.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn load(l: &Loader, hidden: usize, intermediate: usize) -> Result<Self> {
        Ok(Self {
            gate: Linear::load(&l.sub("gate_proj"), hidden, intermediate, false)?,
            up: Linear::load(&l.sub("up_proj"), hidden, intermediate, false)?,
            down: Linear::load(&l.sub("down_proj"), intermediate, hidden, false)?,
        })
    }

    /// down(silu(gate(x)) · up(x)).
    pub fn forward(&self, x: &Var) -> Var {
        self.down.forward(&self.inner(x))
    }

    /// `onto` + what [`Mlp::forward`] gives.
    pub fn forward_onto(&self, x: &Var, onto: &Var) -> Var {
        self.down.forward_onto(&self.inner(x), onto)
    }

    fn inner(&self, x: &Var) -> Var {
        self.up.forward_gated(x, &self.gate.forward(x))
    }
}
