//! Scenes as a data set for training: conversations with the pictures in memory.

use std::io::Cursor;
use std::sync::Arc;

use image::ImageFormat;

use super::{Scene, SceneSet};
use crate::data::{DataSet, ImageRef, Sample};
use crate::{Error, Result};

/// What a scene's caption is asked for with.
pub const DESCRIBE: &str = "describe the image.";

impl SceneSet {
    /// Two samples a scene, of one turn each: its caption, and its first question about a colour or a shape.
    ///
    /// Ids are `scene-N` and `scene-N-question`; the picture of both is `scene-N.png`, a PNG in memory.
    ///
    /// # Errors
    /// A set of no scenes.
    pub fn data_set(&self) -> Result<DataSet> {
        let mut samples = Vec::with_capacity(2 * self.count);
        for (number, scene) in self.iter().enumerate() {
            let image = scene.embedded(&format!("scene-{number:05}.png"))?;
            let id = format!("scene-{number:05}");
            samples.push(Sample::question(
                &id,
                image.clone(),
                DESCRIBE,
                &scene.caption,
            ));
            if let Some((question, answer)) = scene.named_questions().next() {
                let id = format!("{id}-question");
                samples.push(Sample::question(id, image, question, answer));
            }
        }
        DataSet::new("drawn scenes", samples)
    }
}

impl Scene {
    /// The questions whose answer is a shape or a colour.
    pub fn named_questions(&self) -> impl Iterator<Item = (&str, &str)> {
        self.questions
            .iter()
            .filter(|(question, _)| question.starts_with("what "))
            .map(|(question, answer)| (question.as_str(), answer.as_str()))
    }

    /// The picture as a PNG in memory under a file name.
    ///
    /// # Errors
    /// The encoder's.
    pub fn embedded(&self, name: &str) -> Result<ImageRef> {
        let mut bytes = Cursor::new(Vec::new());
        self.image
            .write_to(&mut bytes, ImageFormat::Png)
            .map_err(|e| Error::Input(format!("{name}: {e}")))?;
        Ok(ImageRef::Embedded {
            name: name.to_owned(),
            bytes: Arc::from(bytes.into_inner()),
        })
    }
}
