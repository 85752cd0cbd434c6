//! The commented configuration that `config init` writes: `default.toml`, with given keys filled in.

use super::Config;
use crate::{Error, Result};

/// Every key with its documentation and default, as TOML.
///
/// What is written there of keys and choices is checked against the structs by the tests below.
pub const TEMPLATE: &str = include_str!("default.toml");

impl Config {
    /// [`TEMPLATE`] with this configuration's values where they are not the defaults.
    ///
    /// # Errors
    /// A configuration that cannot be written as TOML.
    pub fn commented(&self) -> Result<String> {
        let mut lines: Vec<String> = TEMPLATE.lines().map(str::to_owned).collect();
        for difference in Config::default().all_differences(self)? {
            let (table, key) = difference
                .key
                .split_once('.')
                .unwrap_or((&difference.key, ""));
            let at = lines
                .iter()
                .position(|line| line.trim() == format!("[{table}]"))
                .and_then(|start| {
                    let found = lines[start + 1..]
                        .iter()
                        .take_while(|line| !line.starts_with('['))
                        .position(|line| key_of(line) == Some(key));
                    found.map(|at| start + 1 + at)
                });
            let Some(at) = at else {
                let message = format!("`{}` does not stand in the template", difference.key);
                return Err(Error::Config(message));
            };
            lines[at] = format!("{key} = {}", difference.after);
        }
        Ok(lines.join("\n") + "\n")
    }
}

/// The key of a line `key = value` or `# key = value`.
fn key_of(line: &str) -> Option<&str> {
    let line = line.strip_prefix("# ").unwrap_or(line);
    let (key, value) = line.split_once(" = ")?;
    let bare = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let is_toml = toml::from_str::<toml::Table>(&format!("v = {value}")).is_ok();
    (bare && is_toml).then_some(key)
}

/// The value of such a line.
#[cfg(test)]
fn value_of(line: &str) -> Option<toml::Value> {
    let (_, value) = line.split_once(" = ")?;
    let table: toml::Table = toml::from_str(&format!("v = {value}")).ok()?;
    table.get("v").cloned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use toml::{Table, Value};

    use super::super::KEYS;
    use super::*;

    const WHERE: &str = "src/train/config/default.toml";

    /// What a key of the template has: its comment, its value, and whether it is commented out.
    struct Documented {
        comment: String,
        value: Value,
        commented_out: bool,
    }

    fn documented() -> BTreeMap<String, Documented> {
        let (mut table, mut comment, mut all) = (String::new(), String::new(), BTreeMap::new());
        for line in TEMPLATE.lines() {
            if let Some(name) = line.strip_prefix('[').and_then(|l| l.strip_suffix(']')) {
                table = name.to_owned();
                comment.clear();
            } else if let Some(key) = key_of(line) {
                let key = format!("{table}.{key}");
                let value = value_of(line).unwrap();
                let comment = std::mem::take(&mut comment);
                let commented_out = line.starts_with('#');
                let documented = Documented {
                    comment,
                    value,
                    commented_out,
                };
                assert!(
                    all.insert(key.clone(), documented).is_none(),
                    "`{key}` stands twice in {WHERE}"
                );
            } else if let Some(text) = line.strip_prefix("# ") {
                comment += text;
                comment.push(' ');
            } else {
                assert!(line.is_empty(), "{WHERE}: neither key nor comment: {line}");
                comment.clear();
            }
        }
        all
    }

    /// The names that serde says it would have taken instead of an unknown one: "… expected one of `a`, `b`".
    fn expected(wrong: &str) -> Vec<String> {
        let Err(error) = toml::from_str::<Config>(wrong) else {
            panic!("{wrong} was taken");
        };
        let message = error.message().to_owned();
        let Some((_, names)) = message.split_once("expected") else {
            return Vec::new();
        };
        names
            .split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect()
    }

    /// Every key of the structs.
    fn struct_keys() -> Vec<String> {
        let mut keys = Vec::new();
        for table in expected("nonsense = 1") {
            let fields = expected(&format!("[{table}]\nnonsense = 1"));
            keys.extend(fields.iter().map(|field| format!("{table}.{field}")));
        }
        keys
    }

    #[test]
    fn every_key_is_listed_and_documented() {
        let (documented, keys) = (documented(), struct_keys());
        assert!(keys.len() > 60, "{keys:?}");
        for key in &keys {
            let (table, name) = key.split_once('.').unwrap();
            assert!(
                KEYS.contains(&key.as_str()),
                "`{key}` is not in `KEYS` of src/train/config.rs: add it there"
            );
            let found = documented.get(key);
            assert!(
                found.is_some_and(|d| d.comment.len() > 3),
                "`{key}` has no documentation in {WHERE}: under `[{table}]` write a comment and then `{name} = …` with \
                 its default, or `# {name} = …` with an example where it has none"
            );
        }
        for key in documented
            .keys()
            .map(String::as_str)
            .chain(KEYS.iter().copied())
        {
            assert!(
                keys.iter().any(|known| known == key),
                "`{key}` of {WHERE} or of `KEYS` is no key of the structs: take it out"
            );
        }
    }

    #[test]
    fn the_template_is_the_defaults() {
        let parsed = Config::parse(TEMPLATE, WHERE, &[]).unwrap_or_else(|e| panic!("{e}"));
        let differences = Config::default().differences(&parsed).unwrap();
        assert!(
            differences.is_empty(),
            "{WHERE} has other values than `Config::default()`: {}",
            differences
                .iter()
                .map(|d| format!("{d}; "))
                .collect::<String>()
        );
        let defaults = super::super::changes::leaves(&Config::default()).unwrap();
        for (key, documented) in documented() {
            assert_eq!(
                documented.commented_out,
                !defaults.contains_key(&key),
                "`{key}` of {WHERE}: commented out are those keys that have no default"
            );
            if documented.commented_out {
                // The example has to be of the key's type.
                let (table, name) = key.split_once('.').unwrap();
                let text = format!("[{table}]\n{name} = {}", documented.value);
                assert!(toml::from_str::<Config>(&text).is_ok(), "{WHERE}: {text}");
            }
        }
    }

    #[test]
    fn every_choice_is_documented() {
        let mut with_choices = 0;
        for (key, documented) in documented() {
            let (table, name) = key.split_once('.').unwrap();
            if !documented.value.is_str() {
                continue;
            }
            let text = format!("[{table}]\n{name} = \"no such choice\"");
            if toml::from_str::<Config>(&text).is_ok() {
                continue;
            }
            let choices = expected(&text);
            with_choices += usize::from(!choices.is_empty());
            for choice in choices {
                let quoted = format!("\"{choice}\"");
                assert!(
                    documented.comment.contains(&quoted),
                    "`{key}`: its comment in {WHERE} lacks the choice {quoted}: {}",
                    documented.comment
                );
            }
        }
        assert!(with_choices >= 15, "{with_choices}");
    }

    #[test]
    fn given_keys_are_filled_in() {
        let sets = [
            "model.path=some model",
            "data.targets=t",
            "train.steps=7",
            "run.dir=r",
            "data.mixture=[{path = \"a\", weight = 2.0}]",
        ];
        let config = Config::default()
            .with(&sets.map(str::to_owned))
            .unwrap_err();
        assert!(config.to_string().contains("data.targets"), "{config}");
        let config = Config::default()
            .with(&[sets[0], sets[2], sets[3], sets[4]].map(str::to_owned))
            .unwrap();
        let text = config.commented().unwrap();
        assert_eq!(Config::parse(&text, "t", &[]).unwrap(), config);
        assert!(text.contains("\npath = \"some model\"\n"), "{text}");
        // Nothing else is changed.
        let changed = text.lines().zip(TEMPLATE.lines()).filter(|(a, b)| a != b);
        assert_eq!(changed.count(), 4);
        let plain: Table = toml::from_str(TEMPLATE).unwrap();
        assert_eq!(plain["data"]["path"].as_str(), Some("mini"));
    }
}
