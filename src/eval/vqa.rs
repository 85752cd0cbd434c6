//! Open questions with short answers, scored as VQA is: normalised exact match and agreement with several people.

/// Words whose apostrophe people leave out where that spells no other word.
const CONTRACTIONS: [&str; 60] = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hasn't",
    "haven't",
    "he'd",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "i'm",
    "i've",
    "isn't",
    "it'd",
    "it'll",
    "let's",
    "ma'am",
    "might've",
    "mightn't",
    "must've",
    "mustn't",
    "needn't",
    "o'clock",
    "oughtn't",
    "shan't",
    "she's",
    "should've",
    "shouldn't",
    "somebody's",
    "someone's",
    "something's",
    "that'd",
    "that'll",
    "that's",
    "there'd",
    "there're",
    "there's",
    "they'd",
    "they'll",
    "they're",
    "they've",
    "wasn't",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "where's",
    "who'll",
    "who's",
    "who've",
    "won't",
    "wouldn't",
    "you're",
];

/// Numbers that are written as digits.
const NUMBERS: [(&str, &str); 12] = [
    ("none", "0"),
    ("zero", "0"),
    ("one", "1"),
    ("two", "2"),
    ("three", "3"),
    ("four", "4"),
    ("five", "5"),
    ("six", "6"),
    ("seven", "7"),
    ("eight", "8"),
    ("nine", "9"),
    ("ten", "10"),
];

/// Marks that are dropped beside a space or in a text with digit groups (`1,000`), and spaces elsewhere.
const MARKS: &str = ";/[]\"{}()=+\\_-><@`,?!";

/// An answer as the official VQA evaluation compares it: lower case, no articles, no punctuation (a full stop stays
/// before a digit), numbers as digits, apostrophes of contractions put in.
///
/// Both the answers and the reply are normalised in full.
pub fn normalise(text: &str) -> String {
    let text = text.replace(['\n', '\t'], " ");
    let text = text.trim();
    let characters: Vec<char> = text.chars().collect();
    let grouped = characters
        .windows(3)
        .any(|w| w[1] == ',' && w[0].is_ascii_digit() && w[2].is_ascii_digit());
    // A mark that stands beside a space anywhere is dropped everywhere, as the original does it.
    let loose = |mark: char| {
        grouped
            || characters
                .windows(2)
                .any(|w| (w[0] == mark && w[1] == ' ') || (w[0] == ' ' && w[1] == mark))
    };
    let mut clean = String::new();
    for (i, &c) in characters.iter().enumerate() {
        match c {
            '.' if !characters.get(i + 1).is_some_and(char::is_ascii_digit) => {}
            c if !MARKS.contains(c) => clean.push(c),
            c if loose(c) => {}
            _ => clean.push(' '),
        }
    }
    let clean = clean.to_lowercase().replace('\u{2019}', "'");
    let word = |word: &str| -> Option<String> {
        if ["a", "an", "the"].contains(&word) {
            return None;
        }
        if let Some((_, digits)) = NUMBERS.iter().find(|(name, _)| *name == word) {
            return Some((*digits).to_owned());
        }
        let whole = CONTRACTIONS.iter().find(|c| c.replace('\'', "") == word);
        Some(whole.map_or(word, |c| *c).to_owned())
    };
    let words: Vec<String> = clean.split_whitespace().filter_map(word).collect();
    words.join(" ")
}

/// Whether the reply is one of the answers, after [`normalise`].
pub fn exact(reply: &str, answers: &[String]) -> bool {
    let reply = normalise(reply);
    answers.iter().any(|answer| normalise(answer) == reply)
}

/// Agreement with several people's answers: min(1, matches / 3) against all but one of them, averaged over which one
/// is left out. Of fewer than four answers all the others have to match for 1. `None` for a single answer.
pub fn soft(reply: &str, answers: &[String]) -> Option<f64> {
    if answers.len() < 2 {
        return None;
    }
    let reply = normalise(reply);
    let matches: Vec<bool> = answers.iter().map(|a| normalise(a) == reply).collect();
    let all = matches.iter().filter(|&&m| m).count();
    let needed = 3.min(answers.len() - 1);
    let left_out = matches.iter().map(|&out| all - usize::from(out));
    let sum: f64 = left_out.map(|m| (m as f64 / needed as f64).min(1.0)).sum();
    Some(sum / answers.len() as f64)
}

/// The type of an answer that VQA reports by: `yes/no`, `number` or `other`.
pub fn answer_type(answer: &str) -> &'static str {
    let answer = normalise(answer);
    match answer.as_str() {
        "yes" | "no" => "yes/no",
        _ if answer.parse::<f64>().is_ok() => "number",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    #[test]
    fn answers_are_normalised_as_vqa_does() {
        for (text, wanted) in [
            ("Yes.", "yes"),
            (" The red\ncircle! ", "red circle"),
            ("Two", "2"),
            ("1,000", "1000"),
            ("3.5", "3.5"),
            ("mr. smith.", "mr smith"),
            ("black/white", "black white"),
            ("black / white", "black white"),
            ("it's a dog, isnt it?", "it's dog isn't it"),
            ("The", ""),
            ("isn\u{2019}t", "isn't"),
        ] {
            assert_eq!(normalise(text), wanted, "{text:?}");
        }
    }

    #[test]
    fn exact_match_needs_one_of_the_answers() {
        let answers = texts(&["a circle", "disc"]);
        assert!(exact("Circle.", &answers) && exact("disc", &answers));
        assert!(!exact("circles", &answers) && !exact("", &answers));
    }

    #[test]
    fn soft_accuracy_leaves_each_person_out_once() {
        // Of ten people three say cat: leaving one of the three out, two of nine match (2/3); else three (1).
        let mut answers = texts(&["cat"; 3]);
        answers.extend(texts(&["dog"; 7]));
        assert!((soft("Cat", &answers).unwrap() - (3.0 * 2.0 / 3.0 + 7.0) / 10.0).abs() < 1e-12);
        assert_eq!(soft("dog", &answers), Some(1.0));
        assert_eq!(soft("cow", &answers), Some(0.0));
        assert_eq!(soft("cat", &texts(&["cat"])), None);
        // Two answers that agree: the one other always matches.
        assert_eq!(soft("cat", &texts(&["cat", "cat"])), Some(1.0));
        assert_eq!(soft("cat", &texts(&["cat", "dog"])), Some(0.5));
    }

    #[test]
    fn answers_have_types() {
        let types = ["yes", "No.", "two", "12", "red"].map(answer_type);
        assert_eq!(types, ["yes/no", "yes/no", "number", "number", "other"]);
    }
}
