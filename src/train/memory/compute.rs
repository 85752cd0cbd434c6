//! How much a step computes.

use super::student::{Outline, Role, Tower, Weight};
use super::{MAP, Shape, aligned, aligner, tapped};
use crate::Result;
use crate::train::config::Config;

/// Floating-point operations of one micro-batch, forward and backward, a multiplication and an addition each counted:
/// products with weights, attention, the aligner.
///
/// # Errors
/// As [`Outline::roles`]'s.
pub fn operations(config: &Config, student: &Outline, shape: &Shape) -> Result<u64> {
    let roles = student.roles(config)?;
    let weights = student.weights.iter().zip(&roles);
    let vision = weights
        .clone()
        .any(|(weight, role)| weight.in_vision() && *role != Role::Frozen);
    let recompute = u64::from(config.train.checkpoint_activations);
    let mut sum = 0;
    for (weight, role) in weights {
        let forward = 2 * weight.elements() * rows(weight, student, shape) as u64;
        // A gradient passes through everything behind what is trained first.
        let outer = weight.in_vision() || weight.in_connector();
        let taped = u64::from(!outer || vision || *role != Role::Frozen);
        let again = taped * recompute * u64::from(weight.name.contains(".layers."));
        sum += forward * (1 + taped + u64::from(*role == Role::Own) + again);
        if let (Role::Adapted(rank), [outputs, inputs]) = (role, &weight.shape[..]) {
            let tokens = student.tower(weight.in_vision()).tokens;
            sum += 6 * (rank * (inputs + outputs) * tokens) as u64;
        }
    }
    for (tower, taped) in [(&student.text, true), (&student.vision, vision)] {
        let cross = if std::ptr::eq(tower, &student.text) {
            student.cross
        } else {
            0
        };
        let pictures = student.image_tokens / shape.samples.max(1);
        let forward =
            attention(tower, tower.layers - cross, tower.seen) + attention(tower, cross, pictures);
        // Flash attention's backward is five products to the forward's two.
        sum += match taped {
            true => forward + forward * 5 / 2 + recompute * forward,
            false => forward,
        };
    }
    let layers = tapped(config, student);
    let (weights, _) = aligner(config, student, shape.words);
    sum += 6 * (weights * MAP * shape.words * aligned(config, layers)) as u64;
    Ok(sum)
}

fn attention(tower: &Tower, layers: usize, seen: usize) -> u64 {
    4 * (layers * tower.tokens * seen * tower.queries) as u64
}

/// Rows that a weight is multiplied with; 0 for tables, norms and biases.
fn rows(weight: &Weight, student: &Outline, shape: &Shape) -> usize {
    let name = weight.name.as_str();
    let has = |part: &str| name.contains(part);
    match weight.shape.len() {
        4 => shape.patches,
        2 if has("lm_head") => shape.labels,
        2 if has("embed_tokens") && student.tied => shape.labels,
        2 if has("embed") => 0,
        2 if weight.in_vision() => student.vision.tokens,
        2 if weight.in_connector() || has("cross_attn.k_proj") || has("cross_attn.v_proj") => {
            student.image_tokens
        }
        2 => student.text.tokens,
        _ => 0,
    }
}
