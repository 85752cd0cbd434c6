//! Drawn scenes: one to three coloured shapes on a muted ground, with a caption, questions and every word's region.
//!
//! The embedded default learns from these. A scene is a function of (seed, split, index) alone, so nothing has to be
//! stored and a set can be read in any order. In a scene no two objects share a shape or a colour, so that a shape
//! word or a colour word alone says which object is meant. Captions name an object by both, by shape alone or by
//! colour alone: were the colour always given, a teacher could place every object by its colour and would never
//! learn where a shape word is. Four pairs of shape and colour appear in no training scene; every held-out scene
//! has at least one of them.

mod draw;
mod language;
mod samples;

pub use samples::DESCRIBE;

use image::RgbImage;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::Rng;

/// Side of a scene in pixels.
pub const SIDE: usize = 64;

/// What is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shape {
    /// A disc.
    Circle,
    /// A square with level sides.
    Square,
    /// A triangle on its base.
    Triangle,
    /// A Greek cross.
    Cross,
}

impl Shape {
    /// All shapes.
    pub const ALL: [Self; 4] = [Self::Circle, Self::Square, Self::Triangle, Self::Cross];

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Circle => "circle",
            Self::Square => "square",
            Self::Triangle => "triangle",
            Self::Cross => "cross",
        }
    }
}

/// What it is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Colour {
    /// RGB about (215, 45, 40).
    Red,
    /// RGB about (50, 175, 70).
    Green,
    /// RGB about (50, 85, 220).
    Blue,
    /// RGB about (235, 210, 50).
    Yellow,
    /// RGB about (150, 50, 190).
    Purple,
    /// RGB about (240, 240, 240).
    White,
}

impl Colour {
    /// All colours.
    pub const ALL: [Self; 6] = [
        Self::Red,
        Self::Green,
        Self::Blue,
        Self::Yellow,
        Self::Purple,
        Self::White,
    ];

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Red => "red",
            Self::Green => "green",
            Self::Blue => "blue",
            Self::Yellow => "yellow",
            Self::Purple => "purple",
            Self::White => "white",
        }
    }

    fn rgb(self) -> [f32; 3] {
        match self {
            Self::Red => [215.0, 45.0, 40.0],
            Self::Green => [50.0, 175.0, 70.0],
            Self::Blue => [50.0, 85.0, 220.0],
            Self::Yellow => [235.0, 210.0, 50.0],
            Self::Purple => [150.0, 50.0, 190.0],
            Self::White => [240.0, 240.0, 240.0],
        }
    }
}

/// The pairs that only held-out scenes have: one for each shape, four different colours.
pub const HELD_OUT: [(Shape, Colour); 4] = [
    (Shape::Circle, Colour::Blue),
    (Shape::Square, Colour::Yellow),
    (Shape::Triangle, Colour::Purple),
    (Shape::Cross, Colour::Red),
];

/// Which scenes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Scenes without any pair of [`HELD_OUT`].
    Train,
    /// Scenes with at least one pair of [`HELD_OUT`].
    HeldOut,
}

/// One drawn object; lengths in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Object {
    /// Its shape.
    pub shape: Shape,
    /// Its colour.
    pub colour: Colour,
    /// Its centre: x to the right, y down.
    pub centre: [f32; 2],
    /// Half its extent: 9 to 16.
    pub radius: f32,
}

impl Object {
    /// Whether the object is one of [`HELD_OUT`].
    pub fn is_held_out(&self) -> bool {
        HELD_OUT.contains(&(self.shape, self.colour))
    }
}

/// The visible part of an object: the share of each pixel that it covers, row by row.
#[derive(Clone, Debug, PartialEq)]
pub struct Mask {
    side: usize,
    cover: Vec<f32>,
}

impl Mask {
    /// Pixels along a side.
    pub fn side(&self) -> usize {
        self.side
    }

    /// Share covered of the pixel at column `x`, row `y`, 0 to 1.
    pub fn at(&self, x: usize, y: usize) -> f32 {
        self.cover[y * self.side + x]
    }

    /// Share of the whole image that it covers.
    pub fn area(&self) -> f32 {
        self.cover.iter().sum::<f32>() / self.cover.len() as f32
    }

    /// The mask at a coarser side, which must divide this one: each cell's mean.
    pub fn resized(&self, side: usize) -> Self {
        assert_eq!(
            self.side % side,
            0,
            "mask of {} pixels to {side}",
            self.side
        );
        let step = self.side / side;
        let mut cover = vec![0.0; side * side];
        for y in 0..self.side {
            for x in 0..self.side {
                cover[y / step * side + x / step] += self.at(x, y) / (step * step) as f32;
            }
        }
        Self { side, cover }
    }

    /// Share covered of each cell of a coarser grid of any side, row by row (area average).
    pub fn averaged(&self, side: usize) -> Vec<f32> {
        let scale = self.side as f32 / side as f32;
        let overlap = |cell: usize, pixel: usize| {
            let (low, high) = (cell as f32 * scale, (cell + 1) as f32 * scale);
            (high.min(pixel as f32 + 1.0) - low.max(pixel as f32)).max(0.0) / scale
        };
        let mut cells = vec![0.0; side * side];
        for (i, cell) in cells.iter_mut().enumerate() {
            let range = |c: usize| {
                let last = ((c + 1) as f32 * scale).ceil() as usize;
                (c as f32 * scale) as usize..last.min(self.side)
            };
            for y in range(i / side) {
                for x in range(i % side) {
                    *cell += self.at(x, y) * overlap(i / side, y) * overlap(i % side, x);
                }
            }
        }
        cells
    }

    /// At least half covered, cell by cell.
    pub fn inside(&self) -> Vec<bool> {
        self.cover.iter().map(|&c| c >= 0.5).collect()
    }

    /// The pointing game: whether the first greatest value of a square map of any side falls on a cell of this
    /// mask (brought to the map's side) that is at least half covered.
    pub fn is_hit_by(&self, map: &[f32]) -> bool {
        let side = map.len().isqrt();
        let top = map
            .iter()
            .enumerate()
            .fold(0, |best, (i, &v)| if v > map[best] { i } else { best });
        self.resized(side).inside()[top]
    }
}

/// A picture and what is known of it.
#[derive(Clone, Debug)]
pub struct Scene {
    /// [`SIDE`] × [`SIDE`] pixels.
    pub image: RgbImage,
    /// One to three, in the order drawn; a later one may hide the edge of an earlier one.
    pub objects: Vec<Object>,
    /// Names some or all of the objects: "a red circle and a square".
    pub caption: String,
    /// Questions with their one-word answers.
    pub questions: Vec<(String, String)>,
    masks: Vec<Mask>,
    /// The caption's shape and colour words, each with its object.
    words: Vec<(&'static str, usize)>,
}

impl Scene {
    /// The scene at a place of a split; the same arguments give the same scene on every machine.
    pub fn new(seed: u64, split: Split, index: u64) -> Self {
        let mut dice = Dice::new(seed, split, index);
        let objects = draw::objects(&mut dice, split);
        let (image, masks) = draw::picture(&mut dice, &objects);
        let (caption, words) = language::caption(&mut dice, &objects);
        let questions = language::questions(&mut dice, &objects);
        Self {
            image,
            objects,
            caption,
            questions,
            masks,
            words,
        }
    }

    /// The same picture described again: caption number `variant`, with its words' masks.
    pub fn recaptioned(&self, seed: u64, variant: u64) -> (String, Vec<(String, Mask)>) {
        let mut dice = Dice::new(seed ^ 0x9e37_79b9_7f4a_7c15, Split::Train, variant);
        let (caption, words) = language::caption(&mut dice, &self.objects);
        (caption, self.masks_of(&words))
    }

    /// The same picture talked about again: caption and questions number `variant`.
    pub fn described_again(&self, seed: u64, variant: u64) -> (String, Vec<(String, String)>) {
        let mut dice = Dice::new(seed ^ 0x9e37_79b9_7f4a_7c15, Split::Train, variant);
        let (caption, _) = language::caption(&mut dice, &self.objects);
        (caption, language::questions(&mut dice, &self.objects))
    }

    /// The caption's shape and colour words, in its order, each with the visible region of its object.
    pub fn word_masks(&self) -> Vec<(String, Mask)> {
        self.masks_of(&self.words)
    }

    /// The visible region of each object, in the order of `objects`.
    pub fn object_masks(&self) -> &[Mask] {
        &self.masks
    }

    fn masks_of(&self, words: &[(&'static str, usize)]) -> Vec<(String, Mask)> {
        words
            .iter()
            .map(|&(word, object)| (word.to_owned(), self.masks[object].clone()))
            .collect()
    }
}

/// A run of scenes of one seed and split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SceneSet {
    /// Scenes of another seed are others.
    pub seed: u64,
    /// Which scenes.
    pub split: Split,
    /// How many.
    pub count: usize,
}

impl SceneSet {
    /// The first `count` scenes.
    pub fn new(seed: u64, split: Split, count: usize) -> Self {
        Self { seed, split, count }
    }

    /// Scene number `index`, also past the count.
    pub fn get(&self, index: usize) -> Scene {
        Scene::new(self.seed, self.split, index as u64)
    }

    /// The scenes in order, drawn as they are asked for.
    pub fn iter(&self) -> impl Iterator<Item = Scene> + '_ {
        (0..self.count).map(|index| self.get(index))
    }
}

/// Chance, the same on every machine: nothing here depends on how a library turns bits into numbers.
pub(crate) struct Dice(ChaCha8Rng);

impl Dice {
    pub(crate) fn new(seed: u64, split: Split, index: u64) -> Self {
        let mut rng =
            ChaCha8Rng::seed_from_u64(seed.wrapping_mul(2) + u64::from(split == Split::HeldOut));
        rng.set_stream(index);
        Self(rng)
    }

    /// In [0, 1).
    fn unit(&mut self) -> f32 {
        (self.0.next_u32() >> 8) as f32 / 16_777_216.0
    }

    /// In [low, high).
    fn uniform(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * self.unit()
    }

    /// Standard normal (Box–Muller).
    pub(crate) fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f32::consts::TAU * self.unit()).cos()
    }

    /// In 0..n.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((u64::from(self.0.next_u32()) * n as u64) >> 32) as usize
    }

    /// `items` in a random order.
    pub(crate) fn shuffled<T: Copy>(&mut self, items: &[T]) -> Vec<T> {
        let mut items = items.to_vec();
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
        items
    }
}
