//! Choosing an adapter and deciding its capability tier once.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::GpuOptions;
use crate::error::{Error, Result};

/// Bytes of immediate data (push constants) a kernel may use.
pub const IMMEDIATE_BYTES: u32 = 128;

/// What the opened adapter can do, decided once.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Tier {
    /// The adapter's name as the driver gives it.
    pub name: String,
    /// Backend, driver and its version.
    pub driver: String,
    /// A software driver that runs on the CPU: other kernel variants are fast there.
    pub cpu: bool,
    /// 16-bit floats in shaders and storage.
    pub f16: bool,
    /// Subgroup operations in compute shaders.
    pub subgroup: bool,
    /// Smallest and largest subgroup size.
    pub subgroup_size: (u32, u32),
    /// Matrix units reachable through cooperative matrices.
    pub cooperative_matrix: bool,
    /// Those of them that multiply square matrices of 8 or 16.
    #[serde(default)]
    pub matrix_units: Vec<MatrixUnit>,
    /// Timestamp queries.
    pub timestamps: bool,
    /// On-disk pipeline cache.
    pub pipeline_cache: bool,
    /// Largest storage binding, bytes.
    pub max_binding: u64,
    /// Largest buffer, bytes.
    pub max_buffer: u64,
    /// Workgroup (shared) memory, bytes.
    pub shared_bytes: u32,
    /// Invocations per workgroup.
    pub max_invocations: u32,
    /// Storage buffers that a kernel may bind.
    #[serde(default)]
    pub storage_buffers: u32,
    /// Alignment of a binding's offset, bytes.
    pub offset_alignment: u64,
    /// The device's own memory (a software driver's: the machine's), bytes; `None` where the backend does not tell.
    pub memory: Option<u64>,
    #[serde(skip)]
    pub(crate) cache_key: Option<String>,
}

/// What the elements of a cooperative matrix are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scalar {
    /// 16-bit float.
    F16,
    /// 32-bit float.
    F32,
}

/// Square cooperative matrices that an adapter multiplies: c + a·b.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MatrixUnit {
    /// Rows and columns of a, b and c: 8 or 16.
    pub size: u32,
    /// Elements of a and b.
    pub operands: Scalar,
    /// Elements of c.
    pub sums: Scalar,
}

fn matrix_units(adapter: &wgpu::Adapter) -> Vec<MatrixUnit> {
    let scalar = |listed| match listed {
        wgpu::CooperativeScalarType::F16 => Some(Scalar::F16),
        wgpu::CooperativeScalarType::F32 => Some(Scalar::F32),
        _ => None,
    };
    let listed = adapter.cooperative_matrix_properties();
    let square = listed
        .iter()
        .filter(|u| [8, 16].contains(&u.m_size) && u.m_size == u.n_size && u.m_size == u.k_size);
    let mut units: Vec<MatrixUnit> = Vec::new();
    for unit in square {
        if let (Some(operands), Some(sums)) = (scalar(unit.ab_type), scalar(unit.cr_type)) {
            let unit = MatrixUnit {
                size: unit.m_size,
                operands,
                sums,
            };
            if !units.contains(&unit) {
                units.push(unit);
            }
        }
    }
    units
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes = |b: bool, s: &str| if b { format!(" {s}") } else { String::new() };
        write!(
            f,
            "adapter {} [{}]{}{}{}{}; {}binding {} MiB, shared {} KiB",
            self.name,
            self.driver,
            yes(self.cpu, "cpu"),
            yes(self.f16, "f16"),
            if self.subgroup {
                format!(
                    " subgroup {}..{}",
                    self.subgroup_size.0, self.subgroup_size.1
                )
            } else {
                String::new()
            },
            yes(self.cooperative_matrix, "cooperative-matrix"),
            self.memory
                .map(|bytes| format!("memory {:.1} GiB, ", bytes as f64 / (1u64 << 30) as f64))
                .unwrap_or_default(),
            self.max_binding >> 20,
            self.shared_bytes >> 10,
        )
    }
}

/// One line of `devices`.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterSummary {
    /// Position in the list; `--adapter INDEX` takes it.
    pub index: usize,
    /// `DiscreteGpu`, `IntegratedGpu`, `Cpu`, …
    pub kind: String,
    /// Its capability tier.
    #[serde(flatten)]
    pub tier: Tier,
}

fn instance() -> wgpu::Instance {
    // Only the backends we run on: asking for GL makes some systems print EGL noise.
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    wgpu::Instance::new(descriptor)
}

fn adapters() -> Vec<wgpu::Adapter> {
    pollster::block_on(instance().enumerate_adapters(wgpu::Backends::all()))
}

fn usable(adapter: &wgpu::Adapter) -> bool {
    adapter.features().contains(wgpu::Features::IMMEDIATES)
        && adapter.limits().max_immediate_size >= IMMEDIATE_BYTES
}

fn rank(adapter: &wgpu::Adapter) -> u32 {
    match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

/// The sizes that the driver may choose from. wgpu tells 4 to 64 of every Metal adapter; Apple's own have 32.
fn subgroup_size(info: &wgpu::AdapterInfo) -> (u32, u32) {
    match info.backend {
        wgpu::Backend::Metal if info.name.starts_with("Apple") => (32, 32),
        _ => (info.subgroup_min_size, info.subgroup_max_size),
    }
}

fn tier(adapter: &wgpu::Adapter) -> Tier {
    let (info, limits, features) = (adapter.get_info(), adapter.limits(), adapter.features());
    let subgroup_size = subgroup_size(&info);
    // lavapipe lists matrix units also where its subgroups are narrower, on processors with registers of 128 bits, and then
    // opens no device that asks for them.
    let cooperative_matrix =
        features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) && subgroup_size.1 >= 8;
    let matrix_units = match cooperative_matrix {
        true => matrix_units(adapter),
        false => Vec::new(),
    };
    Tier {
        driver: format!("{} {} {}", info.backend, info.driver, info.driver_info)
            .trim()
            .to_string(),
        name: info.name.clone(),
        cpu: info.device_type == wgpu::DeviceType::Cpu,
        f16: features.contains(wgpu::Features::SHADER_F16),
        subgroup: features.contains(wgpu::Features::SUBGROUP),
        subgroup_size,
        cooperative_matrix,
        matrix_units,
        timestamps: features.contains(wgpu::Features::TIMESTAMP_QUERY),
        pipeline_cache: features.contains(wgpu::Features::PIPELINE_CACHE),
        max_binding: limits.max_storage_buffer_binding_size,
        max_buffer: limits.max_buffer_size,
        shared_bytes: limits.max_compute_workgroup_storage_size,
        max_invocations: limits.max_compute_invocations_per_workgroup,
        storage_buffers: limits.max_storage_buffers_per_shader_stage,
        offset_alignment: u64::from(limits.min_storage_buffer_offset_alignment),
        memory: memory(adapter),
        cache_key: wgpu::util::pipeline_cache_key(&info),
    }
}

/// Bytes of the largest heap that is the device's own. wgpu does not tell; Vulkan does.
#[cfg(not(target_vendor = "apple"))]
fn memory(adapter: &wgpu::Adapter) -> Option<u64> {
    /// `VK_MEMORY_HEAP_DEVICE_LOCAL_BIT`.
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the handles are used while the guard keeps the adapter alive, and nothing of it is destroyed.
    let properties = unsafe {
        let vulkan = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        let instance = vulkan.shared_instance().raw_instance();
        instance.get_physical_device_memory_properties(vulkan.raw_physical_device())
    };
    let heaps = properties.memory_heaps.iter();
    heaps
        .take(properties.memory_heap_count as usize)
        .filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0)
        .map(|heap| heap.size)
        .max()
}

#[cfg(target_vendor = "apple")]
fn memory(_: &wgpu::Adapter) -> Option<u64> {
    None
}

/// Every adapter that this machine has, in `--adapter INDEX` order.
pub fn list_adapters() -> Vec<AdapterSummary> {
    adapters()
        .iter()
        .enumerate()
        .map(|(index, adapter)| AdapterSummary {
            index,
            kind: format!("{:?}", adapter.get_info().device_type),
            tier: tier(adapter),
        })
        .collect()
}

fn choose(adapters: Vec<wgpu::Adapter>, wanted: Option<&str>) -> Result<wgpu::Adapter> {
    if adapters.is_empty() {
        return Err(Error::no_adapter());
    }
    let names: Vec<String> = adapters.iter().map(|a| a.get_info().name).collect();
    let listing = || {
        names
            .iter()
            .enumerate()
            .map(|(i, n)| format!("{i}: {n}"))
            .collect::<Vec<_>>()
            .join(", ")
    };
    let chosen = match wanted {
        None => adapters
            .iter()
            .enumerate()
            .filter(|(_, a)| usable(a))
            .min_by_key(|(i, a)| (rank(a), *i))
            .map(|(i, _)| i),
        Some(text) => match text.parse::<usize>() {
            Ok(index) => (index < adapters.len()).then_some(index),
            Err(_) => names
                .iter()
                .position(|n| n.to_lowercase().contains(&text.to_lowercase())),
        },
    };
    let index = chosen.ok_or_else(|| {
        Error::NoAdapter(match wanted {
            Some(text) => format!("no adapter `{text}`; this machine has {}", listing()),
            None => format!(
                "none of this machine's adapters can run compute shaders: {}",
                listing()
            ),
        })
    })?;
    adapters
        .into_iter()
        .nth(index)
        .ok_or_else(|| Error::NoAdapter("the adapter disappeared".into()))
}

pub(super) fn open(options: &GpuOptions) -> Result<(wgpu::Device, wgpu::Queue, Tier)> {
    let adapter = choose(adapters(), options.adapter.as_deref())?;
    let mut tier = tier(&adapter);
    let mut wanted = wgpu::Features::IMMEDIATES;
    match options.portable {
        true => {
            (tier.f16, tier.subgroup, tier.cooperative_matrix) = (false, false, false);
            (tier.timestamps, tier.pipeline_cache) = (false, false);
            tier.matrix_units.clear();
        }
        false => {
            wanted |= wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP;
            wanted |= wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::PIPELINE_CACHE;
            if !tier.matrix_units.is_empty() {
                wanted |= wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
            }
        }
    }
    let open = |features| {
        pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            label: Some("lavender-wgpu"),
            required_features: adapter.features() & features,
            required_limits: adapter.limits(),
            // SAFETY: cooperative matrices are all that is experimental here, and few kernels'; every access that those
            // make through them lies within the arrays of their own shared memory.
            experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
            ..Default::default()
        }))
    };
    let experimental = wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
    let opened = match open(wanted) {
        Err(error) if wanted.contains(experimental) => {
            tracing::warn!("{}: opened without matrix units: {error}", tier.name);
            tier.cooperative_matrix = false;
            tier.matrix_units.clear();
            open(wanted - experimental)
        }
        opened => opened,
    };
    let (device, queue) = opened.map_err(|e| Error::NoAdapter(format!("{}: {e}", tier.name)))?;
    Ok((device, queue, tier))
}
