//! Reordering of dimensions.

use super::{THREADS, dispatch, linear_groups, two_bytes};
use crate::gpu::Kernel;
use crate::tensor::{Tensor, elements};

const MAX_RANK: usize = 6;

/// Sizes of the result, innermost first, and the source's stride along each.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    threads: u32,
    dims: [u32; MAX_RANK],
    strides: [u32; MAX_RANK],
}

fn kernel(rank: usize, vec4: bool, half: bool) -> Kernel {
    Kernel::new("permute")
        .def("RANK", rank as i32)
        .flag("VEC4", vec4)
        .flag("F16", half)
}

/// Dimension `i` of the result is dimension `order[i]` of `x`; any dtype.
pub fn permute(x: &Tensor, order: &[usize]) -> Tensor {
    let mut sorted = order.to_vec();
    sorted.sort_unstable();
    assert!(
        sorted.into_iter().eq(0..x.rank()),
        "permute: {:?} by {order:?}",
        x.shape()
    );
    let shape: Vec<usize> = order.iter().map(|&i| x.dim(i)).collect();
    // Innermost first; neighbours that stay neighbours are one dimension.
    let mut axes: Vec<(usize, usize)> = Vec::new();
    for &i in order.iter().rev().filter(|&&i| x.dim(i) != 1) {
        let stride = elements(&x.shape()[i + 1..]);
        match axes.last_mut() {
            Some((size, inner)) if stride == *size * *inner => *size *= x.dim(i),
            _ => axes.push((x.dim(i), stride)),
        }
    }
    if axes.len() <= 1 {
        return x.reshape(&shape);
    }
    assert!(axes.len() <= MAX_RANK, "permute: rank of {:?}", x.shape());
    let vec4 = axes[0].1 == 1 && axes[0].0.is_multiple_of(4);
    if vec4 {
        axes[0].0 /= 4;
        axes[1..].iter_mut().for_each(|axis| axis.1 /= 4);
    }
    let rank = if axes.len() <= 3 {
        axes.len()
    } else {
        MAX_RANK
    };
    let threads = x.elements() / if vec4 { 4 } else { 1 };
    let mut params = Params {
        threads: threads as u32,
        dims: [1; MAX_RANK],
        strides: [0; MAX_RANK],
    };
    for (i, &(size, stride)) in axes.iter().enumerate() {
        params.dims[i] = size as u32;
        params.strides[i] = stride as u32;
    }
    let y = Tensor::empty(x.gpu(), x.dtype(), &shape);
    dispatch(
        &kernel(rank, vec4, two_bytes(x)),
        &[x, &y],
        &params,
        linear_groups(threads, THREADS),
    );
    y
}

/// The order that undoes `order`: the backward of [`permute`].
pub fn inverse_order(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    for (to, &from) in order.iter().enumerate() {
        inverse[from] = to;
    }
    inverse
}

/// All kernels of this op.
pub fn variants() -> Vec<Kernel> {
    let ranks = [2, 3, MAX_RANK].into_iter();
    ranks
        .flat_map(|rank| {
            [(false, false), (true, false), (false, true), (true, true)]
                .map(|(vec4, half)| kernel(rank, vec4, half))
        })
        .collect()
}
