//! Pictures and prompts for Llama-3.2-Vision, as transformers' `MllamaProcessor` prepares them.
//!
//! A picture is scaled onto a canvas of up to `max_image_tiles` square tiles, padded at the right and the
//! bottom, and cut into tiles in raster order. The text holds one `<|image|>` token per picture; what a
//! token may attend to follows from its place among them.

use std::path::Path;

use image::RgbImage;
use serde_json::Value;

use super::processor::labels::{Rendered, Tail, labels, render};
use super::processor::resize::{Filter, resize};
use super::processor::template::{ChatTemplate, Message};
use super::processor::tokenizer::{Encoded, TextTokenizer, read_json};
use crate::{Error, Result};

/// The token that stands for a picture.
pub const IMAGE_TOKEN: &str = "<|image|>";

/// Most pictures a prompt may have: each takes a bit of a 32-bit mask, and one is kept for "every tile".
pub const MAX_IMAGES: usize = 31;

/// A picture cut into tiles.
#[derive(Clone, Debug, PartialEq)]
pub struct Tiles {
    /// Normalised pixels `[tiles, 3, side, side]`, tiles in raster order of the grid.
    pub pixels: Vec<f32>,
    /// Tiles down and across.
    pub grid: (usize, usize),
    /// Index of the grid among the supported ones, from 1 (0 is "no picture").
    pub aspect_ratio_id: u32,
    /// Side of a tile in pixels.
    pub side: usize,
}

impl Tiles {
    /// Number of tiles, `grid.0 × grid.1`.
    pub fn count(&self) -> usize {
        self.grid.0 * self.grid.1
    }

    /// Pixels of non-overlapping square patches, `[tiles, patches, 3 · patch · patch]` in the order of a
    /// convolution kernel (channel, row, column), so that the patch embedding is a matrix product.
    pub fn patches(&self, patch: usize) -> Vec<f32> {
        let side = self.side;
        let across = side / patch;
        let mut out = Vec::with_capacity(self.count() * across * across * 3 * patch * patch);
        for tile in self.pixels.chunks_exact(3 * side * side) {
            for (row, column) in (0..across * across).map(|p| (p / across, p % across)) {
                for channel in tile.chunks_exact(side * side) {
                    for y in row * patch..(row + 1) * patch {
                        out.extend_from_slice(&channel[y * side + column * patch..][..patch]);
                    }
                }
            }
        }
        out
    }
}

/// How pictures are cut and normalised: the image processor's part of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct TilingConfig {
    /// Side of a tile in pixels (`size.height`, which equals `size.width`).
    pub side: usize,
    /// `max_image_tiles`.
    pub max_tiles: usize,
    /// Resampling filter of `resample`.
    pub filter: Filter,
    /// Factor on 8-bit values (`rescale_factor`; 1 where `do_rescale` is false).
    pub rescale: f64,
    /// `image_mean` per channel (0 where `do_normalize` is false).
    pub mean: [f64; 3],
    /// `image_std` per channel (1 where `do_normalize` is false).
    pub std: [f64; 3],
}

impl TilingConfig {
    /// Reads `preprocessor_config.json`, or `image_processor` within `processor_config.json`.
    ///
    /// # Errors
    /// Neither file, or a field with an unusable value, naming file and field.
    pub fn load(dir: &Path) -> Result<Self> {
        for (file, nested) in [
            ("processor_config.json", true),
            ("preprocessor_config.json", false),
        ] {
            let path = dir.join(file);
            let Some(json) = read_json(&path)? else {
                continue;
            };
            let json = if nested {
                json.get("image_processor").cloned().unwrap_or(Value::Null)
            } else {
                json
            };
            if json.is_object() {
                return Self::parse(&json, &path);
            }
        }
        Err(Error::file(
            dir,
            "no image processor found: expected `preprocessor_config.json`, or `processor_config.json` with \
             a field `image_processor`",
        ))
    }

    fn parse(json: &Value, path: &Path) -> Result<Self> {
        let wrong = |field: &str, expected: &str| {
            let found = json
                .get(field)
                .map_or("nothing".to_string(), Value::to_string);
            Error::file(
                path,
                format!("field `{field}`: {found} found, {expected} expected"),
            )
        };
        let flag = |field: &str| json.get(field).and_then(Value::as_bool).unwrap_or(true);
        for field in ["do_resize", "do_pad"] {
            if !flag(field) {
                return Err(wrong(
                    field,
                    "true (this model family cuts pictures into tiles)",
                ));
            }
        }
        let size = |key: &str| {
            json.get("size")
                .and_then(|s| s.get(key))
                .and_then(Value::as_u64)
        };
        let side = match (size("height"), size("width")) {
            (Some(height), Some(width)) if height == width && (1..=1 << 14).contains(&height) => {
                height as usize
            }
            _ => return Err(wrong("size", "equal `height` and `width` of 1 to 16384")),
        };
        let max_tiles = match json.get("max_image_tiles") {
            None => 4,
            Some(value) => value
                .as_u64()
                .filter(|n| (1..=64).contains(n))
                .ok_or_else(|| wrong("max_image_tiles", "a whole number from 1 to 64"))?
                as usize,
        };
        let filter = match json.get("resample") {
            None | Some(Value::Null) => Filter::Bilinear,
            Some(value) => value
                .as_u64()
                .and_then(Filter::from_pil)
                .ok_or_else(|| wrong("resample", "a number of PIL's filters, 1 to 5"))?,
        };
        let triple = |field: &str, default: [f64; 3]| -> Result<[f64; 3]> {
            if !flag("do_normalize") || json.get(field).is_none() {
                return Ok(default);
            }
            let numbers: Option<Vec<f64>> = json[field]
                .as_array()
                .and_then(|list| list.iter().map(Value::as_f64).collect());
            numbers
                .and_then(|list| <[f64; 3]>::try_from(list).ok())
                .ok_or_else(|| wrong(field, "three numbers"))
        };
        let plain = !flag("do_normalize");
        let std = triple("image_std", if plain { [1.0; 3] } else { [0.5; 3] })?;
        if std.contains(&0.0) {
            return Err(wrong("image_std", "three numbers other than 0"));
        }
        let rescale = json
            .get("rescale_factor")
            .and_then(Value::as_f64)
            .unwrap_or(1.0 / 255.0);
        Ok(Self {
            side,
            max_tiles,
            filter,
            rescale: if flag("do_rescale") { rescale } else { 1.0 },
            mean: triple("image_mean", if plain { [0.0; 3] } else { [0.5; 3] })?,
            std,
        })
    }

    /// The grids of at most `max_tiles` tiles, (down, across), in the order of their ids from 1.
    pub fn grids(&self) -> Vec<(usize, usize)> {
        let all = 1..=self.max_tiles;
        let pairs = all
            .clone()
            .flat_map(|down| all.clone().map(move |across| (down, across)));
        pairs
            .filter(|(down, across)| down * across <= self.max_tiles)
            .collect()
    }

    /// The grid for a picture: the smallest enlargement that fits, else the mildest reduction; of equal
    /// scales the smallest area.
    pub fn grid_for(&self, width: u32, height: u32) -> (usize, usize) {
        let scale = |&(down, across): &(usize, usize)| {
            let vertical = (down * self.side) as f64 / f64::from(height);
            let horizontal = (across * self.side) as f64 / f64::from(width);
            if horizontal > vertical {
                vertical
            } else {
                horizontal
            }
        };
        let grids = self.grids();
        let enlarging = grids
            .iter()
            .map(scale)
            .filter(|&s| s >= 1.0)
            .fold(f64::INFINITY, f64::min);
        let chosen = if enlarging.is_finite() {
            enlarging
        } else {
            grids.iter().map(scale).fold(0.0, f64::max)
        };
        let fitting = grids.into_iter().filter(|grid| scale(grid) == chosen);
        // `min_by_key` keeps the first of equals, as numpy's argmin does.
        fitting
            .min_by_key(|(down, across)| down * across)
            .unwrap_or((1, 1))
    }

    /// The size (width, height) a picture is resized to before it is padded to its canvas.
    fn fitted(&self, width: u32, height: u32, grid: (usize, usize)) -> (u32, u32) {
        let side = self.side as u32;
        let target_width = width.clamp(side, grid.1 as u32 * side);
        let target_height = height.clamp(side, grid.0 as u32 * side);
        let vertical = f64::from(target_height) / f64::from(height);
        let horizontal = f64::from(target_width) / f64::from(width);
        if horizontal < vertical {
            let fitted = (f64::from(height) * horizontal).floor() as u32;
            (target_width, fitted.max(1).min(target_height))
        } else {
            let fitted = (f64::from(width) * vertical).floor() as u32;
            (fitted.max(1).min(target_width), target_height)
        }
    }

    /// Cuts a picture into tiles.
    pub fn tiles(&self, picture: &RgbImage) -> Tiles {
        let grid = self.grid_for(picture.width(), picture.height());
        let (width, height) = self.fitted(picture.width(), picture.height(), grid);
        let scaled = resize(picture, width, height, self.filter);
        let side = self.side;
        // Value of every byte per channel; padding is a black pixel, normalised like the others.
        let table: [[f32; 256]; 3] = std::array::from_fn(|c| {
            std::array::from_fn(|v| ((v as f64 * self.rescale - self.mean[c]) / self.std[c]) as f32)
        });
        let mut pixels = Vec::with_capacity(grid.0 * grid.1 * 3 * side * side);
        for (down, across) in (0..grid.0 * grid.1).map(|tile| (tile / grid.1, tile % grid.1)) {
            for (channel, values) in table.iter().enumerate() {
                for y in (down * side) as u32..((down + 1) * side) as u32 {
                    for x in (across * side) as u32..((across + 1) * side) as u32 {
                        let inside = x < width && y < height;
                        let byte = if inside {
                            scaled.get_pixel(x, y).0[channel]
                        } else {
                            0
                        };
                        pixels.push(values[usize::from(byte)]);
                    }
                }
            }
        }
        let id = self
            .grids()
            .iter()
            .position(|&g| g == grid)
            .map_or(0, |index| index as u32 + 1);
        Tiles {
            pixels,
            grid,
            aspect_ratio_id: id,
            side,
        }
    }
}

/// A conversation ready for the model.
#[derive(Clone, Debug)]
pub struct MllamaPrompt {
    /// The string that was tokenised, with the byte spans of its answers.
    pub rendered: Rendered,
    /// Tokens with their byte spans.
    pub encoded: Encoded,
    /// A token's own id where it is learned, else `labels::IGNORE`; not shifted.
    pub labels: Vec<u32>,
    /// The pictures, one per `<|image|>`.
    pub images: Vec<Tiles>,
    /// Per token, the pictures that it may attend to: bit i for picture i.
    pub image_bits: Vec<u32>,
}

/// The processor of a Llama-3.2-Vision checkpoint.
pub struct MllamaProcessor {
    /// How pictures are cut.
    pub tiling: TilingConfig,
    /// The checkpoint's tokenizer.
    pub tokenizer: TextTokenizer,
    /// The checkpoint's chat template.
    pub template: ChatTemplate,
    /// Id of `<|image|>`.
    pub image_token: u32,
    bos: String,
}

impl MllamaProcessor {
    /// Loads the processor's files of a checkpoint directory.
    ///
    /// # Errors
    /// A missing or unusable file, or a tokenizer without `<|image|>` or BOS.
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let tokenizer = TextTokenizer::load(dir)?;
        let template = ChatTemplate::load(dir, &tokenizer)?;
        let image_token = tokenizer.required_id(IMAGE_TOKEN)?;
        let bos = tokenizer
            .named("bos_token")
            .unwrap_or("<|begin_of_text|>")
            .to_string();
        tokenizer.required_id(&bos)?;
        Ok(Self {
            tiling: TilingConfig::load(dir)?,
            tokenizer,
            template,
            image_token,
            bos,
        })
    }

    /// Renders, tokenises and labels a conversation. The pictures go to its image parts in order.
    ///
    /// # Errors
    /// A count of pictures other than the conversation's image parts, more than [`MAX_IMAGES`], an empty
    /// answer, or what the template refuses.
    pub fn conversation(
        &self,
        messages: &[Message],
        pictures: &[RgbImage],
        tail: Tail<'_>,
    ) -> Result<MllamaPrompt> {
        self.prepare(render(&self.template, messages, tail)?, pictures)
    }

    /// Tokenises a text as it stands (with its `<|image|>` tokens), BOS added where it has none.
    ///
    /// # Errors
    /// As [`MllamaProcessor::conversation`].
    pub fn text(&self, text: &str, pictures: &[RgbImage]) -> Result<MllamaPrompt> {
        self.prepare(
            Rendered {
                text: text.to_string(),
                answers: Vec::new(),
            },
            pictures,
        )
    }

    fn prepare(&self, rendered: Rendered, pictures: &[RgbImage]) -> Result<MllamaPrompt> {
        let rendered = with_bos(rendered, &self.bos);
        // The text carries its own BOS; the tokenizer's post-processor would put a second one before it.
        let encoded = self.tokenizer.encode(&rendered.text, false)?;
        let found = encoded
            .ids
            .iter()
            .filter(|&&id| id == self.image_token)
            .count();
        if found != pictures.len() {
            return Err(Error::Input(format!(
                "the prompt has {found} `{IMAGE_TOKEN}` tokens, expected one per image ({}); the text itself \
                 must not contain `{IMAGE_TOKEN}`",
                pictures.len()
            )));
        }
        if found > MAX_IMAGES {
            return Err(Error::Input(format!(
                "{found} images in one prompt, at most {MAX_IMAGES} are supported"
            )));
        }
        Ok(MllamaPrompt {
            labels: labels(&self.tokenizer, &rendered, &encoded),
            image_bits: image_bits(&encoded.ids, self.image_token),
            images: pictures
                .iter()
                .map(|picture| self.tiling.tiles(picture))
                .collect(),
            rendered,
            encoded,
        })
    }
}

/// Adds BOS after the leading image tokens of a text that has none.
fn with_bos(rendered: Rendered, bos: &str) -> Rendered {
    if rendered.text.contains(bos) {
        return rendered;
    }
    let text = rendered.text.trim_start_matches(IMAGE_TOKEN);
    let at = rendered.text.len() - text.len();
    let moved = |position: usize| {
        if position >= at {
            position + bos.len()
        } else {
            position
        }
    };
    Rendered {
        text: format!("{}{bos}{text}", &rendered.text[..at]),
        answers: rendered
            .answers
            .iter()
            .map(|span| moved(span.start)..moved(span.end))
            .collect(),
    }
}

/// Which pictures each token may attend to: bit i for picture i.
///
/// A picture is seen from its own token up to the next picture's; pictures that follow each other directly
/// are seen together, up to the end of the last of them; the last picture is seen to the end.
pub fn image_bits(ids: &[u32], image_token: u32) -> Vec<u32> {
    let places: Vec<usize> = ids
        .iter()
        .enumerate()
        .filter(|&(_, &id)| id == image_token)
        .map(|(at, _)| at)
        .collect();
    let mut bits = vec![0; ids.len()];
    let mut last_end = ids.len();
    for (image, &start) in places.iter().enumerate().rev() {
        let mut end = places.get(image + 1).copied().unwrap_or(ids.len());
        if end == start + 1 {
            end = last_end;
        }
        last_end = end;
        for token in &mut bits[start..end] {
            *token |= 1 << image;
        }
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(side: usize) -> TilingConfig {
        TilingConfig {
            side,
            max_tiles: 4,
            filter: Filter::Bilinear,
            rescale: 1.0 / 255.0,
            mean: [0.0; 3],
            std: [1.0; 3],
        }
    }

    #[test]
    fn grids_are_numbered_as_published() {
        let expected = [
            (1, 1),
            (1, 2),
            (1, 3),
            (1, 4),
            (2, 1),
            (2, 2),
            (3, 1),
            (4, 1),
        ];
        assert_eq!(config(560).grids(), expected);
    }

    #[test]
    fn small_pictures_are_enlarged_onto_the_nearest_canvas() {
        // Published examples of the tiling rule at 560 pixels a tile.
        assert_eq!(config(560).grid_for(560, 560), (1, 1));
        assert_eq!(config(560).grid_for(1000, 500), (1, 2));
        assert_eq!(config(560).grid_for(3000, 3000), (2, 2));
        assert_eq!(config(560).grid_for(100, 1000), (2, 1));
    }

    #[test]
    fn consecutive_pictures_are_seen_together() {
        // text, A, B, text, C, text
        assert_eq!(
            image_bits(&[1, 9, 9, 1, 9, 1], 9),
            [0, 0b001, 0b011, 0b011, 0b100, 0b100]
        );
        assert_eq!(image_bits(&[9, 1, 9], 9), [0b01, 0b01, 0b10]);
        assert_eq!(image_bits(&[1, 1], 9), [0, 0]);
    }

    #[test]
    fn bos_follows_leading_pictures() {
        let bos = |text: &str| {
            with_bos(
                Rendered {
                    text: text.into(),
                    answers: std::iter::once(9..11).collect(),
                },
                "<s>",
            )
        };
        assert_eq!(bos("<|image|>hi").text, "<|image|><s>hi");
        assert_eq!(bos("<|image|>hi").answers.first(), Some(&(12..14)));
        assert_eq!(bos("<s><|image|>hi").text, "<s><|image|>hi");
    }
}
