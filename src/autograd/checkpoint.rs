//! Activation checkpointing: forget a block's activations, recompute them in the backward.

use super::var::{Earlier, backward_into, no_grad, recording, with_recording};
use super::{Gradients, Var};
use crate::tensor::Tensor;

/// `f(inputs)` without keeping what it computes on the way; the backward runs `f` again.
///
/// All outputs' gradients count, so attention taps inside keep theirs, and leaves that `f` holds
/// (LoRA weights) get their gradients. `f` must give the same values each time.
pub fn checkpoint(inputs: &[Var], f: impl Fn(&[Var]) -> Vec<Var> + 'static) -> Vec<Var> {
    if !recording() {
        return f(inputs);
    }
    let values: Vec<Tensor> = inputs.iter().map(|v| v.value().clone()).collect();
    let outputs = no_grad(|| f(inputs));
    let outputs = outputs.iter().map(|v| v.value().clone()).collect();
    let parents: Vec<&Var> = inputs.iter().collect();
    let backward = move |upstream: &[Option<Tensor>],
                         needs: &[bool],
                         _: &mut Earlier,
                         outer: &mut Gradients| {
        backward_again(&f, &values, upstream, needs, outer)
    };
    Var::from_multi_op("checkpoint", outputs, &parents, true, Box::new(backward))
}

/// Runs `f` on `values` again, with a tape, and its backward: gradients of those values that need one. Those of leaves go
/// to `outer`.
pub(super) fn backward_again(
    f: &dyn Fn(&[Var]) -> Vec<Var>,
    values: &[Tensor],
    upstream: &[Option<Tensor>],
    needs: &[bool],
    outer: &mut Gradients,
) -> Vec<Option<Tensor>> {
    let input = |(value, &needed): (&Tensor, &bool)| match needed {
        true => Var::parameter(value.clone()),
        false => Var::constant(value.clone()),
    };
    let inputs: Vec<Var> = values.iter().zip(needs).map(input).collect();
    let outputs = with_recording(true, || f(&inputs));
    let roots = outputs.into_iter().zip(upstream);
    let roots: Vec<(Var, Tensor)> = roots
        .filter_map(|(output, grad)| Some((output, grad.clone()?)))
        .collect();
    backward_into(&roots, outer);
    inputs.iter().map(|input| outer.take(input)).collect()
}
