//! Joining tensors along one dimension; the kernel is `slice`'s.

use super::slice::copy_columns;
use crate::tensor::{Tensor, elements};

/// `parts` one after another along `axis`; other dimensions and dtypes must agree; any dtype.
///
/// The backward is [`super::slice::slice`] of each part.
pub fn concat(parts: &[&Tensor], axis: usize) -> Tensor {
    let first = parts[0];
    for part in parts {
        let agrees = part.rank() == first.rank()
            && part.dtype() == first.dtype()
            && (0..first.rank()).all(|i| i == axis || part.dim(i) == first.dim(i));
        assert!(agrees, "concat on axis {axis}: {first:?} and {part:?}");
    }
    if parts.len() == 1 {
        return first.clone();
    }
    let mut shape = first.shape().to_vec();
    shape[axis] = parts.iter().map(|p| p.dim(axis)).sum();
    let y = Tensor::empty(first.gpu(), first.dtype(), &shape);
    let (outer, inner) = (elements(&shape[..axis]), elements(&shape[axis + 1..]));
    let pitch = shape[axis] * inner;
    let mut start = 0;
    for part in parts {
        let width = part.dim(axis) * inner;
        copy_columns(part, &y, outer, width, [width, 0], [pitch, start], false);
        start += width;
    }
    y
}
