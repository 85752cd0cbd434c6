// One update of Adam or AdamW in place; the host precomputes what depends on the step alone.
#import index::thread_index

struct Params {
    elements: u32,
    beta1: f32,
    beta2: f32,
    one_minus_beta1: f32,
    one_minus_beta2: f32,
    eps: f32,
    step_size: f32,
    root_correction: f32,
    shrink: f32,
    l2: f32,
}

@group(0) @binding(0) var<storage, read_write> weight: array<f32>;
@group(0) @binding(1) var<storage, read> gradient: array<f32>;
@group(0) @binding(2) var<storage, read_write> m: array<f32>;
@group(0) @binding(3) var<storage, read_write> v: array<f32>;
#ifdef SCALED
@group(0) @binding(4) var<storage, read> scale: array<f32>;
#endif
var<immediate> p: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = thread_index(group, groups, local, 64u);
    if i >= p.elements {
        return;
    }
#ifdef SCALED
    // A scale that is no number marks bad gradients: the update does not happen. The bits are asked,
    // because compilers may assume that floats are never NaN.
    if (bitcast<u32>(scale[0]) & 0x7f800000u) == 0x7f800000u {
        return;
    }
#endif
    let old = weight[i];
#ifdef SCALED
    let g = gradient[i] * scale[0] + p.l2 * old;
#else
    let g = gradient[i] + p.l2 * old;
#endif
    let first = p.beta1 * m[i] + p.one_minus_beta1 * g;
    let second = p.beta2 * v[i] + p.one_minus_beta2 * g * g;
    m[i] = first;
    v[i] = second;
    weight[i] = old * p.shrink - p.step_size * first / (sqrt(second) * p.root_correction + p.eps);
}
