//! Llama-3.2-Vision (Mllama): a Llama decoder with gated cross-attention layers that read the tiles
//! of the prompt's pictures.
//!
//! Tensor names are those of today's `transformers`; [`canonical`] maps the older ones.

use std::rc::Rc;

use super::decoder::{KvCache, Mlp, Positions, SelfAttention, attend};
pub use super::mllama_config::{MllamaConfig, canonical};
use super::mllama_processor::{MAX_IMAGES, MllamaPrompt, Tiles};
use super::mllama_vision::MllamaVision;
pub use super::mllama_vision::MllamaVisionConfig;
use super::parallel::ParallelAttention;
use crate::Result;
use crate::align::options::Parallel;
use crate::autograd::Var;
use crate::gpu::Gpu;
use crate::nn::{Embedding, Init, Linear, Loader, RmsNorm, recomputed};
use crate::ops::attention::{AttentionMask, AttentionShape};
use crate::ops::attention_tap::AttentionTap;
use crate::tensor::{DType, Tensor};

/// Rows of the token table past the vocabulary; `<|image|>` is the first of them.
pub(super) const EXTRA_TOKENS: usize = 8;

/// The bit of text rows that see no picture: such a row attends to every tile, and its feed-forward
/// update is dropped.
const EVERY_TILE: u32 = 1 << MAX_IMAGES;

/// One sample of a batch.
#[derive(Clone, Copy)]
pub struct MllamaInput<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// Per token, the pictures it may attend to: bit i for picture i.
    pub image_bits: &'a [u32],
    /// The pictures.
    pub images: &'a [Tiles],
}

impl<'a> From<&'a MllamaPrompt> for MllamaInput<'a> {
    fn from(prompt: &'a MllamaPrompt) -> Self {
        Self {
            ids: &prompt.encoded.ids,
            image_bits: &prompt.image_bits,
            images: &prompt.images,
        }
    }
}

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
struct Pictures {
    /// Projected tile states `[batch, keys, hidden]`; `None` once the layers' caches hold them.
    states: Option<Var>,
    mask: AttentionMask,
    /// The real tiles alone, whichever picture a row belongs to, which a parallel attention reads.
    tiles: AttentionMask,
    /// 1 for text rows that see a picture, `[batch, tokens, 1]`; `None` if all do.
    seeing: Option<Var>,
    /// 1 for samples with a picture, `[batch, 1, 1]`; `None` if all have.
    present: Option<Var>,
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

/// State of a generation: the layers' keys and values.
#[derive(Clone)]
pub struct MllamaCache {
    layers: Vec<KvCache>,
    tokens: usize,
    pictures: Option<Pictures>,
}

impl MllamaCache {
    /// Tokens held.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

/// The model.
pub struct Mllama {
    config: MllamaConfig,
    gpu: Gpu,
    activations: DType,
    vision: MllamaVision,
    projector: Linear,
    embedding: Embedding,
    layers: Vec<Rc<Layer>>,
    norm: RmsNorm,
    head: Linear,
    /// Recompute each decoder layer in the backward instead of keeping its activations.
    pub checkpointing: bool,
}

impl Mllama {
    /// Loads the model; the loader's checkpoint was renamed by [`canonical`].
    ///
    /// # Errors
    /// A missing tensor or another shape than the configuration's, by name.
    pub fn load(config: &MllamaConfig, loader: &Loader) -> Result<Self> {
        let (model, hidden) = (loader.sub("model"), config.hidden);
        let text = model.sub("language_model");
        let layer = |i: usize| -> Result<Rc<Layer>> {
            let l = text.sub("layers").sub(i);
            Ok(Rc::new(if config.cross_layers.contains(&i) {
                Layer::Cross(Box::new(CrossLayer::load(config, &l)?))
            } else {
                Layer::Text(Box::new(SelfLayer::load(config, &l)?))
            }))
        };
        Ok(Self {
            vision: MllamaVision::load(&config.vision, &model.sub("vision_model"))?,
            projector: Linear::load(
                &model.sub("multi_modal_projector"),
                config.vision.output(),
                hidden,
                true,
            )?,
            embedding: Embedding::load(
                &text.sub("embed_tokens"),
                config.vocabulary + EXTRA_TOKENS,
                hidden,
            )?,
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            norm: RmsNorm::load(&text.sub("norm"), hidden, config.eps)?,
            head: Linear::load(&loader.sub("lm_head"), hidden, config.vocabulary, false)?,
            gpu: loader.gpu().clone(),
            activations: loader.activations(),
            config: config.clone(),
            checkpointing: false,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &MllamaConfig {
        &self.config
    }

    /// Puts a parallel attention beside that of each of the cross-attention layers `layers`, counted among themselves,
    /// with the weights of `loader` at `model.language_model.layers.<layer>.cross_attn.parallel`.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn add_parallel(
        &mut self,
        loader: &Loader,
        kind: Parallel,
        layers: &[usize],
    ) -> Result<()> {
        let (hidden, shape) = (self.config.hidden, self.config.attention());
        let layers = layers
            .iter()
            .map(|&hooked| self.config.cross_layers[hooked]);
        for index in layers {
            let l = loader.sub("model.language_model.layers").sub(index);
            let l = l.sub("cross_attn.parallel");
            let parallel = ParallelAttention::load(&l, kind, hidden, hidden / shape.heads, shape)?;
            match Rc::get_mut(&mut self.layers[index]).expect("no tape holds it yet") {
                Layer::Cross(layer) => layer.parallel = Some(parallel),
                Layer::Text(_) => unreachable!("the configuration lists cross-attention layers"),
            }
        }
        Ok(())
    }

    /// Encodes pictures and projects them to the decoder's width:
    /// `[pictures, max_tiles · (1 + patches), hidden]`. `None` is a place without a picture.
    /// `recompute` forgets each layer's activations until the backward.
    pub fn encode(&self, pictures: &[Option<&Tiles>], recompute: bool) -> Var {
        self.projector
            .forward(&self.vision.forward(pictures, recompute))
    }

    /// Teacher-forced forward of a batch, shorter texts padded at their end: hidden states after the
    /// last norm `[batch, tokens, hidden]` (undefined past a sample's end), and the tapped
    /// probabilities `[rows, heads, columns]` of `layers`, which count cross-attention layers alone.
    pub fn forward(
        &self,
        inputs: &[MllamaInput<'_>],
        layers: &[usize],
        tap: Option<&AttentionTap>,
    ) -> (Var, Vec<Var>) {
        let tokens = inputs
            .iter()
            .map(|input| input.ids.len())
            .max()
            .unwrap_or(0);
        let x = self.embed(inputs, tokens);
        let pictures = self.pictures(inputs, tokens, self.checkpointing);
        let positions = Positions::new(&self.gpu, &self.config.rope, 0, tokens);
        self.run(x, pictures.as_ref(), &Rc::new(positions), None, layers, tap)
    }

    /// Logits `[.., vocabulary]` of hidden states `[.., hidden]`.
    pub fn logits(&self, hidden: &Var) -> Var {
        self.head.forward(hidden)
    }

    /// Mean next-token loss of hidden states [N, hidden], as [`Var::cross_entropy`] of their logits.
    pub fn next_token_loss(&self, hidden: &Var, labels: &Tensor, count: usize) -> Var {
        self.head.cross_entropy(hidden, labels, count)
    }

    /// Reads a prompt into a new cache; hidden states `[1, tokens, hidden]`.
    pub fn prefill(&self, input: MllamaInput<'_>) -> (Var, MllamaCache) {
        let (inputs, tokens) = ([input], input.ids.len());
        let x = self.embed(&inputs, tokens);
        let pictures = self.pictures(&inputs, tokens, false);
        let positions = Rc::new(Positions::new(&self.gpu, &self.config.rope, 0, tokens));
        let mut layers = vec![KvCache::default(); self.config.layers];
        let caches = Some(&mut layers[..]);
        let (hidden, _) = self.run(x, pictures.as_ref(), &positions, caches, &[], None);
        let last = input.image_bits.last().copied().unwrap_or(0);
        let pictures = pictures.map(|pictures| self.pictures_of_next(pictures, last));
        (
            hidden,
            MllamaCache {
                layers,
                tokens,
                pictures,
            },
        )
    }

    /// Reads one more token; hidden states `[1, 1, hidden]`.
    pub fn decode(&self, token: u32, cache: &mut MllamaCache) -> Var {
        let x = self
            .embedding
            .forward(&Tensor::from_u32(&self.gpu, &[token], &[1, 1]));
        let positions = Rc::new(Positions::new(
            &self.gpu,
            &self.config.rope,
            cache.tokens,
            1,
        ));
        cache.tokens += 1;
        let MllamaCache {
            layers, pictures, ..
        } = cache;
        self.run(
            x,
            pictures.as_ref(),
            &positions,
            Some(&mut layers[..]),
            &[],
            None,
        )
        .0
    }

    fn embed(&self, inputs: &[MllamaInput<'_>], tokens: usize) -> Var {
        let padded = |input: &MllamaInput<'_>| {
            let mut ids = input.ids.to_vec();
            ids.resize(tokens, 0);
            ids
        };
        let ids: Vec<u32> = inputs.iter().flat_map(padded).collect();
        self.embedding
            .forward(&Tensor::from_u32(&self.gpu, &ids, &[inputs.len(), tokens]))
    }

    /// Encodes a batch's pictures and says which rows see which; `None` where there is no picture.
    fn pictures(
        &self,
        inputs: &[MllamaInput<'_>],
        tokens: usize,
        recompute: bool,
    ) -> Option<Pictures> {
        let places = inputs
            .iter()
            .map(|input| input.images.len())
            .max()
            .unwrap_or(0);
        if places == 0 {
            return None;
        }
        let (batch, vision) = (inputs.len(), &self.config.vision);
        let slots: Vec<Option<&Tiles>> = inputs
            .iter()
            .flat_map(|input| (0..places).map(|place| input.images.get(place)))
            .collect();
        let keys = vision.max_tiles * vision.tokens();
        let states =
            self.encode(&slots, recompute)
                .reshape(&[batch, places * keys, self.config.hidden]);
        let key_bits: Vec<u32> = inputs
            .iter()
            .flat_map(|input| (0..places * keys).map(move |at| (input, at)))
            .map(|(input, at)| match input.images.get(at / keys) {
                Some(tiles) if at % keys / vision.tokens() < tiles.count() => {
                    EVERY_TILE | 1 << (at / keys)
                }
                Some(_) => EVERY_TILE,
                // A sample without pictures must see something; its update is dropped below.
                None if input.images.is_empty() => EVERY_TILE,
                None => 0,
            })
            .collect();
        let tile_bits: Vec<u32> = key_bits.iter().map(|bits| bits & !EVERY_TILE).collect();
        let bits = |at: usize, row: usize| inputs[at].image_bits.get(row).copied().unwrap_or(0);
        let rows: Vec<u32> = (0..batch * tokens)
            .map(|at| bits(at / tokens, at % tokens))
            .collect();
        let present: Vec<f32> = inputs
            .iter()
            .map(|input| f32::from(u8::from(!input.images.is_empty())))
            .collect();
        Some(Pictures {
            states: Some(states),
            mask: AttentionMask {
                causal: false,
                query_offset: 0,
                query_bits: Some(self.query_bits(&rows, &[batch, tokens])),
                key_bits: Some(Tensor::from_u32(
                    &self.gpu,
                    &key_bits,
                    &[batch, places * keys],
                )),
            },
            tiles: AttentionMask {
                key_bits: Some(Tensor::from_u32(
                    &self.gpu,
                    &tile_bits,
                    &[batch, places * keys],
                )),
                ..AttentionMask::default()
            },
            seeing: self.seeing(&rows, &[batch, tokens, 1]),
            present: present
                .contains(&0.0)
                .then(|| self.constant(&present, &[batch, 1, 1])),
        })
    }

    /// The same pictures for one following token, which sees what the last one saw.
    fn pictures_of_next(&self, pictures: Pictures, last: u32) -> Pictures {
        Pictures {
            states: None,
            mask: AttentionMask {
                query_bits: Some(self.query_bits(&[last], &[1, 1])),
                ..pictures.mask
            },
            tiles: pictures.tiles,
            seeing: self.seeing(&[last], &[1, 1, 1]),
            present: pictures.present,
        }
    }

    fn query_bits(&self, rows: &[u32], shape: &[usize]) -> Tensor {
        let bits: Vec<u32> = rows
            .iter()
            .map(|&bits| if bits == 0 { EVERY_TILE } else { bits })
            .collect();
        Tensor::from_u32(&self.gpu, &bits, shape)
    }

    fn seeing(&self, rows: &[u32], shape: &[usize]) -> Option<Var> {
        let values: Vec<f32> = rows
            .iter()
            .map(|&bits| f32::from(u8::from(bits != 0)))
            .collect();
        values.contains(&0.0).then(|| self.constant(&values, shape))
    }

    fn constant(&self, values: &[f32], shape: &[usize]) -> Var {
        Var::constant(Tensor::from_f32(&self.gpu, values, shape)).cast(self.activations)
    }

    fn run(
        &self,
        mut x: Var,
        pictures: Option<&Pictures>,
        positions: &Rc<Positions>,
        mut caches: Option<&mut [KvCache]>,
        layers: &[usize],
        tap: Option<&AttentionTap>,
    ) -> (Var, Vec<Var>) {
        let mut found = vec![None; self.config.cross_layers.len()];
        let mut hooked = 0;
        for (index, layer) in self.layers.iter().enumerate() {
            let cache = caches.as_mut().map(|caches| &mut caches[index]);
            let recompute = self.checkpointing && cache.is_none();
            match (&**layer, pictures) {
                // A text without pictures passes by the cross-attention layers.
                (Layer::Cross(_), None) => {}
                (Layer::Text(_), _) if recompute => x = recomputed_text(layer, x, positions),
                (Layer::Text(layer), _) => x = layer.forward(&x, positions, cache),
                (Layer::Cross(cross), Some(pictures)) => {
                    let tap = tap.filter(|_| layers.contains(&hooked));
                    (x, found[hooked]) = match recompute {
                        true => recomputed_cross(layer, x, pictures, tap),
                        false => cross.forward(&x, pictures, cache, tap),
                    };
                    hooked += 1;
                }
            }
        }
        let probs = layers
            .iter()
            .filter_map(|&layer| found[layer].take())
            .collect();
        (self.norm.forward(&x), probs)
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
