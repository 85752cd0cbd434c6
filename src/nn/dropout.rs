//! Where a step's dropout masks come from, for layers that are recomputed or replayed too.

use std::cell::RefCell;

use crate::autograd::{Replayed, Var, checkpoint};
use crate::ops::dropout::dropout;
use crate::tensor::Tensor;

thread_local! {
    /// Seed of this step's masks, u32 `[2]`; `None` while not training.
    static SEED: RefCell<Option<Tensor>> = const { RefCell::new(None) };
}

/// Runs `f` with dropout masks drawn from `seed`, u32 `[2]` with the lower half first; without one nothing is dropped.
pub fn with_dropout<T>(seed: Option<Tensor>, f: impl FnOnce() -> T) -> T {
    let outer = SEED.replace(seed);
    let result = f();
    SEED.set(outer);
    result
}

fn seed() -> Option<Tensor> {
    SEED.with_borrow(Option::clone)
}

/// `x` with a share `p` dropped by the step's mask of `stream`; as it is while not training.
///
/// The mask depends on the seed alone, so that recomputation sees the same one.
pub(super) fn dropped(x: &Var, p: f32, stream: u64) -> Var {
    let Some(seed) = seed().filter(|_| p > 0.0) else {
        return x.clone();
    };
    let y = dropout(x.value(), p, &seed, stream);
    Var::from_op("dropout", y, &[x], move |dy, _| {
        vec![Some(dropout(dy, p, &seed, stream))]
    })
}

/// [`checkpoint`] of layers that may drop: the second time as the first.
pub fn recomputed(inputs: &[Var], f: impl Fn(&[Var]) -> Vec<Var> + 'static) -> Vec<Var> {
    let seed = seed();
    checkpoint(inputs, move |inputs| {
        with_dropout(seed.clone(), || f(inputs))
    })
}

/// [`Replayed::call`] of layers that may drop: by each step's own seed.
pub fn replayed(
    plans: &Replayed,
    own: &[usize],
    inputs: &[Var],
    f: impl Fn(&[Var]) -> Vec<Var> + 'static,
) -> Vec<Var> {
    let (count, mut inputs) = (inputs.len(), inputs.to_vec());
    inputs.extend(seed().map(Var::constant));
    plans.call(own, &inputs, move |inputs| {
        let (inputs, seed) = inputs.split_at(count);
        let seed = seed.first().map(|seed| seed.value().clone());
        with_dropout(seed, || f(inputs))
    })
}
