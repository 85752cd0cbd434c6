use lavender_wgpu::ops::upsample_nearest2x::{upsample_nearest2x, upsample_nearest2x_backward};

use crate::support::*;

#[test]
fn pixels_repeat_and_their_gradients_add() {
    let mut rng = rng(91);
    for dtype in float_types() {
        for [b, h, w, c] in [[1, 1, 1, 1], [2, 3, 5, 7], [2, 5, 3, 8], [1, 17, 9, 4]] {
            let (x, hx) = upload(&uniform(&mut rng, b * h * w * c), dtype, &[b, h, w, c]);
            let (dy, hdy) = upload(
                &uniform(&mut rng, 4 * b * h * w * c),
                dtype,
                &[b, 2 * h, 2 * w, c],
            );
            let mut y = Vec::new();
            let mut dx = vec![0.0; hx.len()];
            for (i, g) in hdy.iter().enumerate() {
                let (ch, col) = (i % c, i / c % (2 * w));
                let (row, image) = (i / c / (2 * w) % (2 * h), i / c / (4 * w * h));
                let from = ((image * h + row / 2) * w + col / 2) * c + ch;
                y.push(hx[from] as f32);
                dx[from] += g;
            }
            let actual = upsample_nearest2x(&x);
            assert_eq!(actual.shape(), dy.shape());
            assert_eq!(actual.to_f32().unwrap(), y);
            assert_close(
                "upsample_nearest2x_backward",
                &upsample_nearest2x_backward(&dy),
                &dx,
            );
        }
    }
}
