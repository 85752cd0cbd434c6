//! Which parts of a model stay as they are, by the names of their tensors.

/// Patterns of frozen parts.
///
/// A pattern is any run of whole parts of a tensor's name between dots (`self_attn.q_proj`), a number standing for
/// itself and `A-B` for a range. `vision`, `connector` and `language` in front stand for the part of the model that a
/// family calls `vision_model`, `connector` or `multi_modal_projector`, `text_model` or `language_model` with
/// `lm_head`; `layers.…` alone is the language model's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freeze(pub Vec<String>);

/// The words for a model's parts, with the names that families have for them.
const PARTS: [(&str, &[&str]); 3] = [
    ("vision", &["vision_model", "vision_tower"]),
    ("connector", &["connector", "multi_modal_projector"]),
    ("language", &["text_model", "language_model", "lm_head"]),
];

impl Freeze {
    /// Whether the tensor or module `name` is frozen.
    pub fn matches(&self, name: &str) -> bool {
        self.0.iter().any(|pattern| matches(pattern, name))
    }

    /// The first pattern that none of `names` matches.
    pub fn unmatched(&self, names: &[&str]) -> Option<&str> {
        let idle = |pattern: &&String| !names.iter().any(|name| matches(pattern, name));
        self.0.iter().find(idle).map(String::as_str)
    }
}

fn matches(pattern: &str, name: &str) -> bool {
    let parts = |word: &str| PARTS.iter().find(|(known, _)| *known == word);
    let mut wanted: Vec<&str> = pattern.split('.').collect();
    let name: Vec<&str> = name.split('.').collect();
    let owner = match wanted[0] {
        "layers" => parts("language"),
        word => parts(word),
    };
    if let Some((word, names)) = owner {
        if !name.iter().any(|part| names.contains(part)) {
            return false;
        }
        if wanted[0] == *word {
            wanted.remove(0);
        }
    }
    let same = |(part, wanted): (&&str, &&str)| part == wanted || in_range(part, wanted);
    let run = |at: &[&str]| at.iter().zip(&wanted).all(same);
    wanted.is_empty() || name.windows(wanted.len()).any(run)
}

/// Whether `part` is a number from A to B of `A-B`.
fn in_range(part: &str, range: &str) -> bool {
    let number = |text: &str| text.parse::<u32>().ok();
    let bounds = range.split_once('-');
    let bounds = bounds.and_then(|(from, to)| Some(number(from)?..=number(to)?));
    bounds.is_some_and(|bounds| number(part).is_some_and(|n| bounds.contains(&n)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 7] = [
        "model.vision_model.encoder.layers.3.self_attn.q_proj.weight",
        "model.connector.modality_projection.proj.weight",
        "model.multi_modal_projector.weight",
        "model.text_model.layers.3.self_attn.q_proj.weight",
        "model.language_model.layers.12.mlp.down_proj.weight",
        "model.text_model.embed_tokens.weight",
        "lm_head.weight",
    ];

    fn matched(pattern: &str) -> Vec<usize> {
        let freeze = Freeze(vec![pattern.to_owned()]);
        (0..NAMES.len())
            .filter(|&i| freeze.matches(NAMES[i]))
            .collect()
    }

    #[test]
    fn patterns_name_parts_ranges_and_runs_of_a_name() {
        assert_eq!(matched("vision"), [0]);
        assert_eq!(matched("connector"), [1, 2]);
        assert_eq!(matched("language"), [3, 4, 5, 6]);
        assert_eq!(matched("layers.0-11"), [3]);
        assert_eq!(matched("layers.12-12"), [4]);
        assert_eq!(matched("layers.3"), [3]);
        assert_eq!(matched("vision.layers.0-5"), [0]);
        assert_eq!(matched("self_attn.q_proj"), [0, 3]);
        assert_eq!(matched("language.self_attn"), [3]);
        assert_eq!(matched("embed_tokens"), [5]);
        // Whole parts only.
        assert!(matched("attn").is_empty() && matched("layers.1").is_empty());
    }

    #[test]
    fn a_pattern_that_matches_nothing_is_found() {
        let freeze = Freeze(vec!["vision".into(), "layers.20-30".into()]);
        assert_eq!(freeze.unmatched(&NAMES), Some("layers.20-30"));
        assert_eq!(Freeze::default().unmatched(&NAMES), None);
    }
}
