//! Llama-3.2-Vision (Mllama): a Llama decoder with gated cross-attention layers that read the tiles
//! of the prompt's pictures.
//!
//! Tensor names are those of today's `transformers`; [`canonical`] maps the older ones.

use std::rc::Rc;

use super::decoder::{KvCache, Positions, replayed_decoder};
pub use super::mllama_config::{MllamaConfig, canonical};
use super::mllama_decoder::{Decoder, Pictures};
use super::mllama_processor::{MAX_IMAGES, MllamaPrompt, Tiles};
use super::mllama_vision::MllamaVision;
pub use super::mllama_vision::MllamaVisionConfig;
use super::parallel::ParallelAttention;
use crate::Result;
use crate::align::options::Parallel;
use crate::autograd::{Replayed, Var};
use crate::gpu::Gpu;
use crate::nn::{Embedding, Linear, Loader};
use crate::ops::attention::AttentionMask;
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
    decoder: Rc<Decoder>,
    plans: Replayed,
    head: Linear,
    /// Whether a layer has a parallel attention.
    parallel: bool,
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
            decoder: Rc::new(Decoder::load(config, &text)?),
            plans: Replayed::new(loader.gpu()),
            head: Linear::load(&loader.sub("lm_head"), hidden, config.vocabulary, false)?,
            gpu: loader.gpu().clone(),
            activations: loader.activations(),
            config: config.clone(),
            parallel: false,
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
            let decoder = Rc::get_mut(&mut self.decoder).expect("no tape holds it yet");
            decoder.add_parallel(index, parallel);
        }
        self.parallel = true;
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
        x: Var,
        pictures: Option<&Pictures>,
        positions: &Rc<Positions>,
        caches: Option<&mut [KvCache]>,
        layers: &[usize],
        tap: Option<&AttentionTap>,
    ) -> (Var, Vec<Var>) {
        let recompute = self.checkpointing;
        if caches.is_some() || self.parallel {
            let tapped = (layers, tap);
            return self
                .decoder
                .forward(x, pictures, positions, caches, tapped, recompute);
        }
        let seen = pictures.map(Pictures::inputs).unwrap_or_default();
        let present = seen.each_ref().map(Option::is_some);
        let own: Vec<usize> = present
            .into_iter()
            .chain([recompute])
            .map(usize::from)
            .chain(layers.iter().copied())
            .collect();
        let inputs = [x].into_iter().chain(seen.into_iter().flatten()).collect();
        let (decoder, positions, hooked) =
            (self.decoder.clone(), positions.clone(), layers.to_vec());
        replayed_decoder(&self.plans, &own, inputs, tap, move |inputs, tap| {
            let mut rest = inputs[1..].iter().cloned();
            let seen = present.map(|present| present.then(|| rest.next()).flatten());
            let pictures = Pictures::of_inputs(seen);
            let tapped = (&hooked[..], tap);
            let x = inputs[0].clone();
            decoder.forward(x, pictures.as_ref(), &positions, None, tapped, recompute)
        })
    }
}
