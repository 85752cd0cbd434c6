//! Dropout whose mask is a hash of seed and index: nothing is stored, the backward draws it again.

use super::{LINE_THREADS, dispatch, is_f16, line};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    vectors: u32,
    chunk: u32,
    stream: [u32; 2],
    /// Elements whose 32 hashed bits lie below it are dropped.
    threshold: u32,
    scale: f32,
}

fn kernel(f16: bool, threads: u32) -> Kernel {
    Kernel::new("dropout")
        .flag("F16", f16)
        .def("WG", threads as i32)
}

/// Zeroes each element with chance `p` and scales the others by 1 / (1 − p); linear in `x`, so the
/// backward is the same call on dy with the same `seed`, `stream` and `p`.
///
/// Element i depends on (`seed` ^ `stream`, i) alone, through the PCG hash of Jarzynski and Olano 2020. `seed`, u32 `[2]`
/// with the lower half first, lies on the device, so that each step's masks differ where a step is replayed.
/// Panics unless 0 ≤ p < 1.
pub fn dropout(x: &Tensor, p: f32, seed: &Tensor, stream: u64) -> Tensor {
    assert!((0.0..1.0).contains(&p), "dropout: p = {p}");
    assert!(
        seed.dtype() == DType::U32 && seed.elements() == 2,
        "dropout: seed {seed:?}"
    );
    if p == 0.0 {
        return x.clone();
    }
    let y = Tensor::empty(x.gpu(), x.dtype(), x.shape());
    let vectors = x.elements().div_ceil(4);
    let line = line(x.gpu(), vectors);
    let params = Params {
        vectors: vectors as u32,
        chunk: line.chunk,
        stream: [stream as u32, (stream >> 32) as u32],
        threshold: (f64::from(p) * 4_294_967_296.0) as u32,
        scale: 1.0 / (1.0 - p),
    };
    dispatch(
        &kernel(is_f16("dropout", x), line.threads),
        &[x, seed, &y],
        &params,
        line.groups,
    );
    y
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let both = |f16| LINE_THREADS.map(|threads| kernel(f16, threads));
    [both(false), both(true)].concat()
}
