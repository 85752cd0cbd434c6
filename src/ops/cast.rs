//! Conversion between element types.

use super::{LINE_THREADS, dispatch, line};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    vectors: u32,
    chunk: u32,
}

fn code(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Bf16 => 2,
        DType::U32 => 3,
        DType::I32 => 4,
    }
}

fn kernel(from: DType, to: DType, threads: u32) -> Kernel {
    Kernel::new("cast")
        .def("FROM", code(from))
        .def("TO", code(to))
        .flag("F16", from == DType::F16 || to == DType::F16)
        .def("WG", threads as i32)
}

/// `x` as `dtype`, rounded to nearest even; the same storage when it is that already.
pub fn cast(x: &Tensor, dtype: DType) -> Tensor {
    if x.dtype() == dtype {
        return x.clone();
    }
    let y = Tensor::empty(x.gpu(), dtype, x.shape());
    let vectors = x.elements().div_ceil(4);
    let line = line(x.gpu(), vectors);
    dispatch(
        &kernel(x.dtype(), dtype, line.threads),
        &[x, &y],
        &Params {
            vectors: vectors as u32,
            chunk: line.chunk,
        },
        line.groups,
    );
    y
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let all = [DType::F32, DType::F16, DType::Bf16, DType::U32, DType::I32];
    let pairs = all.into_iter().flat_map(|from| all.map(|to| (from, to)));
    pairs
        .filter(|(from, to)| from != to)
        .flat_map(|(from, to)| LINE_THREADS.map(|threads| kernel(from, to, threads)))
        .collect()
}
