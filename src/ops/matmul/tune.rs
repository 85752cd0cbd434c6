//! Measures how a product is done fastest on the adapter at hand.

use super::choose::{Choice, alternatives, usual};
use super::right::{Right, Storage};
use super::{Geometry, MatmulOptions, Operands, Shape, Variant, matmul_as, matmul_quantized_as};
use crate::error::Result;
use crate::gpu::{Gpu, Tier, Tuned};
use crate::ops::ways::{RUNS, budget, shortest};
use crate::tensor::{DType, QuantizedMatrix, Tensor};

/// Choices measured for a shape at the most: the usual one, the alternatives, on a GPU the fastest with other splits; the
/// first and the fastest twice.
fn most_choices(tier: &Tier) -> usize {
    if tier.cpu { 6 } else { 14 }
}

/// Products that a run does at the most, where one is too short to be timed.
const REPEATS: usize = 16;

/// FLOPs of a run at the most.
fn per_run(tier: &Tier) -> usize {
    budget(tier) / (most_choices(tier) * (RUNS + 1))
}

/// Elements of an operand or the result at the most: 128 MiB in f32.
const ELEMENTS: usize = 1 << 25;

/// The shape, made smaller along its longest side until a run of it is within the budget.
fn cropped(shape: &Shape, tier: &Tier) -> Shape {
    let mut s = *shape;
    let elements = |s: &Shape| s.batch * (s.m * s.n).max(s.n * s.k).max(s.k * s.m);
    while s.flops() > per_run(tier) || elements(&s) > ELEMENTS {
        let Shape { batch, m, n, k, .. } = &mut s;
        let largest = [batch, m, n, k].into_iter().max_by_key(|size| **size);
        match largest {
            // Fours stay fours and ragged lines ragged.
            Some(size) if *size >= 16 => *size = *size / 8 * 4 + *size % 4,
            Some(size) => *size = (*size / 2).max(1),
            None => break,
        }
    }
    s
}

/// Times the ways of doing a product of this shape, or of one like it that is small enough, and tells the fastest,
/// by timestamps, or by the clock where there are none.
///
/// # Errors
/// Any GPU error.
#[doc(hidden)]
pub fn tune(gpu: &Gpu, shape: &Shape) -> Result<Tuned> {
    let mut trial = Trial::new(gpu, &cropped(shape, gpu.tier()))?;
    let usual = trial.usual();
    let mut best = (usual, trial.time(usual, f64::INFINITY)?);
    let mut usual_millis = best.1;
    for choice in trial.alternatives() {
        if choice != usual {
            best = trial.better(best, choice)?;
        }
    }
    // How often k is split is guessed from the number of workgroups alone.
    if !gpu.tier().cpu && !matches!(best.0.variant, Variant::Vector(_)) && trial.shape.k >= 512 {
        for splits in [1, 4, 16] {
            let choice = Choice {
                splits: Some(splits),
                ..best.0
            };
            best = trial.better(best, choice)?;
        }
    }
    if best.0 != usual {
        // Something else may have kept the machine busy during the first: both again.
        usual_millis = usual_millis.min(trial.time(usual, f64::INFINITY)?);
        best.1 = best.1.min(trial.time(best.0, f64::INFINITY)?);
    }
    // What is hardly faster is not worth another order of the sums.
    if best.1 > 0.95 * usual_millis {
        best = (usual, usual_millis);
    }
    Ok(Tuned {
        choice: best.0.to_string(),
        shape: shape.to_string(),
        millis: best.1,
        usual_millis,
    })
}

/// Operands of a shape, and what has been spent on them.
struct Trial {
    shape: Shape,
    a: Tensor,
    b: Right,
    c: Tensor,
    repeats: usize,
    choices: usize,
    flops: usize,
}

impl Trial {
    fn new(gpu: &Gpu, shape: &Shape) -> Result<Trial> {
        let &Shape { batch, m, n, k, .. } = shape;
        let lead: &[usize] = if batch > 1 { &[batch] } else { &[] };
        let order = |transposed: bool, [rows, columns]: [usize; 2]| match transposed {
            true => [columns, rows],
            false => [rows, columns],
        };
        // Not zeros: a GPU that has nothing to toggle runs at another clock.
        let pattern: Vec<f32> = (0..251).map(|i| i as f32 / 251.0 - 0.5).collect();
        let float = |dtype: DType, [rows, columns]: [usize; 2]| {
            let shape = [lead, &[rows, columns]].concat();
            let elements = batch * rows * columns;
            let mut bytes = dtype
                .narrow(&pattern)
                .repeat(elements.div_ceil(pattern.len()));
            bytes.truncate(elements * dtype.bytes());
            Tensor::from_bytes(gpu, &bytes, dtype, &shape)
        };
        let b_order = order(shape.trans[1], [k, n]);
        let b = match shape.b {
            Storage::Float(dtype) => Right::Float(float(dtype, b_order)),
            Storage::Quantized(kind) => {
                let values: Vec<f32> = pattern.iter().copied().cycle().take(k * n).collect();
                let w = QuantizedMatrix::from_f32(gpu, &values, b_order, kind);
                Right::Quantized(w.expect("finite values"))
            }
        };
        let trial = Trial {
            shape: *shape,
            a: float(shape.a, order(shape.trans[0], [m, k])),
            b,
            c: Tensor::empty(gpu, shape.c, &[lead, &[m, n]].concat()),
            repeats: (per_run(gpu.tier()) / shape.flops().max(1)).clamp(1, REPEATS),
            choices: 0,
            flops: 0,
        };
        gpu.wait()?;
        Ok(trial)
    }

    fn options(&self) -> MatmulOptions<'static> {
        MatmulOptions {
            trans_a: self.shape.trans[0],
            trans_b: self.shape.trans[1],
            output: Some(self.shape.c),
            ..MatmulOptions::default()
        }
    }

    fn with<T>(&self, think: impl FnOnce(&Operands<'_>, &Geometry) -> T) -> T {
        let operands = Operands {
            a: &self.a,
            b: &self.b,
            c: &self.c,
            options: self.options(),
            choice: Variant::Rows.into(),
        };
        let (g, _) = match &self.b {
            Right::Float(b) => super::geometry(self.a.shape(), b.shape(), &self.options()),
            Right::Quantized(w) => super::geometry(self.a.shape(), &w.shape(), &self.options()),
        };
        think(&operands, &g)
    }

    fn usual(&self) -> Choice {
        self.with(usual)
    }

    fn alternatives(&self) -> Vec<Choice> {
        self.with(alternatives)
    }

    /// The faster of the best so far and `choice`.
    fn better(&mut self, best: (Choice, f64), choice: Choice) -> Result<(Choice, f64)> {
        let millis = self.time(choice, best.1)?;
        Ok(if millis < best.1 {
            (choice, millis)
        } else {
            best
        })
    }

    /// Milliseconds of a product, the shortest run's; infinity once the budget is spent.
    fn time(&mut self, choice: Choice, best: f64) -> Result<f64> {
        self.choices += 1;
        if self.choices > most_choices(self.a.gpu().tier()) {
            return Ok(f64::INFINITY);
        }
        self.flops += (RUNS + 1) * self.repeats * self.shape.flops();
        let products = || {
            for _ in 0..self.repeats {
                match &self.b {
                    Right::Float(b) => matmul_as(Some(choice), &self.a, b, &self.options()),
                    Right::Quantized(w) => {
                        matmul_quantized_as(Some(choice), &self.a, w, &self.options())
                    }
                };
            }
        };
        let each = self.repeats as f64;
        Ok(shortest(self.a.gpu(), best * each, &products)? / each)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The cap on time, as work: by the rate that the budget supposes, half a second.
    #[test]
    fn measuring_any_shape_stays_within_the_budget() {
        let gpu = Gpu::new(&Default::default()).expect("an adapter");
        let side = 1 << 24;
        let huge = Shape::float([side, side, 64], [false, true], DType::F32, DType::F32);
        let ragged = Shape::float([4097, 3001, 2999], [true, false], DType::F32, DType::F32);
        for cpu in [true, false] {
            let tier = Tier {
                cpu,
                ..Tier::default()
            };
            for shape in [huge, ragged] {
                let small = cropped(&shape, &tier);
                assert!(
                    most_choices(&tier) * (RUNS + 1) * small.flops() <= budget(&tier),
                    "{small}"
                );
                assert_eq!(small.m % 4, shape.m % 4);
            }
        }
        let shape = Shape::float([500, 300, 700], [false, true], DType::F32, DType::F32);
        let mut trial = Trial::new(&gpu, &cropped(&shape, gpu.tier())).unwrap();
        // More choices than there is a budget for.
        for _ in 0..most_choices(gpu.tier()) + 3 {
            trial.time(Variant::Rows.into(), f64::INFINITY).unwrap();
        }
        assert!(
            trial.flops > 0 && trial.flops <= budget(gpu.tier()),
            "{}",
            trial.flops
        );
    }
}
