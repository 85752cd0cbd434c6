// The true norm of gradients of a scaled loss, the factor that unscales and clips them, and the next scale.
struct Params {
    max_norm: f32,
    interval: f32,
}

@group(0) @binding(0) var<storage, read> norm: array<f32>;
@group(0) @binding(1) var<storage, read_write> scale: array<f32>;
@group(0) @binding(2) var<storage, read_write> truth: array<u32>;
@group(0) @binding(3) var<storage, read_write> factor: array<u32>;
var<immediate> p: Params;

const MOST: f32 = 16777216.0;

@compute @workgroup_size(1)
fn main() {
    let now = scale[0];
    truth[1] = bitcast<u32>(now);
    let bits = bitcast<u32>(norm[0]);
    // As bits: compilers may assume that floats are never NaN.
    if (bits & 0x7f800000u) == 0x7f800000u {
        truth[0] = bits | 0x7fc00000u;
        factor[0] = bits | 0x7fc00000u;
        scale[0] = max(0.5 * now, 1.0);
        scale[1] = 0.0;
        return;
    }
    let length = norm[0] / now;
    truth[0] = bitcast<u32>(length);
    factor[0] = bitcast<u32>(min(1.0, p.max_norm / (length + 1e-6)) / now);
    let good = scale[1] + 1.0;
    if good >= p.interval {
        scale[0] = min(2.0 * now, MOST);
        scale[1] = 0.0;
    } else {
        scale[1] = good;
    }
}
