//! Placing and drawing a scene's objects.

use image::{Rgb, RgbImage};

use super::{Colour, Dice, Mask, Object, SIDE, Shape, Split};

/// Samples along a pixel's side that decide how much of it a shape covers.
const SAMPLES: usize = 4;
/// Times to try a place for an object before the whole scene is laid anew.
const TRIES: usize = 60;
/// Centres lie further apart than this share of the two radii's sum, so objects at most touch corners.
const APART: f32 = 0.9;

/// One to three objects that do not hide each other, as the split demands.
pub(super) fn objects(dice: &mut Dice, split: Split) -> Vec<Object> {
    let count = match dice.unit() {
        u if u < 0.2 => 1,
        u if u < 0.6 => 2,
        _ => 3,
    };
    let kinds: Vec<_> = loop {
        let shapes = dice.shuffled(&Shape::ALL);
        let colours = dice.shuffled(&Colour::ALL);
        let kinds: Vec<_> = shapes.into_iter().zip(colours).take(count).collect();
        let held_out = kinds.iter().any(|kind| super::HELD_OUT.contains(kind));
        if held_out == (split == Split::HeldOut) {
            break kinds;
        }
    };
    loop {
        let mut placed: Vec<Object> = Vec::new();
        for &(shape, colour) in &kinds {
            let place = (0..TRIES).find_map(|_| {
                let radius = dice.uniform(9.0, 16.0);
                let low = radius + 1.0;
                let high = SIDE as f32 - radius - 1.0;
                let centre = [dice.uniform(low, high), dice.uniform(low, high)];
                let free = placed.iter().all(|other| {
                    let dx = centre[0] - other.centre[0];
                    let dy = centre[1] - other.centre[1];
                    dx * dx + dy * dy > (APART * (radius + other.radius)).powi(2)
                });
                free.then_some(Object {
                    shape,
                    colour,
                    centre,
                    radius,
                })
            });
            placed.extend(place);
        }
        if placed.len() == kinds.len() {
            return placed;
        }
    }
}

/// Draws the ground and the objects, and says what of each stays visible.
pub(super) fn picture(dice: &mut Dice, objects: &[Object]) -> (RgbImage, Vec<Mask>) {
    let mut pixels = ground(dice);
    let mut masks: Vec<Mask> = Vec::new();
    for object in objects {
        let cover = cover(object);
        let colour = object.colour.rgb().map(|c| c + dice.uniform(-12.0, 12.0));
        for (pixel, &share) in pixels.iter_mut().zip(&cover) {
            for (value, ink) in pixel.iter_mut().zip(colour) {
                *value += (ink - *value) * share;
            }
        }
        for below in &mut masks {
            for (visible, &share) in below.cover.iter_mut().zip(&cover) {
                *visible *= 1.0 - share;
            }
        }
        masks.push(Mask { side: SIDE, cover });
    }
    let mut image = RgbImage::new(SIDE as u32, SIDE as u32);
    for (pixel, values) in image.pixels_mut().zip(&pixels) {
        *pixel = Rgb(values.map(|value| (value + grain(dice)).round().clamp(0.0, 255.0) as u8));
    }
    (image, masks)
}

/// A pixel's grain: near-normal with a standard deviation of 3, from four uniform draws.
fn grain(dice: &mut Dice) -> f32 {
    let sum: f32 = (0..4).map(|_| dice.unit()).sum();
    (sum - 2.0) * 3.0 * 3.0_f32.sqrt()
}

/// Two muted tones blended by smooth noise of a coarse and a fine grain.
fn ground(dice: &mut Dice) -> Vec<[f32; 3]> {
    let tones = [tone(dice), tone(dice)];
    let coarse_cells = 2 + dice.below(4);
    let coarse = value_noise(dice, coarse_cells);
    let fine_cells = 8 + dice.below(9);
    let fine = value_noise(dice, fine_cells);
    coarse
        .iter()
        .zip(&fine)
        .map(|(c, f)| {
            let blend = 0.65 * c + 0.35 * f;
            std::array::from_fn(|i| tones[0][i] + (tones[1][i] - tones[0][i]) * blend)
        })
        .collect()
}

/// A colour near gray.
fn tone(dice: &mut Dice) -> [f32; 3] {
    let raw: [f32; 3] = std::array::from_fn(|_| dice.uniform(70.0, 150.0));
    let mean = raw.iter().sum::<f32>() / 3.0;
    raw.map(|value| mean + (value - mean) * 0.45)
}

/// Random values on a lattice of `cells` by `cells`, smoothly interpolated; 0 to 1.
fn value_noise(dice: &mut Dice, cells: usize) -> Vec<f32> {
    let lattice: Vec<f32> = (0..(cells + 1) * (cells + 1))
        .map(|_| dice.unit())
        .collect();
    let at = |x: usize, y: usize| lattice[y * (cells + 1) + x];
    let place = |i: usize| {
        let p = (i as f32 + 0.5) / SIDE as f32 * cells as f32;
        let t = p.fract();
        (p as usize, t * t * (3.0 - 2.0 * t))
    };
    let mut values = Vec::with_capacity(SIDE * SIDE);
    for row in 0..SIDE {
        let (y, v) = place(row);
        for column in 0..SIDE {
            let (x, u) = place(column);
            let above = at(x, y) * (1.0 - u) + at(x + 1, y) * u;
            let below = at(x, y + 1) * (1.0 - u) + at(x + 1, y + 1) * u;
            values.push(above * (1.0 - v) + below * v);
        }
    }
    values
}

/// The share of every pixel that an object covers.
fn cover(object: &Object) -> Vec<f32> {
    let mut cover = vec![0.0; SIDE * SIDE];
    let step = 1.0 / SAMPLES as f32;
    let share = step * step;
    for (i, value) in cover.iter_mut().enumerate() {
        for sample in 0..SAMPLES * SAMPLES {
            let x = (i % SIDE) as f32 + ((sample % SAMPLES) as f32 + 0.5) * step;
            let y = (i / SIDE) as f32 + ((sample / SAMPLES) as f32 + 0.5) * step;
            if is_inside(
                object.shape,
                x - object.centre[0],
                y - object.centre[1],
                object.radius,
            ) {
                *value += share;
            }
        }
    }
    cover
}

/// Whether a point, relative to the centre, lies in a shape of the given radius.
fn is_inside(shape: Shape, x: f32, y: f32, radius: f32) -> bool {
    match shape {
        Shape::Circle => x * x + y * y <= radius * radius,
        Shape::Square => x.abs().max(y.abs()) <= 0.86 * radius,
        Shape::Triangle => {
            let down = (y + 0.95 * radius) / (1.75 * radius);
            (0.0..=1.0).contains(&down) && x.abs() <= 1.05 * radius * down
        }
        Shape::Cross => {
            let (long, short) = (x.abs().max(y.abs()), x.abs().min(y.abs()));
            long <= radius && short <= 0.34 * radius
        }
    }
}
