// scale = min(1, max_norm / (norm + 1e-6)); NaN for a norm that is NaN or infinite.
struct Params {
    max_norm: f32,
}

@group(0) @binding(0) var<storage, read> norm: array<f32>;
@group(0) @binding(1) var<storage, read_write> scale: array<u32>;
var<immediate> p: Params;

@compute @workgroup_size(1)
fn main() {
    let bits = bitcast<u32>(norm[0]);
    if (bits & 0x7f800000u) == 0x7f800000u {
        // Passed through as bits: min() may drop a NaN.
        scale[0] = bitcast<u32>(bits | 0x7fc00000u);
        return;
    }
    scale[0] = bitcast<u32>(min(1.0, p.max_norm / (norm[0] + 1e-6)));
}
