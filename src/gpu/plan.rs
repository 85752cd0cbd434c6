//! Plans: work recorded once and replayed on the same buffers, without shapes, allocation or bind groups.
//!
//! What a plan computes on the way lives in its arena, whose buffers the pool hands to nobody else. Plans that never
//! run at the same time share an arena, and with it their memory.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::thread::ThreadId;

use super::pool::{FreeLists, State};
use super::shader::Pipeline;
use super::{Gpu, lock};

/// Whether models replay what they have computed once for the same shapes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Replay {
    /// No: each step is encoded op by op
    #[default]
    Off,
    /// Yes: less work for the CPU, and memory that the plans keep between steps
    On,
    /// `On` on a GPU; `Off` on a driver that runs on the CPU, whose kernels take far longer than encoding them.
    #[value(skip)]
    ByAdapter,
}

/// Buffers of plans that never run at the same time. Clones are the same arena.
///
/// Where the GPU runs out of memory, arenas that nobody holds are given up: then their plans are of no use any more.
#[derive(Clone)]
pub struct Arena(Arc<Inner>);

struct Inner {
    pool: Arc<Mutex<State>>,
    /// `None` once given up.
    free: Mutex<Option<FreeLists>>,
    /// Cloned by those who hold the arena.
    held: Arc<()>,
}

/// Keeps an arena from being given up, and tells others that it is in use.
pub struct Hold {
    _held: Arc<()>,
}

impl Arena {
    /// An empty arena.
    pub fn new(gpu: &Gpu) -> Arena {
        let arena = Arena(Arc::new(Inner {
            pool: gpu.inner().pool.state(),
            free: Mutex::new(Some(FreeLists::default())),
            held: Arc::new(()),
        }));
        let mut arenas = lock(&gpu.inner().arenas);
        arenas.retain(|arena| arena.0.strong_count() > 0);
        arenas.push(WeakArena(Arc::downgrade(&arena.0)));
        arena
    }

    /// Holds the arena until the result is dropped.
    pub fn hold(&self) -> Hold {
        Hold {
            _held: self.0.held.clone(),
        }
    }

    /// Whether somebody holds it.
    pub fn held(&self) -> bool {
        Arc::strong_count(&self.0.held) > 1
    }

    /// Whether its plans are of no use any more.
    pub fn given_up(&self) -> bool {
        lock(&self.0.free).is_none()
    }

    pub(super) fn take(&self, class: u64) -> Option<(u64, wgpu::Buffer)> {
        lock(&self.0.free).as_mut()?.take(class)
    }

    /// Takes a buffer back; one of an arena that was given up goes to the pool.
    pub(super) fn put(&self, class: u64, id: u64, raw: wgpu::Buffer) {
        match lock(&self.0.free).as_mut() {
            Some(free) => free.put(class, id, raw),
            None => lock(&self.0.pool).put(class, id, raw),
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        give_back(&self.pool, &mut lock(&self.free));
    }
}

fn give_back(pool: &Mutex<State>, free: &mut Option<FreeLists>) {
    let mut pool = lock(pool);
    for (class, id, raw) in free.take().into_iter().flat_map(FreeLists::into_buffers) {
        pool.put(class, id, raw);
    }
}

/// An arena as the GPU knows it.
pub(crate) struct WeakArena(Weak<Inner>);

/// A dispatch, ready to be encoded.
#[derive(Clone, Copy)]
pub(super) struct Dispatch<'a> {
    pub pipeline: &'a Pipeline,
    pub group: &'a wgpu::BindGroup,
    pub immediates: &'a [u8],
    pub groups: [u32; 3],
    pub work: u64,
}

/// One thing that a plan does.
pub(super) enum Command {
    Dispatch {
        pipeline: Arc<Pipeline>,
        group: wgpu::BindGroup,
        immediates: Box<[u8]>,
        groups: [u32; 3],
        work: u64,
    },
    Copy {
        from: wgpu::Buffer,
        to: wgpu::Buffer,
        /// Of both.
        offsets: [u64; 2],
        bytes: u64,
    },
    Clear {
        buffer: wgpu::Buffer,
        offset: u64,
        bytes: u64,
    },
}

/// Recorded work; see [`Gpu::plan`].
pub struct Plan {
    commands: Vec<Command>,
    arena: Arena,
}

impl Plan {
    /// Dispatches, copies and clears.
    pub fn len(&self) -> usize {
        self.commands.len()
    }

    /// Whether it does nothing.
    pub fn is_empty(&self) -> bool {
        self.commands.is_empty()
    }
}

/// A plan in the making.
pub(crate) struct Recorder {
    arena: Arena,
    _hold: Hold,
    commands: Vec<Command>,
    /// What other threads dispatch is not part of it.
    thread: ThreadId,
}

impl Gpu {
    /// Whether models replay what they have computed once.
    pub fn replays(&self) -> bool {
        self.inner().replays.load(Ordering::Relaxed)
    }

    /// Computes op by op from now on; the memory of plans is there for other things when it is needed.
    pub fn stop_replaying(&self) {
        self.inner().replays.store(false, Ordering::Relaxed);
    }

    /// Whether this thread is making a plan.
    pub fn planning(&self) -> bool {
        self.recorded(|_| ()).is_some()
    }

    /// Does `work` and records all that it dispatches, copies, clears and uploads; what it allocates belongs to `arena`.
    /// `None` instead of a plan where an error waits for [`Gpu::check`].
    ///
    /// Buffers from elsewhere that `work` uses must outlive the plan, and nothing may be read back within. A buffer of
    /// the arena keeps its content at most until the next plan of the arena is made or replayed.
    pub fn plan<T>(&self, arena: &Arena, work: impl FnOnce() -> T) -> (T, Option<Plan>) {
        let recorder = Recorder {
            arena: arena.clone(),
            _hold: arena.hold(),
            commands: Vec::new(),
            thread: std::thread::current().id(),
        };
        let outer = lock(&self.inner().recorder).replace(recorder);
        assert!(outer.is_none(), "a plan is made within another");
        let result = work();
        let recorder = lock(&self.inner().recorder).take();
        let plan = recorder.filter(|_| !self.failing()).map(|recorder| Plan {
            commands: recorder.commands,
            arena: recorder.arena,
        });
        (result, plan)
    }

    /// Does what `plan` has recorded once more. Does nothing while a fault is pending.
    ///
    /// Panics when the plan's arena was given up.
    pub fn replay(&self, plan: &Plan) {
        assert!(
            !plan.arena.given_up(),
            "a plan outlives the memory of its arena"
        );
        if !self.failing() {
            self.encode_all(&plan.commands);
        }
    }

    /// Does `work` without recording it.
    pub(super) fn unrecorded<T>(&self, work: impl FnOnce() -> T) -> T {
        let recorder = lock(&self.inner().recorder).take();
        let result = work();
        *lock(&self.inner().recorder) = recorder;
        result
    }

    /// What `with` makes of this thread's recorder; `None` where it has none.
    fn recorded<T>(&self, with: impl FnOnce(&mut Recorder) -> T) -> Option<T> {
        let mut recorder = lock(&self.inner().recorder);
        let own = recorder.as_mut()?;
        (own.thread == std::thread::current().id()).then(|| with(own))
    }

    /// Adds a command to the plan in the making, if there is one.
    pub(super) fn note(&self, command: impl FnOnce() -> Command) {
        self.recorded(|recorder| recorder.commands.push(command()));
    }

    /// The arena of the plan in the making.
    pub(super) fn arena(&self) -> Option<Arena> {
        self.recorded(|recorder| recorder.arena.clone())
    }

    /// Gives up every arena that nobody holds; whether there was one.
    pub(super) fn give_up_arenas(&self) -> bool {
        let idle: Vec<Arena> = lock(&self.inner().arenas)
            .iter()
            .filter_map(|arena| arena.0.upgrade().map(Arena))
            .filter(|arena| !arena.held() && !arena.given_up())
            .collect();
        for arena in &idle {
            give_back(&arena.0.pool, &mut lock(&arena.0.free));
        }
        !idle.is_empty()
    }
}
