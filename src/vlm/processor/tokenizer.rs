//! The `tokenizer.json` of a checkpoint, with what its neighbours say about special tokens.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::{Error, Result};

/// Token ids with the byte range of the text that each came from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    /// Token ids in order.
    pub ids: Vec<u32>,
    /// Byte range in the encoded text per token; empty at 0 for tokens that a post-processor added.
    pub spans: Vec<Range<usize>>,
}

/// A tokenizer with its named special tokens (`bos_token`, `eos_token`, …).
pub struct TextTokenizer {
    inner: Tokenizer,
    path: PathBuf,
    named: Vec<(String, String)>,
    special: Vec<u32>,
}

/// Reads and parses a JSON file, `None` if it does not exist.
pub fn read_json(path: &Path) -> Result<Option<Value>> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
    };
    serde_json::from_str(&text)
        .map(Some)
        .map_err(|e| Error::file(path, format!("not valid JSON: {e}")))
}

/// A token given as a string or as `{"content": …}`.
fn token_text(value: &Value) -> Option<&str> {
    value
        .as_str()
        .or_else(|| value.get("content").and_then(Value::as_str))
}

impl TextTokenizer {
    /// Loads `tokenizer.json` of a checkpoint directory (required), and the special tokens named in
    /// `special_tokens_map.json` and `tokenizer_config.json` (the latter wins).
    pub fn load(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let path = dir.join("tokenizer.json");
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let mut inner = Tokenizer::from_bytes(&bytes)
            .map_err(|e| Error::file(&path, format!("not a tokenizer that can be read: {e}")))?;
        // Length limits are checked on whole prompts; a silent cut would drop image tokens.
        inner
            .with_truncation(None)
            .map_err(|e| Error::file(&path, format!("truncation: {e}")))?;
        inner.with_padding(None);
        let mut named: Vec<(String, String)> = Vec::new();
        let mut put = |key: &str, text: &str| match named.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = text.to_string(),
            None => named.push((key.to_string(), text.to_string())),
        };
        for file in ["special_tokens_map.json", "tokenizer_config.json"] {
            let Some(config) = read_json(&dir.join(file))? else {
                continue;
            };
            let Some(map) = config.as_object() else {
                return Err(Error::file(dir.join(file), "expected a JSON object"));
            };
            for (key, value) in map {
                match token_text(value) {
                    Some(text) if key.ends_with("_token") => put(key, text),
                    _ => {}
                }
            }
            // `extra_special_tokens` and `model_specific_special_tokens` name tokens of multimodal models.
            for key in ["extra_special_tokens", "model_specific_special_tokens"] {
                for (name, value) in config
                    .get(key)
                    .and_then(Value::as_object)
                    .into_iter()
                    .flatten()
                {
                    if let Some(text) = token_text(value) {
                        put(name, text);
                    }
                }
            }
        }
        let mut special: Vec<u32> = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| id)
            .collect();
        special.extend(named.iter().filter_map(|(_, text)| inner.token_to_id(text)));
        special.sort_unstable();
        special.dedup();
        Ok(Self {
            inner,
            path,
            named,
            special,
        })
    }

    /// The text of a named special token, such as `"bos_token"`, if the checkpoint names one.
    pub fn named(&self, name: &str) -> Option<&str> {
        self.named
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, text)| text.as_str())
    }

    /// All named special tokens, as the chat template sees them.
    pub fn named_tokens(&self) -> &[(String, String)] {
        &self.named
    }

    /// The id of a token's exact text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The id of a token that the model family cannot do without; an error naming `tokenizer.json` if absent.
    pub fn required_id(&self, token: &str) -> Result<u32> {
        self.id(token).ok_or_else(|| {
            Error::file(
                &self.path,
                format!("vocabulary: no token `{token}` found, this model family expects it"),
            )
        })
    }

    /// Whether a token id is marked special (control tokens, image placeholders).
    pub fn is_special(&self, id: u32) -> bool {
        self.special.binary_search(&id).is_ok()
    }

    /// The size of the vocabulary with added tokens.
    pub fn vocabulary(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Encodes text. `add_special` lets the tokenizer's post-processor add its BOS and EOS.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Encoded> {
        let encoding = self
            .inner
            .encode(text, add_special)
            .map_err(|e| Error::file(&self.path, format!("cannot encode the text: {e}")))?;
        Ok(Encoded {
            ids: encoding.get_ids().to_vec(),
            spans: encoding
                .get_offsets()
                .iter()
                .map(|&(start, end)| start..end)
                .collect(),
        })
    }

    /// Encodes a rendered chat template: the post-processor's BOS is left out when the text already begins
    /// with one, so there is never a second (as transformers' `apply_chat_template` does).
    pub fn encode_prompt(&self, text: &str) -> Result<Encoded> {
        let begun = self
            .named("bos_token")
            .is_some_and(|bos| text.starts_with(bos));
        self.encode(text, !begun)
    }

    /// Decodes ids to text, leaving special tokens out if `skip_special`.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|e| Error::file(&self.path, format!("cannot decode token ids: {e}")))
    }
}
