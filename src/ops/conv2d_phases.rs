//! The input gradient of a convolution of stride 2 as four convolutions of stride 1: pixels of the same parity see the same
//! taps of the weight, and none of the zeros that would lie between dy's pixels.

use super::conv2d::{Conv2dOptions, Force, Geometry, Mode, run};
use super::gather_rows::gather_rows;
use super::matmul::limit;
use super::permute::permute;
use crate::tensor::{DType, Tensor};

const STRIDE: usize = 2;

/// Taps `first`, `first + 2`, … of `count`.
fn taps(first: usize, count: usize) -> impl Iterator<Item = usize> + Clone {
    (first..count).step_by(STRIDE)
}

/// The gradient in the input of `g`, if its sides are even and everything fits a binding.
pub(super) fn grad_input(
    force: &Force,
    dy: &Tensor,
    w: &Tensor,
    g: &Geometry,
    options: &Conv2dOptions,
) -> Option<Tensor> {
    let ([h, width, ci], co, [kh, kw]) = (g.input, g.output[2], g.kernel);
    let bytes = g.batch * h * width * ci * dy.dtype().bytes();
    let even = h.is_multiple_of(STRIDE) && width.is_multiple_of(STRIDE);
    let fits = bytes.max(w.bytes() as usize) as u64 <= limit(dy);
    // Taps of an odd number of two-byte weights can be gathered as f16 alone.
    let words = dy.gpu().tier().f16 || w.dtype() == DType::F32 || (ci * co).is_multiple_of(2);
    let fits = fits && words;
    if options.stride != STRIDE || !even || kh < STRIDE || kw < STRIDE || !fits {
        return None;
    }
    let sides = [h / STRIDE, width / STRIDE];
    let shape = [STRIDE, STRIDE, g.batch, sides[0], sides[1], ci];
    let phases = Tensor::empty(dy.gpu(), dy.dtype(), &shape);
    let [top, _, left, _] = options.padding;
    for phase in 0..STRIDE * STRIDE {
        // With q = y + top, ky has the parity of q, and output row q / 2 − ky / 2 reads row y by it.
        let (qy, qx) = (phase / STRIDE + top, phase % STRIDE + left);
        let (rows, columns) = (taps(qy % STRIDE, kh), taps(qx % STRIDE, kw));
        let chosen: Vec<u32> = rows
            .clone()
            .flat_map(|ky| columns.clone().map(move |kx| (ky * kw + kx) as u32))
            .collect();
        let kernel = [rows.count(), columns.count()];
        let index = Tensor::from_u32(w.gpu(), &chosen, &[chosen.len()]);
        let part = gather_rows(&w.reshape(&[kh * kw, ci * co]), &index);
        let part = part.reshape(&[kernel[0], kernel[1], ci, co]);
        let band = Geometry {
            input: [sides[0], sides[1], ci],
            kernel,
            stride: 1,
            pad_top: (qy / STRIDE) as isize,
            pad_left: (qx / STRIDE) as isize,
            x_start: phase * g.batch * sides[0] * sides[1] * ci,
            ..*g
        };
        run(force, Mode::Input, band, [dy, &part, &phases], None);
    }
    let interleaved = permute(&phases, &[2, 3, 0, 4, 1, 5]);
    Some(interleaved.reshape(&[g.batch, h, width, ci]))
}
