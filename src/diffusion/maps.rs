//! Word maps from the U-Net's cross-attention: which layers, averaged how.

use crate::Result;
use crate::autograd::Var;
use crate::ops::binary::{Binary, binary};
use crate::ops::resize_bicubic::resize_bicubic;
use crate::ops::resize_bilinear::resize_bilinear;
use crate::ops::unary::{Unary, unary};
use crate::tensor::Tensor;

/// Side R of every word map.
pub const MAP_SIDE: usize = 32;

/// Which cross-attention layers make the maps: `maps.layers`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MapLayers {
    /// Down and up blocks at 1/2 and 1/4 of the latent side, each side's mean resized, then the mean of the two
    /// (`"16+32"`, after the sides of Stable Diffusion v1).
    #[default]
    HalfAndQuarter,
    /// Down and up blocks at 1/4 of the latent side alone (`"16"`), as prompt-to-prompt does.
    Quarter,
    /// Down and up blocks at every side but 1/8 of the latent side; each layer resized to the latent side by bicubic
    /// interpolation and clamped at 0, then the mean of all layers (`"daam"`; Tang et al., *What the DAAM*, 2022, but
    /// heads are averaged before the clamp, not after).
    Daam,
}

impl MapLayers {
    /// Parses `"16"`, `"16+32"` or `"daam"`.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "16+32" => Ok(MapLayers::HalfAndQuarter),
            "16" => Ok(MapLayers::Quarter),
            "daam" => Ok(MapLayers::Daam),
            other => Err(crate::Error::Config(format!(
                "maps.layers: found \"{other}\", expected \"16+32\", \"16\" or \"daam\""
            ))),
        }
    }

    /// The name that [`MapLayers::parse`] reads.
    pub fn name(self) -> &'static str {
        match self {
            MapLayers::HalfAndQuarter => "16+32",
            MapLayers::Quarter => "16",
            MapLayers::Daam => "daam",
        }
    }

    fn wants(self, layer: &str, side: usize, latent_side: usize) -> bool {
        let outer = layer.starts_with("down_blocks.") || layer.starts_with("up_blocks.");
        match self {
            MapLayers::HalfAndQuarter => {
                outer && (2 * side == latent_side || 4 * side == latent_side)
            }
            MapLayers::Quarter => outer && 4 * side == latent_side,
            MapLayers::Daam => outer && 8 * side != latent_side,
        }
    }
}

/// A captured layer's name and the side of its maps.
pub(super) type Layer = (String, usize);

/// A layer's maps, summed over steps.
struct LayerSum {
    name: String,
    side: usize,
    /// f32 `[batch, side², tokens]`.
    sum: Tensor,
    steps: usize,
}

/// Collects cross-attention maps over a U-Net's layers and over steps; the hook of [`super::Unet::forward`].
///
/// It is handed probabilities already averaged over heads, and keeps one sum a layer; made by
/// [`Capture::on_tape`] it keeps the maps of one forward with their gradients instead.
pub struct Capture {
    layers: MapLayers,
    latent_side: usize,
    sums: Vec<LayerSum>,
    tape: Option<Vec<Var>>,
}

impl Capture {
    /// An empty capture for latents of `latent_side`².
    pub fn new(layers: MapLayers, latent_side: usize) -> Self {
        Capture {
            layers,
            latent_side,
            sums: Vec::new(),
            tape: None,
        }
    }

    /// A capture that keeps each layer's probabilities on the tape, for a loss on them.
    pub fn on_tape(layers: MapLayers, latent_side: usize) -> Self {
        Capture {
            tape: Some(Vec::new()),
            ..Capture::new(layers, latent_side)
        }
    }

    /// Another of the same kind that has collected nothing.
    pub(super) fn emptied(&self) -> Self {
        Capture::new(self.layers, self.latent_side)
    }

    /// Tells kinds of captures off the tape apart.
    pub(super) fn key(&self) -> Vec<usize> {
        vec![self.layers as usize, self.latent_side]
    }

    /// What it has collected: each layer's sum.
    pub(super) fn into_layers(self) -> Vec<(Layer, Tensor)> {
        let layer = |l: LayerSum| ((l.name, l.side), l.sum);
        self.sums.into_iter().map(layer).collect()
    }

    /// Whether maps are kept on the tape.
    pub fn keeps_tape(&self) -> bool {
        self.tape.is_some()
    }

    /// Keeps one layer's probabilities f32 `[batch, side², tokens]`, mean over heads.
    pub(super) fn keep(&mut self, probs: Var) {
        self.tape.get_or_insert_default().push(probs);
    }

    /// The maps kept on the tape, one `[batch, side², tokens]` a layer.
    pub fn kept(self) -> Vec<Var> {
        self.tape.unwrap_or_default()
    }

    /// Whether the layer `name` (`down_blocks.1.attentions.0.transformer_blocks.0`) with a query grid of `side`² is
    /// one to record.
    pub fn wants(&self, name: &str, side: usize) -> bool {
        self.layers.wants(name, side, self.latent_side)
    }

    /// Adds one step's mean-over-heads probabilities, f32 `[batch, height·width, tokens]`.
    pub fn add(&mut self, name: &str, height: usize, width: usize, probs: Tensor) {
        assert_eq!(height, width, "capture of {name}: the grid must be square");
        match self.sums.iter_mut().find(|layer| layer.name == name) {
            Some(layer) => {
                layer.sum = binary(&layer.sum, &probs, Binary::Add);
                layer.steps += 1;
            }
            None => self.sums.push(LayerSum {
                name: name.to_string(),
                side: height,
                sum: probs,
                steps: 1,
            }),
        }
    }

    /// Every layer's name, side and mean over its steps, f32 `[batch, side², tokens]`.
    pub fn layers(&self) -> impl Iterator<Item = (&str, usize, Tensor)> {
        self.sums
            .iter()
            .map(|l| (l.name.as_str(), l.side, scale(&l.sum, l.steps)))
    }

    /// The maps of every context position, f32 `[batch, R, R, tokens]` with R = 32, as [`MapLayers`] describes.
    ///
    /// # Errors
    /// The U-Net has no layer of the sides asked for.
    pub fn aggregate(&self) -> Result<Tensor> {
        let mut sides: Vec<usize> = self.sums.iter().map(|l| l.side).collect();
        sides.sort_unstable();
        sides.dedup();
        let needed = match self.layers {
            MapLayers::HalfAndQuarter => 2,
            MapLayers::Quarter | MapLayers::Daam => 1,
        };
        if sides.len() < needed {
            return Err(crate::Error::Config(format!(
                "maps.layers = \"{}\" needs cross-attention at {}, but this U-Net of latent side {} has it at {sides:?} only",
                self.layers.name(),
                match self.layers {
                    MapLayers::HalfAndQuarter => "1/2 and 1/4 of the latent side",
                    MapLayers::Quarter => "1/4 of the latent side",
                    MapLayers::Daam => "a side other than 1/8 of the latent side",
                },
                self.latent_side,
            )));
        }
        let maps = match self.layers {
            MapLayers::Daam => self
                .layers()
                .map(|(_, side, maps)| self.enlarged(&maps, side))
                .collect(),
            _ => sides.iter().map(|&side| self.mean_of(side)).collect(),
        };
        Ok(mean(maps))
    }

    /// The mean of a side's layers at R².
    fn mean_of(&self, side: usize) -> Tensor {
        let of_side = self.layers().filter(|&(_, s, _)| s == side);
        let maps = mean(of_side.map(|(_, _, maps)| maps).collect());
        resize_bilinear(&square(&maps, side), MAP_SIDE, MAP_SIDE)
    }

    /// One layer's maps at the latent side without the negative values of bicubic interpolation, then at R².
    fn enlarged(&self, maps: &Tensor, side: usize) -> Tensor {
        let large = resize_bicubic(&square(maps, side), self.latent_side, self.latent_side);
        resize_bilinear(&unary(&large, Unary::Relu), MAP_SIDE, MAP_SIDE)
    }
}

/// `[batch, side², tokens]` as `[batch, side, side, tokens]`.
fn square(maps: &Tensor, side: usize) -> Tensor {
    maps.reshape(&[maps.dim(0), side, side, maps.dim(2)])
}

/// The mean of tensors of one shape, at least one.
fn mean(maps: Vec<Tensor>) -> Tensor {
    let count = maps.len();
    let sum = maps.into_iter().reduce(|a, b| binary(&a, &b, Binary::Add));
    scale(&sum.expect("at least one side was checked for"), count)
}

/// `x / count`.
fn scale(x: &Tensor, count: usize) -> Tensor {
    if count == 1 {
        return x.clone();
    }
    unary(x, Unary::Affine(1.0 / count as f32, 0.0))
}

/// The maps of a text's tokens, those of all its chunks in text order.
#[derive(Clone, Debug, Default)]
pub struct TokenMaps {
    /// Where each token stands: `[start, end)` in characters of the text. No BOS, EOS or padding.
    pub offsets: Vec<(usize, usize)>,
    /// A map of R·R probabilities a token, row-major.
    pub maps: Vec<Vec<f32>>,
}

impl TokenMaps {
    /// Adds a chunk: its tokens' offsets, and `[R, R, context]` maps whose position 0 is BOS.
    pub fn push(&mut self, offsets: &[(usize, usize)], context_maps: &[f32]) {
        let context = context_maps.len() / (MAP_SIDE * MAP_SIDE);
        for (i, &offset) in offsets.iter().enumerate() {
            self.offsets.push(offset);
            self.maps.push(
                context_maps
                    .iter()
                    .skip(1 + i)
                    .step_by(context)
                    .copied()
                    .collect(),
            );
        }
    }

    /// The weighted sum of tokens' maps: a word's `raw` map from the weights of its tokens.
    pub fn weighted(&self, weights: &[(usize, f32)]) -> Vec<f32> {
        let mut map = vec![0.0; MAP_SIDE * MAP_SIDE];
        for &(token, weight) in weights {
            for (sum, value) in map.iter_mut().zip(&self.maps[token]) {
                *sum += weight * value;
            }
        }
        map
    }
}
