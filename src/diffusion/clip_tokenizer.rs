//! CLIP's byte-pair tokenizer, and texts longer than its context cut into chunks.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::Tokenizer;
use unicode_segmentation::UnicodeSegmentation;

use crate::{Error, Result};

/// One pass of a text through the encoder.
#[derive(Clone, Debug)]
pub struct TextChunk {
    /// The part of the text, as written.
    pub text: String,
    /// Ids of the whole context: BOS, the tokens, EOS, padding.
    pub ids: Vec<u32>,
    /// Where each token between BOS and EOS stands: `[start, end)` in characters of the whole text.
    pub offsets: Vec<(usize, usize)>,
}

/// CLIP's tokenizer: NFC, lower case, byte-level pairs with `</w>` at the end of a word.
pub struct ClipTokenizer {
    tokenizer: Tokenizer,
    path: PathBuf,
    context: usize,
    bos: u32,
    eos: u32,
    pad: u32,
}

impl ClipTokenizer {
    /// Loads a `tokenizer/` directory, from `tokenizer.json` or from `vocab.json` and `merges.txt`.
    ///
    /// `context` is the text encoder's, in tokens with BOS and EOS; `vocabulary` its number of embeddings. Errors: a
    /// missing or ill-formed file, a special token that the vocabulary lacks, ids beyond the embeddings.
    pub fn load(dir: &Path, context: usize, vocabulary: usize) -> Result<Self> {
        let whole = dir.join("tokenizer.json");
        let (path, bytes) = if whole.is_file() {
            let bytes = std::fs::read(&whole).map_err(|e| Error::io(&whole, e))?;
            (whole, bytes)
        } else {
            let vocab = dir.join("vocab.json");
            if !vocab.is_file() {
                return Err(Error::file(
                    dir,
                    "no tokenizer: expected tokenizer.json, or vocab.json and merges.txt",
                ));
            }
            let bytes = read_vocabulary(&vocab, &dir.join("merges.txt"))?;
            (vocab, bytes)
        };
        let specials = read_object(&dir.join("tokenizer_config.json"))?;
        let older = read_object(&dir.join("special_tokens_map.json"))?;
        Self::new(path, bytes, [specials, older], context, vocabulary)
    }

    /// CLIP's own vocabulary, which the program carries: for checkpoints without a tokenizer. Arguments and errors as
    /// [`ClipTokenizer::load`].
    pub fn embedded(context: usize, vocabulary: usize) -> Result<Self> {
        let path = PathBuf::from("models/clip-tokenizer/bpe_simple_vocab_16e6.txt.gz");
        let (names, merges) = published_vocabulary().map_err(|e| Error::io(&path, e))?;
        let merges: Vec<&str> = merges.iter().map(String::as_str).collect();
        let names = names.into_iter().enumerate();
        let vocabulary_json = names.map(|(id, name)| (name, Value::from(id))).collect();
        let bytes = assemble(&vocabulary_json, &merges);
        Self::new(path, bytes, Default::default(), context, vocabulary)
    }

    /// From a `tokenizer.json`, and the objects that may name its special tokens.
    fn new(
        path: PathBuf,
        bytes: Vec<u8>,
        [specials, older]: [serde_json::Map<String, Value>; 2],
        context: usize,
        vocabulary: usize,
    ) -> Result<Self> {
        let mut tokenizer = Tokenizer::from_bytes(bytes)
            .map_err(|e| Error::file(&path, format!("not a tokenizer: {e}")))?;
        tokenizer
            .with_truncation(None)
            .map_err(|e| Error::file(&path, e.to_string()))?
            .with_padding(None);
        let id = |field: &str, default: &str| -> Result<u32> {
            let written = |v: &Value| match v {
                Value::String(s) => Some(s.clone()),
                Value::Object(o) => o.get("content").and_then(Value::as_str).map(str::to_string),
                _ => None,
            };
            let token = specials
                .get(field)
                .and_then(written)
                .or_else(|| older.get(field).and_then(written))
                .unwrap_or_else(|| default.to_string());
            tokenizer.token_to_id(&token).ok_or_else(|| {
                Error::file(
                    &path,
                    format!("the vocabulary lacks the {field} \"{token}\""),
                )
            })
        };
        let (bos, eos) = (
            id("bos_token", "<|startoftext|>")?,
            id("eos_token", "<|endoftext|>")?,
        );
        let pad = id("pad_token", "<|endoftext|>")?;
        let size = tokenizer.get_vocab_size(true);
        if size > vocabulary {
            return Err(Error::file(
                &path,
                format!("{size} tokens, but the text encoder's `vocab_size` is {vocabulary}"),
            ));
        }
        Ok(ClipTokenizer {
            tokenizer,
            path,
            context,
            bos,
            eos,
            pad,
        })
    }

    /// The text as chunks that fit the context: one, or for a longer text its sentences packed into as few as they
    /// fill in order.
    ///
    /// A sentence that alone is too long is cut before the word that overflows; of a word that alone is too long the
    /// first tokens are kept. Errors: a text without any token.
    pub fn chunks(&self, text: &str) -> Result<Vec<TextChunk>> {
        let mut parts = Vec::new();
        self.pack(text, 0..text.len(), Split::Sentences, &mut parts)?;
        let chunks: Vec<TextChunk> = parts
            .into_iter()
            .map(|range| self.chunk(text, range))
            .filter(|chunk| !matches!(chunk, Ok(c) if c.offsets.is_empty()))
            .collect::<Result<_>>()?;
        if chunks.is_empty() {
            return Err(Error::Input(format!(
                "the text {text:?} is empty: a caption with at least one word is needed"
            )));
        }
        Ok(chunks)
    }

    /// One chunk of a text, cut to the context where it is longer, empty where the text is: a sampler's prompt.
    pub fn chunk_of(&self, text: &str) -> Result<TextChunk> {
        self.chunk(text, 0..text.len())
    }

    /// Packs the segments of `text[range]` into ranges of at most `context − 2` tokens.
    fn pack(
        &self,
        text: &str,
        range: std::ops::Range<usize>,
        split: Split,
        into: &mut Vec<std::ops::Range<usize>>,
    ) -> Result<()> {
        if self.tokens(&text[range.clone()])? <= self.context - 2 {
            into.push(range);
            return Ok(());
        }
        let part = &text[range.clone()];
        let starts: Vec<usize> = match split {
            Split::Sentences => part
                .split_sentence_bound_indices()
                .map(|(i, _)| i)
                .collect(),
            Split::Words => part.split_word_bound_indices().map(|(i, _)| i).collect(),
        };
        let mut start = 0;
        for (i, &from) in starts.iter().enumerate() {
            let end = starts.get(i + 1).copied().unwrap_or(part.len());
            if self.tokens(&part[start..end])? <= self.context - 2 {
                continue;
            }
            if from > start {
                into.push(range.start + start..range.start + from);
                start = from;
            }
            if self.tokens(&part[from..end])? > self.context - 2 {
                let sub = range.start + from..range.start + end;
                match split {
                    Split::Sentences => self.pack(text, sub, Split::Words, into)?,
                    Split::Words => into.push(sub),
                }
                start = end;
            }
        }
        if start < part.len() {
            into.push(range.start + start..range.end);
        }
        Ok(())
    }

    fn tokens(&self, text: &str) -> Result<usize> {
        Ok(self.encode(text)?.len())
    }

    fn encode(&self, text: &str) -> Result<tokenizers::Encoding> {
        self.tokenizer
            .encode_char_offsets(text, false)
            .map_err(|e| Error::file(&self.path, format!("cannot tokenise {text:?}: {e}")))
    }

    fn chunk(&self, text: &str, range: std::ops::Range<usize>) -> Result<TextChunk> {
        let before = text[..range.start].chars().count();
        let part = text[range].trim_end();
        let encoding = self.encode(part)?;
        let kept = encoding.len().min(self.context - 2);
        let mut ids = Vec::with_capacity(self.context);
        ids.push(self.bos);
        ids.extend(&encoding.get_ids()[..kept]);
        ids.push(self.eos);
        ids.resize(self.context, self.pad);
        let offsets = encoding.get_offsets()[..kept]
            .iter()
            .map(|&(start, end)| (before + start, before + end))
            .collect();
        Ok(TextChunk {
            text: part.trim_start().to_string(),
            ids,
            offsets,
        })
    }
}

/// Where a text that is too long is cut.
#[derive(Clone, Copy)]
enum Split {
    Sentences,
    Words,
}

/// The JSON object in a file; an empty one where the file is missing.
fn read_object(path: &Path) -> Result<serde_json::Map<String, Value>> {
    if !path.is_file() {
        return Ok(serde_json::Map::new());
    }
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::file(path, format!("expected a JSON object: {e}")))
}

/// The `tokenizer.json` of a `vocab.json` and a `merges.txt`.
fn read_vocabulary(vocab: &Path, merges: &Path) -> Result<Vec<u8>> {
    let vocabulary = read_object(vocab)?;
    let text = std::fs::read_to_string(merges).map_err(|e| Error::io(merges, e))?;
    let merges: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.trim().is_empty())
        .collect();
    Ok(assemble(&vocabulary, &merges))
}

/// CLIP's merges as published; `models/clip-tokenizer/README.md` says where they are from.
static PUBLISHED_MERGES: &[u8] =
    include_bytes!("../../models/clip-tokenizer/bpe_simple_vocab_16e6.txt.gz");
/// The merges that CLIP uses of them: 49,408 tokens less two for each byte and two special ones.
const MERGES: usize = 49_408 - 2 * 256 - 2;

/// CLIP's tokens in the order of their ids, and its merges, `"a b"` each.
fn published_vocabulary() -> std::io::Result<(Vec<String>, Vec<String>)> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(PUBLISHED_MERGES).read_to_string(&mut text)?;
    let merges: Vec<String> = text
        .lines()
        .skip(1)
        .take(MERGES)
        .map(str::to_string)
        .collect();
    // Bytes that print stand for themselves, the others for the characters from 256 on.
    let prints = |b: &u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let others = 256 - (0..256).filter(prints).count() as u32;
    let bytes = (0..256).filter(prints).chain(256..256 + others);
    let bytes: Vec<String> = bytes.filter_map(char::from_u32).map(String::from).collect();
    let names = bytes.iter().cloned();
    let names = names.chain(bytes.iter().map(|b| format!("{b}</w>")));
    let names = names.chain(merges.iter().map(|merge| merge.replace(' ', "")));
    let specials = ["<|startoftext|>", "<|endoftext|>"].map(String::from);
    Ok((names.chain(specials).collect(), merges))
}

/// The `tokenizer.json` that `transformers` writes for a CLIP vocabulary and its merges.
fn assemble(vocabulary: &serde_json::Map<String, Value>, merges: &[&str]) -> Vec<u8> {
    let specials: Vec<Value> = ["<|startoftext|>", "<|endoftext|>"]
        .iter()
        .filter_map(|name| {
            vocabulary.get(*name).map(|id| {
                json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": true})
            })
        })
        .collect();
    let pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": specials,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        ]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "unk_token": "<|endoftext|>", "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>", "fuse_unk": false, "byte_fallback": false,
            "vocab": vocabulary, "merges": merges,
        },
    });
    tokenizer.to_string().into_bytes()
}
