//! Several tensors served by one dispatch (`wgsl/common/sets.wgsl`).

use crate::gpu::Gpu;

/// Most tensors of a dispatch.
pub(super) const SETS: usize = 8;

/// Tensors that fit one dispatch with `bindings` for each and `others` beside them.
pub(super) fn sets(gpu: &Gpu, bindings: usize, others: usize) -> usize {
    let bound = gpu.tier().storage_buffers as usize;
    (bound.saturating_sub(others) / bindings).clamp(1, SETS)
}

/// `values` of the tensors, and `rest` for those that are missing.
pub(super) fn filled(values: impl Iterator<Item = u32>, rest: u32) -> [u32; SETS] {
    let mut all = [rest; SETS];
    all.iter_mut().zip(values).for_each(|(slot, v)| *slot = v);
    all
}

/// Where each tensor's share of a dispatch ends, given the shares' sizes; missing ones end with the last.
pub(super) fn ends(sizes: impl Iterator<Item = usize>) -> [u32; SETS] {
    let mut total = 0;
    let ends: Vec<u32> = sizes
        .map(|size| {
            total += size as u32;
            total
        })
        .collect();
    filled(ends.into_iter(), total)
}
