//! How well a teacher's trajectory knows the image: the image, its round trip through the VAE, and what sampling back
//! from the inverted latents gives, side by side with the signal-to-noise ratio of each.

use image::RgbImage;

use super::picture::{Row, sheet};
use super::targets::Made;
use crate::Result;
use crate::diffusion::null_text::NullTextOptions;
use crate::diffusion::pipeline::{StableDiffusion, repeat_samples};

/// One reconstruction of an image.
pub struct Reconstruction {
    /// `VAE`, `DDIM` or `null-text`.
    pub name: &'static str,
    /// What came out.
    pub image: RgbImage,
    /// Peak signal-to-noise ratio against the image, in dB.
    pub psnr: f64,
}

/// The reconstructions of the `sample`-th image of a batch; `image` as the model was given it.
///
/// DDIM goes back with the guidance that null-text inversion is made for, and drifts away by it. The null-text column
/// is there where the batch was made with it; a text in several chunks is shown with its first.
///
/// # Errors
/// What the GPU reports.
pub fn reconstructions(
    model: &StableDiffusion,
    image: &RgbImage,
    made: &Made,
    sample: usize,
    steps: usize,
) -> Result<Vec<Reconstruction>> {
    let seen = model.resized(image);
    let recorded = &made.recorded;
    let chunk = recorded.first_chunk[sample];
    let text = repeat_samples(&recorded.text, &[chunk]);
    let inverted = repeat_samples(&recorded.latents, &[chunk]);
    let guidance = NullTextOptions::default().guidance;
    let mut latents = vec![
        ("VAE", repeat_samples(&made.latents, &[sample])),
        (
            "DDIM",
            model.sample_back(&inverted, &text, steps, guidance)?,
        ),
    ];
    if let Some(reconstructed) = &recorded.reconstructed {
        latents.push(("null-text", repeat_samples(reconstructed, &[chunk])));
    }
    let mut found = Vec::with_capacity(latents.len());
    for (name, latents) in latents {
        for image in model.decode_latents(&latents)? {
            found.push(Reconstruction {
                name,
                psnr: psnr(&seen, &image),
                image,
            });
        }
    }
    Ok(found)
}

/// The image and its reconstructions in a row, titled with their names and ratios.
pub fn picture(model: &StableDiffusion, image: &RgbImage, found: &[Reconstruction]) -> RgbImage {
    let titles: Vec<String> = ["image".to_owned()]
        .into_iter()
        .chain(
            found
                .iter()
                .map(|r| format!("{}, {:.1} dB", r.name, r.psnr)),
        )
        .collect();
    let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
    let images = found.iter().map(|r| Some(r.image.clone()));
    let row = Row {
        word: String::new(),
        cells: [Some(model.resized(image))]
            .into_iter()
            .chain(images)
            .collect(),
    };
    sheet(&titles, &[row])
}

/// Peak signal-to-noise ratio in dB of two images of one size, infinite where they are equal.
pub fn psnr(a: &RgbImage, b: &RgbImage) -> f64 {
    let squares = a.as_raw().iter().zip(b.as_raw());
    let squares = squares.map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2));
    let mean = squares.sum::<f64>() / a.as_raw().len().max(1) as f64;
    10.0 * (255.0f64.powi(2) / mean).log10()
}

#[cfg(test)]
mod tests {
    use image::{Rgb, RgbImage};

    use super::psnr;

    #[test]
    fn psnr_of_known_differences() {
        let gray = |v| RgbImage::from_pixel(4, 4, Rgb([v; 3]));
        // 20·log10(255 / difference).
        assert!((psnr(&gray(100), &gray(110)) - 28.1308).abs() < 1e-3);
        assert!((psnr(&gray(0), &gray(255))).abs() < 1e-9);
        assert!(psnr(&gray(7), &gray(7)).is_infinite());
    }
}
