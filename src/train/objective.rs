//! What a step minimises: next-token loss plus λ × the distance of the student's aligned word maps from the targets.

use super::batch::{Batch, Example};
use super::config::Config;
use crate::align::aligner::{Aligner, AlignerShape};
use crate::align::loss::{aligned, attention_loss, mean_mean};
use crate::align::maps::{SampleWords, word_maps};
use crate::align::options::{Parallel, WordSource};
use crate::autograd::{Var, no_grad};
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::nn::Parameters;
use crate::vlm::mirror::{Mirror, MirroredSample};
use crate::vlm::{Grid, Student, Taps};

/// Student and aligner, and how their maps are compared with the targets.
pub struct Objective {
    /// Student with its trained parts.
    pub student: Student,
    /// Aligner network.
    pub aligner: Aligner,
    /// Weights of `attention.parallel`; none without.
    pub parallel: Parameters,
    /// Hooked layers that are aligned.
    layers: Vec<usize>,
    config: Config,
}

/// Losses of one batch, on the tape.
pub struct Losses {
    /// Next-token loss, without the warm-up's factor.
    pub lm: Var,
    /// Distance of the maps, without λ; `None` where the batch has no word with a target.
    pub attention: Option<Var>,
    /// What is minimised.
    pub total: Var,
}

/// The factors of a step's losses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    /// λ.
    pub attention: f32,
    /// Of the language loss: 1 but for warm-up and ramp.
    pub language: f32,
    /// Whether the student stands still and the aligner alone learns.
    pub frozen: bool,
}

/// A sample's words with the student's aligned maps and the targets, both [words, R·R].
pub struct WordSheet {
    /// The matched words.
    pub words: Vec<String>,
    /// The student's maps.
    pub maps: Vec<f32>,
    /// The attention that they are made of: its mean over the aligned layers and their heads.
    pub attention: Vec<f32>,
    /// The teacher's.
    pub targets: Vec<f32>,
}

impl WordSheet {
    /// The part of `values`, which are [words, R·R], that belongs to the word at `place`.
    pub fn part<'a>(&self, values: &'a [f32], place: usize) -> Option<&'a [f32]> {
        let cells = values.len() / self.words.len().max(1);
        values.get(place * cells..(place + 1) * cells)
    }
}

impl Objective {
    /// The aligner that `config` describes beside `student`, and its parallel attention, with new weights or those of
    /// `init.aligner` and `init.parallel`.
    ///
    /// # Errors
    /// Layers that the student does not have; a mirror where there is nothing to mirror; files that do not fit.
    pub fn new(gpu: &Gpu, config: &Config, mut student: Student) -> Result<Objective> {
        let shape = AlignerShape {
            kind: config.aligner.kind,
            channels: config.aggregation().channels(student.heads()),
            hidden: config.aligner.hidden,
            norm: config.aligner.norm,
            activation: config.aligner.activation,
        };
        let aligner = match &config.init.aligner {
            Some(file) => Aligner::open(gpu, file, shape)?,
            None => Aligner::new(gpu, shape, config.train.seed ^ 0xa119)?,
        };
        let available: Vec<usize> = (0..student.hooked_layers()).collect();
        let layers = config.attention.layers.choose(&available);
        let layers = layers.map_err(Error::Config)?;
        if config.attention.mirror && !student.attends_itself() {
            return Err(Error::Config(format!(
                "attention.mirror = true, but {} reads pictures by cross-attention, in which they do not attend to the text; \
                 expected false",
                config.model.path.display()
            )));
        }
        let (init, seed) = (&config.init.parallel, config.train.seed ^ 0x9a2a);
        let parallel = match config.attention.parallel {
            Parallel::None => Parameters::default(),
            kind => student.add_parallel(kind, &layers, init.as_deref(), seed)?,
        };
        Ok(Objective {
            layers,
            student,
            aligner,
            parallel,
            config: config.clone(),
        })
    }

    /// Finds what of the examples only the student knows: its words, with `words.source = "predicted"`.
    ///
    /// # Errors
    /// A GPU fault.
    pub fn complete(&self, gpu: &Gpu, examples: &mut [Example]) -> Result<()> {
        match self.config.words.source {
            WordSource::Labels => Ok(()),
            WordSource::Predicted => self.predict_words(gpu, examples, &self.config.word_rules()),
        }
    }

    /// The losses of one batch; nothing is waited for.
    ///
    /// # Errors
    /// Examples that do not fit one batch.
    pub fn losses(
        &self,
        gpu: &Gpu,
        examples: &[&Example],
        batch: &Batch,
        weights: Weights,
    ) -> Result<Losses> {
        let prepared: Vec<_> = examples.iter().map(|e| &e.prepared).collect();
        let output = self
            .student
            .forward(&prepared, self.taps(gpu, examples, batch).as_ref())?;
        let width = output.hidden.value().last_dim();
        let tokens = output.hidden.value().elements() / width;
        let hidden = output.hidden.reshape(&[tokens, width]);
        let learned = hidden.gather_rows(&batch.label_rows);
        let lm = self
            .student
            .next_token_loss(&learned, &batch.labels, batch.label_count);
        let attention = batch.targets.as_ref().map(|targets| {
            let loss = |taps: &[Var]| {
                let maps = self.maps_of(gpu, taps, examples, batch);
                attention_loss(&maps, targets, self.config.loss.kind)
            };
            let detached = || output.taps.iter().map(Var::detach).collect::<Vec<_>>();
            // Logged at λ = 0 too, off the tape.
            match (weights.attention == 0.0, weights.frozen) {
                (true, _) => no_grad(|| loss(&detached())),
                (false, true) => loss(&detached()),
                (false, false) => loss(&output.taps),
            }
        });
        let weighted = match weights.language == 1.0 {
            _ if weights.frozen => lm.detach().scale(weights.language),
            true => lm.clone(),
            false => lm.scale(weights.language),
        };
        let total = match &attention {
            Some(attention) if weights.attention != 0.0 => {
                weighted.add(&attention.scale(weights.attention))
            }
            _ => weighted,
        };
        Ok(Losses {
            lm,
            attention,
            total,
        })
    }

    /// Aligned maps of an example's matched words, for looking; `None` where it has none.
    ///
    /// # Errors
    /// A GPU fault.
    pub fn maps(&self, gpu: &Gpu, example: &Example) -> Result<Option<WordSheet>> {
        let batch = Batch::new(gpu, &[example]);
        let Some(taps) = self.taps(gpu, &[example], &batch) else {
            return Ok(None);
        };
        no_grad(|| {
            let output = self.student.forward(&[&example.prepared], Some(&taps))?;
            let layers = layer_maps(gpu, &output.taps, &[example], &batch);
            let maps = self.joined(&layers, &[example]);
            Ok(Some(WordSheet {
                words: example.words.words.clone(),
                maps: maps.value().to_f32()?,
                attention: mean_mean(&layers).value().to_f32()?,
                targets: example.targets.clone(),
            }))
        })
    }

    /// What the student is to tap for a batch; `None` where it has no word.
    fn taps(&self, gpu: &Gpu, examples: &[&Example], batch: &Batch) -> Option<Taps<'_>> {
        let mirror = || {
            let samples: Vec<_> = examples
                .iter()
                .map(|e| MirroredSample {
                    rows: &e.words.rows,
                    columns: &e.prepared.columns,
                    tokens: e.prepared.tokens(),
                })
                .collect();
            let length = examples.iter().map(|e| e.prepared.ids.len()).max();
            Mirror::new(gpu, &samples, length.unwrap_or(0))
        };
        batch.tap_rows.as_ref().map(|rows| Taps {
            layers: &self.layers,
            rows: rows.clone(),
            columns: batch.tap_columns.clone(),
            mirror: self.config.attention.mirror.then(mirror),
        })
    }

    /// One map [R·R] in 0…1 for each word of the batch, from each layer's tap.
    fn maps_of(&self, gpu: &Gpu, taps: &[Var], examples: &[&Example], batch: &Batch) -> Var {
        self.joined(&layer_maps(gpu, taps, examples, batch), examples)
    }

    /// One map of each word from those of each layer.
    fn joined(&self, layers: &[Var], examples: &[&Example]) -> Var {
        let words: Vec<usize> = examples.iter().map(|e| e.words.words.len()).collect();
        aligned(layers, &words, &self.config.aggregation(), &self.aligner)
    }
}

/// The words' maps [words, R, R, heads] of each layer's tap.
fn layer_maps(gpu: &Gpu, taps: &[Var], examples: &[&Example], batch: &Batch) -> Vec<Var> {
    let samples: Vec<(&SampleWords, Grid)> = examples
        .iter()
        .zip(&batch.grids)
        .map(|(e, &grid)| (&e.words, grid))
        .collect();
    taps.iter()
        .filter_map(|tap| word_maps(gpu, tap, &samples))
        .collect()
}
