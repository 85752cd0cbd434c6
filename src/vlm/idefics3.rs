//! SmolVLM and Idefics3: a SigLIP encoder whose merged patches stand among the text tokens of a Llama
//! decoder.
//!
//! Tensor names are those of the checkpoints, old and new: `model.vision_model.…`, `model.connector.…`,
//! `model.text_model.…`, `lm_head.weight`.

use std::rc::Rc;

use super::decoder::{KvCache, Mlp, Positions, SelfAttention, replayed_decoder};
pub use super::idefics3_config::Idefics3Config;
use super::idefics3_processor::Tiles;
use super::mirror::Mirror;
use super::siglip::{Siglip, pixel_shuffle};
use crate::Result;
use crate::align::options::Parallel;
use crate::autograd::{Replayed, Var};
use crate::gpu::Gpu;
use crate::nn::{Embedding, Linear, Loader, RmsNorm, recomputed};
use crate::ops::attention::AttentionMask;
use crate::ops::attention_tap::AttentionTap;
use crate::tensor::Tensor;

/// One sample of a batch.
#[derive(Clone, Copy)]
pub struct Idefics3Input<'a> {
    /// Token ids, image tokens expanded.
    pub ids: &'a [u32],
    /// The pictures' tiles.
    pub images: &'a [Tiles],
    /// Position of every image token, in the order of the tiles' merged patches.
    pub image_positions: &'a [usize],
}

struct Layer {
    input_norm: RmsNorm,
    attention: SelfAttention,
    post_norm: RmsNorm,
    mlp: Mlp,
}

impl Layer {
    fn load(config: &Idefics3Config, l: &Loader) -> Result<Self> {
        let (hidden, eps) = (config.hidden, config.eps);
        let attn = l.sub("self_attn");
        Ok(Self {
            input_norm: RmsNorm::load(&l.sub("input_layernorm"), hidden, eps)?,
            attention: SelfAttention::load(
                &attn,
                hidden,
                config.heads,
                config.kv_heads,
                config.head_dim,
            )?,
            post_norm: RmsNorm::load(&l.sub("post_attention_layernorm"), hidden, eps)?,
            mlp: Mlp::load(&l.sub("mlp"), hidden, config.intermediate)?,
        })
    }

    fn forward(
        &self,
        x: &Var,
        positions: &Positions,
        cache: Option<&mut KvCache>,
        tap: Option<&AttentionTap>,
    ) -> (Var, Option<Var>) {
        let normed = self.input_norm.forward(x);
        let attention = &self.attention;
        let (x, probs) = attention.forward_onto(&normed, x, positions, cache, tap);
        let normed = self.post_norm.forward(&x);
        (self.mlp.forward_onto(&normed, &x), probs)
    }
}

/// The layers and the norm behind them.
struct Decoder {
    layers: Vec<Rc<Layer>>,
    norm: RmsNorm,
}

impl Decoder {
    /// Hidden states of embeddings `x`, and the probabilities of each of `layers`.
    fn forward(
        &self,
        mut x: Var,
        positions: &Rc<Positions>,
        mut caches: Option<&mut Vec<KvCache>>,
        (layers, tap): (&[usize], Option<&AttentionTap>),
        recompute: bool,
    ) -> (Var, Vec<Var>) {
        let mut found: Vec<Option<Var>> = vec![None; self.layers.len()];
        for (index, layer) in self.layers.iter().enumerate() {
            let tap = tap.filter(|_| layers.contains(&index));
            let cache = caches.as_mut().map(|caches| &mut caches[index]);
            (x, found[index]) = if recompute && cache.is_none() {
                let (layer, positions, tap) = (layer.clone(), positions.clone(), tap.cloned());
                let mut outputs = recomputed(&[x], move |inputs| {
                    let (x, probs) = layer.forward(&inputs[0], &positions, None, tap.as_ref());
                    [x].into_iter().chain(probs).collect()
                });
                (outputs.remove(0), outputs.pop())
            } else {
                layer.forward(&x, positions, cache, tap)
            };
        }
        let taps = layers
            .iter()
            .filter_map(|&index| found.get(index)?.clone())
            .collect();
        (self.norm.forward(&x), taps)
    }
}

/// State of a generation: every layer's keys and values.
#[derive(Clone)]
pub struct Idefics3Cache {
    layers: Vec<KvCache>,
    tokens: usize,
    picture: Option<AttentionMask>,
}

/// The model.
pub struct Idefics3 {
    config: Idefics3Config,
    gpu: Gpu,
    vision: Siglip,
    projection: Linear,
    embedding: Embedding,
    decoder: Rc<Decoder>,
    plans: Replayed,
    head: Linear,
    /// Whether a layer has a parallel attention.
    parallel: bool,
    /// Recompute each layer in the backward instead of keeping its activations.
    pub checkpointing: bool,
}

impl Idefics3 {
    /// Loads the model.
    ///
    /// # Errors
    /// A missing tensor or another shape than the configuration's, by name.
    pub fn load(config: &Idefics3Config, loader: &Loader) -> Result<Self> {
        let (model, hidden) = (loader.sub("model"), config.hidden);
        let text = model.sub("text_model");
        let merged = config.vision.hidden * config.scale_factor * config.scale_factor;
        let projection = model
            .sub("connector")
            .sub("modality_projection")
            .sub("proj");
        let vision = Siglip::load(&config.vision, &model.sub("vision_model"))?;
        let projection = Linear::load(&projection, merged, hidden, false)?;
        let embedding = Embedding::load(&text.sub("embed_tokens"), config.vocabulary, hidden)?;
        let layers = (0..config.layers)
            .map(|i| Ok(Rc::new(Layer::load(config, &text.sub("layers").sub(i))?)))
            .collect::<Result<_>>()?;
        let norm = RmsNorm::load(&text.sub("norm"), hidden, config.eps)?;
        let head = match config.tied {
            true => embedding.tied_projection(),
            false => Linear::load(&loader.sub("lm_head"), hidden, config.vocabulary, false)?,
        };
        Ok(Self {
            vision,
            projection,
            embedding,
            decoder: Rc::new(Decoder { layers, norm }),
            plans: Replayed::new(loader.gpu()),
            head,
            gpu: loader.gpu().clone(),
            config: config.clone(),
            parallel: false,
            checkpointing: false,
        })
    }

    /// Puts a parallel attention beside that of each of `layers`, with the weights of `loader` at
    /// `model.text_model.layers.<layer>.self_attn.parallel`.
    ///
    /// # Errors
    /// A missing tensor or another shape.
    pub fn add_parallel(
        &mut self,
        loader: &Loader,
        kind: Parallel,
        layers: &[usize],
    ) -> Result<()> {
        let (hidden, head_dim) = (self.config.hidden, self.config.head_dim);
        for &index in layers {
            let l = loader.sub("model.text_model.layers").sub(index);
            let decoder = Rc::get_mut(&mut self.decoder);
            let layer = decoder.and_then(|decoder| Rc::get_mut(&mut decoder.layers[index]));
            let attention = &mut layer.expect("no tape holds it yet").attention;
            attention.add_parallel(&l.sub("self_attn"), kind, hidden, head_dim)?;
        }
        self.parallel = true;
        Ok(())
    }

    /// The configuration.
    pub fn config(&self) -> &Idefics3Config {
        &self.config
    }

    /// Encodes tiles to image tokens `[tiles · tokens per tile, hidden]`, in the order of the tiles.
    pub fn encode<'a>(&self, pictures: impl Iterator<Item = &'a Tiles>, recompute: bool) -> Var {
        let (mut pixels, mut tiles) = (Vec::new(), 0);
        for picture in pictures {
            pixels.extend(picture.patches(self.config.vision.patch));
            tiles += picture.count();
        }
        let states = self.vision.forward(&pixels, tiles, recompute);
        self.projection
            .forward(&pixel_shuffle(&states, self.config.scale_factor))
    }

    /// Token embeddings of a batch padded to `tokens`, image tokens replaced by the pictures'.
    fn embed(&self, inputs: &[Idefics3Input<'_>], tokens: usize, recompute: bool) -> Var {
        let (mut ids, mut rows) = (Vec::with_capacity(inputs.len() * tokens), Vec::new());
        for (sample, input) in inputs.iter().enumerate() {
            ids.extend_from_slice(input.ids);
            ids.resize((sample + 1) * tokens, 0);
            rows.extend(
                input
                    .image_positions
                    .iter()
                    .map(|&at| (sample * tokens + at) as u32),
            );
        }
        let count = ids.len();
        let x = self
            .embedding
            .forward(&Tensor::from_u32(&self.gpu, &ids, &[count]));
        let pictures = inputs.iter().flat_map(|input| input.images);
        let x = match rows.len() {
            0 => x,
            n => {
                let rows = Tensor::from_u32(&self.gpu, &rows, &[n]);
                x.replace_rows(&rows, &self.encode(pictures, recompute))
            }
        };
        x.reshape(&[inputs.len(), tokens, self.config.hidden])
    }

    /// The mask that leaves the pictures' tokens, where a parallel attention asks for it.
    fn picture(&self, inputs: &[Idefics3Input<'_>], tokens: usize) -> Option<AttentionMask> {
        let mut bits = vec![0; inputs.len() * tokens];
        for (sample, input) in inputs.iter().enumerate() {
            for &at in input.image_positions {
                bits[sample * tokens + at] = 1;
            }
        }
        self.parallel.then(|| AttentionMask {
            key_bits: Some(Tensor::from_u32(&self.gpu, &bits, &[inputs.len(), tokens])),
            ..AttentionMask::default()
        })
    }

    /// Teacher-forced forward: hidden states after the last norm `[batch, tokens, hidden]`, shorter samples
    /// padded at their end (where rows are undefined; no real row sees them), and the probabilities
    /// `[rows, heads, columns]` of each tapped layer, in the order of `layers`.
    pub fn forward(
        &self,
        inputs: &[Idefics3Input<'_>],
        layers: &[usize],
        tap: Option<&AttentionTap>,
    ) -> (Var, Vec<Var>) {
        self.forward_mirrored(inputs, layers, tap, None)
    }

    /// [`Idefics3::forward`] with `mirror` added to the probabilities.
    pub fn forward_mirrored(
        &self,
        inputs: &[Idefics3Input<'_>],
        layers: &[usize],
        tap: Option<&AttentionTap>,
        mirror: Option<&Mirror>,
    ) -> (Var, Vec<Var>) {
        let tokens = inputs
            .iter()
            .map(|input| input.ids.len())
            .max()
            .unwrap_or(0);
        let x = self.embed(inputs, tokens, self.checkpointing);
        let positions = Rc::new(Positions {
            picture: self.picture(inputs, tokens),
            mirror: mirror.cloned(),
            ..Positions::new(&self.gpu, &self.config.rope, 0, tokens)
        });
        self.run(x, &positions, None, layers, tap)
    }

    /// Reads a prompt into a new cache; hidden states `[1, tokens, hidden]`.
    pub fn prefill(&self, input: Idefics3Input<'_>) -> (Var, Idefics3Cache) {
        let tokens = input.ids.len();
        let x = self.embed(&[input], tokens, false);
        let mut cache = Idefics3Cache {
            layers: vec![KvCache::default(); self.config.layers],
            tokens,
            picture: self.picture(&[input], tokens),
        };
        let positions = Rc::new(Positions {
            picture: cache.picture.clone(),
            ..Positions::new(&self.gpu, &self.config.rope, 0, tokens)
        });
        let (hidden, _) = self.run(x, &positions, Some(&mut cache.layers), &[], None);
        (hidden, cache)
    }

    /// Reads one more token; hidden states `[1, 1, hidden]`.
    pub fn decode(&self, token: u32, cache: &mut Idefics3Cache) -> Var {
        let x = self
            .embedding
            .forward(&Tensor::from_u32(&self.gpu, &[token], &[1, 1]));
        let positions = Rc::new(Positions {
            picture: cache.picture.clone(),
            ..Positions::new(&self.gpu, &self.config.rope, cache.tokens, 1)
        });
        cache.tokens += 1;
        self.run(x, &positions, Some(&mut cache.layers), &[], None)
            .0
    }

    /// Logits `[.., vocabulary]` of hidden states `[.., hidden]`.
    pub fn logits(&self, hidden: &Var) -> Var {
        self.head.forward(hidden)
    }

    /// Mean next-token loss of hidden states [N, hidden], as [`Var::cross_entropy`] of their logits.
    pub fn next_token_loss(&self, hidden: &Var, labels: &Tensor, count: usize) -> Var {
        self.head.cross_entropy(hidden, labels, count)
    }

    fn run(
        &self,
        x: Var,
        positions: &Rc<Positions>,
        caches: Option<&mut Vec<KvCache>>,
        layers: &[usize],
        tap: Option<&AttentionTap>,
    ) -> (Var, Vec<Var>) {
        let recompute = self.checkpointing;
        if caches.is_some() || positions.picture.is_some() || positions.mirror.is_some() {
            let tapped = (layers, tap);
            return self
                .decoder
                .forward(x, positions, caches, tapped, recompute);
        }
        let own: Vec<usize> = [usize::from(recompute)]
            .into_iter()
            .chain(layers.iter().copied())
            .collect();
        let (decoder, positions, hooked) =
            (self.decoder.clone(), positions.clone(), layers.to_vec());
        replayed_decoder(&self.plans, &own, vec![x], tap, move |inputs, tap| {
            let tapped = (&hooked[..], tap);
            decoder.forward(inputs[0].clone(), &positions, None, tapped, recompute)
        })
    }
}
