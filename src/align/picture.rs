//! Word maps as pictures: over their image in a colour scale, and sheets of them with the word under each.

use std::path::Path;
use std::sync::OnceLock;

use ab_glyph::{Font, FontRef, Glyph, PxScale, ScaleFont, point};
use image::imageops::FilterType;
use image::{ImageFormat, Rgb, RgbImage};

use crate::{Error, Result, files};

/// Side of a cell's picture, in pixels.
pub const CELL: u32 = 192;

/// Pixels around each cell.
const MARGIN: u32 = 8;

/// Height of a line of text, in pixels.
const LINE: u32 = 22;

/// Height of a sheet's titles, in pixels.
pub const HEAD: u32 = LINE + MARGIN;

/// Height of a row of a sheet, in pixels.
pub const ROW: u32 = CELL + LINE + MARGIN;

const TEXT: PxScale = PxScale { x: 16.0, y: 16.0 };
const INK: Rgb<u8> = Rgb([20, 20, 20]);
const PAPER: Rgb<u8> = Rgb([255, 255, 255]);

/// How much of a map's colour covers the image beneath.
const COVER: f32 = 0.65;

/// One word's maps for [`word_sheet`]; each `[side, side]` in 0…1.
#[derive(Clone, Copy, Debug)]
pub struct WordMaps<'a> {
    /// The word.
    pub word: &'a str,
    /// The diffusion model's map.
    pub target: Option<&'a [f32]>,
    /// The vision-language model's map before training.
    pub before: Option<&'a [f32]>,
    /// And after it.
    pub after: Option<&'a [f32]>,
}

/// A row of a sheet: a word, and one picture per column (`None` leaves the cell empty).
#[derive(Clone, Debug)]
pub struct Row {
    /// Written under each of the row's pictures.
    pub word: String,
    /// Pictures of any size; scaled to [`CELL`].
    pub cells: Vec<Option<RgbImage>>,
}

/// A square map as colours (inferno: black is 0, pale yellow is 1), scaled smoothly to `width × height`.
///
/// Values outside 0…1 are clamped, NaN is shown as 0. Panics if `map` is not a square.
pub fn heat(map: &[f32], width: u32, height: u32) -> RgbImage {
    let values = enlarge(map, width, height);
    RgbImage::from_fn(width, height, |x, y| {
        let colour = colorous::INFERNO.eval_continuous(values[(y * width + x) as usize].into());
        Rgb([colour.r, colour.g, colour.b])
    })
}

/// A square map over its image: gray where the map is 0, coloured the more the higher it is.
pub fn overlay(image: &RgbImage, map: &[f32]) -> RgbImage {
    let (width, height) = image.dimensions();
    let values = enlarge(map, width, height);
    let colours = heat(map, width, height);
    RgbImage::from_fn(width, height, |x, y| {
        let pixel = image.get_pixel(x, y).0.map(f32::from);
        // Rec. 601 luma, as image viewers turn to gray.
        let gray = 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2];
        let cover = COVER * values[(y * width + x) as usize].sqrt();
        let colour = colours.get_pixel(x, y).0;
        Rgb(colour.map(|c| (0.8 * gray * (1.0 - cover) + f32::from(c) * cover).round() as u8))
    })
}

/// The sheet of one sample: image | target | before | after, a row per word with the word under each picture.
///
/// Columns that no word has a map for are left out. `image` is scaled to a square as the maps are.
pub fn word_sheet(image: &RgbImage, words: &[WordMaps<'_>]) -> RgbImage {
    type Pick = for<'a> fn(&WordMaps<'a>) -> Option<&'a [f32]>;
    let square = image::imageops::resize(image, CELL, CELL, FilterType::Triangle);
    let columns: [(&str, Pick); 3] = [
        ("target", |w| w.target),
        ("before", |w| w.before),
        ("after", |w| w.after),
    ];
    let columns: Vec<_> = columns
        .iter()
        .filter(|(_, pick)| words.iter().any(|w| pick(w).is_some()))
        .collect();
    let titles: Vec<&str> = ["image"]
        .into_iter()
        .chain(columns.iter().map(|(title, _)| *title))
        .collect();
    let rows: Vec<Row> = words
        .iter()
        .map(|word| {
            let maps = columns
                .iter()
                .map(|(_, pick)| pick(word).map(|map| overlay(&square, map)));
            Row {
                word: word.word.to_owned(),
                cells: [Some(square.clone())].into_iter().chain(maps).collect(),
            }
        })
        .collect();
    sheet(&titles, &rows)
}

/// A sheet of pictures: column titles on top, rows beneath, each row's word under each of its pictures.
pub fn sheet(titles: &[&str], rows: &[Row]) -> RgbImage {
    let columns = titles.len().max(1) as u32;
    let width = CELL + 2 * MARGIN;
    let mut page = RgbImage::from_pixel(columns * width, HEAD + rows.len() as u32 * ROW, PAPER);
    for (column, title) in titles.iter().enumerate() {
        write(&mut page, title, column as u32 * width, MARGIN / 2, width);
    }
    for (r, row) in rows.iter().enumerate() {
        let top = HEAD + r as u32 * ROW;
        for (c, cell) in row.cells.iter().enumerate().take(titles.len()) {
            let Some(cell) = cell else { continue };
            let left = c as u32 * width;
            let scaled = if cell.dimensions() == (CELL, CELL) {
                cell.clone()
            } else {
                image::imageops::resize(cell, CELL, CELL, FilterType::Triangle)
            };
            image::imageops::replace(&mut page, &scaled, (left + MARGIN).into(), top.into());
            write(&mut page, &row.word, left, top + CELL + 2, width);
        }
    }
    page
}

/// Pictures in reading order, `columns` beside each other, each with its caption beneath.
pub fn gallery(cells: &[(String, RgbImage)], columns: usize) -> RgbImage {
    let columns = columns.min(cells.len()).max(1);
    let (width, height) = (CELL + 2 * MARGIN, CELL + LINE + MARGIN);
    let rows = cells.len().div_ceil(columns) as u32;
    let mut page = RgbImage::from_pixel(columns as u32 * width, MARGIN + rows * height, PAPER);
    for (i, (caption, picture)) in cells.iter().enumerate() {
        let (left, top) = (
            (i % columns) as u32 * width,
            MARGIN + (i / columns) as u32 * height,
        );
        let scaled = image::imageops::resize(picture, CELL, CELL, FilterType::Triangle);
        image::imageops::replace(&mut page, &scaled, (left + MARGIN).into(), top.into());
        write(&mut page, caption, left, top + CELL + 2, width);
    }
    page
}

/// Writes a PNG, whole or not at all.
pub fn save_png(path: impl AsRef<Path>, image: &RgbImage) -> Result<()> {
    let path = path.as_ref();
    let mut bytes = std::io::Cursor::new(Vec::new());
    image
        .write_to(&mut bytes, ImageFormat::Png)
        .map_err(|e| Error::file(path, e.to_string()))?;
    files::write_bytes(path, bytes.get_ref())
}

/// A word as a file name: characters that some file system refuses become `_`.
pub fn file_stem(word: &str) -> String {
    let kept: String = word
        .chars()
        .map(|c| {
            if c.is_alphanumeric() || "-'’".contains(c) {
                c
            } else {
                '_'
            }
        })
        .collect();
    kept.chars().take(64).collect()
}

/// Bilinear with half-pixel centres, as every resize of a map in the method is; `[height, width]` in 0…1.
fn enlarge(map: &[f32], width: u32, height: u32) -> Vec<f32> {
    let side = map.len().isqrt();
    assert_eq!(
        side * side,
        map.len(),
        "a map of {} values is not a square",
        map.len()
    );
    let at = |i: u32, out: u32| {
        let x = ((i as f32 + 0.5) * side as f32 / out as f32 - 0.5).clamp(0.0, side as f32 - 1.0);
        let low = x.floor() as usize;
        (low, (low + 1).min(side - 1), x - low as f32)
    };
    let columns: Vec<_> = (0..width).map(|x| at(x, width)).collect();
    let mut values = Vec::with_capacity((width * height) as usize);
    for y in 0..height {
        let (y0, y1, fy) = at(y, height);
        for &(x0, x1, fx) in &columns {
            let row = |y: usize| map[y * side + x0] * (1.0 - fx) + map[y * side + x1] * fx;
            let value = row(y0) * (1.0 - fy) + row(y1) * fy;
            values.push(if value.is_nan() {
                0.0
            } else {
                value.clamp(0.0, 1.0)
            });
        }
    }
    values
}

/// Text in the middle of a strip; too long a text is cut with an ellipsis.
fn write(page: &mut RgbImage, text: &str, left: u32, top: u32, width: u32) {
    static FONT: OnceLock<Option<FontRef<'static>>> = OnceLock::new();
    let font = FONT.get_or_init(|| FontRef::try_from_slice(dejavu::sans::regular()).ok());
    let Some(font) = font else { return };
    let mut text = text.to_owned();
    let (mut glyphs, mut length) = lay_out(font, &text);
    while length > width as f32 && text.chars().count() > 2 {
        text = text
            .chars()
            .take(text.chars().count() - 2)
            .chain(['…'])
            .collect();
        (glyphs, length) = lay_out(font, &text);
    }
    let start = (
        left as f32 + (width as f32 - length).max(0.0) / 2.0,
        top as f32,
    );
    for glyph in glyphs {
        let Some(outline) = font.outline_glyph(glyph) else {
            continue;
        };
        let corner = outline.px_bounds().min;
        outline.draw(|x, y, coverage| {
            let (x, y) = (start.0 + corner.x + x as f32, start.1 + corner.y + y as f32);
            // Outside the page there is nothing to draw on; a negative coordinate saturates to the edge otherwise.
            if x >= 0.0 && y >= 0.0 && (x as u32) < page.width() && (y as u32) < page.height() {
                let pixel = page.get_pixel_mut(x as u32, y as u32);
                for (paper, ink) in pixel.0.iter_mut().zip(INK.0) {
                    let mixed = f32::from(*paper) * (1.0 - coverage) + f32::from(ink) * coverage;
                    *paper = mixed.round() as u8;
                }
            }
        });
    }
}

/// A line's glyphs from the left end of its top edge, and its length in pixels.
fn lay_out(font: &FontRef<'static>, text: &str) -> (Vec<Glyph>, f32) {
    let font = font.as_scaled(TEXT);
    let mut at = 0.0;
    let mut glyphs: Vec<Glyph> = Vec::new();
    for character in text.chars() {
        let id = font.glyph_id(character);
        if let Some(last) = glyphs.last() {
            at += font.kern(last.id, id);
        }
        glyphs.push(id.with_scale_and_position(TEXT, point(at, font.ascent())));
        at += font.h_advance(id);
    }
    (glyphs, at)
}
