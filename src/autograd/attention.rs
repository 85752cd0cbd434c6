//! Attention, its taps and its capture on [`Var`].

use super::Var;
use super::var::Earlier;
use crate::ops::attention::{self as op, AttentionMask, AttentionShape};
use crate::ops::attention_tap::{AttentionTap, attention_mean_probs, attention_tap};
use crate::tensor::Tensor;

/// Flash attention: q [B, T, H·D], k and v [B, S, Hkv·D] → [B, T, H·D].
pub fn attention(q: &Var, k: &Var, v: &Var, shape: AttentionShape, mask: &AttentionMask) -> Var {
    run(q, k, v, shape, mask, &[]).0
}

/// [`attention`] with a tap: also the probabilities f32 [rows, H, columns] that the tap asks for.
pub fn attention_tapped(
    q: &Var,
    k: &Var,
    v: &Var,
    shape: AttentionShape,
    mask: &AttentionMask,
    tap: &AttentionTap,
) -> (Var, Var) {
    let (out, mut probs) = run(q, k, v, shape, mask, std::slice::from_ref(tap));
    (out, probs.remove(0))
}

/// [`attention`] with the probabilities' mean over heads, f32 [B, T, S]; not differentiated.
pub fn attention_captured(
    q: &Var,
    k: &Var,
    v: &Var,
    shape: AttentionShape,
    mask: &AttentionMask,
) -> (Var, Tensor) {
    let (out, lse) = op::attention(q.value(), k.value(), v.value(), shape, mask);
    let probs = attention_mean_probs(q.value(), k.value(), &lse, shape, mask);
    (node(q, k, v, shape, mask, (out, lse), &[]).0, probs)
}

fn run(
    q: &Var,
    k: &Var,
    v: &Var,
    shape: AttentionShape,
    mask: &AttentionMask,
    taps: &[AttentionTap],
) -> (Var, Vec<Var>) {
    let forward = op::attention(q.value(), k.value(), v.value(), shape, mask);
    node(q, k, v, shape, mask, forward, taps)
}

/// Puts an attention already computed on the tape, with its taps as further outputs.
fn node(
    q: &Var,
    k: &Var,
    v: &Var,
    shape: AttentionShape,
    mask: &AttentionMask,
    (out, lse): (Tensor, Tensor),
    taps: &[AttentionTap],
) -> (Var, Vec<Var>) {
    let (qv, kv, vv) = (q.value().clone(), k.value().clone(), v.value().clone());
    let probs: Vec<Tensor> = taps
        .iter()
        .map(|tap| attention_tap(&qv, &kv, &lse, tap, shape, mask))
        .collect();
    let outputs: Vec<Tensor> = std::iter::once(out.clone()).chain(probs.clone()).collect();
    let (taps, mask) = (taps.to_vec(), mask.clone());
    let backward = move |upstream: &[Option<Tensor>],
                         _: &[bool],
                         _: &mut Earlier,
                         _: &mut super::Gradients| {
        let tapped: Vec<(&AttentionTap, &Tensor, &Tensor)> = taps
            .iter()
            .zip(&probs)
            .zip(&upstream[1..])
            .filter_map(|((tap, probs), grad)| Some((tap, probs, grad.as_ref()?)))
            .collect();
        if upstream[0].is_none() && tapped.is_empty() {
            return vec![None, None, None];
        }
        let forward = op::Forward {
            q: &qv,
            k: &kv,
            v: &vv,
            out: &out,
            lse: &lse,
        };
        let (dq, dk, dv) =
            op::attention_backward(forward, upstream[0].as_ref(), &tapped, shape, &mask);
        vec![Some(dq), Some(dk), Some(dv)]
    };
    let mut outputs =
        Var::from_multi_op("attention", outputs, &[q, k, v], false, Box::new(backward));
    let taps = outputs.split_off(1);
    (outputs.remove(0), taps)
}
