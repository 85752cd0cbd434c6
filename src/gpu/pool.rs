//! Storage buffers from a pool of size classes.
//!
//! A dropped buffer goes straight back to the free list: the queue runs dispatches in the order
//! they were recorded, so a later dispatch may overwrite it without waiting.
//!
//! The oldest free buffer of a class is handed out first. So a step that allocates and frees as the one before it gets
//! the very same buffers, dispatch by dispatch, and finds every bind group in the stream's cache.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use super::plan::Arena;
use super::{Gpu, lock};
use crate::error::Error;

/// Bytes of our allocator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes in live buffers.
    pub current_bytes: u64,
    /// Most bytes ever live at once since [`Gpu::reset_peak`].
    pub peak_bytes: u64,
    /// Bytes held from the driver, live or free.
    pub reserved_bytes: u64,
}

/// Free buffers by size class, then by identity.
#[derive(Default)]
pub(super) struct FreeLists(HashMap<u64, BTreeMap<u64, wgpu::Buffer>>);

impl FreeLists {
    pub fn put(&mut self, class: u64, id: u64, raw: wgpu::Buffer) {
        self.0.entry(class).or_default().insert(id, raw);
    }

    /// The oldest of a class.
    pub fn take(&mut self, class: u64) -> Option<(u64, wgpu::Buffer)> {
        self.0.get_mut(&class)?.pop_first()
    }

    /// Class, identity and buffer of all.
    pub fn into_buffers(self) -> impl Iterator<Item = (u64, u64, wgpu::Buffer)> {
        let all = |(class, list): (u64, BTreeMap<_, _>)| {
            list.into_iter().map(move |(id, raw)| (class, id, raw))
        };
        self.0.into_iter().flat_map(all)
    }
}

#[derive(Default)]
pub(super) struct State {
    free: FreeLists,
    stats: MemoryStats,
    created: u64,
}

impl State {
    /// Takes a live buffer back.
    pub fn put(&mut self, class: u64, id: u64, raw: wgpu::Buffer) {
        self.stats.current_bytes -= class;
        self.free.put(class, id, raw);
    }
}

pub(crate) struct Pool {
    state: Arc<Mutex<State>>,
    max_bytes: Option<u64>,
}

/// A pooled storage buffer; returns to its pool when dropped.
pub struct Buffer {
    raw: Option<wgpu::Buffer>,
    id: u64,
    class: u64,
    home: Home,
}

/// Where a dropped buffer goes.
enum Home {
    Pool(Arc<Mutex<State>>),
    Arena(Arena),
}

impl Buffer {
    /// The wgpu buffer.
    pub fn raw(&self) -> &wgpu::Buffer {
        match &self.raw {
            Some(raw) => raw,
            // Only `drop` empties the slot.
            None => unreachable!("a live pooled buffer always holds its wgpu buffer"),
        }
    }

    /// Names the wgpu buffer among all that this pool ever made.
    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    /// Capacity in bytes (its size class).
    pub fn capacity(&self) -> u64 {
        self.class
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(raw) = self.raw.take() {
            match &self.home {
                Home::Pool(state) => lock(state).put(self.class, self.id, raw),
                Home::Arena(arena) => arena.put(self.class, self.id, raw),
            }
        }
    }
}

/// Bytes that a buffer of `bytes` takes, its size class: quarter steps between powers of two, at least 256 bytes.
pub fn size_class(bytes: u64) -> u64 {
    // 16 spare bytes let kernels read a whole vec4 at the tail.
    let bytes = (bytes + 16).max(256);
    let step = (bytes.next_power_of_two() / 8).max(256);
    bytes.div_ceil(step) * step
}

impl Pool {
    pub fn new(max_bytes: Option<u64>) -> Pool {
        Pool {
            state: Arc::default(),
            max_bytes,
        }
    }

    pub fn max_bytes(&self) -> Option<u64> {
        self.max_bytes
    }

    /// Buffers made so far.
    pub fn made(&self) -> u64 {
        lock(&self.state).created
    }

    pub fn stats(&self) -> MemoryStats {
        lock(&self.state).stats
    }

    pub fn reset_peak(&self) {
        let mut state = lock(&self.state);
        state.stats.peak_bytes = state.stats.current_bytes;
    }

    pub(super) fn state(&self) -> Arc<Mutex<State>> {
        self.state.clone()
    }

    fn take_free(&self, class: u64) -> Option<(u64, wgpu::Buffer)> {
        lock(&self.state).free.take(class)
    }

    /// A name for a buffer just made, whose `class` bytes count as held from now on.
    fn register(&self, raw: wgpu::Buffer, class: u64) -> (u64, wgpu::Buffer) {
        let mut state = lock(&self.state);
        state.stats.reserved_bytes += class;
        state.created += 1;
        (state.created, raw)
    }

    fn adopt(&self, (id, raw): (u64, wgpu::Buffer), class: u64) -> Buffer {
        let mut state = lock(&self.state);
        state.stats.current_bytes += class;
        state.stats.peak_bytes = state.stats.peak_bytes.max(state.stats.current_bytes);
        Buffer {
            raw: Some(raw),
            id,
            class,
            home: Home::Pool(self.state.clone()),
        }
    }
}

impl Gpu {
    /// A storage buffer of at least `bytes`; its content is undefined.
    ///
    /// When the adapter or the limit has no room, the free lists are given back and the allocation
    /// is tried once more, then the memory of plans that are not in use; after that the error waits for [`Gpu::check`]
    /// and dispatches do nothing.
    pub fn allocate(&self, bytes: u64) -> Buffer {
        let class = size_class(bytes);
        let Some(arena) = self.arena() else {
            return self.allocate_pooled(class);
        };
        match arena.take(class) {
            Some((id, raw)) => Buffer {
                raw: Some(raw),
                id,
                class,
                home: Home::Arena(arena),
            },
            None => {
                let mut buffer = self.allocate_pooled(class);
                buffer.home = Home::Arena(arena);
                buffer
            }
        }
    }

    fn allocate_pooled(&self, class: u64) -> Buffer {
        let pool = &self.inner().pool;
        if let Some(free) = pool.take_free(class) {
            return pool.adopt(free, class);
        }
        let trimmed = || {
            self.trim();
            self.create(class)
        };
        let given_up = || self.give_up_arenas().then(trimmed).flatten();
        if let Some(raw) = self.create(class).or_else(trimmed).or_else(given_up) {
            return pool.adopt(pool.register(raw, class), class);
        }
        self.inner().faults.set(Error::OutOfMemory {
            requested: class,
            in_use: pool.stats().current_bytes,
            limit: pool.max_bytes,
        });
        // A stand-in of the smallest class: with the fault set nothing is dispatched on it.
        let smallest = pool
            .take_free(256)
            .unwrap_or_else(|| pool.register(self.create_raw(256), 256));
        pool.adopt(smallest, 256)
    }

    fn create(&self, class: u64) -> Option<wgpu::Buffer> {
        let inner = self.inner();
        let over = |limit: u64| inner.pool.stats().reserved_bytes + class > limit;
        if class > inner.tier.max_buffer || inner.pool.max_bytes.is_some_and(over) {
            return None;
        }
        let scope = inner
            .device
            .push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let raw = self.create_raw(class);
        pollster::block_on(scope.pop()).is_none().then_some(raw)
    }

    fn create_raw(&self, size: u64) -> wgpu::Buffer {
        self.inner().device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        })
    }

    /// Gives every free buffer back to the driver.
    pub fn trim(&self) {
        self.trim_since(0);
    }

    /// Gives the free buffers back that were made after the first `made`.
    pub(crate) fn trim_since(&self, made: u64) {
        self.flush();
        self.poll_wait(None);
        self.forget_bind_groups();
        let mut state = lock(&self.inner().pool.state);
        let State { free, stats, .. } = &mut *state;
        for (class, buffers) in &mut free.0 {
            let given_back = buffers.split_off(&(made + 1));
            stats.reserved_bytes -= class * given_back.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::size_class;

    #[test]
    fn size_classes_leave_a_vec4_of_room_and_waste_at_most_a_quarter() {
        for bytes in (1..200_000u64).step_by(37) {
            let class = size_class(bytes);
            assert!(class >= bytes + 16 && class.is_multiple_of(256));
            assert!(class <= 512 || (class as f64) < (bytes + 16) as f64 * 1.26 + 256.0);
        }
    }
}
