//! Which words count: by part of speech, and without stop-words. English, offline.

use std::collections::HashSet;
use std::sync::LazyLock;

use harper_brill::{Chunker, Tagger, UPOS, brill_chunker, brill_tagger};
use unicode_segmentation::UnicodeSegmentation;

use super::options::{ControlTargets, WordFilter, WordSource};
use super::words::{Case, Word, words};

static STOP_WORDS: LazyLock<HashSet<&'static str>> = LazyLock::new(|| {
    stop_words::get(stop_words::Language::English)
        .iter()
        .copied()
        .collect()
});

/// How words are found and matched: `[words]` and `control.targets` of the configuration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WordRules {
    /// Where the student's words come from.
    pub source: WordSource,
    /// How words are compared.
    pub case: Case,
    /// Parts of speech that count.
    pub filter: WordFilter,
    /// Whether stop-words are dropped.
    pub drop_stop_words: bool,
    /// What stands in for the targets.
    pub control: ControlTargets,
}

impl WordRules {
    /// The words of `text` that count: those with an occurrence that does.
    pub fn words(&self, text: &str) -> Vec<Word> {
        let mut found = words(text, self.case);
        if self.drop_stop_words {
            found.retain(|word| !STOP_WORDS.contains(word.text.to_lowercase().as_str()));
        }
        if self.filter != WordFilter::All {
            let kept = self.filter.starts(text);
            found.retain(|word| word.spans.iter().any(|(start, _)| kept.contains(start)));
        }
        found
    }
}

impl WordFilter {
    /// Where the words of `text` that pass stand, in characters.
    fn starts(self, text: &str) -> HashSet<usize> {
        let mut kept = HashSet::new();
        let mut first = 0;
        for sentence in text.split_sentence_bounds() {
            let mut at = first;
            let mut tokens: Vec<(usize, String)> = Vec::new();
            for token in sentence.split_word_bounds() {
                if !token.trim().is_empty() {
                    tokens.push((at, token.to_owned()));
                }
                at += token.chars().count();
            }
            first = at;
            let texts: Vec<String> = tokens.iter().map(|(_, token)| token.clone()).collect();
            let passes = self.passes(&texts);
            kept.extend(
                tokens
                    .iter()
                    .zip(passes)
                    .filter(|(_, passes)| *passes)
                    .map(|((start, _), _)| *start),
            );
        }
        kept
    }

    /// Which tokens of a sentence pass. A word that the tagger does not know counts as a noun: most are names.
    fn passes(self, sentence: &[String]) -> Vec<bool> {
        let tags = brill_tagger().tag_sentence(sentence);
        let of = |tag: &Option<UPOS>| tag.unwrap_or(UPOS::NOUN);
        let noun = |tag: &Option<UPOS>| matches!(of(tag), UPOS::NOUN | UPOS::PROPN);
        match self {
            WordFilter::All => vec![true; sentence.len()],
            WordFilter::Nouns => tags.iter().map(noun).collect(),
            WordFilter::Adjectives => tags.iter().map(|t| of(t) == UPOS::ADJ).collect(),
            WordFilter::NounsAdjectivesVerbs => tags
                .iter()
                .map(|t| noun(t) || matches!(of(t), UPOS::ADJ | UPOS::VERB))
                .collect(),
            WordFilter::SubjectsObjects => {
                let phrases = brill_chunker().chunk_sentence(sentence, &tags);
                // The head of an English noun phrase is its last noun.
                (0..sentence.len())
                    .map(|i| {
                        let next = phrases.get(i + 1).copied().unwrap_or(false);
                        let next = next && tags.get(i + 1).is_some_and(noun);
                        phrases[i] && noun(&tags[i]) && !next
                    })
                    .collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "A small brown dog quickly chases the red ball. The dog's owner smiles, naïve.";

    fn kept(filter: WordFilter, drop_stop_words: bool) -> Vec<String> {
        let rules = WordRules {
            filter,
            drop_stop_words,
            ..WordRules::default()
        };
        rules.words(TEXT).into_iter().map(|w| w.text).collect()
    }

    #[test]
    fn parts_of_speech_are_told_apart() {
        let nouns = kept(WordFilter::Nouns, false);
        assert!(
            ["dog", "ball", "owner"]
                .iter()
                .all(|w| nouns.contains(&w.to_string())),
            "{nouns:?}"
        );
        assert!(
            !["a", "small", "quickly", "chases", "red"]
                .iter()
                .any(|w| nouns.contains(&w.to_string())),
            "{nouns:?}"
        );
        let adjectives = kept(WordFilter::Adjectives, false);
        assert!(
            adjectives.contains(&"small".into()) && adjectives.contains(&"red".into()),
            "{adjectives:?}"
        );
        assert!(!adjectives.contains(&"dog".into()));
        let all = kept(WordFilter::NounsAdjectivesVerbs, false);
        assert!(
            all.contains(&"chases".into())
                && all.contains(&"dog".into())
                && !all.contains(&"the".into()),
            "{all:?}"
        );
        let heads = kept(WordFilter::SubjectsObjects, false);
        assert!(
            heads.contains(&"dog".into()) && heads.contains(&"ball".into()),
            "{heads:?}"
        );
        assert!(
            !heads.contains(&"brown".into()) && !heads.contains(&"chases".into()),
            "{heads:?}"
        );
    }

    #[test]
    fn stop_words_are_dropped_and_nothing_else() {
        let words = kept(WordFilter::All, true);
        assert!(
            !words.contains(&"a".into()) && !words.contains(&"the".into()),
            "{words:?}"
        );
        assert_eq!(
            words.len() + 2,
            kept(WordFilter::All, false).len(),
            "{words:?}"
        );
    }
}
