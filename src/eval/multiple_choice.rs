//! Multiple choice by letter.

use super::vqa::normalise;

/// A letter and what it stands for.
pub type Options = [(char, String)];

/// The prompt of a question whose options stand in columns of their own.
pub fn prompt(hint: Option<&str>, question: &str, options: &Options) -> String {
    let mut text = match hint {
        Some(hint) => format!("Hint: {hint}\nQuestion: {question}\nOptions:\n"),
        None => format!("Question: {question}\nOptions:\n"),
    };
    for (letter, option) in options {
        text.push_str(&format!("{letter}. {option}\n"));
    }
    text + "Answer with the letter of the correct option."
}

/// Options that a question lists line by line: `A. cat`, `(B) dog`, `C: cow`; they have to run from A.
pub fn options_in(question: &str) -> Vec<(char, String)> {
    let listed = question.lines().filter_map(|line| {
        let (letter, rest) = lettered(line.trim())?;
        (!rest.is_empty()).then(|| (letter, rest.to_owned()))
    });
    let options: Vec<(char, String)> = listed.collect();
    let in_order = ('A'..='Z').zip(&options).all(|(a, (b, _))| a == *b);
    match options.len() >= 2 && in_order {
        true => options,
        false => Vec::new(),
    }
}

/// A capital letter with a mark after it (or in brackets), and what follows.
fn lettered(text: &str) -> Option<(char, &str)> {
    let (opened, text) = match text.strip_prefix('(') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let letter = text.chars().next().filter(char::is_ascii_uppercase)?;
    let rest = &text[1..];
    let marks: &[char] = if opened {
        &[')']
    } else {
        &['.', ')', ':', ',']
    };
    Some((letter, rest.strip_prefix(marks)?.trim()))
}

/// The letter that a reply chooses, by fixed rules; the first that applies counts:
///
/// 1. the reply is one letter, bare or with marks around it: `B`, `(B)`, `**B**`, `b`
/// 2. it begins with a letter and a mark: `B. a dog`, `(B) a dog`, `B: …`
/// 3. "answer is B", "answer: B", "option B", "choice B": the last of these
/// 4. exactly one letter stands alone in it (`A` before a lower-case word is the article)
/// 5. exactly one option's text is found in it, by whole words, after VQA's normalisation
///
/// Only letters of `options` count; without options, those from A to Z.
pub fn letter(reply: &str, options: &Options) -> Option<char> {
    let known = |c: char| match options.is_empty() {
        true => c.is_ascii_uppercase(),
        false => options.iter().any(|(letter, _)| *letter == c),
    };
    let reply = reply.trim();
    let bare = reply.trim_matches(|c: char| !c.is_alphanumeric());
    let mut characters = bare.chars();
    if let (Some(only), None) = (characters.next(), characters.next()) {
        return Some(only.to_ascii_uppercase()).filter(|&c| known(c));
    }
    let unmarked = reply.trim_start_matches(['*', '_', ' ']);
    if let Some((first, _)) = lettered(unmarked).filter(|(c, _)| known(*c)) {
        return Some(first);
    }
    // Words with their letters only, and which marks they had is gone; "A" is told from the article by what follows.
    let words: Vec<&str> = reply
        .split_whitespace()
        .map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()))
        .filter(|word| !word.is_empty())
        .collect();
    let single = |at: usize| {
        let mut characters = words.get(at)?.chars();
        let first = characters.next().filter(|&c| known(c))?;
        characters.next().is_none().then_some(first)
    };
    let announced = (0..words.len()).rev().find_map(|at| {
        let word = words[at].to_lowercase();
        match word.as_str() {
            "answer"
                if words
                    .get(at + 1)
                    .is_some_and(|w| w.eq_ignore_ascii_case("is")) =>
            {
                single(at + 2)
            }
            "answer" | "option" | "choice" => single(at + 1),
            _ => None,
        }
    });
    if announced.is_some() {
        return announced;
    }
    let article = |at: usize| {
        let next = words.get(at + 1).copied().unwrap_or_default();
        words[at] == "A" && next.starts_with(char::is_lowercase) && !["or", "and"].contains(&next)
    };
    let mut alone: Vec<char> = (0..words.len())
        .filter(|&at| !article(at))
        .filter_map(single)
        .collect();
    alone.sort_unstable();
    alone.dedup();
    if let [only] = alone[..] {
        return Some(only);
    }
    let padded = |text: &str| format!(" {} ", normalise(text));
    let whole = padded(reply);
    let named = options.iter().filter(|(_, option)| {
        let option = padded(option);
        !option.trim().is_empty() && whole.contains(&option)
    });
    let named: Vec<char> = named.map(|(letter, _)| *letter).collect();
    match named[..] {
        [only] => Some(only),
        _ => None,
    }
}

/// The letter of the expected answer: a letter itself, or the text of an option.
pub fn expected(answer: &str, options: &Options) -> Option<char> {
    let same = |(_, option): &&(char, String)| normalise(option) == normalise(answer);
    match options.iter().find(same) {
        Some((letter, _)) => Some(*letter),
        None => letter(answer, options),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Vec<(char, String)> {
        let texts = ["cat", "a dog", "cow", "hot dog"];
        ('A'..).zip(texts.map(String::from)).collect()
    }

    #[test]
    fn letters_are_found_by_the_rules() {
        for (reply, wanted) in [
            ("B", Some('B')),
            (" (c) ", Some('C')),
            ("**D**", Some('D')),
            ("E", None),
            ("B. a dog", Some('B')),
            ("(A) cat", Some('A')),
            ("A cow stands there, so the answer is C.", Some('C')),
            ("Answer: B", Some('B')),
            ("Not option A but option D", Some('D')),
            ("A dog is in the picture, B", Some('B')),
            ("Either A or B", None),
            ("It is a cow.", Some('C')),
            ("There is a cat and a cow", None),
            ("concatenate", None),
            ("", None),
        ] {
            assert_eq!(letter(reply, &options()), wanted, "{reply:?}");
        }
        // Without options any letter will do.
        assert_eq!(letter("The answer is F", &[]), Some('F'));
    }

    #[test]
    fn expected_answers_are_letters_or_texts() {
        assert_eq!(expected("B", &options()), Some('B'));
        assert_eq!(expected("Hot dog", &options()), Some('D'));
        assert_eq!(expected("horse", &options()), None);
    }

    #[test]
    fn options_are_written_into_prompts_and_read_from_questions() {
        let text = prompt(Some("It barks."), "What is it?", &options());
        assert!(
            text.starts_with("Hint: It barks.\nQuestion: What is it?\nOptions:\nA. cat\n"),
            "{text}"
        );
        assert_eq!(options_in(&text), options());
        assert_eq!(
            options_in("Which?\n(A) x\n(B) y z"),
            [('A', "x".into()), ('B', "y z".into())]
        );
        assert!(options_in("What is it?\nB. dog\nC. cow").is_empty());
        assert!(options_in("A. alone").is_empty());
    }
}
