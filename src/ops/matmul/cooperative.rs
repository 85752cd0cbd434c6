//! The product on matrix units, through cooperative matrices.

use super::launch::{bound, fours, params};
use super::right::Storage;
use super::{Geometry, Operands};
use crate::gpu::{Kernel, MatrixUnit, Scalar, Tier};
use crate::ops::dispatch_work;
use crate::tensor::{DType, Quantization};

/// Shape of a cooperative product: each of four subgroups sums `fragments`² matrices of `size`².
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cooperative {
    /// Side of a matrix, 8 or 16.
    pub size: u32,
    /// Matrices along a side of a subgroup's block, 2 or 4.
    pub fragments: u32,
}

/// Subgroups' blocks in a workgroup's tile.
const BLOCKS: u32 = 4;

impl Cooperative {
    /// Side of a workgroup's tile.
    pub fn tile(self) -> usize {
        (2 * self.size * self.fragments) as usize
    }

    /// Elements that a step of the kernel takes along k.
    pub(crate) fn step(self) -> usize {
        2 * self.size as usize
    }

    /// Whether an adapter of this tier has the matrices that a product of f16 operands (f32 unless `half`) needs.
    pub(crate) fn serves(self, tier: &Tier, half: bool) -> bool {
        let unit = MatrixUnit {
            size: self.size,
            operands: if half { Scalar::F16 } else { Scalar::F32 },
            sums: Scalar::F32,
        };
        // f32 operands fill shared memory: no tile of 128 then.
        let fits = half || self.tile() == 64;
        fits && tier.subgroup && tier.matrix_units.contains(&unit)
    }

    /// Shapes for a result that has `groups(side)` tiles of a side, the likely best first.
    pub(crate) fn candidates(groups: impl Fn(usize) -> usize) -> Vec<Cooperative> {
        let mut order = Vec::new();
        for size in [16, 8] {
            let [large, small] = [4, 2].map(|fragments| Cooperative { size, fragments });
            order.extend(match groups(large.tile()) >= 64 {
                true => [large, small],
                false => [small, large],
            });
        }
        order
    }

    /// Threads that become four subgroups, if the driver makes them as large as it can; AMD's does unless asked.
    pub(crate) fn threads(self, tier: &Tier) -> u32 {
        BLOCKS * tier.subgroup_size.1.clamp(4, 64)
    }

    /// `kernel` with what `wgsl/common/matrix_units.wgsl` asks for, `half` the operands' type in shared memory.
    pub(crate) fn units(self, kernel: Kernel, threads: u32, half: bool) -> Kernel {
        kernel
            .flag("COOPERATIVE", true)
            .def("SIZE", self.size as i32)
            .def("FRAGMENTS", self.fragments as i32)
            .def("THREADS", threads as i32)
            .flag("HALF", half)
    }

    /// [`Cooperative::units`] and what `wgsl/common/matrix_product.wgsl` asks for.
    pub(crate) fn flags(self, kernel: Kernel, tier: &Tier, half: bool, trans: [bool; 2]) -> Kernel {
        self.flags_of(kernel, self.threads(tier), half, trans)
    }

    fn flags_of(self, kernel: Kernel, threads: u32, half: bool, trans: [bool; 2]) -> Kernel {
        self.units(kernel, threads, half)
            .def("STEP", self.step() as i32)
            .flag("TRANS_A", trans[0])
            .flag("TRANS_B", trans[1])
    }
}

/// Whether operands are multiplied as f16. One that is f32 is never rounded; weights in bf16, 8 or 4 bits are, beside an
/// `a` that is f16 already.
pub(super) fn half(a: DType, b: Storage) -> bool {
    a == DType::F16 && b != Storage::Float(DType::F32)
}

fn kernel(
    shape: Cooperative,
    threads: u32,
    quads: bool,
    trans: [bool; 2],
    a: DType,
    b: Storage,
    c: DType,
) -> Kernel {
    let kernel = Kernel::new("matmul_cooperative").flag("QUADS", quads);
    b.flags(shape.flags_of(kernel, threads, half(a, b), trans), a, c)
}

/// The kernel of a piece of the product.
pub(super) fn kernel_of(shape: Cooperative, o: &Operands<'_>, g: &Geometry) -> Kernel {
    kernel(
        shape,
        shape.threads(o.a.gpu().tier()),
        fours(o, g) == [true; 2],
        [o.options.trans_a, o.options.trans_b],
        o.a.dtype(),
        o.b.storage(),
        o.c.dtype(),
    )
}

pub(super) fn launch(shape: Cooperative, o: &Operands<'_>, g: &Geometry, work: u64) {
    let groups = [
        g.n.div_ceil(shape.tile()) as u32,
        g.m.div_ceil(shape.tile()) as u32,
        (g.batch * g.splits) as u32,
    ];
    dispatch_work(
        &kernel_of(shape, o, g),
        &bound(o),
        &params(o, g, shape.step()),
        groups,
        work,
    );
}

/// A kernel for each choice that the file makes; not for each combination of them.
pub(super) fn variants() -> Vec<Kernel> {
    let (half, full) = (DType::F16, DType::F32);
    let [large, small] = [16, 8].map(|size| Cooperative { size, fragments: 4 });
    let few = Cooperative {
        fragments: 2,
        ..large
    };
    let stored = [
        Storage::Float(half),
        Storage::Float(DType::Bf16),
        Storage::Quantized(Quantization::Q8),
        Storage::Quantized(Quantization::Q4),
    ];
    let mut kernels = Vec::new();
    for trans in [[false, false], [false, true], [true, false], [true, true]] {
        for shape in [large, small, few] {
            kernels.push(kernel(shape, 128, true, trans, half, stored[0], half));
        }
        kernels.push(kernel(small, 32, false, trans, half, stored[0], full));
        kernels.push(kernel(small, 128, true, trans, full, stored[0], full));
    }
    for b in stored {
        for quads in [true, false] {
            kernels.push(kernel(large, 256, quads, [false, true], half, b, half));
            kernels.push(kernel(small, 128, quads, [false, true], full, b, full));
        }
    }
    let full_b = Storage::Float(full);
    kernels.push(kernel(small, 128, true, [false; 2], half, full_b, full));
    kernels
}
