//! Floor 1: adapter, capability tier, buffers, pipelines, command stream. Knows nothing of tensors.

mod adapter;
mod kernel;
mod plan;
mod pool;
mod profile;
mod readback;
mod shader;
mod stream;
mod tuning;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard};

pub use adapter::{AdapterSummary, MatrixUnit, Scalar, Tier, list_adapters};
pub use kernel::Kernel;
pub use plan::{Arena, Hold, Plan, Replay};
pub use pool::{Buffer, MemoryStats, size_class};
pub use profile::OpTime;
pub use readback::ReadBack;
pub use shader::{ShaderLibrary, stitched_wgsl};
pub use stream::Binding;
pub use tuning::{Tuned, Tuning, TuningSpent};

use crate::error::{Error, Result};

/// How to open a GPU.
#[derive(Clone, Debug, Default)]
pub struct GpuOptions {
    /// Adapter index (as `devices` lists them) or a part of its name; `None` picks the strongest.
    pub adapter: Option<String>,
    /// Upper bound on the bytes our allocator may hold.
    pub max_bytes: Option<u64>,
    /// Record a timestamp pair around every dispatch; see [`Gpu::profile`].
    pub profile: bool,
    /// Use nothing that an adapter may lack (f16, subgroups, matrix units, timestamps): other kernels serve then.
    pub portable: bool,
    /// Compile shaders with bounds checks (tests); release runs without.
    pub checked: bool,
    /// Whether kernels are chosen as they were measured on this adapter.
    pub tuning: Tuning,
    /// Whether models replay what they have computed once for the same shapes.
    pub replay: Replay,
    /// Folder for what is kept between runs: compiled kernels, measured choices; `None` is the user's cache folder.
    pub cache_dir: Option<std::path::PathBuf>,
}

/// One opened GPU: device, queue, pools, caches and the command stream. Cheap to clone.
#[derive(Clone)]
pub struct Gpu(Arc<Inner>);

pub(crate) struct Inner {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub tier: Tier,
    pub faults: Arc<Faults>,
    pub pool: pool::Pool,
    pub shaders: shader::Shaders,
    pub tuner: tuning::Tuner,
    pub stream: Mutex<stream::Stream>,
    /// Whether models replay plans.
    pub replays: AtomicBool,
    /// The plan in the making.
    pub recorder: Mutex<Option<plan::Recorder>>,
    pub arenas: Mutex<Vec<plan::WeakArena>>,
    pub profiler: Mutex<profile::Profiler>,
}

/// The first GPU error seen; once set, dispatches do nothing until it is reported.
#[derive(Default)]
pub(crate) struct Faults(Mutex<Option<Error>>);

impl Faults {
    /// Records `error` unless an earlier one is pending.
    pub fn set(&self, error: Error) {
        let mut slot = lock(&self.0);
        if slot.is_none() {
            *slot = Some(error);
        }
    }

    /// Whether an error is pending.
    pub fn any(&self) -> bool {
        lock(&self.0).is_some()
    }

    fn take(&self) -> Option<Error> {
        lock(&self.0).take()
    }
}

impl Faults {
    fn uncaptured(&self, error: wgpu::Error) {
        self.set(match error {
            wgpu::Error::OutOfMemory { .. } => Error::OutOfMemory {
                requested: 0,
                in_use: 0,
                limit: None,
            },
            other => Error::Gpu(other.to_string()),
        });
    }
}

/// A lock that survives a panic in another thread: the data are caches, whole after every statement.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Gpu {
    /// Opens the adapter that `options` ask for, with all the features and limits it has.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] when none fits; [`Error::Gpu`] when the device cannot be created.
    pub fn new(options: &GpuOptions) -> Result<Gpu> {
        let (device, queue, tier) = adapter::open(options)?;
        let faults = Arc::new(Faults::default());
        let uncaptured = faults.clone();
        device.on_uncaptured_error(Arc::new(move |error| uncaptured.uncaptured(error)));
        let lost = faults.clone();
        device.set_device_lost_callback(move |reason, message| {
            if !matches!(reason, wgpu::DeviceLostReason::Destroyed) {
                lost.set(Error::DeviceLost(message));
            }
        });
        tracing::info!("{tier}");
        let cache_dir = options.cache_dir.clone().or_else(shader::cache_dir);
        Ok(Gpu(Arc::new(Inner {
            pool: pool::Pool::new(options.max_bytes),
            shaders: shader::Shaders::new(&device, &tier, options.checked, cache_dir.as_deref()),
            tuner: tuning::Tuner::new(options.tuning, cache_dir, &tier),
            stream: Mutex::new(stream::Stream::new(&tier)),
            replays: AtomicBool::new(match options.replay {
                Replay::Off => false,
                Replay::On => true,
                Replay::ByAdapter => !tier.cpu,
            }),
            recorder: Mutex::default(),
            arenas: Mutex::default(),
            profiler: Mutex::new(profile::Profiler::new(options.profile && tier.timestamps)),
            device,
            queue,
            tier,
            faults,
        })))
    }

    /// The capability tier decided when the adapter was opened.
    pub fn tier(&self) -> &Tier {
        &self.0.tier
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.0
    }

    /// Whether two handles are the same opened GPU.
    pub fn same(&self, other: &Gpu) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Step boundary: reports the first GPU error recorded since the last call, if any.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::BindingTooLarge`], [`Error::DeviceLost`] or [`Error::Gpu`].
    pub fn check(&self) -> Result<()> {
        self.0.faults.take().map_or(Ok(()), Err)
    }

    /// Whether an error waits for [`Gpu::check`]: nothing is dispatched until then.
    pub fn failing(&self) -> bool {
        self.0.faults.any()
    }

    /// Records an error for [`Gpu::check`] to report.
    pub(crate) fn fault(&self, error: Error) {
        self.0.faults.set(error);
    }

    /// Submits everything recorded so far and waits until the device has finished it.
    ///
    /// # Errors
    /// As [`Gpu::check`].
    pub fn wait(&self) -> Result<()> {
        self.flush();
        self.poll_wait(None);
        self.check()
    }

    pub(crate) fn poll_wait(&self, index: Option<wgpu::SubmissionIndex>) {
        let waited = self.0.device.poll(wgpu::PollType::Wait {
            submission_index: index,
            timeout: None,
        });
        if let Err(error) = waited {
            self.0.faults.set(Error::DeviceLost(error.to_string()));
        }
    }

    /// Bytes held by our allocator now, at its peak, and kept in its free lists.
    pub fn memory(&self) -> MemoryStats {
        self.0.pool.stats()
    }

    /// Bytes that may be held: the limit that it was opened with or the adapter's memory, whichever is less; `None`
    /// where neither is known.
    pub fn room(&self) -> Option<u64> {
        let limits = [self.0.pool.max_bytes(), self.0.tier.memory];
        limits.into_iter().flatten().min()
    }

    /// Starts a new peak measurement at the current level.
    pub fn reset_peak(&self) {
        self.0.pool.reset_peak();
    }

    /// Device milliseconds of what `work` dispatches; 0 where the adapter has no timestamps. What was recorded before is
    /// waited for, and [`Gpu::profile`] tells nothing of `work`.
    pub(crate) fn device_millis(&self, work: impl FnOnce()) -> f64 {
        self.flush();
        self.poll_wait(None);
        let profiler = profile::Profiler::new(self.0.tier.timestamps);
        let outer = std::mem::replace(&mut *lock(&self.0.profiler), profiler);
        work();
        let times = self.profile();
        *lock(&self.0.profiler) = outer;
        times.iter().map(|op| op.millis).sum()
    }

    /// Time per op since the last call, longest first; empty unless opened with `profile`.
    pub fn profile(&self) -> Vec<OpTime> {
        self.flush();
        self.poll_wait(None);
        lock(&self.0.profiler).take(self.0.queue.get_timestamp_period())
    }
}
