#define_import_path activation

// erf to 1.2e-7 absolute: W. J. Cody's rational form is dearer, and f32 holds no more here.
fn erf(x: f32) -> f32 {
    let z = abs(x);
    let t = 1.0 / (1.0 + 0.5 * z);
    let poly = -1.26551223 + t * (1.00002368 + t * (0.37409196 + t * (0.09678418
        + t * (-0.18628806 + t * (0.27886807 + t * (-1.13520398 + t * (1.48851587
        + t * (-0.82215223 + t * 0.17087277))))))));
    let r = 1.0 - t * exp(-z * z + poly);
    return select(-r, r, x >= 0.0);
}

fn sigmoid(x: f32) -> f32 {
    return 1.0 / (1.0 + exp(-x));
}

// tanh through exp of a negative number only: some drivers overflow the built-in for large |x|.
fn tanh_safe(x: f32) -> f32 {
    let e = exp(-2.0 * abs(x));
    let r = (1.0 - e) / (1.0 + e);
    return select(-r, r, x >= 0.0);
}

// The functions of `Unary`, numbered as there.
fn activation(code: u32, a: f32, b: f32, x: f32) -> f32 {
    switch code {
        case 1u: { return x * sigmoid(x); }
        case 2u: { return 0.5 * x * (1.0 + tanh_safe(0.7978845608 * (x + 0.044715 * x * x * x))); }
        case 3u: { return 0.5 * x * (1.0 + erf(x * 0.7071067812)); }
        case 4u: { return x * sigmoid(1.702 * x); }
        case 5u: { return max(x, 0.0); }
        case 6u: { return clamp(x, 0.0, 6.0); }
        case 7u: { return select(a * x, x, x > 0.0); }
        case 8u: { return tanh_safe(x); }
        case 9u: { return sigmoid(x); }
        case 10u: { return exp(x); }
        case 11u: { return log(x); }
        case 12u: { return x * x; }
        case 13u: { return sqrt(x); }
        case 14u: { return a * x + b; }
        default: { return x; }
    }
}

// Their derivatives at x.
fn activation_slope(code: u32, a: f32, b: f32, x: f32) -> f32 {
    switch code {
        case 1u: {
            let s = sigmoid(x);
            return s * (1.0 + x * (1.0 - s));
        }
        case 2u: {
            let u = 0.7978845608 * (x + 0.044715 * x * x * x);
            let t = tanh_safe(u);
            return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608 * (1.0 + 0.134145 * x * x);
        }
        case 3u: {
            return 0.5 * (1.0 + erf(x * 0.7071067812)) + x * 0.3989422804 * exp(-0.5 * x * x);
        }
        case 4u: {
            let s = sigmoid(1.702 * x);
            return s + 1.702 * x * s * (1.0 - s);
        }
        case 5u: { return select(0.0, 1.0, x > 0.0); }
        case 6u: { return select(0.0, 1.0, x > 0.0 && x < 6.0); }
        case 7u: { return select(a, 1.0, x > 0.0); }
        case 8u: {
            let t = tanh_safe(x);
            return 1.0 - t * t;
        }
        case 9u: {
            let s = sigmoid(x);
            return s * (1.0 - s);
        }
        case 10u: { return exp(x); }
        case 11u: { return 1.0 / x; }
        case 12u: { return 2.0 * x; }
        case 13u: { return 0.5 / sqrt(x); }
        case 14u: { return a; }
        default: { return 1.0; }
    }
}

// What a product x ends with: `other` added (1), or its SiLU times x as the result's type would have stored it (2), so that
// the bits are those of a SwiGLU of two tensors.
fn ended(ending: u32, other: f32, x: f32, stored: f32) -> f32 {
    if ending == 2u {
        return other * sigmoid(other) * stored;
    }
    return x + other;
}
