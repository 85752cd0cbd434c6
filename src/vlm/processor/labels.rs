//! Which tokens of a conversation are learned, and which rows predict a word.

use std::ops::Range;

use super::template::{ChatTemplate, Message};
use super::tokenizer::{Encoded, TextTokenizer};
use crate::{Error, Result};

/// What stands after the messages in the string that the model reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail<'a> {
    /// Nothing: the conversation as the template renders it, answers included (training).
    None,
    /// The template's generation prompt (`ask`).
    GenerationPrompt,
    /// The generation prompt and then this text as it is, without an end of turn: the template's prompt and
    /// the answer are one string (`attention`).
    Answer(&'a str),
}

/// A rendered conversation and the byte spans of its answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The string to tokenise.
    pub text: String,
    /// Byte range of each assistant turn's answer in `text`, in order: from the end of the generation prompt,
    /// with white space that the template puts before the answer.
    pub answers: Vec<Range<usize>>,
}

/// Renders messages and finds each assistant turn's answer in the result.
///
/// The answer of turn *i* is looked for after what the template makes of the messages before it, so that
/// an answer that also stands in a question is not mistaken. Errors: an empty answer, and a template that
/// does not contain its messages' text.
pub fn render(template: &ChatTemplate, messages: &[Message], tail: Tail<'_>) -> Result<Rendered> {
    let said = messages.iter().enumerate();
    let said: Vec<(usize, String)> = said
        .filter(|(_, message)| message.role == "assistant")
        .map(|(turn, message)| (turn, message.joined_text()))
        .collect();
    // Before the template, which may have other words for it.
    if let Some((turn, _)) = said.iter().find(|(_, answer)| answer.trim().is_empty()) {
        return Err(Error::Input(format!(
            "message {turn} (assistant): the text is empty, expected an answer to learn"
        )));
    }
    let mut text = template.render(messages, tail != Tail::None)?;
    let mut answers = Vec::new();
    let mut from = 0;
    for (turn, answer) in said {
        let mut prompt_end = None;
        for generation_prompt in [true, false] {
            // Some templates refuse a conversation cut here; the other cut, or the last turn's end, serves.
            if let Ok(prefix) = template.render(&messages[..turn], generation_prompt)
                && text.starts_with(&prefix)
            {
                from = from.max(prefix.len());
                prompt_end = generation_prompt.then_some(prefix.len());
                break;
            }
        }
        // A template may trim the text; it never changes it otherwise.
        let found = [answer.as_str(), answer.trim()]
            .into_iter()
            .find_map(|wanted| {
                text[from..]
                    .find(wanted)
                    .map(|at| from + at..from + at + wanted.len())
            });
        let Some(mut span) = found else {
            return Err(Error::Input(format!(
                "message {turn} (assistant): the chat template's output does not contain its text {answer:?}"
            )));
        };
        from = span.end;
        // Where the model begins to answer: a space that the template puts first is its to write.
        if let Some(end) = prompt_end
            && end <= span.start
            && text[end..span.start].trim().is_empty()
        {
            span.start = end;
        }
        answers.push(span);
    }
    if let Tail::Answer(answer) = tail {
        if answer.trim().is_empty() {
            return Err(Error::Input(
                "the answer text is empty, expected at least one word".into(),
            ));
        }
        answers.push(text.len()..text.len() + answer.len());
        text.push_str(answer);
    }
    Ok(Rendered { text, answers })
}

impl Rendered {
    /// Replaces each occurrence of `placeholder` by the next of `replacements`, moving the answers' spans.
    ///
    /// Errors if there are more or fewer placeholders than replacements: the text must not contain the
    /// placeholder itself, and every image needs its place.
    pub fn expand(self, placeholder: &str, replacements: &[String]) -> Result<Self> {
        let places: Vec<usize> = self
            .text
            .match_indices(placeholder)
            .map(|(at, _)| at)
            .collect();
        if places.len() != replacements.len() {
            return Err(Error::Input(format!(
                "the prompt has {} `{placeholder}` placeholders, expected one per image ({}); the text itself \
                 must not contain `{placeholder}`",
                places.len(),
                replacements.len()
            )));
        }
        let mut text = String::with_capacity(
            self.text.len() + replacements.iter().map(String::len).sum::<usize>(),
        );
        let mut done = 0;
        for (&at, replacement) in places.iter().zip(replacements) {
            text.push_str(&self.text[done..at]);
            text.push_str(replacement);
            done = at + placeholder.len();
        }
        text.push_str(&self.text[done..]);
        let moved = |position: usize| {
            let before = places.iter().filter(|&&at| at < position).count();
            position
                + replacements[..before]
                    .iter()
                    .map(String::len)
                    .sum::<usize>()
                - before * placeholder.len()
        };
        let answers = self
            .answers
            .iter()
            .map(|span| moved(span.start)..moved(span.end))
            .collect();
        Ok(Self { text, answers })
    }
}

/// The label of a token that is not learned.
pub const IGNORE: u32 = u32::MAX;

/// Labels of a tokenised conversation, before the shift by one: a token's own id if it is learned, else
/// [`IGNORE`].
///
/// Learned are the tokens from the first that overlaps an answer's span to the last, and on to the first special token
/// after it, its end-of-turn token, if nothing but white space stands between. (Tokenizers that trim their offsets give
/// a token of white space no span at all.)
pub fn labels(tokenizer: &TextTokenizer, rendered: &Rendered, encoded: &Encoded) -> Vec<u32> {
    let mut labels = vec![IGNORE; encoded.ids.len()];
    for answer in &rendered.answers {
        let tokens = tokens_of(encoded, answer);
        let (Some(&first), Some(&last)) = (tokens.first(), tokens.last()) else {
            continue;
        };
        let special = |&index: &usize| {
            !encoded.spans[index].is_empty() && tokenizer.is_special(encoded.ids[index])
        };
        let after = (last + 1..encoded.ids.len()).find(special);
        let end_of_turn = after.filter(|&index| {
            let between = answer.end..encoded.spans[index].start;
            let between = rendered.text.get(between);
            between.is_some_and(|between| between.trim().is_empty())
        });
        let learned = first..end_of_turn.unwrap_or(last) + 1;
        labels[learned.clone()].copy_from_slice(&encoded.ids[learned]);
    }
    labels
}

/// Indices of the tokens whose span overlaps a byte range of the text.
pub fn tokens_of(encoded: &Encoded, range: &Range<usize>) -> Vec<usize> {
    encoded
        .spans
        .iter()
        .enumerate()
        .filter(|(_, span)| span.start < range.end && range.start < span.end)
        .map(|(index, _)| index)
        .collect()
}

/// The rows that predict the tokens of a byte range: row t−1 predicts token t. A first token has no row.
pub fn predicting_rows(encoded: &Encoded, range: &Range<usize>) -> Vec<usize> {
    tokens_of(encoded, range)
        .into_iter()
        .filter_map(|token| token.checked_sub(1))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPLATE: &str = "{% for m in messages %}[{{ m['role'] }}] {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}";

    fn conversation() -> Vec<Message> {
        vec![
            Message::image_and_text("a cat or a dog?"),
            Message::text("assistant", "a cat"),
            Message::text("user", "a cat ?"),
            Message::text("assistant", "a cat"),
        ]
    }

    #[test]
    fn answers_are_found_in_their_own_turn() {
        let template = ChatTemplate::from_source(TEMPLATE, &[]);
        let rendered = render(&template, &conversation(), Tail::None).unwrap();
        let starts: Vec<usize> = rendered
            .text
            .match_indices("[assistant] a cat")
            .map(|(at, _)| at + 11)
            .collect();
        assert_eq!(
            rendered
                .answers
                .iter()
                .map(|span| span.start)
                .collect::<Vec<_>>(),
            starts
        );
        let expanded = rendered
            .expand("<image>", &["<g><image><image>".to_string()])
            .unwrap();
        for span in &expanded.answers {
            assert_eq!(&expanded.text[span.clone()], " a cat");
        }
    }

    #[test]
    fn a_tail_answer_follows_the_generation_prompt() {
        let template = ChatTemplate::from_source(TEMPLATE, &[]);
        let rendered = render(&template, &conversation()[..1], Tail::Answer(" a cat")).unwrap();
        assert!(rendered.text.ends_with("[assistant] a cat"));
        assert_eq!(&rendered.text[rendered.answers[0].clone()], " a cat");
    }

    #[test]
    fn empty_answers_and_stray_placeholders_are_refused() {
        let template = ChatTemplate::from_source(TEMPLATE, &[]);
        let empty = [
            Message::image_and_text("?"),
            Message::text("assistant", " "),
        ];
        assert!(
            render(&template, &empty, Tail::None)
                .unwrap_err()
                .to_string()
                .contains("message 1")
        );
        let stray = [Message::image_and_text("what is <image> ?")];
        let rendered = render(&template, &stray, Tail::None).unwrap();
        assert!(
            rendered
                .expand("<image>", &["x".into()])
                .unwrap_err()
                .to_string()
                .contains("2 `<image>`")
        );
    }
}
