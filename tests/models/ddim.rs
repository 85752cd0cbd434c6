//! The noise schedule against `diffusers`.

use lavender_wgpu::diffusion::{NoiseSchedule, SchedulerConfig};

use crate::teacher_fixture::{Expected, assert_relative};

#[test]
fn the_noise_schedule_is_that_of_diffusers() {
    let expected = Expected::open("a").get("alphas_cumprod").0;
    let schedule = NoiseSchedule::new(&SchedulerConfig::default());
    let bars: Vec<f32> = (0..1000).map(|t| schedule.alpha_bar(t) as f32).collect();
    // diffusers multiplies in f32: a thousand roundings.
    assert_relative("alphas_cumprod", &bars, &expected, 3e-5);
    assert_eq!(schedule.alpha_bar(-250), schedule.alpha_bar(0));
    assert_eq!(schedule.timesteps(4), [0, 250, 500, 750]);
    assert_eq!(schedule.noised_timesteps(5), [1, 150, 300, 450, 600]);
}
