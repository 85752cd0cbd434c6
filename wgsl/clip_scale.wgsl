// scale = min(1, max_norm / (norm + 1e-6)).
struct Params {
    max_norm: f32,
}

@group(0) @binding(0) var<storage, read> norm: array<f32>;
@group(0) @binding(1) var<storage, read_write> scale: array<f32>;
var<immediate> p: Params;

@compute @workgroup_size(1)
fn main() {
    scale[0] = min(1.0, p.max_norm / (norm[0] + 1e-6));
}
