//! Convolution on matrix units, through cooperative matrices.

use super::conv2d::Mode;
use super::matmul::Cooperative;
use crate::gpu::{Gpu, Kernel, Tier};
use crate::tensor::DType;

/// Whether the operands are multiplied as f16; one that is f32 is never rounded.
fn half([x, b]: [DType; 2]) -> bool {
    x == DType::F16 && b != DType::F32
}

/// Whether the kernel can do a convolution of these channels and types on `gpu`.
pub(super) fn serves(
    shape: Cooperative,
    gpu: &Gpu,
    mode: Mode,
    channels: [usize; 2],
    dtypes: [DType; 3],
) -> bool {
    channels.iter().all(|c| c.is_multiple_of(4))
        && shape.serves(gpu.tier(), half([dtypes[0], dtypes[1]]))
        && gpu.compiles(&kernel(shape, gpu.tier(), mode, dtypes))
}

/// The likely best shape for a result of `m` rows and `n` columns in `splits` parts; `None` where the tile serves.
pub(super) fn choose(
    gpu: &Gpu,
    mode: Mode,
    channels: [usize; 2],
    dtypes: [DType; 3],
    [m, n, splits]: [usize; 3],
) -> Option<Cooperative> {
    // Matrix units multiply f16 many times as fast; f32 they round or do as slowly as registers.
    if !half([dtypes[0], dtypes[1]]) {
        return None;
    }
    let groups = |side: usize| m.div_ceil(side) * n.div_ceil(side) * splits;
    let mut shapes = Cooperative::candidates(groups).into_iter();
    shapes.find(|&shape| serves(shape, gpu, mode, channels, dtypes))
}

/// The kernel for `[unfolded, weight or dy, result]` of these types.
pub(super) fn kernel(shape: Cooperative, tier: &Tier, mode: Mode, [x, b, y]: [DType; 3]) -> Kernel {
    let trans = [mode == Mode::Weight, mode == Mode::Input];
    let kernel = Kernel::new("conv2d_cooperative")
        .def("MODE", mode as i32)
        .flag("F16", [x, b, y].contains(&DType::F16))
        .flag("X_F16", x == DType::F16)
        .flag("B_F16", b == DType::F16)
        .flag("B_BF16", b == DType::Bf16)
        .flag("Y_F16", y == DType::F16);
    shape.flags(kernel, tier, half([x, b]), trans)
}

/// A kernel for each choice that the file makes.
pub(super) fn variants() -> Vec<Kernel> {
    let tier = Tier {
        subgroup_size: (32, 32),
        ..Tier::default()
    };
    let (full, half) = (DType::F32, DType::F16);
    let mut kernels = Vec::new();
    for size in [8, 16] {
        for fragments in [2, 4] {
            let shape = Cooperative { size, fragments };
            for b in [half, DType::Bf16] {
                kernels.push(kernel(shape, &tier, Mode::Forward, [half, b, half]));
                kernels.push(kernel(shape, &tier, Mode::Input, [half, b, half]));
            }
            kernels.push(kernel(shape, &tier, Mode::Weight, [half, half, full]));
        }
    }
    let small = Cooperative {
        size: 8,
        fragments: 4,
    };
    for mode in [Mode::Forward, Mode::Input, Mode::Weight] {
        kernels.push(kernel(small, &tier, mode, [full; 3]));
    }
    kernels
}
