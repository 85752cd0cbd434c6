//! WGSL files, composed with their imports, compiled to pipelines once per variant.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use include_dir::{Dir, include_dir};
use naga_oil::compose::preprocess::Preprocessor;
use naga_oil::compose::{
    ComposableModuleDescriptor, Composer, NagaModuleDescriptor, ShaderDefValue,
};
use rustc_hash::{FxHashMap, FxHashSet};

use super::{Gpu, Kernel, Tier, lock};
use crate::error::{Error, Result};

static WGSL: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/wgsl");

/// Definitions of kernels that need an extension of the language, and its name.
const EXTENSIONS: [(&str, &str); 2] = [("F16", "f16"), ("COOPERATIVE", "wgpu_cooperative_matrix")];

/// Composes kernels from the embedded WGSL files.
pub struct ShaderLibrary {
    composer: Composer,
}

impl ShaderLibrary {
    /// A library with every file of `wgsl/common/` ready to import.
    ///
    /// # Errors
    /// [`Error::Gpu`] with the composer's report when a common file does not parse.
    pub fn new(validate: bool) -> Result<ShaderLibrary> {
        let composer = if validate {
            Composer::default()
        } else {
            Composer::non_validating()
        };
        let mut composer = composer.with_capabilities(naga::valid::Capabilities::all());
        let mut pending: Vec<(&str, &str)> = WGSL
            .get_dir("common")
            .into_iter()
            .flat_map(Dir::files)
            .filter_map(|f| Some((f.path().to_str()?, f.contents_utf8()?)))
            .collect();
        pending.sort_unstable();
        // A common file may import another: retry until none is left or none gets in.
        while !pending.is_empty() {
            let before = pending.len();
            let mut last = String::new();
            pending.retain(|(path, source)| {
                let added = composer.add_composable_module(ComposableModuleDescriptor {
                    source,
                    file_path: path,
                    ..Default::default()
                });
                match added.map(|_| ()) {
                    Ok(()) => false,
                    Err(error) => {
                        last = error.to_string();
                        true
                    }
                }
            });
            if pending.len() == before {
                return Err(Error::Gpu(format!("wgsl/{}: {last}", pending[0].0)));
            }
        }
        Ok(ShaderLibrary { composer })
    }

    /// The module of `kernel` with imports resolved and conditionals applied.
    ///
    /// # Errors
    /// [`Error::Gpu`] naming the file when it is missing or does not parse.
    pub fn compose(&mut self, kernel: &Kernel) -> Result<naga::Module> {
        let path = format!("{}.wgsl", kernel.file);
        let source = WGSL
            .get_file(&path)
            .and_then(|f| f.contents_utf8())
            .ok_or_else(|| Error::Gpu(format!("no kernel file wgsl/{path}")))?;
        let shader_defs = kernel
            .defs
            .iter()
            .map(|&(name, value)| (name.to_string(), ShaderDefValue::Int(value)))
            .collect();
        // The composer hoists directives only from the top of a file, never out of a conditional.
        let mut enabled = String::new();
        for (flag, extension) in EXTENSIONS {
            if kernel.defs.iter().any(|&(name, _)| name == flag) {
                enabled += &format!("enable {extension};\n");
            }
        }
        if kernel.defs.iter().any(|&(name, _)| name == "COOPERATIVE") {
            return inlined(&(enabled + &inline_imports(source)?), &path, shader_defs);
        }
        enabled += source;
        let composed = self.composer.make_naga_module(NagaModuleDescriptor {
            source: &enabled,
            file_path: &path,
            shader_defs,
            ..Default::default()
        });
        composed.map_err(|error| Error::Gpu(error.emit_to_string(&self.composer)))
    }
}

/// `source` with the common files that it imports in the place of the import.
fn inline_imports(source: &str) -> Result<String> {
    let mut text = String::new();
    for line in source.lines() {
        let import = line
            .strip_prefix("#import ")
            .and_then(|l| l.split("::").next());
        match import {
            Some(stem) => {
                let path = format!("common/{stem}.wgsl");
                let common = WGSL.get_file(&path).and_then(|f| f.contents_utf8());
                text += common.ok_or_else(|| Error::Gpu(format!("no kernel file wgsl/{path}")))?;
            }
            None => text += line,
        }
        text.push('\n');
    }
    Ok(text)
}

/// The module of a text that imports nothing. The composer loses track of what cooperative matrices are loaded from
/// when it copies a module together, so theirs is parsed whole.
fn inlined(text: &str, path: &str, defs: HashMap<String, ShaderDefValue>) -> Result<naga::Module> {
    let output = Preprocessor::default().preprocess(text, &defs);
    let source = output
        .map_err(|e| Error::Gpu(format!("wgsl/{path}: {e}")))?
        .preprocessed_source;
    naga::front::wgsl::parse_str(&source)
        .map_err(|e| Error::Gpu(e.emit_to_string_with_path(&source, path)))
}

/// The composed module written back as one WGSL text, for debugging.
///
/// # Errors
/// [`Error::Gpu`] when the module does not validate or cannot be written.
pub fn stitched_wgsl(module: &naga::Module) -> Result<String> {
    let gpu = |e: String| Error::Gpu(e);
    let info = naga::valid::Validator::new(
        naga::valid::ValidationFlags::all(),
        naga::valid::Capabilities::all(),
    )
    .validate(module)
    .map_err(|e| gpu(format!("{e:?}")))?;
    naga::back::wgsl::write_string(module, &info, naga::back::wgsl::WriterFlags::empty())
        .map_err(|e| gpu(e.to_string()))
}

pub(crate) struct Pipeline {
    pub id: u64,
    /// The kernel's name and definitions, for profiles.
    pub label: String,
    pub raw: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
    pub immediate_bytes: u32,
    pub writes: Vec<bool>,
}

pub(crate) struct Shaders {
    /// Whether kernels are compiled with bounds checks.
    pub checked: bool,
    library: Mutex<Option<ShaderLibrary>>,
    pipelines: Mutex<FxHashMap<Kernel, Arc<Pipeline>>>,
    cache: Option<(wgpu::PipelineCache, PathBuf)>,
    dump: Option<PathBuf>,
    /// Kernels that did not compile here.
    rejected: Mutex<FxHashSet<Kernel>>,
    /// Files whose kernels are made to fail, for tests.
    broken: Mutex<HashSet<&'static str>>,
}

/// The user's folder for what we keep between runs (pipeline caches, tuning).
pub(super) fn cache_dir() -> Option<PathBuf> {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
    let base = var("XDG_CACHE_HOME")
        .or_else(|| var("LOCALAPPDATA"))
        .map(PathBuf::from)
        .or_else(|| var("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(base.join("lavender-wgpu"))
}

impl Shaders {
    pub fn new(
        device: &wgpu::Device,
        tier: &Tier,
        checked: bool,
        cache_dir: Option<&Path>,
    ) -> Shaders {
        let cache = tier
            .cache_key
            .as_ref()
            .filter(|_| tier.pipeline_cache)
            .and_then(|key| {
                let path = cache_dir?.join(key);
                let data = std::fs::read(&path).ok();
                // SAFETY: the file was written by `save_cache` from this API's own data; the driver
                // validates its header, and `fallback` discards what it does not accept.
                let cache = unsafe {
                    device.create_pipeline_cache(&wgpu::PipelineCacheDescriptor {
                        label: None,
                        data: data.as_deref(),
                        fallback: true,
                    })
                };
                Some((cache, path))
            });
        Shaders {
            checked,
            library: Mutex::new(None),
            pipelines: Mutex::default(),
            cache,
            dump: std::env::var_os("LAVENDER_DUMP_WGSL").map(PathBuf::from),
            rejected: Mutex::default(),
            broken: Mutex::default(),
        }
    }

    /// Writes the driver's pipeline cache for the next start; failing to is no error.
    pub fn save_cache(&self) {
        let Some((cache, path)) = &self.cache else {
            return;
        };
        let (Some(data), Some(dir)) = (cache.get_data(), path.parent()) else {
            return;
        };
        let temporary = path.with_extension("tmp");
        let written = std::fs::create_dir_all(dir)
            .and_then(|()| std::fs::write(&temporary, data))
            .and_then(|()| std::fs::rename(&temporary, path));
        if let Err(error) = written {
            tracing::debug!("pipeline cache not saved at {}: {error}", path.display());
        }
    }
}

impl Drop for Shaders {
    fn drop(&mut self) {
        self.save_cache();
    }
}

impl Gpu {
    /// The pipeline of `kernel`, compiled at its first use.
    pub(crate) fn pipeline(&self, kernel: &Kernel) -> Result<Arc<Pipeline>> {
        let shaders = &self.inner().shaders;
        if let Some(found) = lock(&shaders.pipelines).get(kernel) {
            return Ok(found.clone());
        }
        let module = {
            let mut library = lock(&shaders.library);
            if library.is_none() {
                *library = Some(ShaderLibrary::new(false)?);
            }
            match library.as_mut() {
                Some(library) => library.compose(kernel)?,
                None => unreachable!("the library was made above"),
            }
        };
        if let Some(dir) = &shaders.dump {
            dump(dir, kernel, &module);
        }
        let pipeline = Arc::new(self.compile(kernel, module)?);
        lock(&shaders.pipelines).insert(kernel.clone(), pipeline.clone());
        Ok(pipeline)
    }

    /// Whether the driver takes `kernel`; a warning names one that it does not, once. For ops that have another.
    pub(crate) fn compiles(&self, kernel: &Kernel) -> bool {
        let inner = self.inner();
        if lock(&inner.shaders.pipelines).contains_key(kernel) {
            return true;
        }
        if lock(&inner.shaders.rejected).contains(kernel) {
            return false;
        }
        match self.pipeline(kernel) {
            Ok(_) => true,
            // A device in trouble compiles nothing; the kernel is not to blame.
            Err(_) if self.failing() => true,
            Err(error) => {
                tracing::warn!(
                    "another kernel takes over on {} [{}]: {error}",
                    inner.tier.name,
                    inner.tier.driver
                );
                lock(&inner.shaders.rejected).insert(kernel.clone());
                false
            }
        }
    }

    /// Makes the kernels of `wgsl/<file>.wgsl` that are not compiled yet fail to, for tests.
    #[doc(hidden)]
    pub fn break_kernels(&self, file: &'static str) {
        lock(&self.inner().shaders.broken).insert(file);
    }

    fn compile(&self, kernel: &Kernel, module: naga::Module) -> Result<Pipeline> {
        let inner = self.inner();
        let device = &inner.device;
        let (entries, immediate_bytes) = reflect(&module);
        let label = kernel.label();
        let entry = match lock(&inner.shaders.broken).contains(kernel.file) {
            true => "broken",
            false => kernel.entry,
        };
        // What wgpu refuses, and what the driver's own compiler does.
        let scopes = [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::Internal]
            .map(|filter| device.push_error_scope(filter));
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(&label),
            entries: &entries,
        });
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(&label),
            bind_group_layouts: &[Some(&layout)],
            immediate_size: immediate_bytes,
        });
        let descriptor = wgpu::ShaderModuleDescriptor {
            label: Some(&label),
            source: wgpu::ShaderSource::Naga(std::borrow::Cow::Owned(module)),
        };
        let shader = if inner.shaders.checked {
            device.create_shader_module(descriptor)
        } else {
            // SAFETY: every kernel bounds its own indices; the tests run the same kernels checked.
            unsafe {
                device.create_shader_module_trusted(
                    descriptor,
                    wgpu::ShaderRuntimeChecks::unchecked(),
                )
            }
        };
        let raw = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&label),
            layout: Some(&pipeline_layout),
            module: &shader,
            entry_point: Some(entry),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &kernel.constants,
                zero_initialize_workgroup_memory: false,
            },
            cache: inner.shaders.cache.as_ref().map(|(cache, _)| cache),
        });
        // The innermost first; both are to be popped.
        let errors: Vec<_> = scopes.into_iter().rev().map(|s| s.pop()).collect();
        for error in errors {
            if let Some(error) = pollster::block_on(error) {
                return Err(Error::Gpu(format!(
                    "kernel {label} {:?}: {error}",
                    kernel.defs
                )));
            }
        }
        static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
        let defs: String = kernel
            .defs
            .iter()
            .map(|(n, v)| format!(" {n}={v}"))
            .collect();
        Ok(Pipeline {
            label: label + &defs,
            id: NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            raw,
            layout,
            immediate_bytes,
            writes: entries
                .iter()
                .map(|e| {
                    matches!(
                        e.ty,
                        wgpu::BindingType::Buffer {
                            ty: wgpu::BufferBindingType::Storage { read_only: false },
                            ..
                        }
                    )
                })
                .collect(),
        })
    }
}

/// Bind group entries and immediate bytes that the module declares, used or not.
fn reflect(module: &naga::Module) -> (Vec<wgpu::BindGroupLayoutEntry>, u32) {
    let mut entries = Vec::new();
    let mut immediate_bytes = 0;
    for (_, variable) in module.global_variables.iter() {
        match (&variable.binding, variable.space) {
            (Some(binding), naga::AddressSpace::Storage { access }) => {
                entries.push(wgpu::BindGroupLayoutEntry {
                    binding: binding.binding,
                    visibility: wgpu::ShaderStages::COMPUTE,
                    ty: wgpu::BindingType::Buffer {
                        ty: wgpu::BufferBindingType::Storage {
                            read_only: !access.contains(naga::StorageAccess::STORE),
                        },
                        has_dynamic_offset: false,
                        min_binding_size: None,
                    },
                    count: None,
                });
            }
            (None, naga::AddressSpace::Immediate) => {
                let size = module.types[variable.ty].inner.size(module.to_ctx());
                immediate_bytes = size.next_multiple_of(4);
            }
            _ => {}
        }
    }
    entries.sort_by_key(|e| e.binding);
    (entries, immediate_bytes)
}

fn dump(dir: &std::path::Path, kernel: &Kernel, module: &naga::Module) {
    let defs: String = kernel
        .defs
        .iter()
        .map(|(n, v)| format!("-{n}{v}"))
        .collect();
    let path = dir.join(format!("{}{defs}.wgsl", kernel.label()));
    let written = stitched_wgsl(module)
        .and_then(|text| std::fs::write(&path, text).map_err(|e| Error::io(&path, e)));
    if let Err(error) = written {
        tracing::warn!("stitched source not dumped: {error}");
    }
}
