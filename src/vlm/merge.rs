//! Merging a LoRA adapter into its base: W + scale · B A, with DoRA its rows brought to their lengths, as a Hugging Face
//! directory.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Map, Value, json};

use super::prepare::model_type;
use super::processor::tokenizer::read_json;
use super::student::canonical;
use crate::error::{Error, Result};
use crate::files::{create_dir, sync_dir, write_atomic, write_bytes};
use crate::nn::{LoraConfig, another_base, lora_config, lora_factors};
use crate::tensor::{Checkpoint, DType, Stored};

/// Extensions of files that hold weights, which are not copied.
const WEIGHTS: [&str; 9] = [
    "safetensors",
    "bin",
    "pt",
    "pth",
    "ckpt",
    "h5",
    "msgpack",
    "onnx",
    "gguf",
];

/// What [`merge`] wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Merged {
    /// Linear layers whose weight was changed.
    pub modules: usize,
    /// Tensors in all.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
}

/// Writes the model of directory `base` with the LoRA adapter of `adapter` merged in to directory `out`.
///
/// Files, shards, names and dtypes are the base's; `dtype` converts every floating-point tensor. Sums are f32. One
/// tensor at a time is in memory. `out` appears whole, by one rename, or not at all. `on_tensor` is called before each
/// tensor with its number, the number of all, and its name; its error stops the work.
///
/// # Errors
/// A base or adapter that cannot be read, an adapter of another base (the first difference), an `out` that is not empty.
pub fn merge(
    base: &Path,
    adapter: &Path,
    out: &Path,
    dtype: Option<DType>,
    on_tensor: &mut dyn FnMut(usize, usize, &str) -> Result<()>,
) -> Result<Merged> {
    check_empty(out)?;
    let checkpoint = Checkpoint::open(base, "model")?;
    let updates = Updates::open(base, adapter, &checkpoint)?;
    let mut merged = Merged {
        modules: updates.factors.len(),
        ..Merged::default()
    };
    let changes = updates.factors.into_iter().map(|(name, factors)| {
        let change: Change<'_> = Box::new(move |weight| {
            factors.add_to(weight);
            Ok(())
        });
        (name, change)
    });
    let changes = changes.collect();
    (merged.tensors, merged.bytes) = rewrite(base, &checkpoint, out, dtype, &changes, on_tensor)?;
    Ok(merged)
}

/// What becomes of a weight's values.
pub type Change<'a> = Box<dyn Fn(&mut [f32]) -> Result<()> + 'a>;

/// Writes the model of directory `base`, whose weights `checkpoint` is, with `changes` to its tensors (by their names
/// in the file) to directory `out`, as [`merge`] does. Gives the number of tensors and their bytes.
///
/// # Errors
/// A base that cannot be read, an `out` that is not empty, a change's own.
pub fn rewrite(
    base: &Path,
    checkpoint: &Checkpoint,
    out: &Path,
    dtype: Option<DType>,
    changes: &BTreeMap<String, Change<'_>>,
    on_tensor: &mut dyn FnMut(usize, usize, &str) -> Result<()>,
) -> Result<(usize, u64)> {
    check_empty(out)?;
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    create_dir(parent)?;
    let work = tempfile::Builder::new()
        .prefix(".merging-")
        .suffix(".tmp")
        .tempdir_in(parent)
        .map_err(|e| Error::io(out, e))?;
    copy_files(base, work.path(), dtype)?;

    let files = checkpoint.stored();
    let all: usize = files.iter().map(|(_, tensors)| tensors.len()).sum();
    let (mut number, mut total, mut weight_map) = (0, 0, Map::new());
    for (path, tensors) in &files {
        let name = match files.len() {
            1 => "model.safetensors".into(),
            _ => path.file_name().unwrap_or_default().to_string_lossy(),
        };
        for tensor in tensors {
            weight_map.insert(tensor.name.to_owned(), json!(name));
        }
        let file = work.path().join(name.as_ref());
        let mut before = |tensor: &Stored<'_>| {
            number += 1;
            on_tensor(number, all, tensor.name)
        };
        total += write_shard(&file, tensors, dtype, changes, &mut before)?;
    }
    if files.len() > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&work.path().join("model.safetensors.index.json"), &index)?;
    }
    publish(work, out)?;
    Ok((all, total))
}

/// An output directory that exists has to be empty.
fn check_empty(out: &Path) -> Result<()> {
    let taken = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => out.exists(),
    };
    match taken {
        true => Err(Error::file(
            out,
            "exists and is not empty; give --out a new directory",
        )),
        false => Ok(()),
    }
}

/// The factors by the name of the weight that they change, as the base's file has it.
struct Updates {
    config: LoraConfig,
    factors: BTreeMap<String, Factors>,
}

/// B A of one linear layer, scaled, and with DoRA the lengths of the rows.
struct Factors {
    a: Vec<f32>,
    b: Vec<f32>,
    magnitude: Option<Vec<f32>>,
    inputs: usize,
    rank: usize,
    scale: f32,
}

impl Updates {
    /// Reads the adapter and compares every factor's shape with the base's weight.
    fn open(base: &Path, adapter: &Path, checkpoint: &Checkpoint) -> Result<Updates> {
        let rename = canonical(&model_type(base)?);
        let config = lora_config(adapter)?.rename(rename);
        let file = lora_factors(adapter, rename)?;
        let weights: BTreeMap<String, &str> =
            checkpoint.names().map(|raw| (rename(raw), raw)).collect();
        let mut updates = Updates {
            config,
            factors: BTreeMap::new(),
        };
        for name in file.names() {
            let (module, part) = match name.rsplit_once(".lora_") {
                Some((module, "A.weight")) => (module, Part::A),
                Some((module, "B.weight")) => (module, Part::B),
                other => (other.map_or(name, |(module, _)| module), Part::Magnitude),
            };
            let raw = weights.get(&format!("{module}.weight"));
            let shape = raw.and_then(|raw| checkpoint.shape(raw));
            let rank = updates.config.rank(module);
            let wanted = match (shape, &part) {
                (Some(&[_, inputs]), Part::A) => Some(vec![rank, inputs]),
                (Some(&[outputs, _]), Part::B) => Some(vec![outputs, rank]),
                (Some(&[outputs, _]), Part::Magnitude) => Some(vec![outputs]),
                _ => None,
            };
            let wanted = wanted.as_deref();
            if file.shape(name) != wanted {
                return Err(another_base(adapter, name, file.shape(name), wanted));
            }
            let first = format!("{module}.lora_A.weight");
            let (Some(raw), Some(&[_, inputs])) = (raw, shape) else {
                unreachable!("the shapes were compared")
            };
            if let Part::A = part {
                let values = |part: &str| {
                    let (values, _) = file.values(&format!("{module}.{part}"))?;
                    Ok(values)
                };
                let dora = updates.config.use_dora;
                let factors = Factors {
                    a: values("lora_A.weight")?,
                    b: values("lora_B.weight")?,
                    magnitude: dora.then(|| values("lora_magnitude_vector")).transpose()?,
                    inputs,
                    rank,
                    scale: updates.config.scale(module),
                };
                updates.factors.insert((*raw).to_owned(), factors);
            } else if !file.contains(&first) {
                return Err(Error::tensor(adapter, &first, "missing"));
            }
        }
        if updates.factors.is_empty() {
            return Err(Error::file(
                adapter,
                "holds no LoRA factors; nothing to merge",
            ));
        }
        Ok(updates)
    }
}

/// What a tensor of an adapter is to its module.
enum Part {
    A,
    B,
    Magnitude,
}

impl Factors {
    /// `weight` [outputs, inputs] += scale · B A, row by row; with DoRA each row is then as long as its magnitude.
    fn add_to(&self, weight: &mut [f32]) {
        let rows = weight
            .par_chunks_mut(self.inputs)
            .zip(self.b.par_chunks(self.rank));
        rows.enumerate().for_each(|(i, (row, b))| {
            let mut update = vec![0.0f32; row.len()];
            for (&b, a) in b.iter().zip(self.a.chunks(self.inputs)) {
                update.iter_mut().zip(a).for_each(|(u, &a)| *u += b * a);
            }
            row.iter_mut()
                .zip(&update)
                .for_each(|(w, &u)| *w += self.scale * u);
            if let Some(magnitude) = &self.magnitude {
                let length = row.iter().map(|w| w * w).sum::<f32>().sqrt();
                row.iter_mut().for_each(|w| *w *= magnitude[i] / length);
            }
        });
    }
}

/// The dtype of a floating-point tensor that we compute with.
fn float(dtype: safetensors::Dtype) -> Option<DType> {
    match dtype {
        safetensors::Dtype::F32 => Some(DType::F32),
        safetensors::Dtype::F16 => Some(DType::F16),
        safetensors::Dtype::BF16 => Some(DType::Bf16),
        _ => None,
    }
}

/// Writes one file tensor by tensor and gives the tensors' bytes.
fn write_shard(
    file: &Path,
    tensors: &[Stored<'_>],
    dtype: Option<DType>,
    changes: &BTreeMap<String, Change<'_>>,
    before: &mut dyn FnMut(&Stored<'_>) -> Result<()>,
) -> Result<u64> {
    // Wide elements first, so that each tensor stays aligned to its own width.
    let to = |t: &Stored<'_>| float(t.dtype).map(|own| dtype.unwrap_or(own));
    let elements = |t: &Stored<'_>| t.shape.iter().product::<usize>();
    let size = |t: &Stored<'_>| to(t).map_or(t.bytes.len(), |d| d.bytes() * elements(t));
    let mut order: Vec<&Stored<'_>> = tensors.iter().collect();
    order.sort_by_key(|t| std::cmp::Reverse(size(t).checked_div(elements(t)).unwrap_or(0)));

    let mut header = Map::new();
    header.insert("__metadata__".into(), json!({"format": "pt"}));
    let mut at = 0;
    for tensor in &order {
        if changes.contains_key(tensor.name) && float(tensor.dtype).is_none() {
            let message = format!(
                "dtype {:?} found, F32, F16 or BF16 expected to change it",
                tensor.dtype
            );
            return Err(Error::tensor(file, tensor.name, message));
        }
        let name = match to(tensor) {
            Some(DType::F32) => "F32".to_owned(),
            Some(DType::F16) => "F16".to_owned(),
            Some(_) => "BF16".to_owned(),
            None => serde_json::to_value(tensor.dtype)
                .ok()
                .and_then(|v| v.as_str().map(String::from))
                .unwrap_or_default(),
        };
        let end = at + size(tensor);
        let entry = json!({"dtype": name, "shape": tensor.shape, "data_offsets": [at, end]});
        header.insert(tensor.name.to_owned(), entry);
        at = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    // The callback's own error is kept: the writer can only carry an error of the system.
    let mut stopped = None;
    let written = write_atomic(file, |w| {
        w.write_all(&(header.len() as u64).to_le_bytes())?;
        w.write_all(&header)?;
        for tensor in &order {
            if let Err(error) = before(tensor) {
                stopped = Some(error);
                return Err(std::io::ErrorKind::Interrupted.into());
            }
            let change = changes.get(tensor.name);
            match (float(tensor.dtype), to(tensor)) {
                (Some(from), Some(to)) if from != to || change.is_some() => {
                    let mut values = from.widen(tensor.bytes);
                    if let Some(Err(error)) = change.map(|change| change(&mut values)) {
                        stopped = Some(error);
                        return Err(std::io::ErrorKind::Interrupted.into());
                    }
                    w.write_all(&to.narrow(&values))?;
                }
                _ => w.write_all(tensor.bytes)?,
            }
        }
        Ok(())
    });
    match stopped {
        Some(error) => Err(error),
        None => written.map(|()| at as u64),
    }
}

/// Copies every file of `base` but weights and hidden ones; `config.json` gets the new dtype.
fn copy_files(base: &Path, to: &Path, dtype: Option<DType>) -> Result<()> {
    for entry in fs::read_dir(base).map_err(|e| Error::io(base, e))? {
        let path = entry.map_err(|e| Error::io(base, e))?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        let weights = WEIGHTS.contains(&extension.as_ref()) || name.ends_with(".index.json");
        // Not the entry's own type: the files of a Hugging Face cache are links.
        if name.starts_with('.') || weights || !path.is_file() {
            continue;
        }
        let target = to.join(&name);
        match (name.as_str(), dtype) {
            ("config.json", Some(dtype)) => {
                let mut json = read_json(&path)?.unwrap_or_default();
                set_dtype(&mut json, dtype);
                write_json(&target, &json)?;
            }
            _ => {
                let bytes = fs::read(&path).map_err(|e| Error::io(&path, e))?;
                write_bytes(&target, &bytes)?;
            }
        }
    }
    Ok(())
}

/// Sets every `torch_dtype` and `dtype` that the configuration or a part of it has.
fn set_dtype(json: &mut Value, dtype: DType) {
    let name = match dtype {
        DType::F16 => "float16",
        DType::Bf16 => "bfloat16",
        _ => "float32",
    };
    let Value::Object(map) = json else { return };
    for (key, value) in map {
        match key.as_str() {
            "torch_dtype" | "dtype" => *value = json!(name),
            _ => set_dtype(value, dtype),
        }
    }
}

fn write_json(path: &Path, json: &Value) -> Result<()> {
    let text = serde_json::to_vec_pretty(json).map_err(|e| Error::file(path, e.to_string()))?;
    write_bytes(path, &text)
}

/// Gives the finished directory its name.
fn publish(work: tempfile::TempDir, out: &Path) -> Result<()> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary directories are private to the user; a result has the usual permissions.
        let _ = fs::set_permissions(work.path(), fs::Permissions::from_mode(0o755));
    }
    sync_dir(work.path());
    if out.is_dir() {
        fs::remove_dir(out).map_err(|e| Error::io(out, e))?;
    }
    let from: PathBuf = work.keep();
    fs::rename(&from, out).map_err(|e| {
        let _ = fs::remove_dir_all(&from);
        Error::io(out, e)
    })?;
    sync_dir(out.parent().unwrap_or(Path::new(".")));
    Ok(())
}
