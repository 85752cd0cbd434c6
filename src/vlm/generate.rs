//! Text generation, one token at a time.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it and a token is drawn.
    pub temperature: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            seed: 0,
        }
    }
}

/// What a generation gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, the one that ended it included.
    pub tokens: Vec<u32>,
    /// Their text without special tokens.
    pub text: String,
    /// Whether an end-of-turn token ended it, and not the limit.
    pub finished: bool,
}

/// Draws tokens from logits.
pub(super) struct Sampler {
    temperature: f32,
    rng: ChaCha8Rng,
}

impl Sampler {
    pub(super) fn new(sampling: Sampling) -> Self {
        Self {
            temperature: sampling.temperature,
            rng: ChaCha8Rng::seed_from_u64(sampling.seed),
        }
    }

    /// The next token; of equal logits the first.
    pub(super) fn choose(&mut self, logits: &[f32]) -> u32 {
        let mut best = 0;
        for (id, &value) in logits.iter().enumerate() {
            if value > logits[best] {
                best = id;
            }
        }
        if self.temperature <= 0.0 {
            return best as u32;
        }
        let weight = |value: f32| f64::from((value - logits[best]) / self.temperature).exp();
        let total: f64 = logits.iter().map(|&value| weight(value)).sum();
        let mut left = self.rng.random_range(0.0..1.0f64) * total;
        for (id, &value) in logits.iter().enumerate() {
            left -= weight(value);
            if left < 0.0 {
                return id as u32;
            }
        }
        best as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_temperature_takes_the_first_maximum() {
        let mut sampler = Sampler::new(Sampling::default());
        assert_eq!(sampler.choose(&[0.0, 2.0, 1.0, 2.0]), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let sampling = Sampling {
            temperature: 0.5,
            seed: 7,
        };
        let mut sampler = Sampler::new(sampling);
        // exp((1 - 0.5) / 0.5) = e: the second token e times as often as the first.
        let logits = [0.5, 1.0, f32::NEG_INFINITY];
        let mut counts = [0; 3];
        for _ in 0..20_000 {
            counts[sampler.choose(&logits) as usize] += 1;
        }
        // Standard deviation of the share is 0.0031.
        let share = f64::from(counts[1]) / 20_000.0;
        let e = std::f64::consts::E;
        assert!((share - e / (1.0 + e)).abs() < 0.02, "{counts:?}");
        assert_eq!(counts[2], 0);
    }
}
