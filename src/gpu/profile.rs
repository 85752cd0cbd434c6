//! Device time per op, behind [`super::GpuOptions::profile`].

use std::collections::HashMap;

/// Timestamp pairs per query set (the WebGPU limit is 4096 queries).
const PAIRS: u32 = 2048;

/// Device time spent in one kernel.
#[derive(Clone, Debug)]
pub struct OpTime {
    /// Kernel label.
    pub op: String,
    /// Dispatches.
    pub count: u64,
    /// Device milliseconds in all.
    pub millis: f64,
}

#[derive(Default)]
pub(crate) struct Profiler {
    enabled: bool,
    set: Option<(wgpu::QuerySet, wgpu::Buffer)>,
    labels: Vec<String>,
    pending: Vec<(wgpu::Buffer, Vec<String>)>,
    device: Option<wgpu::Device>,
}

pub(crate) struct PassWrites {
    set: wgpu::QuerySet,
    pair: u32,
}

impl PassWrites {
    pub fn descriptor(&self) -> wgpu::ComputePassTimestampWrites<'_> {
        wgpu::ComputePassTimestampWrites {
            query_set: &self.set,
            beginning_of_pass_write_index: Some(2 * self.pair),
            end_of_pass_write_index: Some(2 * self.pair + 1),
        }
    }
}

impl Profiler {
    pub fn new(enabled: bool) -> Profiler {
        Profiler {
            enabled,
            ..Default::default()
        }
    }

    /// A timestamp pair for the next dispatch, or `None` when not profiling.
    pub fn next(&mut self, device: &wgpu::Device, label: &str) -> Option<PassWrites> {
        if !self.enabled {
            return None;
        }
        self.device.get_or_insert_with(|| device.clone());
        let (set, _) = self.set.get_or_insert_with(|| {
            let set = device.create_query_set(&wgpu::QuerySetDescriptor {
                label: None,
                ty: wgpu::QueryType::Timestamp,
                count: 2 * PAIRS,
            });
            let resolved = device.create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: u64::from(2 * PAIRS) * 8,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            });
            (set, resolved)
        });
        self.labels.push(label.to_string());
        Some(PassWrites {
            set: set.clone(),
            pair: self.labels.len() as u32 - 1,
        })
    }

    pub fn full(&self) -> bool {
        self.labels.len() as u32 >= PAIRS
    }

    /// Records the copy of this submission's timestamps.
    pub fn resolve(&mut self, encoder: &mut wgpu::CommandEncoder) {
        let (Some((set, resolved)), Some(device)) = (&self.set, &self.device) else {
            return;
        };
        if self.labels.is_empty() {
            return;
        }
        let labels = std::mem::take(&mut self.labels);
        let queries = 2 * labels.len() as u32;
        let staging = device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: u64::from(queries) * 8,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        encoder.resolve_query_set(set, 0..queries, resolved, 0);
        encoder.copy_buffer_to_buffer(resolved, 0, &staging, 0, u64::from(queries) * 8);
        self.pending.push((staging, labels));
    }

    /// Sums per kernel since the last call; the caller has waited for the device.
    pub fn take(&mut self, nanos_per_tick: f32) -> Vec<OpTime> {
        let period = f64::from(nanos_per_tick) * 1e-6;
        let Some(device) = &self.device else {
            return Vec::new();
        };
        let mut sums: HashMap<String, (u64, f64)> = HashMap::new();
        for (staging, labels) in self.pending.drain(..) {
            staging.map_async(wgpu::MapMode::Read, .., |_| {});
            if device.poll(wgpu::PollType::wait_indefinitely()).is_err() {
                continue;
            }
            let Ok(view) = staging.get_mapped_range(..) else {
                continue;
            };
            let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&view[..]);
            for (label, pair) in labels.iter().zip(ticks.chunks_exact(2)) {
                let entry = sums.entry(label.clone()).or_default();
                entry.0 += 1;
                entry.1 += pair[1].saturating_sub(pair[0]) as f64 * period;
            }
        }
        let mut times: Vec<OpTime> = sums
            .into_iter()
            .map(|(op, (count, millis))| OpTime { op, count, millis })
            .collect();
        times.sort_by(|a, b| b.millis.total_cmp(&a.millis));
        times
    }
}
