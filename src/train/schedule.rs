//! The course of the learning rate.

use serde::{Deserialize, Serialize};

/// `optimizer.schedule`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Times `optimizer.gamma` after each epoch.
    #[default]
    Step,
    /// The same all the way.
    Constant,
    /// Half a cosine, down to 0 at the end.
    Cosine,
    /// A straight line down to 0 at the end.
    Linear,
}

impl Schedule {
    /// The rate's factor at `step` of `total`, from 0 at step 0 to 1 at step `warmup` in a line, then along the
    /// schedule: as `get_scheduler` of transformers has it. (γ per epoch is not in it.)
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        if step < warmup {
            return step as f64 / warmup as f64;
        }
        let left = total.saturating_sub(warmup).max(1) as f64;
        match self {
            Schedule::Step | Schedule::Constant => 1.0,
            Schedule::Linear => (total.saturating_sub(step) as f64 / left).max(0.0),
            Schedule::Cosine => {
                let done = (step - warmup) as f64 / left;
                (0.5 * (1.0 + (std::f64::consts::PI * done).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values that transformers 5.23 gives: `get_scheduler(name, AdamW(lr=1), 3, 10)`, one a step.
    #[test]
    fn schedules_are_those_of_transformers() {
        let third = 1.0 / 3.0;
        let cosine = [
            0.0,
            third,
            2.0 * third,
            1.0,
            0.950_484_433_951_21,
            0.811_744_900_929_366_8,
            0.611_260_466_978_157_2,
            0.388_739_533_021_842_8,
            0.188_255_099_070_633_23,
            0.049_515_566_048_790_48,
        ];
        let down = |step: f64| (10.0 - step) / 7.0;
        for step in 0..10u64 {
            let at = |schedule: Schedule| schedule.factor(step, 3, 10);
            let linear = match step {
                0..3 => cosine[step as usize],
                _ => down(step as f64),
            };
            assert!((at(Schedule::Cosine) - cosine[step as usize]).abs() < 1e-12);
            assert!((at(Schedule::Linear) - linear).abs() < 1e-12);
            let constant = cosine[step as usize].max(f64::from(u8::from(step >= 3)));
            assert!((at(Schedule::Constant) - constant).abs() < 1e-12);
        }
        // Past the end, and with nothing but warm-up.
        assert_eq!(Schedule::Linear.factor(12, 3, 10), 0.0);
        assert_eq!(Schedule::Cosine.factor(5, 5, 5), 1.0);
    }
}
