// Dependent multiply-adds on sixteen vec4s a thread: what this adapter can reach at best.
struct Params {
    rounds: u32,
    factor: f32,
}

@group(0) @binding(0) var<storage, read_write> out: array<vec4<f32>>;
var<immediate> p: Params;

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    var sum: array<vec4<f32>, 16>;
    for (var i = 0u; i < 16u; i++) {
        sum[i] = vec4<f32>(f32(id.x + i));
    }
    for (var r = 0u; r < p.rounds; r++) {
        for (var i = 0u; i < 16u; i++) {
            sum[i] = fma(sum[i], vec4<f32>(p.factor), vec4<f32>(1.0));
            sum[i] = fma(sum[i], vec4<f32>(p.factor), vec4<f32>(2.0));
            sum[i] = fma(sum[i], vec4<f32>(p.factor), vec4<f32>(3.0));
            sum[i] = fma(sum[i], vec4<f32>(p.factor), vec4<f32>(4.0));
        }
    }
    var total = vec4<f32>();
    for (var i = 0u; i < 16u; i++) {
        total += sum[i];
    }
    out[id.x] = total;
}
