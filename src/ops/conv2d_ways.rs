//! Which kernel family does a convolution: the likely best, one that a test asks for, or the one that was measured.

use super::conv2d::{Force, Geometry, Mode, Variant};
use super::ways::{self, Question, near};
use super::{conv2d_narrow, conv2d_winograd};
use crate::tensor::{DType, Tensor};

/// Marks the keys of this op among those that are decided.
const OP: u32 = 1 << 30;

/// Convolutions of fewer FLOPs are not worth a measurement.
const SMALL: usize = 20_000_000;

/// Rows that a measured convolution has at least.
const LEAST_ROWS: usize = 8;

impl Force {
    /// The family for `mode`; `None` where the types decide between the tile and matrix units.
    pub(super) fn variant(&self, mode: Mode, g: &Geometry, x: &Tensor) -> Option<Variant> {
        let direct = x.gpu().tier().cpu.then_some(Variant::Rows);
        match self.variant.unwrap_or_else(|| usual(mode, g, x)) {
            Variant::Direct => direct,
            Variant::Winograd if !conv2d_winograd::serves(mode, g) => direct,
            Variant::Narrow if !conv2d_narrow::serves(mode, g) => direct,
            variant => Some(variant),
        }
    }

    /// The same with the family that was measured, where none is forced; `run` does a band with a family.
    pub(super) fn measured(
        &self,
        mode: Mode,
        g: &Geometry,
        x: &Tensor,
        run: &dyn Fn(&Force, &Geometry),
    ) -> Force {
        let ways = ways(mode, g, x);
        let trial = trial(mode, g, x, ways.len());
        if self.any() || g.flops() < SMALL || trial.is_none() {
            return *self;
        }
        let forced = |way: usize| Force {
            variant: Some(ways[way]),
            ..*self
        };
        let names: Vec<&'static str> = ways.iter().map(name).collect();
        let sizes = |size: &dyn Fn(usize) -> usize, g: &Geometry| {
            let [rows, columns, co] = g.output;
            let kind = if mode == Mode::Input {
                "input gradient"
            } else {
                "forward"
            };
            let dtype = if x.dtype() == DType::F16 {
                "f16"
            } else {
                "f32"
            };
            format!(
                "conv2d {kind} {}x{} of {} pixels, {} to {} channels, {dtype}",
                g.kernel[0],
                g.kernel[1],
                size(g.batch * rows * columns),
                size(g.input[2]),
                size(co)
            )
        };
        let [rows, columns, co] = g.output.map(|size| size as u32);
        let kind = mode as u32 | u32::from(x.dtype() == DType::F16) << 2 | (g.taps() as u32) << 8;
        let question = Question {
            key: [
                g.batch as u32 * rows,
                columns,
                g.input[2] as u32,
                co,
                OP | kind,
            ],
            ways: &names,
            class: &|| sizes(&near, g),
            shape: &|| {
                trial
                    .as_ref()
                    .map_or(String::new(), |t| sizes(&|size| size, t))
            },
        };
        let way = ways::fastest(x.gpu(), &question, &|way| {
            trial.iter().for_each(|trial| run(&forced(way), trial));
        });
        forced(way)
    }
}

/// The likely best.
fn usual(mode: Mode, g: &Geometry, x: &Tensor) -> Variant {
    if conv2d_narrow::pays(mode, g, x) {
        Variant::Narrow
    } else if conv2d_winograd::pays(mode, g, x) {
        Variant::Winograd
    } else {
        Variant::Direct
    }
}

/// The usual family, then others that could be faster.
fn ways(mode: Mode, g: &Geometry, x: &Tensor) -> Vec<Variant> {
    let usual = usual(mode, g, x);
    let mut others = vec![Variant::Direct];
    if conv2d_winograd::replaces(mode, g) {
        others.push(Variant::Winograd);
    }
    others.retain(|variant| *variant != usual);
    [vec![usual], others].concat()
}

fn name(variant: &Variant) -> &'static str {
    match variant {
        Variant::Winograd => "winograd",
        Variant::Narrow => "narrow",
        _ => "direct",
    }
}

/// As much of a convolution as all ways can be measured with; `None` where that is too little, or there is no choice.
fn trial(mode: Mode, g: &Geometry, x: &Tensor, ways: usize) -> Option<Geometry> {
    let most = ways::per_run(x.gpu().tier(), ways);
    let image = g.images(0, g.batch.min(1));
    let height = match mode {
        Mode::Input => image.input[0],
        _ => image.output[0],
    };
    let rows = (most / (image.flops() / height.max(1)).max(1)).min(height);
    (ways > 1 && rows >= LEAST_ROWS.min(height)).then(|| match rows < height {
        true => image.rows(mode, 0, rows),
        false => image,
    })
}
