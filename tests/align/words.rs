//! Words, their places and their tokens.

use lavender_wgpu::align::words::{Case, Word, WordTokens, character_offsets, word_tokens, words};

fn texts(text: &str, case: Case) -> Vec<String> {
    words(text, case).into_iter().map(|w| w.text).collect()
}

#[test]
fn segments_without_letter_or_digit_are_dropped() {
    assert_eq!(
        texts("A red ball, 3 cats — & a dog!", Case::Lower),
        ["a", "red", "ball", "3", "cats", "dog"]
    );
    for nothing in ["", "   ", "?! … —", "🙂🙃 👩‍👩‍👧", "\n\t"] {
        assert!(words(nothing, Case::Lower).is_empty(), "{nothing:?}");
    }
}

#[test]
fn apostrophes_decimals_and_hyphens_follow_uax29() {
    assert_eq!(
        texts(
            "Don't touch John’s well-lit 3.5 litre e.g. can",
            Case::Lower
        ),
        [
            "don't", "touch", "john’s", "well", "lit", "3.5", "litre", "e.g", "can"
        ]
    );
}

#[test]
fn spans_count_characters_and_case_is_kept_on_request() {
    let text = "Ça 🙂 va, Ça? ÉTÉ été İstanbul";
    let characters: Vec<char> = text.chars().collect();
    for case in [Case::Lower, Case::Keep] {
        for word in words(text, case) {
            for &(start, end) in &word.spans {
                let written: String = characters[start..end].iter().collect();
                match case {
                    Case::Keep => assert_eq!(written, word.text),
                    Case::Lower => assert_eq!(written.to_lowercase(), word.text),
                }
            }
        }
    }
    assert_eq!(
        words(text, Case::Lower)[0],
        Word {
            text: "ça".into(),
            spans: vec![(0, 2), (9, 11)]
        }
    );
    assert_eq!(texts(text, Case::Lower).len(), 4);
    assert_eq!(texts(text, Case::Keep).len(), 5);
}

#[test]
fn repeated_words_count_once_in_order_of_first_occurrence() {
    let found = words("the cat and The dog and THE bird", Case::Lower);
    let order: Vec<_> = found
        .iter()
        .map(|w| (w.text.as_str(), w.spans.len()))
        .collect();
    assert_eq!(
        order,
        [("the", 3), ("cat", 1), ("and", 2), ("dog", 1), ("bird", 1)]
    );
}

#[test]
fn sub_word_tokens_average_within_an_occurrence_first() {
    // <s> |zeb|ra| and| zebra|,|</s>: three sub-word tokens for one word in two occurrences.
    let text = "zebra and zebra,";
    let offsets = [(0, 0), (0, 3), (3, 5), (5, 9), (9, 15), (15, 16), (0, 0)];
    let found = word_tokens(&words(text, Case::Lower), &offsets);
    assert_eq!(
        found[0],
        WordTokens {
            text: "zebra".into(),
            occurrences: vec![vec![1, 2], vec![4]]
        }
    );
    assert_eq!(found[0].weights(), [(1, 0.25), (2, 0.25), (4, 0.5)]);
    assert_eq!(found[1].occurrences, [[3]]);
    assert_eq!(found.len(), 2);
}

#[test]
fn cut_off_words_go_and_shared_tokens_stay_with_both() {
    let text = "New York at night";
    // One token over "New York"; " at" is " " and "at"; "night" lies past the context.
    let offsets = [(0, 8), (8, 9), (9, 11)];
    let found = word_tokens(&words(text, Case::Lower), &offsets);
    let texts: Vec<_> = found
        .iter()
        .map(|w| (w.text.as_str(), w.occurrences.clone()))
        .collect();
    assert_eq!(
        texts,
        [
            ("new", vec![vec![0]]),
            ("york", vec![vec![0]]),
            ("at", vec![vec![2]])
        ]
    );
}

#[test]
fn words_move_with_the_answer_inside_a_prompt() {
    let word = &words("a cat", Case::Lower)[1];
    assert_eq!(word.shifted(10).spans, [(12, 15)]);
}

#[test]
fn byte_offsets_become_character_offsets() {
    let text = "é🙂z";
    // é is bytes 0..2, the emoji 2..6 (split over two byte tokens), z is 6..7.
    let found = character_offsets(text, &[(0, 2), (2, 4), (4, 6), (6, 7), (0, 0)]);
    assert_eq!(found, [(0, 1), (1, 2), (1, 2), (2, 3), (0, 0)]);
}
