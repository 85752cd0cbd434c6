//! Cross-entropy of logits with integer labels.

use super::{dispatch, grid, is_f16, row_ranges, row_threads};
use crate::gpu::Kernel;
use crate::tensor::{DType, Tensor};

/// The label of a row that takes no part in the loss.
pub const IGNORE: u32 = u32::MAX;

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    rows: u32,
    width: u32,
    first_row: u32,
}

fn kernel(backward: bool, f16: bool, vec4: bool, threads: u32) -> Kernel {
    Kernel::new("cross_entropy")
        .flag("BACKWARD", backward)
        .flag("F16", f16)
        .flag("VEC4", vec4)
        .def("WG", threads as i32)
}

/// Per-row values of [`cross_entropy`].
pub struct CrossEntropy {
    /// f32 `[N]`: −log p(label), 0 for ignored rows.
    pub loss: Tensor,
    /// f32 `[N]`: log-sum-exp of the row's logits, for the backward.
    pub lse: Tensor,
}

fn check(logits: &Tensor, labels: &Tensor) -> (usize, usize) {
    assert!(
        logits.rank() == 2 && labels.dtype() == DType::U32 && labels.elements() == logits.dim(0),
        "cross_entropy: logits {logits:?}, labels {labels:?}"
    );
    (logits.dim(0), logits.dim(1))
}

/// −log softmax(logits)`[label]` of each row; a label of [`IGNORE`] gives 0.
///
/// `logits` [N, V] f32 or f16, `labels` u32 `[N]`, each < V or [`IGNORE`].
pub fn cross_entropy(logits: &Tensor, labels: &Tensor) -> CrossEntropy {
    cross_entropy_with(logits, labels, row_threads(logits.gpu()))
}

/// [`cross_entropy`] with the workgroup size chosen by the caller: 8 fits CPU drivers, 128 GPUs.
pub fn cross_entropy_with(logits: &Tensor, labels: &Tensor, threads: u32) -> CrossEntropy {
    let (rows, columns) = check(logits, labels);
    let vec4 = columns.is_multiple_of(4);
    let result = CrossEntropy {
        loss: Tensor::empty(logits.gpu(), DType::F32, &[rows]),
        lse: Tensor::empty(logits.gpu(), DType::F32, &[rows]),
    };
    for (start, len) in row_ranges(logits.gpu(), rows, columns * logits.dtype().bytes()) {
        dispatch(
            &kernel(false, is_f16("cross_entropy", logits), vec4, threads),
            &[
                &logits.narrow(start, len),
                labels,
                &result.loss,
                &result.lse,
            ],
            &Params {
                rows: len as u32,
                width: (columns / if vec4 { 4 } else { 1 }) as u32,
                first_row: start as u32,
            },
            grid(len),
        );
    }
    result
}

/// Gradient of [`cross_entropy`]: (softmax − one-hot)·upstream of the row, 0 for ignored rows.
///
/// `upstream` f32 `[N]` is the gradient of each row's loss; the result has the logits' dtype.
pub fn cross_entropy_backward(
    logits: &Tensor,
    labels: &Tensor,
    lse: &Tensor,
    upstream: &Tensor,
) -> Tensor {
    let (rows, columns) = check(logits, labels);
    assert!(
        lse.elements() == rows && upstream.elements() == rows && upstream.dtype() == DType::F32,
        "cross_entropy_backward: logits {logits:?}, lse {lse:?}, upstream {upstream:?}"
    );
    let vec4 = columns.is_multiple_of(4);
    let dlogits = Tensor::empty(logits.gpu(), logits.dtype(), logits.shape());
    let f16 = is_f16("cross_entropy_backward", logits);
    for (start, len) in row_ranges(logits.gpu(), rows, columns * logits.dtype().bytes()) {
        let (from, to) = (logits.narrow(start, len), dlogits.narrow(start, len));
        dispatch(
            &kernel(true, f16, vec4, row_threads(logits.gpu())),
            &[&from, labels, lse, upstream, &to],
            &Params {
                rows: len as u32,
                width: (columns / if vec4 { 4 } else { 1 }) as u32,
                first_row: start as u32,
            },
            grid(len),
        );
    }
    dlogits
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let mut all = Vec::new();
    for (backward, f16) in [(false, false), (false, true), (true, false), (true, true)] {
        for (vec4, threads) in [(false, 8), (true, 128)] {
            all.push(kernel(backward, f16, vec4, threads));
        }
    }
    all
}
