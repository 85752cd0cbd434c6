//! 95 % intervals: over samples by bootstrap, over seeds by Student's t.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Resamples of a bootstrap.
const RESAMPLES: usize = 1000;

/// 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
const T: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
];

/// 95 % percentile intervals of the figures that `figures` computes from any choice of samples, by resampling the
/// `count` samples with replacement; the same seed gives the same intervals. A resample that has no finite value of a
/// figure is left out of it; `None` where none has.
pub fn bootstrap(
    count: usize,
    seed: u64,
    figures: impl Fn(&[usize]) -> Vec<f64>,
) -> Vec<Option<(f64, f64)>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut columns: Vec<Vec<f64>> = Vec::new();
    let mut chosen = vec![0; count];
    for _ in 0..RESAMPLES {
        chosen.fill_with(|| rng.random_range(0..count));
        let values = figures(&chosen);
        columns.resize(values.len(), Vec::new());
        for (column, value) in columns.iter_mut().zip(values) {
            column.extend(Some(value).filter(|v| v.is_finite()));
        }
    }
    let interval = |mut column: Vec<f64>| {
        column.sort_by(f64::total_cmp);
        let at = |share: f64| column.get((share * (column.len() as f64 - 1.0)).round() as usize);
        Some((*at(0.025)?, *at(0.975)?))
    };
    columns.into_iter().map(interval).collect()
}

/// Mean, and half the width of its 95 % interval by Student's t; no width for a single value.
pub fn mean_and_half_width(values: &[f64]) -> (f64, Option<f64>) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    if values.len() < 2 {
        return (mean, None);
    }
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (
        mean,
        Some(quantile(values.len() - 1) * (variance / n).sqrt()),
    )
}

/// 97.5 % quantile of Student's t.
fn quantile(degrees: usize) -> f64 {
    match T.get(degrees - 1) {
        Some(t) => *t,
        // The first terms of its series in 1/degrees (Abramowitz & Stegun 26.7.5): right to 1e-3 from here on.
        None => {
            let z = 1.959_964f64;
            z + (z.powi(3) + z) / (4.0 * degrees as f64)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn student_s_t_interval_of_three_seeds() {
        // scipy.stats.t.interval(0.95, 2, loc=2, scale=sem): 2 ± 4.303 · 1/√3.
        let (mean, half) = mean_and_half_width(&[1.0, 2.0, 3.0]);
        assert_eq!(mean, 2.0);
        assert!((half.unwrap() - 2.4841).abs() < 1e-3, "{half:?}");
        assert_eq!(mean_and_half_width(&[5.0]), (5.0, None));
        // t at 60 degrees is 2.0003.
        assert!((quantile(60) - 2.0003).abs() < 1e-3);
    }

    #[test]
    fn bootstrap_covers_the_binomial_and_repeats_itself() {
        // 400 samples, 30 % right: standard error 0.0229, interval about ± 0.045.
        let right: Vec<f64> = (0..400).map(|i| f64::from(u8::from(i < 120))).collect();
        let share = |chosen: &[usize]| {
            let sum: f64 = chosen.iter().map(|&i| right[i]).sum();
            vec![sum / chosen.len() as f64, f64::NAN]
        };
        let intervals = bootstrap(400, 7, share);
        let (low, high) = intervals[0].unwrap();
        assert!(
            (low - 0.255).abs() < 0.012 && (high - 0.345).abs() < 0.012,
            "{low} {high}"
        );
        assert_eq!(intervals[1], None);
        assert_eq!(bootstrap(400, 7, share), intervals);
        assert_ne!(bootstrap(400, 8, share), intervals);
    }
}
