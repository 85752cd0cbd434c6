//! The student's words as it says them itself: `words.source = "predicted"`.

use std::collections::BTreeMap;

use super::batch::Example;
use super::objective::Objective;
use crate::align::filter::WordRules;
use crate::align::maps::SampleWords;
use crate::align::words::WordTokens;
use crate::autograd::no_grad;
use crate::error::Result;
use crate::gpu::Gpu;
use crate::ops::reduce::{Reduce, arg_extremum};
use crate::tensor::Tensor;

/// Rows whose logits are held at once.
const ROWS: usize = 256;

impl Objective {
    /// Gives `examples` the words that the student predicts: at every text position, prompt and answer, the likeliest
    /// next token, decoded alone; a word is found where the token is one, and matched where the sample has its target.
    ///
    /// # Errors
    /// A GPU fault.
    pub fn predict_words(
        &self,
        gpu: &Gpu,
        examples: &mut [Example],
        rules: &WordRules,
    ) -> Result<()> {
        let image = self.student.processor().image_token();
        let longest = examples.iter().map(|e| e.prepared.ids.len()).max();
        let longest = longest.unwrap_or(0);
        // (example, position) of every text token that another follows.
        let places: Vec<(usize, usize)> = examples
            .iter()
            .enumerate()
            .flat_map(|(b, e)| {
                let ids = &e.prepared.ids;
                (0..ids.len().saturating_sub(1))
                    .filter(move |&t| ids[t] != image)
                    .map(move |t| (b, t))
            })
            .collect();
        let prepared: Vec<_> = examples.iter().map(|e| &e.prepared).collect();
        let mut tokens = Vec::with_capacity(places.len());
        no_grad(|| -> Result<()> {
            let hidden = self.student.forward(&prepared, None)?.hidden;
            let width = hidden.value().last_dim();
            let hidden = hidden.reshape(&[hidden.value().elements() / width, width]);
            for chunk in places.chunks(ROWS) {
                let rows: Vec<u32> = chunk
                    .iter()
                    .map(|(b, t)| (b * longest + t) as u32)
                    .collect();
                let rows = Tensor::from_u32(gpu, &rows, &[rows.len()]);
                let logits = self.student.logits(&hidden.gather_rows(&rows));
                tokens.extend(arg_extremum(logits.value(), 1, Reduce::Max).to_u32()?);
            }
            Ok(())
        })?;
        let mut said: Vec<BTreeMap<String, Vec<usize>>> = vec![BTreeMap::new(); examples.len()];
        for (&(b, t), &token) in places.iter().zip(&tokens) {
            let text = self.student.tokenizer().decode(&[token], true)?;
            if let [word] = &rules.words(text.trim())[..]
                && word.spans == [(0, text.trim().chars().count())]
            {
                said[b].entry(word.text.clone()).or_default().push(t);
            }
        }
        for (example, said) in examples.iter_mut().zip(said) {
            let Some(known) = &example.known else {
                continue;
            };
            let (mut words, mut targets) = (Vec::new(), Vec::new());
            for (text, rows) in said {
                let map = known
                    .map_of(&text)
                    .filter(|map| map.iter().any(|&v| v > 0.0));
                if let Some(map) = map {
                    targets.extend_from_slice(map);
                    // The row of token t + 1 is t.
                    let occurrences = rows.iter().map(|t| vec![t + 1]).collect();
                    words.push(WordTokens { text, occurrences });
                }
            }
            example.words = SampleWords::new(&words);
            example.targets = targets;
        }
        Ok(())
    }
}
