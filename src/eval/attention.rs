//! Figures of one word map.

/// Entropy −Σ p ln p of a map normalised to sum 1, in nats; lower is sharper. 0 for an all-zero map.
pub fn entropy(map: &[f32]) -> f32 {
    let sum: f32 = map.iter().sum();
    if sum <= 0.0 {
        return 0.0;
    }
    map.iter()
        .map(|&v| v / sum)
        .filter(|&p| p > 0.0)
        .map(|p| -p * p.ln())
        .sum()
}

/// Whether the map's first maximum lies inside the region (the pointing game).
///
/// Panics when the sizes differ.
pub fn points_inside(map: &[f32], region: &[bool]) -> bool {
    assert_eq!(map.len(), region.len(), "points_inside");
    let best = map
        .iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |best, (i, &v)| {
            if v > best.1 { (i, v) } else { best }
        });
    region.get(best.0).copied().unwrap_or(false)
}

/// Intersection over union of the region and the map above its best threshold.
///
/// Panics when the sizes differ.
pub fn best_iou(map: &[f32], region: &[bool]) -> f32 {
    assert_eq!(map.len(), region.len(), "best_iou");
    let total = region.iter().filter(|&&r| r).count();
    let mut order: Vec<usize> = (0..map.len()).collect();
    order.sort_by(|&a, &b| map[b].total_cmp(&map[a]));
    let (mut inside, mut best) = (0, 0.0f32);
    for (taken, &i) in order.iter().enumerate() {
        inside += usize::from(region[i]);
        // A threshold takes all cells of one value or none.
        if order.get(taken + 1).is_some_and(|&j| map[j] == map[i]) {
            continue;
        }
        let union = taken + 1 + total - inside;
        best = best.max(inside as f32 / union as f32);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_of_uniform_and_of_one_cell() {
        assert!((entropy(&[1.0; 16]) - 16f32.ln()).abs() < 1e-5);
        assert_eq!(entropy(&[0.0, 3.0, 0.0, 0.0]), 0.0);
        assert_eq!(entropy(&[0.0; 4]), 0.0);
    }

    #[test]
    fn pointing_takes_the_first_maximum() {
        assert!(points_inside(&[0.0, 1.0, 1.0], &[false, true, false]));
        assert!(!points_inside(&[0.0, 0.5, 1.0], &[false, true, false]));
    }

    #[test]
    fn iou_uses_the_best_threshold_and_no_part_of_a_tie() {
        assert_eq!(
            best_iou(&[0.9, 0.8, 0.1, 0.0], &[true, true, false, false]),
            1.0
        );
        assert_eq!(best_iou(&[0.5; 4], &[true, false, false, false]), 0.25);
    }
}
