//! Reading safetensors checkpoints: one file or shards with an index, memory-mapped.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::SafeTensors;

use super::{DType, Tensor};
use crate::error::{Error, Result};
use crate::gpu::Gpu;

/// Headers beyond this are refused before they are parsed.
const MAX_HEADER_BYTES: u64 = 100 << 20;

#[derive(Clone)]
struct Entry {
    shard: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    /// Byte range within the shard.
    range: std::ops::Range<usize>,
}

/// A tensor as it lies in its file.
pub struct Stored<'a> {
    /// Name (of [`Checkpoint::rename`], if that was called).
    pub name: &'a str,
    /// Element type.
    pub dtype: safetensors::Dtype,
    /// Shape.
    pub shape: &'a [usize],
    /// Little-endian bytes, memory-mapped.
    pub bytes: &'a [u8],
}

/// The tensors of a checkpoint by name; clones share the memory maps.
#[derive(Clone)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Arc<Vec<(PathBuf, Mmap)>>,
    entries: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// Opens `path`: a `.safetensors` file, or a directory with `<stem>.safetensors`,
    /// `<stem>.fp16.safetensors` or `<stem>.safetensors.index.json`.
    ///
    /// # Errors
    /// A missing, truncated, overlapping or pickled checkpoint, naming the file.
    pub fn open(path: &Path, stem: &str) -> Result<Checkpoint> {
        Checkpoint::open_variant(path, stem, false)
    }

    /// [`Checkpoint::open`], of a directory with both variants the one in half precision if `half` and the full one
    /// otherwise.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_variant(path: &Path, stem: &str, half: bool) -> Result<Checkpoint> {
        if path.is_file() {
            return Checkpoint::from_shards(path, &[path.to_path_buf()]);
        }
        if !path.is_dir() {
            return Err(Error::file(path, "no such file or directory"));
        }
        let full = [
            format!("{stem}.safetensors"),
            format!("{stem}.safetensors.index.json"),
        ];
        let fp16 = [
            format!("{stem}.fp16.safetensors"),
            format!("{stem}.safetensors.index.fp16.json"),
        ];
        let order = if half { [fp16, full] } else { [full, fp16] };
        for [whole, index] in order {
            let (whole, index) = (path.join(whole), path.join(index));
            if whole.is_file() {
                return Checkpoint::from_shards(path, &[whole]);
            }
            if index.is_file() {
                return Checkpoint::from_shards(path, &shards_of(&index)?);
            }
        }
        Err(missing(path, stem))
    }

    fn from_shards(path: &Path, files: &[PathBuf]) -> Result<Checkpoint> {
        let mut shards = Vec::with_capacity(files.len());
        let mut entries = BTreeMap::new();
        for (shard, file) in files.iter().enumerate() {
            refuse_pickle(file)?;
            let handle = File::open(file).map_err(|e| Error::io(file, e))?;
            // SAFETY: the map is read-only; a file truncated by another process while we run is
            // outside what a reader can guard against.
            let map = unsafe { Mmap::map(&handle) }.map_err(|e| Error::io(file, e))?;
            read_header(file, &map, shard, &mut entries)?;
            shards.push((file.clone(), map));
        }
        Ok(Checkpoint {
            path: path.to_path_buf(),
            shards: Arc::new(shards),
            entries,
        })
    }

    /// The same checkpoint with every name passed through `to_canonical`, so that older and newer
    /// key dialects read alike.
    pub fn rename(self, to_canonical: impl Fn(&str) -> String) -> Checkpoint {
        Checkpoint {
            entries: self
                .entries
                .into_iter()
                .map(|(name, entry)| (to_canonical(&name), entry))
                .collect(),
            ..self
        }
    }

    /// The tensors that `place` gives a name, under that name and with a shape of as many elements: one component of a
    /// file that holds several.
    pub fn select(
        &self,
        place: impl Fn(&str, &[usize]) -> Option<(String, Vec<usize>)>,
    ) -> Checkpoint {
        let entries = self.entries.iter().filter_map(|(name, entry)| {
            let (name, shape) = place(name, &entry.shape)?;
            assert_eq!(
                super::elements(&shape),
                super::elements(&entry.shape),
                "select: {name} {:?} as {shape:?}",
                entry.shape
            );
            Some((
                name,
                Entry {
                    shape,
                    ..entry.clone()
                },
            ))
        });
        Checkpoint {
            entries: entries.collect(),
            path: self.path.clone(),
            shards: self.shards.clone(),
        }
    }

    /// The files that hold the tensors.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|(path, _)| path.as_path())
    }

    /// The file or directory it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Shape of tensor `name`.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|e| e.shape.as_slice())
    }

    /// Bytes of an element of tensor `name`, as stored.
    pub fn element_bytes(&self, name: &str) -> Option<usize> {
        let entry = self.entries.get(name)?;
        Some(entry.range.len() / super::elements(&entry.shape).max(1))
    }

    fn entry(&self, name: &str, shape: Option<&[usize]>) -> Result<&Entry> {
        let entry = self.entries.get(name).ok_or_else(|| {
            let near = self
                .names()
                .max_by(|a, b| strsim::jaro(a, name).total_cmp(&strsim::jaro(b, name)));
            let hint = near
                .map(|n| format!(" (nearest: `{n}`)"))
                .unwrap_or_default();
            Error::tensor(self.path(), name, format!("missing{hint}"))
        })?;
        if shape.is_some_and(|shape| shape != entry.shape) {
            return Err(Error::tensor(
                self.path(),
                name,
                format!(
                    "shape {:?} found, {:?} expected by the configuration",
                    entry.shape,
                    shape.unwrap_or_default()
                ),
            ));
        }
        Ok(entry)
    }

    /// That there is a tensor `name` of `shape`.
    ///
    /// # Errors
    /// It is missing or has another shape.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<()> {
        self.entry(name, Some(shape)).map(|_| ())
    }

    fn bytes(&self, entry: &Entry) -> &[u8] {
        &self.shards[entry.shard].1[entry.range.clone()]
    }

    fn dtype(&self, name: &str, entry: &Entry) -> Result<DType> {
        Ok(match entry.dtype {
            safetensors::Dtype::F32 => DType::F32,
            safetensors::Dtype::F16 => DType::F16,
            safetensors::Dtype::BF16 => DType::Bf16,
            safetensors::Dtype::U32 => DType::U32,
            safetensors::Dtype::I32 => DType::I32,
            other => {
                let message = format!("dtype {other:?} found, F32, F16 or BF16 expected");
                return Err(Error::tensor(self.path(), name, message));
            }
        })
    }

    /// Uploads tensor `name`, which must have `shape`, in the dtype of the file
    /// (F16 widened to F32 on adapters without it).
    ///
    /// # Errors
    /// A missing tensor, another shape or an unusable dtype.
    pub fn tensor(&self, gpu: &Gpu, name: &str, shape: &[usize]) -> Result<Tensor> {
        let entry = self.entry(name, Some(shape))?;
        let dtype = self.dtype(name, entry)?;
        if dtype == DType::F16 && !gpu.tier().f16 {
            return self.tensor_f32(gpu, name, shape);
        }
        Ok(Tensor::from_bytes(gpu, self.bytes(entry), dtype, shape))
    }

    /// Uploads tensor `name`, which must have `shape`, widened to f32.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn tensor_f32(&self, gpu: &Gpu, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.entry(name, Some(shape))?;
        let (values, shape) = self.values(name)?;
        Ok(Tensor::from_f32(gpu, &values, &shape))
    }

    /// Values of tensor `name` as f32 on the host, and its shape.
    ///
    /// # Errors
    /// A missing tensor or an unusable dtype.
    pub fn values(&self, name: &str) -> Result<(Vec<f32>, Vec<usize>)> {
        let entry = self.entry(name, None)?;
        let dtype = self.dtype(name, entry)?;
        Ok((dtype.widen(self.bytes(entry)), entry.shape.clone()))
    }

    /// Values of tensor `name`, which must have `shape`, as f32 on the host.
    ///
    /// # Errors
    /// A missing tensor, another shape or an unusable dtype.
    pub fn values_of(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.entry(name, Some(shape))?;
        Ok(self.values(name)?.0)
    }

    /// Little-endian bytes of tensor `name`, which must have `shape`, and their dtype.
    ///
    /// # Errors
    /// A missing tensor, another shape or an unusable dtype.
    pub fn bytes_of(&self, name: &str, shape: &[usize]) -> Result<(&[u8], DType)> {
        let entry = self.entry(name, Some(shape))?;
        Ok((self.bytes(entry), self.dtype(name, entry)?))
    }

    /// Raw values of a `u32` tensor on the host, and its shape.
    ///
    /// # Errors
    /// A missing tensor or another dtype.
    pub fn values_u32(&self, name: &str) -> Result<(Vec<u32>, Vec<usize>)> {
        let entry = self.entry(name, None)?;
        if self.dtype(name, entry)? != DType::U32 {
            let message = format!("dtype {:?} found, U32 expected", entry.dtype);
            return Err(Error::tensor(self.path(), name, message));
        }
        Ok((
            bytemuck::pod_collect_to_vec(self.bytes(entry)),
            entry.shape.clone(),
        ))
    }

    /// Every file with its tensors as they lie in it, in the file's order.
    pub fn stored(&self) -> Vec<(&Path, Vec<Stored<'_>>)> {
        let mut entries: Vec<(&String, &Entry)> = self.entries.iter().collect();
        entries.sort_by_key(|(_, entry)| (entry.shard, entry.range.start));
        let mut files: Vec<(&Path, Vec<Stored<'_>>)> = Vec::new();
        files.extend(
            self.shards
                .iter()
                .map(|(path, _)| (path.as_path(), Vec::new())),
        );
        for (name, entry) in entries {
            files[entry.shard].1.push(Stored {
                name,
                dtype: entry.dtype,
                shape: &entry.shape,
                bytes: self.bytes(entry),
            });
        }
        files
    }

    /// Bytes of all tensors as stored.
    pub fn stored_bytes(&self) -> u64 {
        self.entries.values().map(|e| e.range.len() as u64).sum()
    }
}

fn read_header(
    file: &Path,
    map: &Mmap,
    shard: usize,
    entries: &mut BTreeMap<String, Entry>,
) -> Result<()> {
    let length = map.first_chunk::<8>().map(|b| u64::from_le_bytes(*b));
    let length = length.ok_or_else(|| {
        Error::file(
            file,
            format!("{} bytes found: too short for safetensors", map.len()),
        )
    })?;
    if length > MAX_HEADER_BYTES {
        let message = format!(
            "a header of {length} bytes is declared; at most {MAX_HEADER_BYTES} are accepted"
        );
        return Err(Error::file(file, message));
    }
    if length + 8 > map.len() as u64 {
        let message = format!(
            "truncated: the header declares {length} bytes, the file has {}; download it again",
            map.len()
        );
        return Err(Error::file(file, message));
    }
    let tensors = SafeTensors::deserialize(map).map_err(|e| {
        Error::file(
            file,
            format!("not a whole safetensors file ({e}); download it again"),
        )
    })?;
    let start = map.as_ptr() as usize;
    for (name, view) in tensors.tensors() {
        let from = view.data().as_ptr() as usize - start;
        let entry = Entry {
            shard,
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            range: from..from + view.data().len(),
        };
        if entries.insert(name.clone(), entry).is_some() {
            return Err(Error::tensor(file, name, "found in two shards"));
        }
    }
    Ok(())
}

fn shards_of(index: &Path) -> Result<Vec<PathBuf>> {
    let text = std::fs::read_to_string(index).map_err(|e| Error::io(index, e))?;
    let json: serde_json::Value =
        serde_json::from_str(&text).map_err(|e| Error::file(index, format!("not JSON: {e}")))?;
    let map = json
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| Error::file(index, "field `weight_map` is missing or no object"))?;
    let dir = index.parent().unwrap_or(Path::new("."));
    let mut files = Vec::new();
    for (name, file) in map {
        let file = file
            .as_str()
            .filter(|f| !f.contains(['/', '\\']) && *f != "..")
            .ok_or_else(|| {
                Error::file(index, format!("weight_map.{name}: a file name expected"))
            })?;
        let file = dir.join(file);
        if !files.contains(&file) {
            if !file.is_file() {
                return Err(Error::file(
                    &file,
                    format!("missing; {} names it", index.display()),
                ));
            }
            files.push(file);
        }
    }
    Ok(files)
}

fn is_pickle(path: &Path) -> bool {
    let extension = path
        .extension()
        .and_then(|e| e.to_str())
        .unwrap_or_default();
    ["bin", "ckpt", "pt", "pth"].contains(&extension)
}

fn refuse_pickle(file: &Path) -> Result<()> {
    if is_pickle(file) {
        return Err(Error::file(
            file,
            "a pickled checkpoint can run code and is not read; convert it: \
             python -c \"import sys,torch;from safetensors.torch import save_file;\
             save_file({k:v.contiguous() for k,v in torch.load(sys.argv[1],map_location='cpu',weights_only=True).items()},sys.argv[2])\" \
             OLD NEW.safetensors",
        ));
    }
    Ok(())
}

fn missing(dir: &Path, stem: &str) -> Error {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    match entries.map(|e| e.path()).find(|p| is_pickle(p)) {
        Some(pickled) => match refuse_pickle(&pickled) {
            Err(error) => error,
            Ok(()) => unreachable!("the file was found to be pickled"),
        },
        None => Error::file(
            dir,
            format!("neither {stem}.safetensors nor {stem}.safetensors.index.json found"),
        ),
    }
}
