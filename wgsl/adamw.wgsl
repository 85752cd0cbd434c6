// One update of Adam or AdamW in place on up to eight tensors; the host precomputes what depends on the step alone.
#import index::{group_index, share}
#import sets::{one_of, start_of, tensor_of}

struct Params {
    // Of each tensor.
    elements_low: vec4<u32>,
    elements_high: vec4<u32>,
    // Workgroup behind each tensor's last.
    ends_low: vec4<u32>,
    ends_high: vec4<u32>,
    // Vectors of four that a workgroup takes.
    chunk: u32,
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

@group(0) @binding(0) var<storage, read_write> weight0: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> gradient0: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> m0: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> v0: array<vec4<f32>>;
#if SETS > 1
@group(0) @binding(4) var<storage, read_write> weight1: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> gradient1: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> m1: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read_write> v1: array<vec4<f32>>;
#endif
#if SETS > 2
@group(0) @binding(8) var<storage, read_write> weight2: array<vec4<f32>>;
@group(0) @binding(9) var<storage, read> gradient2: array<vec4<f32>>;
@group(0) @binding(10) var<storage, read_write> m2: array<vec4<f32>>;
@group(0) @binding(11) var<storage, read_write> v2: array<vec4<f32>>;
#endif
#if SETS > 3
@group(0) @binding(12) var<storage, read_write> weight3: array<vec4<f32>>;
@group(0) @binding(13) var<storage, read> gradient3: array<vec4<f32>>;
@group(0) @binding(14) var<storage, read_write> m3: array<vec4<f32>>;
@group(0) @binding(15) var<storage, read_write> v3: array<vec4<f32>>;
#endif
#if SETS > 4
@group(0) @binding(16) var<storage, read_write> weight4: array<vec4<f32>>;
@group(0) @binding(17) var<storage, read> gradient4: array<vec4<f32>>;
@group(0) @binding(18) var<storage, read_write> m4: array<vec4<f32>>;
@group(0) @binding(19) var<storage, read_write> v4: array<vec4<f32>>;
#endif
#if SETS > 5
@group(0) @binding(20) var<storage, read_write> weight5: array<vec4<f32>>;
@group(0) @binding(21) var<storage, read> gradient5: array<vec4<f32>>;
@group(0) @binding(22) var<storage, read_write> m5: array<vec4<f32>>;
@group(0) @binding(23) var<storage, read_write> v5: array<vec4<f32>>;
#endif
#if SETS > 6
@group(0) @binding(24) var<storage, read_write> weight6: array<vec4<f32>>;
@group(0) @binding(25) var<storage, read> gradient6: array<vec4<f32>>;
@group(0) @binding(26) var<storage, read_write> m6: array<vec4<f32>>;
@group(0) @binding(27) var<storage, read_write> v6: array<vec4<f32>>;
#endif
#if SETS > 7
@group(0) @binding(28) var<storage, read_write> weight7: array<vec4<f32>>;
@group(0) @binding(29) var<storage, read> gradient7: array<vec4<f32>>;
@group(0) @binding(30) var<storage, read_write> m7: array<vec4<f32>>;
@group(0) @binding(31) var<storage, read_write> v7: array<vec4<f32>>;
#endif
#ifdef SCALED
@group(0) @binding(#{SCALE}) var<storage, read> scale: array<f32>;
#endif
var<immediate> p: Params;

struct Held {
    weight: vec4<f32>,
    gradient: vec4<f32>,
    m: vec4<f32>,
    v: vec4<f32>,
}

fn load(tensor: u32, i: u32) -> Held {
    switch tensor {
        case 0u: {
            return Held(weight0[i], gradient0[i], m0[i], v0[i]);
        }
#if SETS > 1
        case 1u: {
            return Held(weight1[i], gradient1[i], m1[i], v1[i]);
        }
#endif
#if SETS > 2
        case 2u: {
            return Held(weight2[i], gradient2[i], m2[i], v2[i]);
        }
#endif
#if SETS > 3
        case 3u: {
            return Held(weight3[i], gradient3[i], m3[i], v3[i]);
        }
#endif
#if SETS > 4
        case 4u: {
            return Held(weight4[i], gradient4[i], m4[i], v4[i]);
        }
#endif
#if SETS > 5
        case 5u: {
            return Held(weight5[i], gradient5[i], m5[i], v5[i]);
        }
#endif
#if SETS > 6
        case 6u: {
            return Held(weight6[i], gradient6[i], m6[i], v6[i]);
        }
#endif
#if SETS > 7
        case 7u: {
            return Held(weight7[i], gradient7[i], m7[i], v7[i]);
        }
#endif
        default: {
            return Held();
        }
    }
}

fn store(tensor: u32, i: u32, updated: Held) {
    switch tensor {
        case 0u: {
            weight0[i] = updated.weight;
            m0[i] = updated.m;
            v0[i] = updated.v;
        }
#if SETS > 1
        case 1u: {
            weight1[i] = updated.weight;
            m1[i] = updated.m;
            v1[i] = updated.v;
        }
#endif
#if SETS > 2
        case 2u: {
            weight2[i] = updated.weight;
            m2[i] = updated.m;
            v2[i] = updated.v;
        }
#endif
#if SETS > 3
        case 3u: {
            weight3[i] = updated.weight;
            m3[i] = updated.m;
            v3[i] = updated.v;
        }
#endif
#if SETS > 4
        case 4u: {
            weight4[i] = updated.weight;
            m4[i] = updated.m;
            v4[i] = updated.v;
        }
#endif
#if SETS > 5
        case 5u: {
            weight5[i] = updated.weight;
            m5[i] = updated.m;
            v5[i] = updated.v;
        }
#endif
#if SETS > 6
        case 6u: {
            weight6[i] = updated.weight;
            m6[i] = updated.m;
            v6[i] = updated.v;
        }
#endif
#if SETS > 7
        case 7u: {
            weight7[i] = updated.weight;
            m7[i] = updated.m;
            v7[i] = updated.v;
        }
#endif
        default: {
        }
    }
}

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = group_index(group, groups);
    let tensor = tensor_of(index, p.ends_low, p.ends_high);
    if tensor >= #{SETS}u {
        return;
    }
#ifdef SCALED
    // A scale that is no number marks bad gradients: the update does not happen. The bits are asked,
    // because compilers may assume that floats are never NaN.
    if (bitcast<u32>(scale[0]) & 0x7f800000u) == 0x7f800000u {
        return;
    }
    let factor = scale[0];
#else
    let factor = 1.0;
#endif
    let elements = one_of(p.elements_low, p.elements_high, tensor);
    let first = start_of(tensor, p.ends_low, p.ends_high);
    let own = share(index - first, p.chunk, (elements + 3u) / 4u);
    for (var i = own.x + local; i < own.y; i += #{WG}u) {
        let old = load(tensor, i);
        let g = old.gradient * factor + p.l2 * old.weight;
        let m = p.beta1 * old.m + p.one_minus_beta1 * g;
        let v = p.beta2 * old.v + p.one_minus_beta2 * g * g;
        let moved = old.weight * p.shrink - p.step_size * m / (sqrt(v) * p.root_correction + p.eps);
        // What lies past the end may be another tensor's.
        let inside = vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(elements);
        store(tensor, i, Held(
            select(old.weight, moved, inside),
            old.gradient,
            select(old.m, m, inside),
            select(old.v, v, inside),
        ));
    }
}
