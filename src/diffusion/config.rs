//! Reading a model's `config.json` field by field, so that an error names the file and the field.

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result};

/// The top-level object of a JSON configuration file.
pub struct ConfigFile {
    path: PathBuf,
    object: serde_json::Map<String, Value>,
}

impl ConfigFile {
    /// Reads `path`. Errors: unreadable, not JSON, or not an object.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        match serde_json::from_str(&text) {
            Ok(Value::Object(object)) => Ok(ConfigFile { path, object }),
            Ok(_) => Err(Error::file(&path, "expected a JSON object at the top")),
            Err(e) => Err(Error::file(&path, format!("not valid JSON: {e}"))),
        }
    }

    /// The file that was read.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The raw value of a field; `None` where it is missing or null.
    pub fn value(&self, field: &str) -> Option<&Value> {
        self.object.get(field).filter(|v| !v.is_null())
    }

    /// A field that may be missing or null. Errors: a value of another type.
    pub fn optional<T: DeserializeOwned>(&self, field: &str) -> Result<Option<T>> {
        self.value(field)
            .map(|v| T::deserialize(v).map_err(|e| self.error(field, format!("found {v}: {e}"))))
            .transpose()
    }

    /// A field with the value that the library assumes where it is missing.
    pub fn or<T: DeserializeOwned>(&self, field: &str, default: T) -> Result<T> {
        Ok(self.optional(field)?.unwrap_or(default))
    }

    /// A field that must be there.
    pub fn required<T: DeserializeOwned>(&self, field: &str) -> Result<T> {
        self.optional(field)?
            .ok_or_else(|| self.error(field, "is missing"))
    }

    /// A field that is one value for every level or a list with one per level.
    pub fn per_level<T: DeserializeOwned + Clone>(
        &self,
        field: &str,
        levels: usize,
        default: T,
    ) -> Result<Vec<T>> {
        match self.value(field) {
            Some(Value::Array(list)) if list.len() != levels => Err(self.error(
                field,
                format!(
                    "found {} entries, expected {levels}, one a level",
                    list.len()
                ),
            )),
            Some(Value::Array(_)) => self.required(field),
            _ => Ok(vec![self.or(field, default)?; levels]),
        }
    }

    /// Refuses every value but `supported` (missing and null count as the default, `supported`).
    pub fn only<T: DeserializeOwned + PartialEq + Debug>(
        &self,
        field: &str,
        supported: &[T],
    ) -> Result<()> {
        match self.optional::<T>(field)? {
            Some(found) if !supported.contains(&found) => {
                let expected: Vec<String> = supported.iter().map(|s| format!("{s:?}")).collect();
                Err(self.error(
                    field,
                    format!(
                        "found {found:?}, expected {}: other values are not supported",
                        expected.join(" or ")
                    ),
                ))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a field that asks for something not supported: anything but missing, null or false.
    pub fn absent(&self, field: &str) -> Result<()> {
        match self.value(field) {
            None | Some(Value::Bool(false)) => Ok(()),
            Some(found) => Err(self.error(
                field,
                format!("found {found}, expected null: not supported"),
            )),
        }
    }

    /// An error about `field` of this file.
    pub fn error(&self, field: &str, message: impl std::fmt::Display) -> Error {
        Error::file(&self.path, format!("field `{field}`: {message}"))
    }

    /// Refuses zero and a count that does not divide `whole`.
    pub fn divides(&self, field: &str, count: usize, whole: usize) -> Result<()> {
        if count == 0 || !whole.is_multiple_of(count) {
            return Err(self.error(field, format!("{count} does not divide {whole}")));
        }
        Ok(())
    }
}
