//! The command stream: dispatches recorded into few submissions, each kept short.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use rustc_hash::FxHashMap;

use super::plan::{Command, Dispatch};
use super::shader::Pipeline;
use super::{Buffer, Gpu, Inner, Kernel, Tier, lock};
use crate::error::Error;

/// Aimed length of one submission; watchdogs start at 2 s.
const TARGET_MILLIS: f64 = 60.0;
/// Submissions the host may run ahead of the device.
const IN_FLIGHT: usize = 6;
/// Bind groups of one generation of the cache: some steps' worth of large models.
const BIND_GROUPS: usize = 16_384;
/// Dispatches in a submission at the most, so that the device gets work early.
const DISPATCHES: u32 = 256;

/// A buffer range that a kernel reads or writes.
#[derive(Clone, Copy)]
pub struct Binding<'a> {
    /// The pooled buffer.
    pub buffer: &'a Buffer,
    /// First byte; a multiple of the adapter's offset alignment.
    pub offset: u64,
    /// Bytes used.
    pub bytes: u64,
}

impl Binding<'_> {
    /// Bytes bound: all that the buffer has from `offset` on, so that sequences of many lengths share bind groups;
    /// with `exact` no more than are used, so that bounds checks see every stray access.
    fn size(&self, limit: u64, exact: bool) -> u64 {
        let used = self.bytes.next_multiple_of(16).max(16);
        match exact {
            true => used,
            false => (self.buffer.capacity() - self.offset).min(limit) & !15,
        }
    }
}

/// Bind groups by what they bind, in two generations: when the newer one is full the older one's unused are dropped.
#[derive(Default)]
struct BindGroups {
    newer: FxHashMap<Box<[u64]>, wgpu::BindGroup>,
    older: FxHashMap<Box<[u64]>, wgpu::BindGroup>,
    /// The key being looked up: the pipeline, then each binding's buffer, offset and size.
    key: Vec<u64>,
    /// Made since the GPU was opened.
    made: u64,
}

impl BindGroups {
    /// The bind group of `bindings` for `pipeline`, made at its first use.
    fn get(
        &mut self,
        inner: &Inner,
        pipeline: &Pipeline,
        bindings: &[Binding<'_>],
    ) -> wgpu::BindGroup {
        let (limit, exact) = (inner.tier.max_binding, inner.shaders.checked);
        let size = |b: &Binding<'_>| b.size(limit, exact);
        self.key.clear();
        self.key.push(pipeline.id);
        for b in bindings {
            self.key.extend([b.buffer.id(), b.offset, size(b)]);
        }
        if let Some(group) = self.newer.get(self.key.as_slice()) {
            return group.clone();
        }
        let group = self.older.remove(self.key.as_slice()).unwrap_or_else(|| {
            self.made += 1;
            let ranges = bindings.iter().map(|b| wgpu::BufferBinding {
                buffer: b.buffer.raw(),
                offset: b.offset,
                size: wgpu::BufferSize::new(size(b)),
            });
            let entries: Vec<_> = ranges
                .enumerate()
                .map(|(i, range)| wgpu::BindGroupEntry {
                    binding: i as u32,
                    resource: wgpu::BindingResource::Buffer(range),
                })
                .collect();
            inner.device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &pipeline.layout,
                entries: &entries,
            })
        });
        if self.newer.len() >= BIND_GROUPS {
            self.older = std::mem::take(&mut self.newer);
        }
        self.newer.insert(self.key.as_slice().into(), group.clone());
        group
    }
}

pub(crate) struct Stream {
    encoder: Option<wgpu::CommandEncoder>,
    pass: Option<wgpu::ComputePass<'static>>,
    /// The pipeline set last in the pass.
    pipeline: Option<u64>,
    dispatches: u32,
    /// Since the GPU was opened.
    dispatched: u64,
    /// Those of them that plans had ready.
    replayed: u64,
    work: u64,
    bind_groups: BindGroups,
    in_flight: VecDeque<wgpu::SubmissionIndex>,
    /// Work units per millisecond, measured; 0 until the first submission has returned.
    rate: Arc<AtomicU64>,
    first_rate: u64,
}

impl Stream {
    pub fn new(tier: &Tier) -> Stream {
        Stream {
            encoder: None,
            pass: None,
            pipeline: None,
            dispatches: 0,
            dispatched: 0,
            replayed: 0,
            work: 0,
            bind_groups: BindGroups::default(),
            in_flight: VecDeque::new(),
            rate: Arc::default(),
            // Work units are about one FLOP: a slow guess until the device has been measured.
            first_rate: if tier.cpu { 2_000_000 } else { 100_000_000 },
        }
    }

    /// Encodes one dispatch; whether it is time to submit.
    fn dispatch(&mut self, inner: &Inner, dispatch: Dispatch<'_>) -> bool {
        let mut profiler = lock(&inner.profiler);
        if let Some(writes) = profiler.next(&inner.device, &dispatch.pipeline.label) {
            // Profiling: a pass of its own for every dispatch.
            self.pass = None;
            let encoder = encoder(&mut self.encoder, &inner.device);
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                label: None,
                timestamp_writes: Some(writes.descriptor()),
            });
            encode(&mut pass, &dispatch, None);
        } else {
            if self.pass.is_none() {
                let pass = encoder(&mut self.encoder, &inner.device)
                    .begin_compute_pass(&wgpu::ComputePassDescriptor::default())
                    .forget_lifetime();
                self.pass = Some(pass);
                self.pipeline = None;
            }
            if let Some(pass) = self.pass.as_mut() {
                encode(pass, &dispatch, self.pipeline);
            }
            self.pipeline = Some(dispatch.pipeline.id);
        }
        self.dispatches += 1;
        self.dispatched += 1;
        self.work += dispatch.work.max(10_000);
        profiler.full() || self.dispatches >= DISPATCHES || self.work >= self.budget()
    }

    fn copy(
        &mut self,
        inner: &Inner,
        from: &wgpu::Buffer,
        to: &wgpu::Buffer,
        [from_offset, to_offset]: [u64; 2],
        bytes: u64,
    ) {
        self.pass = None;
        encoder(&mut self.encoder, &inner.device).copy_buffer_to_buffer(
            from,
            from_offset,
            to,
            to_offset,
            bytes,
        );
        self.work += bytes;
    }

    fn clear(&mut self, inner: &Inner, buffer: &wgpu::Buffer, offset: u64, bytes: u64) {
        self.pass = None;
        encoder(&mut self.encoder, &inner.device).clear_buffer(buffer, offset, Some(bytes));
    }

    fn budget(&self) -> u64 {
        let rate = match self.rate.load(Ordering::Relaxed) {
            0 => self.first_rate,
            measured => measured,
        };
        (rate as f64 * TARGET_MILLIS) as u64
    }
}

impl Gpu {
    /// Records one dispatch of `kernel`; `work` is about its FLOPs, to keep submissions short.
    ///
    /// Does nothing while a fault is pending; records a fault for a binding over the limit.
    pub fn dispatch(
        &self,
        kernel: &Kernel,
        bindings: &[Binding<'_>],
        immediates: &[u8],
        groups: [u32; 3],
        work: u64,
    ) {
        let inner = self.inner();
        if inner.faults.any() || groups.contains(&0) {
            return;
        }
        let limit = inner.tier.max_binding;
        if let Some(large) = bindings.iter().find(|b| b.bytes > limit) {
            inner.faults.set(Error::BindingTooLarge {
                op: kernel.label(),
                bytes: large.bytes,
                limit,
            });
            return;
        }
        let pipeline = match self.pipeline(kernel) {
            Ok(pipeline) => pipeline,
            Err(error) => {
                inner.faults.set(error);
                return;
            }
        };
        assert_eq!(
            pipeline.immediate_bytes as usize,
            immediates.len(),
            "kernel {}: immediate bytes declared and given differ",
            kernel.label()
        );
        assert_eq!(
            pipeline.writes.len(),
            bindings.len(),
            "kernel {}: bindings declared and given differ",
            kernel.label()
        );
        let mut stream = lock(&inner.stream);
        let group = stream.bind_groups.get(inner, &pipeline, bindings);
        let full = stream.dispatch(
            inner,
            Dispatch {
                pipeline: &pipeline,
                group: &group,
                immediates,
                groups,
                work,
            },
        );
        drop(stream);
        self.note(|| Command::Dispatch {
            pipeline,
            group,
            immediates: immediates.into(),
            groups,
            work,
        });
        if full {
            self.flush();
        }
    }

    /// Encodes commands of a plan.
    pub(super) fn encode_all(&self, commands: &[Command]) {
        let inner = self.inner();
        let mut stream = lock(&inner.stream);
        let before = stream.dispatched;
        for command in commands {
            let full = match command {
                Command::Dispatch {
                    pipeline,
                    group,
                    immediates,
                    groups,
                    work,
                } => stream.dispatch(
                    inner,
                    Dispatch {
                        pipeline,
                        group,
                        immediates,
                        groups: *groups,
                        work: *work,
                    },
                ),
                Command::Copy {
                    from,
                    to,
                    offsets,
                    bytes,
                } => {
                    stream.copy(inner, from, to, *offsets, *bytes);
                    false
                }
                Command::Clear {
                    buffer,
                    offset,
                    bytes,
                } => {
                    stream.clear(inner, buffer, *offset, *bytes);
                    false
                }
            };
            if full {
                drop(stream);
                self.flush();
                stream = lock(&inner.stream);
            }
        }
        stream.replayed += stream.dispatched - before;
    }

    /// Dispatches recorded since the GPU was opened.
    pub fn dispatches(&self) -> u64 {
        lock(&self.inner().stream).dispatched
    }

    /// Those of them that were replayed.
    pub fn replayed(&self) -> u64 {
        lock(&self.inner().stream).replayed
    }

    /// Bind groups made since the GPU was opened: none in a step that repeats the one before it.
    pub fn bind_groups(&self) -> u64 {
        lock(&self.inner().stream).bind_groups.made
    }

    /// Records a buffer copy in stream order; offsets and sizes are multiples of 4.
    pub(crate) fn copy_raw(
        &self,
        from: &wgpu::Buffer,
        from_offset: u64,
        to: &wgpu::Buffer,
        to_offset: u64,
        bytes: u64,
    ) {
        let inner = self.inner();
        let offsets = [from_offset, to_offset];
        lock(&inner.stream).copy(inner, from, to, offsets, bytes);
        self.note(|| Command::Copy {
            from: from.clone(),
            to: to.clone(),
            offsets,
            bytes,
        });
    }

    /// Records a copy of `bytes` between pooled buffers in stream order.
    pub fn copy(&self, from: &Buffer, from_offset: u64, to: &Buffer, to_offset: u64, bytes: u64) {
        if !self.inner().faults.any() {
            let padded = bytes.next_multiple_of(4);
            self.copy_raw(from.raw(), from_offset, to.raw(), to_offset, padded);
        }
    }

    /// Overwrites `buffer` at `offset` with `data`, in stream order.
    pub fn upload(&self, buffer: &Buffer, offset: u64, data: &[u8]) {
        if self.inner().faults.any() || data.is_empty() {
            return;
        }
        // Through chunks of a mapped staging buffer: a queue write would overtake dispatches that
        // are recorded but not submitted and still use this pooled buffer.
        const CHUNK: usize = 64 << 20;
        for (i, chunk) in data.chunks(CHUNK).enumerate() {
            let padded = (chunk.len() as u64).next_multiple_of(4);
            let staging = self.inner().device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("upload"),
                size: padded,
                usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: true,
            });
            match staging.get_mapped_range_mut(..) {
                Ok(mut view) => view.slice(..chunk.len()).copy_from_slice(chunk),
                Err(error) => {
                    self.inner()
                        .faults
                        .set(Error::Gpu(format!("upload failed: {error}")));
                    return;
                }
            }
            staging.unmap();
            let at = offset + (i * CHUNK) as u64;
            self.copy_raw(&staging, 0, buffer.raw(), at, padded);
            if data.len() > CHUNK {
                self.flush();
            }
        }
    }

    /// Fills `bytes` of `buffer` at `offset` with zeros, in stream order.
    pub fn clear(&self, buffer: &Buffer, offset: u64, bytes: u64) {
        if !self.inner().faults.any() {
            self.clear_raw(buffer.raw(), offset, bytes.next_multiple_of(4));
        }
    }

    /// Records a clear in stream order; offset and size are multiples of 4.
    pub(crate) fn clear_raw(&self, buffer: &wgpu::Buffer, offset: u64, bytes: u64) {
        let inner = self.inner();
        lock(&inner.stream).clear(inner, buffer, offset, bytes);
        self.note(|| Command::Clear {
            buffer: buffer.clone(),
            offset,
            bytes,
        });
    }

    pub(crate) fn forget_bind_groups(&self) {
        let mut stream = lock(&self.inner().stream);
        stream.bind_groups.newer.clear();
        stream.bind_groups.older.clear();
    }

    /// Submits what is recorded; waits only when the host is too many submissions ahead.
    pub fn flush(&self) -> Option<wgpu::SubmissionIndex> {
        let inner = self.inner();
        let mut stream = lock(&inner.stream);
        stream.pass = None;
        let mut encoder = stream.encoder.take()?;
        lock(&inner.profiler).resolve(&mut encoder);
        let work = std::mem::take(&mut stream.work);
        stream.dispatches = 0;
        let index = inner.queue.submit([encoder.finish()]);
        let (rate, started) = (stream.rate.clone(), Instant::now());
        let alone = stream.in_flight.is_empty();
        inner.queue.on_submitted_work_done(move || {
            let millis = started.elapsed().as_secs_f64() * 1e3;
            // Only a submission that had the device to itself tells the device's rate.
            if alone && work > 1_000_000 {
                let measured = (work as f64 / millis.max(0.01)) as u64;
                let old = rate.load(Ordering::Relaxed);
                let blended = if old == 0 {
                    measured
                } else {
                    (3 * old + measured) / 4
                };
                rate.store(blended.max(1), Ordering::Relaxed);
            }
        });
        stream.in_flight.push_back(index.clone());
        let oldest = (stream.in_flight.len() > IN_FLIGHT)
            .then(|| stream.in_flight.pop_front())
            .flatten();
        drop(stream);
        match oldest {
            Some(oldest) => {
                self.poll_wait(Some(oldest));
            }
            None => {
                if let Err(error) = inner.device.poll(wgpu::PollType::Poll) {
                    inner.faults.set(Error::DeviceLost(error.to_string()));
                }
            }
        }
        Some(index)
    }
}

fn encoder<'a>(
    slot: &'a mut Option<wgpu::CommandEncoder>,
    device: &wgpu::Device,
) -> &'a mut wgpu::CommandEncoder {
    slot.get_or_insert_with(|| device.create_command_encoder(&Default::default()))
}

/// Encodes a dispatch into a pass in which the pipeline `set` was set last.
fn encode(pass: &mut wgpu::ComputePass<'_>, dispatch: &Dispatch<'_>, set: Option<u64>) {
    if set != Some(dispatch.pipeline.id) {
        pass.set_pipeline(&dispatch.pipeline.raw);
    }
    pass.set_bind_group(0, dispatch.group, &[]);
    if !dispatch.immediates.is_empty() {
        pass.set_immediates(0, dispatch.immediates);
    }
    let [x, y, z] = dispatch.groups;
    pass.dispatch_workgroups(x, y, z);
}
