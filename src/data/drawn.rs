//! Drawn scenes as a data set on disk.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::scenes::{Scene, SceneSet};
use crate::error::{Error, Result};
use crate::files;

/// What a caption is asked for with.
pub const CAPTION_PROMPT: &str = "Describe the image in a single sentence as a caption.";

/// Writes the scenes as PNG and two LLaVA files below `dir`: `captions.json` (a caption a scene) and
/// `train.json` (those, and `questions` of each scene's questions); gives the two paths. Files that
/// are there already stay.
///
/// # Errors
/// Files that cannot be written.
pub fn write(dir: &Path, scenes: SceneSet, questions: usize) -> Result<(PathBuf, PathBuf)> {
    let (captions, train) = (dir.join("captions.json"), dir.join("train.json"));
    if captions.is_file() && train.is_file() {
        return Ok((captions, train));
    }
    let (mut described, mut asked) = (Vec::new(), Vec::new());
    for (i, scene) in scenes.iter().enumerate() {
        let image = format!("{i:04}.png");
        write_png(&dir.join(&image), &scene)?;
        described.push(sample(
            &format!("scene-{i:04}"),
            &image,
            CAPTION_PROMPT,
            &scene.caption,
        ));
        for (q, (question, answer)) in scene.questions.iter().take(questions).enumerate() {
            asked.push(sample(
                &format!("scene-{i:04}-q{q}"),
                &image,
                question,
                answer,
            ));
        }
    }
    write_json(&captions, &described)?;
    described.append(&mut asked);
    write_json(&train, &described)?;
    Ok((captions, train))
}

fn sample(id: &str, image: &str, question: &str, answer: &str) -> Value {
    json!({
        "id": id,
        "image": image,
        "conversations": [
            {"from": "human", "value": format!("<image>\n{question}")},
            {"from": "gpt", "value": answer},
        ],
    })
}

fn write_png(path: &Path, scene: &Scene) -> Result<()> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    scene
        .image
        .write_to(&mut bytes, image::ImageFormat::Png)
        .map_err(|e| Error::file(path, e.to_string()))?;
    files::write_bytes(path, &bytes.into_inner())
}

fn write_json(path: &Path, samples: &[Value]) -> Result<()> {
    let text = serde_json::to_vec_pretty(samples).map_err(|e| Error::file(path, e.to_string()))?;
    files::write_bytes(path, &text)
}
