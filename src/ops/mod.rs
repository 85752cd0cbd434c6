//! Floor 3: pure tensor functions, one file per op, the backward beside the forward.
//!
//! A shape error here is a bug in our own code and panics naming the op and the shapes.

pub mod adamw;
pub mod attention;
mod attention_cooperative;
pub mod attention_tap;
pub mod binary;
pub mod cast;
pub mod concat;
pub mod conv2d;
mod conv2d_cooperative;
mod conv2d_narrow;
mod conv2d_phases;
mod conv2d_rows;
mod conv2d_ways;
mod conv2d_winograd;
pub mod cross_entropy;
pub mod dropout;
pub mod embedding;
pub mod finite;
pub mod fma_probe;
pub mod gather_rows;
pub mod geglu;
pub mod grad_norm;
pub mod group_norm;
pub mod in_place;
pub mod layer_norm;
pub mod linear_cross_entropy;
pub mod loss_scale;
pub mod matmul;
pub mod permute;
pub mod reduce;
pub mod replace_rows;
pub mod resize_bicubic;
pub mod resize_bilinear;
pub mod rms_norm;
pub mod rotary;
mod rows;
mod sets;
pub mod slice;
pub mod softmax;
pub mod swiglu;
pub mod unary;
pub mod upsample_nearest2x;
mod ways;

use crate::gpu::{Binding, Gpu, Kernel};
use crate::tensor::{DType, Tensor};

/// Threads in the workgroup of the elementwise kernels.
pub(crate) const THREADS: u32 = 64;

/// Workgroups per grid dimension that every adapter allows.
const MAX_GROUPS: u32 = 65_535;

/// Every kernel variant that the ops use, for the test that translates them all.
pub fn variants() -> Vec<Kernel> {
    [
        attention::variants(),
        attention_cooperative::variants(),
        attention_tap::variants(),
        binary::variants(),
        cast::variants(),
        conv2d::variants(),
        cross_entropy::variants(),
        embedding::variants(),
        gather_rows::variants(),
        geglu::variants(),
        group_norm::variants(),
        layer_norm::variants(),
        loss_scale::variants(),
        matmul::variants(),
        permute::variants(),
        reduce::variants(),
        replace_rows::variants(),
        rotary::variants(),
        slice::variants(),
        softmax::variants(),
        adamw::variants(),
        dropout::variants(),
        finite::variants(),
        fma_probe::variants(),
        grad_norm::variants(),
        in_place::variants(),
        resize_bicubic::variants(),
        resize_bilinear::variants(),
        swiglu::variants(),
        upsample_nearest2x::variants(),
        unary::variants(),
    ]
    .concat()
}

/// Records one dispatch over `tensors` in `@binding` order; `work` is about its FLOPs.
pub(crate) fn dispatch_work<P: bytemuck::Pod>(
    kernel: &Kernel,
    tensors: &[&Tensor],
    params: &P,
    groups: [u32; 3],
    work: u64,
) {
    let bindings: Vec<Binding<'_>> = tensors.iter().map(|t| t.binding()).collect();
    tensors[0]
        .gpu()
        .dispatch(kernel, &bindings, bytemuck::bytes_of(params), groups, work);
}

/// [`dispatch_work`] for memory-bound kernels: the work is taken from the bytes bound.
pub(crate) fn dispatch<P: bytemuck::Pod>(
    kernel: &Kernel,
    tensors: &[&Tensor],
    params: &P,
    groups: [u32; 3],
) {
    let bytes: u64 = tensors.iter().map(|t| t.bytes()).sum();
    dispatch_work(kernel, tensors, params, groups, bytes);
}

/// A grid of at least `groups` workgroups, split over x and y; `wgsl/common/index.wgsl` undoes it.
pub(crate) fn grid(groups: usize) -> [u32; 3] {
    let groups = u32::try_from(groups).expect("a grid has fewer than 2^32 workgroups");
    if groups <= MAX_GROUPS {
        return [groups, 1, 1];
    }
    let y = groups.div_ceil(MAX_GROUPS);
    [groups.div_ceil(y), y, 1]
}

/// How a kernel over a line of vectors is cut: workgroups of `threads`, each taking `chunk` vectors.
#[derive(Clone, Copy)]
pub(crate) struct Line {
    pub threads: u32,
    pub chunk: u32,
    pub groups: [u32; 3],
}

/// Workgroup sizes that [`line`] chooses from.
pub(crate) const LINE_THREADS: [u32; 2] = [8, THREADS];

/// A CPU driver pays for each workgroup and runs one SIMD register of it at a time: few and long ones are fast there.
pub(crate) fn line(gpu: &Gpu, vectors: usize) -> Line {
    let (threads, chunk) = match gpu.tier().cpu {
        true => (8, (vectors / 64).clamp(64, 1024).next_multiple_of(8)),
        false => (THREADS, THREADS as usize * (vectors >> 20).clamp(1, 4)),
    };
    Line {
        threads,
        chunk: chunk as u32,
        groups: grid(vectors.div_ceil(chunk)),
    }
}

/// How a kernel over the columns of a matrix is cut: a workgroup's `threads` are `lanes` neighbouring columns of
/// `threads / lanes` blocks of `chunk` rows.
#[derive(Clone, Copy)]
pub(crate) struct Columns {
    pub threads: u32,
    pub lanes: u32,
    pub chunk: u32,
    pub groups: [u32; 3],
}

/// Workgroup sizes and lanes that [`columns`] chooses from.
pub(crate) const COLUMN_THREADS: [(u32, u32); 2] = [(8, 8), (THREADS, 16)];

/// Vectors of a row that [`columns`] takes on every adapter.
pub(crate) const WIDEST_ROW: usize = 8 * MAX_GROUPS as usize;

/// Cuts `rows` of at most [`WIDEST_ROW`] vectors, at least `least` rows a thread.
pub(crate) fn columns(gpu: &Gpu, rows: usize, width: usize, least: usize) -> Columns {
    let ((threads, lanes), least) = match gpu.tier().cpu {
        true => (COLUMN_THREADS[0], least.max(64)),
        false => (COLUMN_THREADS[1], least),
    };
    assert!(width <= WIDEST_ROW, "a row of {width} vectors");
    let blocks = (threads / lanes) as usize;
    let chunk = least.max(rows.div_ceil(blocks * MAX_GROUPS as usize));
    Columns {
        threads,
        lanes,
        chunk: chunk as u32,
        groups: [
            width.div_ceil(lanes as usize) as u32,
            rows.div_ceil(blocks * chunk) as u32,
            1,
        ],
    }
}

/// A grid with one thread for each of `threads`, in workgroups of `size`.
pub(crate) fn linear_groups(threads: usize, size: u32) -> [u32; 3] {
    grid(threads.div_ceil(size as usize))
}

/// Asserts an activation dtype and tells whether it is f16.
pub(crate) fn is_f16(op: &str, x: &Tensor) -> bool {
    match x.dtype() {
        DType::F32 => false,
        DType::F16 => true,
        other => panic!("{op}: {other:?} is no activation dtype"),
    }
}

/// Whether elements have two bytes: kernels that only move data take those as f16 and others as u32.
pub(crate) fn two_bytes(x: &Tensor) -> bool {
    x.dtype().bytes() == 2
}

/// Threads of the kernels that reduce a row in a workgroup: one SIMD register on CPU drivers.
pub(crate) fn row_threads(gpu: &Gpu) -> u32 {
    if gpu.tier().cpu { 8 } else { 128 }
}

/// Whether workgroups of 8 threads are one subgroup, on a CPU driver.
pub(crate) fn shares_loads(gpu: &Gpu) -> bool {
    let tier = gpu.tier();
    tier.cpu && tier.subgroup && tier.subgroup_size == (8, 8)
}

/// The kernel for CPU drivers whose workgroups of 8 threads share loads (`wgsl/common/lanes.wgsl`), made for 8 that share
/// where they are one subgroup and the driver takes it, else for 1; and for how many it was made.
pub(crate) fn shared_loads(gpu: &Gpu, kernel: impl Fn(u32) -> Kernel) -> (Kernel, u32) {
    let shared = shares_loads(gpu).then(|| kernel(8));
    shared
        .filter(|kernel| gpu.compiles(kernel))
        .map_or_else(|| (kernel(1), 1), |kernel| (kernel, 8))
}

/// Completes a kernel that reduces rows of `width` vectors, a workgroup of `threads` a row: how it sums over the workgroup,
/// and how many vectors a thread keeps in registers where a row fits there.
pub(crate) fn row_kernel(gpu: &Gpu, kernel: Kernel, width: usize, threads: u32) -> Kernel {
    let tier = gpu.tier();
    let subgroup = tier.subgroup && tier.subgroup_size == (threads, threads);
    row_variant(kernel, subgroup, width, threads)
}

pub(crate) fn row_variant(kernel: Kernel, subgroup: bool, width: usize, threads: u32) -> Kernel {
    let held = held(width, threads);
    kernel
        .flag("SUBGROUP", subgroup)
        .flag(
            "WHOLE",
            held.is_some() && width.is_multiple_of(threads as usize),
        )
        .def("WG", threads as i32)
        .defs("HELD", held.map(|n| n as i32))
}

/// Vectors of a row that each of `threads` keeps in registers; `None` where they are too many. CPU drivers unroll loops up
/// to about a hundred statements and fall to a third of the speed beyond.
pub(crate) fn held(width: usize, threads: u32) -> Option<usize> {
    let each = width.div_ceil(threads as usize).max(1);
    (each <= if threads == 8 { 24 } else { 16 }).then_some(each)
}

/// Splits `rows` of `row_bytes` each into ranges (start, len) that each fit one storage binding and
/// start where a view may start.
pub(crate) fn row_ranges(gpu: &Gpu, rows: usize, row_bytes: usize) -> Vec<(usize, usize)> {
    row_ranges_under(
        rows,
        row_bytes,
        gpu.tier().max_binding,
        gpu.tier().offset_alignment,
    )
}

fn row_ranges_under(
    rows: usize,
    row_bytes: usize,
    limit: u64,
    alignment: u64,
) -> Vec<(usize, usize)> {
    let most = (limit / row_bytes.max(1) as u64) as usize;
    // Any multiple of `alignment` rows starts at an aligned byte.
    let step = (most / alignment as usize * alignment as usize).max(1);
    if rows <= most || rows == 0 {
        return vec![(0, rows)];
    }
    (0..rows)
        .step_by(step)
        .map(|start| (start, step.min(rows - start)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::row_ranges_under;

    #[test]
    fn row_ranges_fit_the_binding_and_start_aligned() {
        assert_eq!(row_ranges_under(10, 100, 1000, 16), [(0, 10)]);
        for (rows, row_bytes) in [(1000, 36), (49_408, 768 * 4), (129, 514)] {
            let ranges = row_ranges_under(rows, row_bytes, 64 * 1024, 16);
            assert_eq!(ranges.iter().map(|r| r.1).sum::<usize>(), rows);
            for (start, len) in ranges {
                assert!(len * row_bytes <= 64 * 1024 && start * row_bytes % 16 == 0);
            }
        }
    }
}
