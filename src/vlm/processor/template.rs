//! Chat templates: the Jinja program of a checkpoint that turns messages into one string.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::tokenizer::{TextTokenizer, read_json};
use crate::{Error, Result};

/// One part of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// The place of an image; the images themselves are passed beside the messages, in order.
    Image,
    /// A run of text.
    Text(String),
}

/// One message of a conversation, as transformers' multimodal templates take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `"system"`, `"user"` or `"assistant"`.
    pub role: String,
    /// Image and text parts in order.
    pub parts: Vec<Part>,
}

impl Message {
    /// A message of one text part.
    pub fn text(role: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            parts: vec![Part::Text(text.into())],
        }
    }

    /// A user's message: one image, then text.
    pub fn image_and_text(text: impl Into<String>) -> Self {
        Self {
            role: "user".into(),
            parts: vec![Part::Image, Part::Text(text.into())],
        }
    }

    /// The message's text parts, joined.
    pub fn joined_text(&self) -> String {
        self.parts
            .iter()
            .filter_map(|part| match part {
                Part::Text(text) => Some(text.as_str()),
                Part::Image => None,
            })
            .collect()
    }

    /// The number of image parts.
    pub fn images(&self) -> usize {
        self.parts
            .iter()
            .filter(|part| **part == Part::Image)
            .count()
    }
}

/// A checkpoint's chat template.
///
/// Jinja as transformers sets it up: `trim_blocks`, `lstrip_blocks`, loop controls, Python's string
/// methods, `raise_exception`, `strftime_now` (in UTC), `{% generation %}` blocks rendered as their content.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    path: PathBuf,
    tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Loads the template of a checkpoint directory: `chat_template.jinja`, else `chat_template.json`, else
    /// `chat_template` in `processor_config.json` or `tokenizer_config.json` (a list's `default` entry).
    /// The tokenizer's named special tokens (`bos_token`, …) become template variables.
    pub fn load(dir: impl AsRef<Path>, tokenizer: &TextTokenizer) -> Result<Self> {
        let dir = dir.as_ref();
        let tokens = tokenizer.named_tokens().to_vec();
        let jinja = dir.join("chat_template.jinja");
        match std::fs::read_to_string(&jinja) {
            Ok(source) => {
                return Ok(Self {
                    source,
                    path: jinja,
                    tokens,
                });
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(&jinja, e)),
        }
        for file in [
            "chat_template.json",
            "processor_config.json",
            "tokenizer_config.json",
        ] {
            let path = dir.join(file);
            let Some(template) =
                read_json(&path)?.and_then(|json| json.get("chat_template").cloned())
            else {
                continue;
            };
            if template.is_null() {
                continue;
            }
            let source = template.as_str().map(str::to_string).or_else(|| {
                template
                    .as_array()?
                    .iter()
                    .find(|entry| entry.get("name").and_then(|n| n.as_str()) == Some("default"))
                    .and_then(|entry| entry.get("template")?.as_str().map(str::to_string))
            });
            let Some(source) = source else {
                return Err(Error::file(
                    &path,
                    "field `chat_template`: expected a string or a list with a `default` entry",
                ));
            };
            return Ok(Self {
                source,
                path,
                tokens,
            });
        }
        Err(Error::file(
            dir,
            "no chat template found: expected `chat_template.jinja`, `chat_template.json`, or a field \
             `chat_template` in `processor_config.json` or `tokenizer_config.json`",
        ))
    }

    /// A template from its source, for tests and for checkpoints without one.
    pub fn from_source(source: impl Into<String>, tokens: &[(String, String)]) -> Self {
        Self {
            source: source.into(),
            path: PathBuf::from("<template>"),
            tokens: tokens.to_vec(),
        }
    }

    /// Renders a conversation. `add_generation_prompt` ends the string where the assistant would answer.
    ///
    /// Errors carry the template's file and Jinja's message (`raise_exception` included).
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        env.set_syntax(syntax.expect("only whitespace flags differ from the default syntax"));
        env.set_unknown_method_callback(unknown_method_callback);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        env.add_function("strftime_now", |format: String| {
            strftime(&format, SystemTime::now())
        });
        let failed = |e: minijinja::Error| Error::file(&self.path, format!("chat template: {e}"));
        let source = without_generation_tags(&self.source);
        let template = env.template_from_str(&source).map_err(failed)?;
        let messages: Vec<Value> = messages.iter().map(message_value).collect();
        let mut context: Vec<(String, Value)> = self
            .tokens
            .iter()
            .map(|(name, text)| (name.clone(), Value::from(text.as_str())))
            .collect();
        context.push(("messages".into(), Value::from(messages)));
        context.push((
            "add_generation_prompt".into(),
            Value::from(add_generation_prompt),
        ));
        template.render(Value::from_pairs(context)).map_err(failed)
    }
}

fn message_value(message: &Message) -> Value {
    let parts: Vec<Value> = message
        .parts
        .iter()
        .map(|part| match part {
            Part::Image => Value::from_pairs([("type", Value::from("image"))]),
            Part::Text(text) => Value::from_pairs([
                ("type", Value::from("text")),
                ("text", Value::from(text.as_str())),
            ]),
        })
        .collect();
    Value::from_pairs([
        ("role", Value::from(message.role.as_str())),
        ("content", Value::from(parts)),
    ])
}

/// Turns `{% generation %}` … `{% endgeneration %}` (a transformers extension that only marks assistant
/// text) into an always-true `if`, which keeps the whitespace control of the tags.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|end| start + end) else {
            break;
        };
        let inner = &rest[start + 2..end];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        out.push_str(&rest[..start + 2]);
        match word {
            "generation" => out.push_str(&inner.replace("generation", "if true")),
            "endgeneration" => out.push_str(&inner.replace("endgeneration", "endif")),
            _ => out.push_str(inner),
        }
        out.push_str("%}");
        rest = &rest[end + 2..];
    }
    out.push_str(rest);
    out
}

/// C's `strftime` for the fields that chat templates use, in UTC; unknown fields are kept as they stand.
fn strftime(format: &str, now: SystemTime) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('d') => out += &format!("{day:02}"),
            Some('m') => out += &format!("{month:02}"),
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('b') => out += &MONTHS[month as usize - 1][..3],
            Some('B') => out += MONTHS[month as usize - 1],
            Some('a') => out += &DAYS[(days % 7) as usize][..3],
            Some('A') => out += DAYS[(days % 7) as usize],
            Some('H') => out += &format!("{:02}", second / 3600),
            Some('M') => out += &format!("{:02}", second / 60 % 60),
            Some('S') => out += &format!("{:02}", second % 60),
            Some('%') => out.push('%'),
            Some(other) => {
                out.push('%');
                out.push(other);
            }
            None => out.push('%'),
        }
    }
    out
}

/// Gregorian year, month and day of a day count since 1970-01-01, by eras of 400 years from 0000-03-01.
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_are_gregorian() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(
            strftime("%d %b %Y %H:%M:%S %a", at(0)),
            "01 Jan 1970 00:00:00 Thu"
        );
        // 29 February 2024, from `date -u -d @1709208000`.
        assert_eq!(
            strftime("%A %d %B %y %%", at(1_709_208_000)),
            "Thursday 29 February 24 %"
        );
    }

    #[test]
    fn generation_tags_keep_their_whitespace_control() {
        assert_eq!(
            without_generation_tags(
                "a {%- generation -%} b {% endgeneration %}\n{% if x %}{% endif %}"
            ),
            "a {%- if true -%} b {% endif %}\n{% if x %}{% endif %}"
        );
    }

    #[test]
    fn smolvlm_template_renders_as_published() {
        let template = ChatTemplate::from_source(
            "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
            &[],
        );
        let messages = [
            Message::image_and_text("What <is> it?"),
            Message::text("assistant", "A cat."),
        ];
        assert_eq!(
            template.render(&messages, false).unwrap(),
            "<|im_start|>User:<image>What <is> it?<end_of_utterance>\nAssistant: A cat.<end_of_utterance>\n"
        );
        assert_eq!(
            template.render(&messages[..1], true).unwrap(),
            "<|im_start|>User:<image>What <is> it?<end_of_utterance>\nAssistant:"
        );
    }

    #[test]
    fn a_template_can_refuse() {
        let template = ChatTemplate::from_source("{{ raise_exception('no tools here') }}", &[]);
        let message = template.render(&[], false).unwrap_err().to_string();
        assert!(message.contains("no tools here"), "{message}");
    }
}
