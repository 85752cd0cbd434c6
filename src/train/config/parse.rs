//! Reading a configuration: files, `--set` arguments, and messages that name the line and the nearest key.

use std::path::Path;

use toml::de::{DeTable, DeValue};
use toml::{Spanned, Table, Value};

use super::{Config, KEYS};
use crate::{Error, Result, files};

impl Config {
    /// Reads a file and applies `--set` arguments. Errors name the file and line, or the argument.
    pub fn load(path: impl AsRef<Path>, sets: &[String]) -> Result<Self> {
        let path = path.as_ref();
        Self::parse(&files::read_text(path)?, path, sets)
    }

    /// [`Self::load`] of text at hand; `path` is its name in messages.
    pub fn parse(text: &str, path: impl AsRef<Path>, sets: &[String]) -> Result<Self> {
        let path = path.as_ref();
        let line = |at: usize| text[..at.min(text.len())].matches('\n').count() + 1;
        let wrong = |at: Option<std::ops::Range<usize>>, message: String| match at {
            Some(at) => Error::file(path, format!("line {}: {message}", line(at.start))),
            None => Error::file(path, message),
        };
        let whole = DeTable::parse(text).map_err(|e| wrong(e.span(), e.message().to_owned()))?;
        let mut leaves = Vec::new();
        check_keys(whole.get_ref(), "", &mut leaves)
            .map_err(|(at, message)| wrong(Some(at), message))?;
        let config: Self = toml::from_str(text).map_err(|e| {
            let span = e.span();
            let field = span.clone().and_then(|s| {
                leaves
                    .iter()
                    .find(|(_, leaf)| leaf.start <= s.start && s.end <= leaf.end)
            });
            match field {
                Some((key, _)) => wrong(span, format!("field `{key}`: {}", e.message())),
                None => wrong(span, e.message().to_owned()),
            }
        })?;
        config.check().map_err(|(key, message)| {
            let at = leaves
                .iter()
                .find(|(leaf, _)| leaf == key)
                .map(|(_, at)| at.clone());
            wrong(at, format!("field `{key}`: {message}"))
        })?;
        config.with(sets)
    }

    /// This configuration with `--set` arguments applied, each checked by itself.
    pub fn with(self, sets: &[String]) -> Result<Self> {
        let mut config = self;
        for set in sets {
            config = config.with_one(set)?;
        }
        Ok(config)
    }

    fn with_one(&self, set: &str) -> Result<Self> {
        let wrong = |message: String| Error::Config(format!("--set {set}: {message}"));
        let Some((key, value)) = set.split_once('=') else {
            return Err(wrong("expected KEY=VALUE, such as train.steps=100".into()));
        };
        let (key, value) = (key.trim(), value.trim());
        if !KEYS.contains(&key) {
            return Err(wrong(unknown(key)));
        }
        // As TOML where it is one (numbers, lists, booleans, quoted text), else as a plain text such as a path.
        let parsed = toml::from_str::<Table>(&format!("v = {value}"))
            .ok()
            .and_then(|mut t| t.remove("v"))
            .unwrap_or_else(|| Value::String(value.to_owned()));
        let text = || Value::String(value.to_owned());
        let mut last = String::new();
        // A text that looks like a number (a folder called 7) is taken as a text where a number does not fit.
        for candidate in [parsed, text()] {
            let mut table = Table::try_from(self).map_err(|e| wrong(e.to_string()))?;
            let (section, name) = key.split_once('.').unwrap_or((key, ""));
            if let Some(Value::Table(section)) = table.get_mut(section) {
                section.insert(name.to_owned(), candidate);
            }
            // Of the two ways to say how long, the one given last counts.
            if let (Some(Value::Table(train)), "train.steps" | "train.epochs") =
                (table.get_mut("train"), key)
            {
                train.remove(if key == "train.steps" {
                    "epochs"
                } else {
                    "steps"
                });
            }
            match table.try_into::<Self>() {
                Ok(config) => {
                    config
                        .check()
                        .map_err(|(key, message)| wrong(format!("field `{key}`: {message}")))?;
                    return Ok(config);
                }
                Err(error) if last.is_empty() => last = error.message().to_owned(),
                Err(_) => {}
            }
        }
        Err(wrong(last))
    }

    /// The resolved configuration as TOML, ready to be read again.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::Config(e.to_string()))
    }
}

/// A key's name and where its value stands.
type Leaf = (String, std::ops::Range<usize>);

/// Walks a parsed file: every key has to be known; values' places go into `leaves`.
fn check_keys(
    table: &DeTable<'_>,
    prefix: &str,
    leaves: &mut Vec<Leaf>,
) -> std::result::Result<(), (std::ops::Range<usize>, String)> {
    for (key, value) in table.iter() {
        let name = if prefix.is_empty() {
            key.get_ref().to_string()
        } else {
            format!("{prefix}.{}", key.get_ref())
        };
        let value: &Spanned<DeValue<'_>> = value;
        let is_table = KEYS
            .iter()
            .any(|k| k.split_once('.').is_some_and(|(t, _)| t == name));
        match value.get_ref() {
            DeValue::Table(inner) if is_table => check_keys(inner, &name, leaves)?,
            _ if is_table => {
                return Err((
                    key.span(),
                    format!("`{name}` is a table, expected `[{name}]` and keys under it"),
                ));
            }
            _ if KEYS.contains(&name.as_str()) => leaves.push((name, value.span())),
            _ => return Err((key.span(), unknown(&name))),
        }
    }
    Ok(())
}

/// The message about an unknown key, with the nearest known one.
fn unknown(key: &str) -> String {
    let last = |k: &str| k.rsplit('.').next().unwrap_or_default().to_owned();
    // A key in the wrong table is nearer than a key of the same table that looks a little like it.
    let nearest = KEYS.iter().max_by(|a, b| {
        let score =
            |k: &str| strsim::jaro_winkler(k, key).max(strsim::jaro_winkler(&last(k), &last(key)));
        score(a).total_cmp(&score(b))
    });
    match nearest {
        Some(nearest) => format!("unknown key `{key}`; did you mean `{nearest}`?"),
        None => format!("unknown key `{key}`"),
    }
}
