//! Hugging Face parquet: one file, or a folder of shards `SPLIT-00000-of-00004.parquet`.
//!
//! A row is an entry as in [`super::entry`] with its image in the column `image` (or `images`, a list of one): a
//! struct of `bytes` and `path`, plain bytes, or the path of a file. Texts are read at once; an image is read when it
//! is used, out of the page that it stands in.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::{ConvertedType, Type as Physical};
use parquet::column::reader::ColumnReader;
use parquet::data_type::ByteArray;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use parquet::file::properties::ReaderProperties;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::file::serialized_reader::SerializedRowGroupReader;
use parquet::record::{Field, Row};
use parquet::schema::types::{Type, TypePtr};
use serde_json::{Map, Value};

use super::entry::{self, Images, Place};
use super::format::{MAX_IMAGE, MAX_TEXT, Selection, inside};
use super::sample::ImageFile;
use super::{ImageRef, Sample};
use crate::{Error, Result};

/// Columns that make an entry; others are not read.
const TEXTS: [&str; 13] = [
    "id",
    "conversations",
    "messages",
    "texts",
    "question",
    "answer",
    "answers",
    "caption",
    "captions",
    "text",
    "split",
    "filename",
    "file_name",
];

/// Most bytes that a row group's text column may unpack to.
const MAX_COLUMN: i64 = 2 << 30;

/// A column that unpacks to more than this times its size on disk, and to more than [`FREE`] bytes, is a bomb: text
/// and tokens compress some tenfold.
const MAX_RATIO: i64 = 1000;

/// Bytes that any column may unpack to.
const FREE: i64 = 64 << 20;

/// The splits that the datasets library names files by.
const SPLITS: [&str; 6] = ["train", "test", "validation", "valid", "val", "dev"];

/// The samples of the files `shards` of the data set `path`.
///
/// # Errors
/// No parquet file; columns that make no entry, naming those found and expected; columns that unpack to an
/// unreasonable size; a bad row.
pub(super) fn load(
    path: &Path,
    shards: &[PathBuf],
    images: Option<&Path>,
    selection: &Selection,
) -> Result<Vec<Sample>> {
    let (shards, selection) = of_split(path, shards, selection)?;
    let mut rows: Vec<(Arc<Shard>, Rows)> = Vec::new();
    for shard in &shards {
        let root = images.unwrap_or_else(|| shard.parent().unwrap_or(Path::new("")));
        let (shard, of_shard) = guarded(shard, || read(shard, root))?;
        rows.push((Arc::new(shard), of_shard));
    }
    let split =
        |row: &Map<String, Value>| row.get("split").and_then(Value::as_str).map(str::to_owned);
    let mut available: Vec<String> = rows
        .iter()
        .flat_map(|(_, r)| r.iter().filter_map(split))
        .collect();
    available.sort();
    available.dedup();
    selection.check(path, &available)?;
    let mut all = Vec::new();
    let mut number = 0;
    for (shard, rows) in rows {
        for (at, row) in rows.into_iter().enumerate() {
            let id = number.to_string();
            number += 1;
            if split(&row).is_some_and(|split| !selection.wants(&split, &available)) {
                continue;
            }
            let place = Place {
                path: &shard.path,
                at: format!("row {at}"),
            };
            let images = shard.image_of(&place, at, &row, &id)?;
            all.extend(entry::samples(&place, &row, &id, images, &selection)?);
        }
    }
    Ok(all)
}

/// The files of the wanted split where files are named by splits, and what of the selection is left.
fn of_split(
    path: &Path,
    shards: &[PathBuf],
    selection: &Selection,
) -> Result<(Vec<PathBuf>, Selection)> {
    let named = |shard: &PathBuf| {
        let stem = shard.file_stem()?.to_str()?;
        let split = stem.split(['-', '_', '.']).next()?;
        let known = SPLITS.contains(&split) || selection.splits.iter().any(|s| s == split);
        known.then(|| split.to_owned())
    };
    let mut available: Vec<String> = shards.iter().filter_map(named).collect();
    available.sort();
    available.dedup();
    // A file given by its own name is wanted, whatever it is called.
    if path.is_file() || available.is_empty() {
        return Ok((shards.to_vec(), selection.clone()));
    }
    if selection.splits.is_empty() && !available.iter().any(|s| s == "train") {
        return Err(Error::file(
            path,
            format!(
                "has no files of the split `train`, only of {}; choose by `#SPLIT`",
                available.join(", ")
            ),
        ));
    }
    selection.check(path, &available)?;
    let wanted = |shard: &&PathBuf| named(shard).is_some_and(|s| selection.wants(&s, &available));
    let rest = Selection {
        splits: Vec::new(),
        first: selection.first,
    };
    Ok((shards.iter().filter(wanted).cloned().collect(), rest))
}

/// Runs what reads a parquet file; its library checks most damage, and a check that is missing panics.
fn guarded<T>(path: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read))
        .unwrap_or_else(|_| Err(damaged(path, "its pages do not agree with its schema")))
}

fn damaged(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::file(
        path,
        format!("not a whole parquet file that can be read: {reason}"),
    )
}

/// The texts of a file's rows.
type Rows = Vec<Map<String, Value>>;

/// One file and where its images are.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    metadata: Arc<ParquetMetaData>,
    /// The column (leaf) with the encoded images.
    bytes: Option<usize>,
    /// The image's path in each row, where there is such a column.
    paths: Option<Vec<Option<String>>>,
    /// Folder that paths are relative to.
    root: PathBuf,
}

/// Opens a file and reads the texts of its rows.
fn read(path: &Path, root: &Path) -> Result<(Shard, Rows)> {
    let wrong = |e: ParquetError| damaged(path, e);
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let reader = SerializedFileReader::new(file).map_err(wrong)?;
    let metadata = Arc::new(reader.metadata().clone());
    let schema = metadata.file_metadata().schema();
    let columns: Vec<&str> = schema.get_fields().iter().map(|f| f.name()).collect();
    let has = |name: &str| columns.contains(&name);
    let says = [
        "conversations",
        "messages",
        "texts",
        "caption",
        "captions",
        "text",
    ]
    .iter()
    .any(|c| has(c))
        || has("question") && (has("answer") || has("answers"));
    let Some(image) = ["image", "images"]
        .into_iter()
        .find(|c| has(c))
        .filter(|_| says)
    else {
        return Err(Error::file(
            path,
            format!(
                "found the columns {}; expected `image` (or `images`) and one of `messages`, `conversations`, `texts`, \
                 `question` with `answer` or `answers`, `caption`, `captions`, `text`; rename them",
                columns.join(", ")
            ),
        ));
    };
    let (bytes, names) = image_columns(path, &metadata, image)?;
    let texts: Vec<TypePtr> = schema
        .get_fields()
        .iter()
        .filter(|f| TEXTS.contains(&f.name()))
        .cloned()
        .collect();
    check_sizes(path, &metadata, &texts, names)?;
    let projection = Type::group_type_builder(schema.name())
        .with_fields(texts)
        .build()
        .map_err(wrong)?;
    let mut rows = Vec::new();
    for row in reader.get_row_iter(Some(projection)).map_err(wrong)? {
        let mut size = 0;
        let row = object(
            row.map_err(|e| damaged(path, format!("row {}: {e}", rows.len())))?,
            &mut size,
        );
        if size > MAX_TEXT as usize {
            return Err(Error::file(
                path,
                format!(
                    "row {}: has {size} bytes of text, expected at most {MAX_TEXT}",
                    rows.len()
                ),
            ));
        }
        rows.push(row);
    }
    let paths = names
        .map(|column| strings(path, &reader, column))
        .transpose()?;
    if let Some(paths) = &paths
        && paths.len() != rows.len()
    {
        return Err(damaged(
            path,
            format!("{} rows of text, {} of images", rows.len(), paths.len()),
        ));
    }
    let shard = Shard {
        path: path.to_path_buf(),
        metadata,
        bytes,
        paths,
        root: root.to_path_buf(),
    };
    Ok((shard, rows))
}

/// The leaf columns of the encoded image and of its path.
fn image_columns(
    path: &Path,
    metadata: &ParquetMetaData,
    image: &str,
) -> Result<(Option<usize>, Option<usize>)> {
    let (mut bytes, mut names) = (None, None);
    let mut found = Vec::new();
    for (number, column) in metadata
        .file_metadata()
        .schema_descr()
        .columns()
        .iter()
        .enumerate()
    {
        let parts = column.path().parts();
        if parts.first().is_none_or(|p| p != image) {
            continue;
        }
        let text = column.converted_type() == ConvertedType::UTF8;
        found.push(format!("{} ({})", parts.join("."), column.physical_type()));
        // `image`, `images.list.element`, `image.bytes`, `images.list.element.path` …
        let inner = ["list", "element", "item", "array"];
        let field = parts[1..]
            .iter()
            .map(String::as_str)
            .rfind(|p| !inner.contains(p));
        match (column.physical_type(), field) {
            (Physical::BYTE_ARRAY, Some("path")) => names = Some(number),
            (Physical::BYTE_ARRAY, None) if text => names = Some(number),
            (Physical::BYTE_ARRAY, None | Some("bytes")) => bytes = Some(number),
            _ => {}
        }
    }
    if bytes.is_none() && names.is_none() {
        return Err(Error::file(
            path,
            format!(
                "column `{image}`: found {}, expected a struct of `bytes` and `path`, bytes, or the path as a text",
                found.join(", ")
            ),
        ));
    }
    Ok((bytes, names))
}

/// Refuses text columns that unpack to an unreasonable size.
fn check_sizes(
    path: &Path,
    metadata: &ParquetMetaData,
    texts: &[TypePtr],
    names: Option<usize>,
) -> Result<()> {
    for (number, group) in metadata.row_groups().iter().enumerate() {
        for (leaf, column) in group.columns().iter().enumerate() {
            let parts = column.column_path().parts();
            let is_text = texts
                .iter()
                .any(|t| parts.first().is_some_and(|p| p == t.name()));
            if !is_text && names != Some(leaf) {
                continue;
            }
            let (packed, unpacked) = (column.compressed_size(), column.uncompressed_size());
            let bomb = unpacked > FREE && unpacked / MAX_RATIO > packed;
            if unpacked < 0 || packed < 0 || unpacked > MAX_COLUMN || bomb {
                return Err(Error::file(
                    path,
                    format!(
                        "column `{}`, row group {number}: {packed} bytes that unpack to {unpacked}, expected at most \
                         {MAX_COLUMN} and no more than {MAX_RATIO}-fold; write smaller row groups",
                        parts.join(".")
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// The texts of a leaf column, one for each row; a list's is its only element.
fn strings(
    path: &Path,
    reader: &SerializedFileReader<File>,
    leaf: usize,
) -> Result<Vec<Option<String>>> {
    let mut all = Vec::new();
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group).map_err(|e| damaged(path, e))?;
        let rows = usize::try_from(group.metadata().num_rows()).map_err(|e| damaged(path, e))?;
        for value in values(path, &*group, leaf, 0, rows)? {
            let row = all.len();
            let text = value.map(|v| v.as_utf8().map(str::to_owned)).transpose();
            all.push(text.map_err(|_| {
                Error::file(path, format!("row {row}: the image's path is not UTF-8"))
            })?);
        }
    }
    Ok(all)
}

/// Rows `from .. from + count` of a leaf column of bytes; `None` where it is null or an empty list.
fn values(
    path: &Path,
    group: &dyn RowGroupReader,
    leaf: usize,
    from: usize,
    count: usize,
) -> Result<Vec<Option<ByteArray>>> {
    let wrong = |e: ParquetError| damaged(path, e);
    let descriptor = group.metadata().column(leaf).column_descr_ptr();
    let ColumnReader::ByteArrayColumnReader(mut column) =
        group.get_column_reader(leaf).map_err(wrong)?
    else {
        return Err(damaged(path, "a column of bytes has another type"));
    };
    column.skip_records(from).map_err(wrong)?;
    let (mut definitions, mut repetitions, mut found) = (Vec::new(), Vec::new(), Vec::new());
    let mut read = 0;
    while read < count {
        let (records, ..) = column
            .read_records(
                count - read,
                Some(&mut definitions),
                Some(&mut repetitions),
                &mut found,
            )
            .map_err(wrong)?;
        if records == 0 {
            return Err(damaged(path, format!("row {} is not there", from + read)));
        }
        read += records;
    }
    let (present, nested) = (descriptor.max_def_level(), descriptor.max_rep_level() > 0);
    // A required column has no levels; its values are all there.
    if present == 0 {
        definitions = vec![0; found.len()];
    }
    let mut found = found.into_iter();
    let mut all: Vec<Option<ByteArray>> = Vec::new();
    for (level, &definition) in definitions.iter().enumerate() {
        let value = match definition == present {
            true => found.next(),
            false => None,
        };
        let again = nested && repetitions.get(level).is_some_and(|&r| r > 0);
        match all.last_mut().filter(|_| again) {
            Some(last) if last.is_none() => *last = value,
            Some(_) if value.is_none() => {}
            Some(_) => {
                let row = from + all.len() - 1;
                return Err(Error::file(
                    path,
                    format!("row {row}: has several images, expected one image a sample"),
                ));
            }
            None => all.push(value),
        }
    }
    Ok(all)
}

impl Shard {
    /// Where row `at`'s image is, and how it is called.
    fn image_of(
        self: &Arc<Self>,
        place: &Place,
        at: usize,
        row: &Map<String, Value>,
        id: &str,
    ) -> Result<Images<'static>> {
        let path = self.paths.as_ref().and_then(|paths| paths[at].as_deref());
        if self.bytes.is_none() {
            let Some(path) = path else {
                return Err(place.wrong("field `image`: found nothing, expected a path"));
            };
            let path =
                inside(&self.root, path).map_err(|e| place.wrong(format!("field `image`: {e}")))?;
            return Ok(Images::Given(ImageRef::Path(path)));
        }
        let named = ["filename", "file_name"]
            .iter()
            .find_map(|key| row.get(*key)?.as_str());
        let name = path.or(named).unwrap_or(id);
        let name = name.rsplit(['/', '\\']).next().unwrap_or(id).to_owned();
        Ok(Images::Given(ImageRef::Stored {
            name,
            file: self.clone(),
            at: at as u64,
        }))
    }

    /// The row group of row `at`, and the row's place in it.
    fn group_of(&self, at: u64) -> Option<(usize, usize)> {
        let mut left = at;
        for (number, group) in self.metadata.row_groups().iter().enumerate() {
            let rows = u64::try_from(group.num_rows()).ok()?;
            if left < rows {
                return Some((number, left as usize));
            }
            left -= rows;
        }
        None
    }

    fn bytes_of(&self, leaf: usize, at: u64) -> Result<Option<Vec<u8>>> {
        let lost = || damaged(&self.path, format!("row {at} is not there"));
        let (number, row) = self.group_of(at).ok_or_else(lost)?;
        let group: &RowGroupMetaData = self.metadata.row_group(number);
        let column = group.column(leaf);
        // The format allows pages of 2 GiB; images of a sane size cannot fill them.
        let most = (MAX_IMAGE as i64).saturating_mul(group.num_rows());
        if column.uncompressed_size() > most {
            return Err(damaged(
                &self.path,
                format!("images of more than {MAX_IMAGE} bytes each"),
            ));
        }
        // A handle of its own: threads must not share a file's position.
        let file = Arc::new(File::open(&self.path).map_err(|e| Error::io(&self.path, e))?);
        let index = self.metadata.page_index_for_row_group(number);
        let properties = Arc::new(ReaderProperties::builder().build());
        let reader = SerializedRowGroupReader::new(file, group, index, properties)
            .map_err(|e| damaged(&self.path, e))?;
        let found = values(&self.path, &reader, leaf, row, 1)?;
        Ok(found
            .into_iter()
            .next()
            .flatten()
            .map(|v| v.data().to_vec()))
    }
}

impl ImageFile for Shard {
    fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self, at: u64) -> Result<Vec<u8>> {
        let wrong = |message: String| Err(Error::file(&self.path, format!("row {at}: {message}")));
        let stored = self
            .bytes
            .map(|leaf| guarded(&self.path, || self.bytes_of(leaf, at)));
        if let Some(bytes) = stored.transpose()?.flatten() {
            if bytes.len() as u64 > MAX_IMAGE {
                return wrong(format!(
                    "image of {} bytes, expected at most {MAX_IMAGE}",
                    bytes.len()
                ));
            }
            return Ok(bytes);
        }
        let Some(path) = self.paths.as_ref().and_then(|p| p[at as usize].as_deref()) else {
            return wrong("field `image`: has neither bytes nor a path".into());
        };
        match inside(&self.root, path) {
            Ok(path) => std::fs::read(&path).map_err(|e| Error::io(&path, e)),
            Err(e) => wrong(format!("field `image`: {e}")),
        }
    }
}

/// A row as a JSON object; `size` grows by its texts' bytes.
fn object(row: Row, size: &mut usize) -> Map<String, Value> {
    let columns = row.into_columns().into_iter();
    columns
        .map(|(name, field)| (name, value(&field, size)))
        .collect()
}

fn value(field: &Field, size: &mut usize) -> Value {
    match field {
        Field::Bool(v) => Value::Bool(*v),
        Field::Byte(v) => Value::from(*v),
        Field::Short(v) => Value::from(*v),
        Field::Int(v) => Value::from(*v),
        Field::Long(v) => Value::from(*v),
        Field::UByte(v) => Value::from(*v),
        Field::UShort(v) => Value::from(*v),
        Field::UInt(v) => Value::from(*v),
        Field::ULong(v) => Value::from(*v),
        Field::Float(v) => Value::from(*v),
        Field::Double(v) => Value::from(*v),
        Field::Str(text) => {
            *size += text.len();
            Value::String(text.clone())
        }
        Field::Group(row) => row
            .get_column_iter()
            .map(|(name, field)| (name.clone(), value(field, size)))
            .collect(),
        Field::ListInternal(list) => list
            .elements()
            .iter()
            .map(|field| value(field, size))
            .collect(),
        // Dates, decimals, bytes: nothing that an entry is made of.
        _ => Value::Null,
    }
}
