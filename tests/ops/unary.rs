use lavender_wgpu::ops::unary::{Unary, unary, unary_backward};

use crate::support::*;

/// Each function with its derivative, in f64.
fn reference(function: Unary, x: f64) -> (f64, f64) {
    let f = |x: f64| -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match function {
            Unary::Silu => x * sigmoid(x),
            Unary::GeluTanh => {
                0.5 * x
                    * (1.0
                        + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
            }
            Unary::GeluErf => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
            Unary::QuickGelu => x * sigmoid(1.702 * x),
            Unary::Relu => x.max(0.0),
            Unary::Relu6 => x.clamp(0.0, 6.0),
            Unary::LeakyRelu(s) => {
                if x > 0.0 {
                    x
                } else {
                    f64::from(s) * x
                }
            }
            Unary::Tanh => x.tanh(),
            Unary::Sigmoid => sigmoid(x),
            Unary::Exp => x.exp(),
            Unary::Log => x.ln(),
            Unary::Square => x * x,
            Unary::Sqrt => x.sqrt(),
            Unary::Affine(a, b) => f64::from(a) * x + f64::from(b),
        }
    };
    let h = 1e-6;
    (f(x), (f(x + h) - f(x - h)) / (2.0 * h))
}

/// erf by its Maclaurin series; converges for the |x| ≤ 6 used here in f64 to 1e-9.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn values_and_slopes_match_f64() {
    let functions = [
        Unary::Silu,
        Unary::GeluTanh,
        Unary::GeluErf,
        Unary::QuickGelu,
        Unary::Relu,
        Unary::Relu6,
        Unary::LeakyRelu(0.1),
        Unary::Tanh,
        Unary::Sigmoid,
        Unary::Exp,
        Unary::Log,
        Unary::Square,
        Unary::Sqrt,
        Unary::Affine(-1.5, 0.25),
    ];
    let mut rng = rng(1);
    for dtype in float_types() {
        for (i, function) in functions.into_iter().enumerate() {
            let n = [1, 7, 257, 1031][i % 4];
            let positive = matches!(function, Unary::Log | Unary::Sqrt);
            let values: Vec<f32> = uniform(&mut rng, n)
                .iter()
                .map(|v| if positive { v.abs() + 0.3 } else { 4.0 * v })
                .collect();
            let (x, held) = upload(&values, dtype, &[n]);
            let (dy, dy_held) = upload(&uniform(&mut rng, n), dtype, &[n]);
            let y: Vec<f64> = held.iter().map(|&v| reference(function, v).0).collect();
            assert_close(&format!("{function:?}"), &unary(&x, function), &y);
            let dx: Vec<f64> = held
                .iter()
                .zip(&dy_held)
                .map(|(&v, &g)| reference(function, v).1 * g)
                .collect();
            let actual = unary_backward(&x, &dy, function);
            assert_close(&format!("{function:?} backward"), &actual, &dx);
        }
    }
}
