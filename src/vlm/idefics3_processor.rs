//! Pictures and prompts for SmolVLM and Idefics3, as transformers' `Idefics3Processor` prepares them.
//!
//! A picture is scaled so that its longest edge is `size.longest_edge`, then up to whole tiles of
//! `max_image_size.longest_edge`, cut into tiles in raster order, and followed by the whole picture as one
//! more tile, the *global* one. Every tile takes `image_seq_len` `<image>` tokens in the prompt.

use std::ops::Range;
use std::path::Path;

use image::RgbImage;
use serde_json::Value;

use super::processor::labels::{Rendered, Tail, labels, render};
use super::processor::resize::{Filter, resize};
use super::processor::template::{ChatTemplate, Message};
use super::processor::tokenizer::{Encoded, TextTokenizer, read_json};
use crate::{Error, Result};

/// The token that stands for one merged patch of a tile.
pub const IMAGE_TOKEN: &str = "<image>";
/// The token around every run of image tokens.
const FAKE_TOKEN: &str = "<fake_token_around_image>";
/// The token before the whole picture's tile.
const GLOBAL_TOKEN: &str = "<global-img>";
/// Longest side that a picture is ever resized to.
const MAX_SIDE: u32 = 4096;

/// A picture cut into tiles.
#[derive(Clone, Debug, PartialEq)]
pub struct Tiles {
    /// Normalised pixels `[tiles, 3, side, side]`: the grid in raster order, then the global tile.
    pub pixels: Vec<f32>,
    /// Tiles down and across; (0, 0) for a picture that is its own only tile.
    pub grid: (usize, usize),
    /// Side of a tile in pixels.
    pub side: usize,
}

impl Tiles {
    /// Number of tiles, the global one included.
    pub fn count(&self) -> usize {
        self.grid.0 * self.grid.1 + 1
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

/// How large a picture is made before it is cut (`size`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Size {
    /// `do_resize` is false.
    Keep,
    /// `longest_edge`: the longer side, the other in proportion and even.
    Longest(u32),
    /// `height` and `width`.
    Exact(u32, u32),
}

/// How pictures are cut and normalised: the image processor's part of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct SplitConfig {
    /// Side of a tile in pixels (`max_image_size.longest_edge`).
    pub side: usize,
    /// Whether pictures are cut at all (`do_image_splitting`); otherwise each is one tile.
    pub split: bool,
    size: Size,
    filter: Filter,
    rescale: f64,
    mean: [f32; 3],
    std: [f32; 3],
}

impl SplitConfig {
    /// Reads `image_processor` within `processor_config.json`, else `preprocessor_config.json`.
    ///
    /// # Errors
    /// Neither file, or a field with an unusable value, naming file and field.
    pub fn load(dir: &Path) -> Result<Self> {
        let nested = dir.join("processor_config.json");
        if let Some(json) = read_json(&nested)?.and_then(|j| j.get("image_processor").cloned()) {
            return Self::parse(&json, &nested);
        }
        let path = dir.join("preprocessor_config.json");
        match read_json(&path)? {
            Some(json) => Self::parse(&json, &path),
            None => Err(Error::file(
                dir,
                "no image processor found: expected `preprocessor_config.json`, or `processor_config.json` \
                 with a field `image_processor`",
            )),
        }
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
        let edge = |field: &str, key: &str| {
            json.get(field)
                .and_then(|size| size.get(key))
                .and_then(Value::as_u64)
                .filter(|n| (1..=16_384).contains(n))
                .map(|n| n as u32)
        };
        let side = edge("max_image_size", "longest_edge").ok_or_else(|| {
            wrong(
                "max_image_size",
                "an object with `longest_edge` from 1 to 16384",
            )
        })? as usize;
        let size = match (
            edge("size", "longest_edge"),
            edge("size", "height"),
            edge("size", "width"),
        ) {
            _ if !flag("do_resize") => Size::Keep,
            (Some(longest), _, _) => Size::Longest(longest),
            (None, Some(height), Some(width)) => Size::Exact(width, height),
            _ => {
                return Err(wrong(
                    "size",
                    "`longest_edge`, or `height` and `width`, of 1 to 16384",
                ));
            }
        };
        let filter = match json.get("resample") {
            None | Some(Value::Null) => Filter::Lanczos,
            Some(value) => value
                .as_u64()
                .and_then(Filter::from_pil)
                .ok_or_else(|| wrong("resample", "a number of PIL's filters, 1 to 5"))?,
        };
        let triple = |field: &str, plain: f32| -> Result<[f32; 3]> {
            if !flag("do_normalize") {
                return Ok([plain; 3]);
            }
            if json.get(field).is_none() {
                return Ok([0.5; 3]);
            }
            let numbers: Option<Vec<f32>> = json[field]
                .as_array()
                .and_then(|list| list.iter().map(|v| v.as_f64().map(|v| v as f32)).collect());
            numbers
                .and_then(|list| <[f32; 3]>::try_from(list).ok())
                .ok_or_else(|| wrong(field, "three numbers"))
        };
        let std = triple("image_std", 1.0)?;
        if std.contains(&0.0) {
            return Err(wrong("image_std", "three numbers other than 0"));
        }
        let rescale = json
            .get("rescale_factor")
            .and_then(Value::as_f64)
            .unwrap_or(1.0 / 255.0);
        Ok(Self {
            side,
            split: flag("do_image_splitting"),
            size,
            filter,
            rescale: if flag("do_rescale") { rescale } else { 1.0 },
            mean: triple("image_mean", 0.0)?,
            std,
        })
    }

    /// The size (width, height) of a picture after the first resize.
    fn first_size(&self, width: u32, height: u32) -> (u32, u32) {
        match self.size {
            Size::Keep => (width, height),
            Size::Exact(width, height) => (width, height),
            Size::Longest(longest) => {
                let ratio = f64::from(width) / f64::from(height);
                let even = |side: f64| (side as u32).next_multiple_of(2).max(1);
                let (width, height) = if width >= height {
                    (longest, even(f64::from(longest) / ratio))
                } else {
                    (even(f64::from(longest) * ratio), longest)
                };
                let ratio = f64::from(width) / f64::from(height);
                if width >= height && width > MAX_SIDE {
                    (MAX_SIDE, ((f64::from(MAX_SIDE) / ratio) as u32).max(1))
                } else if height > width && height > MAX_SIDE {
                    (((f64::from(MAX_SIDE) * ratio) as u32).max(1), MAX_SIDE)
                } else {
                    (width, height)
                }
            }
        }
    }

    /// The size (width, height) in whole tiles: the longer side rounded up, the other in proportion to that,
    /// then rounded up as well.
    fn whole_tiles(&self, width: u32, height: u32) -> (u32, u32) {
        let side = self.side as u32;
        let ratio = f64::from(width) / f64::from(height);
        if width >= height {
            let width = width.next_multiple_of(side);
            let height = (f64::from(width) / ratio) as u32;
            (width, height.next_multiple_of(side).max(side))
        } else {
            let height = height.next_multiple_of(side);
            let width = (f64::from(height) * ratio) as u32;
            (width.next_multiple_of(side).max(side), height)
        }
    }

    /// Tiles down and across of a picture of this size; (0, 0) for one that is its own only tile.
    pub fn grid(&self, width: u32, height: u32) -> (usize, usize) {
        let (width, height) = self.first_size(width, height);
        let (width, height) = self.whole_tiles(width, height);
        let side = self.side as u32;
        match ((height / side) as usize, (width / side) as usize) {
            _ if !self.split => (0, 0),
            (1, 1) => (0, 0),
            grid => grid,
        }
    }

    /// Cuts a picture into tiles.
    pub fn tiles(&self, picture: &RgbImage) -> Tiles {
        let side = self.side as u32;
        let (width, height) = self.first_size(picture.width(), picture.height());
        let scaled = resize(picture, width, height, self.filter);
        let grid = self.grid(picture.width(), picture.height());
        let scaled = match self.split {
            true => {
                let (width, height) = self.whole_tiles(width, height);
                resize(&scaled, width, height, self.filter)
            }
            false => scaled,
        };
        let global = resize(&scaled, side, side, self.filter);
        // numpy's arithmetic: the product in double, then single-precision subtraction and division.
        let table: Vec<[f32; 3]> = (0..256)
            .map(|v| {
                let value = (f64::from(v) * self.rescale) as f32;
                std::array::from_fn(|c| (value - self.mean[c]) / self.std[c])
            })
            .collect();
        let mut pixels = Vec::with_capacity((grid.0 * grid.1 + 1) * 3 * self.side * self.side);
        let mut push = |image: &RgbImage, left: u32, top: u32| {
            for channel in 0..3 {
                for y in top..top + side {
                    for x in left..left + side {
                        pixels.push(table[image.get_pixel(x, y).0[channel] as usize][channel]);
                    }
                }
            }
        };
        for tile in 0..grid.0 * grid.1 {
            let (down, across) = ((tile / grid.1) as u32, (tile % grid.1) as u32);
            push(&scaled, across * side, down * side);
        }
        push(&global, 0, 0);
        Tiles {
            pixels,
            grid,
            side: self.side,
        }
    }
}

/// A conversation ready for the model.
#[derive(Clone, Debug)]
pub struct Idefics3Prompt {
    /// The string that was tokenised (image tokens expanded), with the byte spans of its answers.
    pub rendered: Rendered,
    /// Tokens with their byte spans.
    pub encoded: Encoded,
    /// A token's own id where it is learned, else `labels::IGNORE`; not shifted.
    pub labels: Vec<u32>,
    /// The pictures in order.
    pub images: Vec<Tiles>,
    /// Positions of all image tokens, in the order of the tiles' merged patches.
    pub image_positions: Vec<usize>,
    /// Per picture, the positions of its global tile's tokens, in raster order.
    pub global: Vec<Range<usize>>,
}

/// The processor of a SmolVLM or Idefics3 checkpoint.
pub struct Idefics3Processor {
    /// How pictures are cut.
    pub split: SplitConfig,
    /// The checkpoint's tokenizer.
    pub tokenizer: TextTokenizer,
    /// The checkpoint's chat template.
    pub template: ChatTemplate,
    /// Id of `<image>`.
    pub image_token: u32,
    /// Image tokens per tile (`image_seq_len`).
    pub tile_tokens: usize,
}

impl Idefics3Processor {
    /// Loads the processor's files of a checkpoint directory. `tile_tokens` is what the model makes of a
    /// tile of the given side: `image_seq_len` of `processor_config.json` must agree where it is given.
    ///
    /// # Errors
    /// A missing or unusable file, a tokenizer without the family's tokens, or a disagreeing count.
    pub fn load(dir: impl AsRef<Path>, tile_tokens: impl Fn(usize) -> usize) -> Result<Self> {
        let dir = dir.as_ref();
        let tokenizer = TextTokenizer::load(dir)?;
        let template = ChatTemplate::load(dir, &tokenizer)?;
        let image_token = tokenizer.required_id(IMAGE_TOKEN)?;
        for token in [FAKE_TOKEN, GLOBAL_TOKEN] {
            tokenizer.required_id(token)?;
        }
        let split = SplitConfig::load(dir)?;
        let expected = tile_tokens(split.side);
        let path = dir.join("processor_config.json");
        let given = read_json(&path)?.and_then(|json| json.get("image_seq_len")?.as_u64());
        if let Some(found) = given
            && found as usize != expected
        {
            return Err(Error::file(
                path,
                format!(
                    "field `image_seq_len`: {found} found, {expected} expected: what `config.json` makes of a \
                     tile of {0}x{0} pixels (patch size, scale factor)",
                    split.side
                ),
            ));
        }
        Ok(Self {
            split,
            tokenizer,
            template,
            image_token,
            tile_tokens: expected,
        })
    }

    /// Renders, tokenises and labels a conversation. The pictures go to its image parts in order.
    ///
    /// # Errors
    /// A count of pictures other than the conversation's image parts, an empty answer, or what the template
    /// refuses.
    pub fn conversation(
        &self,
        messages: &[Message],
        pictures: &[RgbImage],
        tail: Tail<'_>,
    ) -> Result<Idefics3Prompt> {
        self.prepare(render(&self.template, messages, tail)?, pictures)
    }

    /// Tokenises a text as it stands, its `<image>` placeholders expanded to the pictures' tokens.
    ///
    /// # Errors
    /// As [`Idefics3Processor::conversation`].
    pub fn text(&self, text: &str, pictures: &[RgbImage]) -> Result<Idefics3Prompt> {
        let answers = Vec::new();
        self.prepare(
            Rendered {
                text: text.to_string(),
                answers,
            },
            pictures,
        )
    }

    fn prepare(&self, rendered: Rendered, pictures: &[RgbImage]) -> Result<Idefics3Prompt> {
        let images: Vec<Tiles> = pictures
            .iter()
            .map(|picture| self.split.tiles(picture))
            .collect();
        let expansions: Vec<String> = images
            .iter()
            .map(|tiles| self.expansion(tiles.grid))
            .collect();
        let rendered = rendered.expand(IMAGE_TOKEN, &expansions)?;
        let encoded = self.tokenizer.encode_prompt(&rendered.text)?;
        let image_positions: Vec<usize> = encoded
            .ids
            .iter()
            .enumerate()
            .filter(|&(_, &id)| id == self.image_token)
            .map(|(at, _)| at)
            .collect();
        let mut global = Vec::with_capacity(images.len());
        let mut before = 0;
        for tiles in &images {
            before += tiles.count() * self.tile_tokens;
            let first = image_positions.get(before - self.tile_tokens);
            let Some(&first) = first.filter(|_| before <= image_positions.len()) else {
                return Err(Error::Input(format!(
                    "the prompt holds {} image tokens, expected at least {before}",
                    image_positions.len()
                )));
            };
            global.push(first..first + self.tile_tokens);
        }
        Ok(Idefics3Prompt {
            labels: labels(&self.tokenizer, &rendered, &encoded),
            rendered,
            encoded,
            images,
            image_positions,
            global,
        })
    }

    /// What stands in the prompt for a picture cut into `grid` tiles; [`prompt_tokens`] of the published tokenizers.
    fn expansion(&self, grid: (usize, usize)) -> String {
        let tile = IMAGE_TOKEN.repeat(self.tile_tokens);
        let mut text = String::new();
        for row in 1..=grid.0 {
            for column in 1..=grid.1 {
                text += &format!("{FAKE_TOKEN}<row_{row}_col_{column}>{tile}");
            }
            text.push('\n');
        }
        if grid.0 > 0 {
            text.push('\n');
        }
        text + &format!("{FAKE_TOKEN}{GLOBAL_TOKEN}{tile}{FAKE_TOKEN}")
    }
}

/// Tokens of a prompt that stand for a picture cut into `grid` tiles of `tile_tokens` image tokens: before each tile
/// two more, after each row a line break, a further one after them all, and three around the global tile.
pub fn prompt_tokens(grid: (usize, usize), tile_tokens: usize) -> usize {
    let rows = if grid.0 > 0 { grid.0 + 1 } else { 0 };
    grid.0 * grid.1 * (tile_tokens + 2) + rows + tile_tokens + 3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(longest: u32, side: usize) -> SplitConfig {
        SplitConfig {
            side,
            split: true,
            size: Size::Longest(longest),
            filter: Filter::Lanczos,
            rescale: 1.0 / 255.0,
            mean: [0.5; 3],
            std: [0.5; 3],
        }
    }

    #[test]
    fn sizes_follow_the_longest_edge_and_whole_tiles() {
        // By hand: 1000x500 -> 2048x1024 is 4x2 tiles of 512; 100x333 -> 616x2048 (615 made even) -> 2x4.
        let c = config(2048, 512);
        assert_eq!(c.first_size(1000, 500), (2048, 1024));
        assert_eq!(c.whole_tiles(2048, 1024), (2048, 1024));
        assert_eq!(c.first_size(100, 333), (616, 2048));
        assert_eq!(c.whole_tiles(616, 2048), (1024, 2048));
    }

    #[test]
    fn a_picture_of_one_tile_is_only_global() {
        let tiles = config(64, 64).tiles(&RgbImage::new(10, 10));
        assert_eq!((tiles.grid, tiles.count()), ((0, 0), 1));
        assert_eq!(tiles.pixels.len(), 3 * 64 * 64);
        assert_eq!(tiles.pixels[0], -1.0);
    }
}
