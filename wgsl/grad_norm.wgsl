// Partial sums of squares of up to eight tensors: part t of a tensor takes vectors t, t + parts, …
#import index::thread_index
#import sets::{one_of, start_of, tensor_of}

#ifdef F16
alias Elem4 = vec4<f16>;
#else
alias Elem4 = vec4<f32>;
#endif

struct Params {
    // Of each tensor.
    elements_low: vec4<u32>,
    elements_high: vec4<u32>,
    // Part behind each tensor's last.
    ends_low: vec4<u32>,
    ends_high: vec4<u32>,
    // Where the first tensor's partial sums begin.
    start: u32,
}

@group(0) @binding(0) var<storage, read_write> partial: array<f32>;
@group(0) @binding(1) var<storage, read> x0: array<Elem4>;
#if SETS > 1
@group(0) @binding(2) var<storage, read> x1: array<Elem4>;
#endif
#if SETS > 2
@group(0) @binding(3) var<storage, read> x2: array<Elem4>;
#endif
#if SETS > 3
@group(0) @binding(4) var<storage, read> x3: array<Elem4>;
#endif
#if SETS > 4
@group(0) @binding(5) var<storage, read> x4: array<Elem4>;
#endif
#if SETS > 5
@group(0) @binding(6) var<storage, read> x5: array<Elem4>;
#endif
#if SETS > 6
@group(0) @binding(7) var<storage, read> x6: array<Elem4>;
#endif
#if SETS > 7
@group(0) @binding(8) var<storage, read> x7: array<Elem4>;
#endif
var<immediate> p: Params;

fn load(tensor: u32, i: u32) -> vec4<f32> {
    switch tensor {
        case 0u: {
            return vec4<f32>(x0[i]);
        }
#if SETS > 1
        case 1u: {
            return vec4<f32>(x1[i]);
        }
#endif
#if SETS > 2
        case 2u: {
            return vec4<f32>(x2[i]);
        }
#endif
#if SETS > 3
        case 3u: {
            return vec4<f32>(x3[i]);
        }
#endif
#if SETS > 4
        case 4u: {
            return vec4<f32>(x4[i]);
        }
#endif
#if SETS > 5
        case 5u: {
            return vec4<f32>(x5[i]);
        }
#endif
#if SETS > 6
        case 6u: {
            return vec4<f32>(x6[i]);
        }
#endif
#if SETS > 7
        case 7u: {
            return vec4<f32>(x7[i]);
        }
#endif
        default: {
            return vec4<f32>(0.0);
        }
    }
}

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let index = thread_index(group, groups, local, #{WG}u);
    let tensor = tensor_of(index, p.ends_low, p.ends_high);
    if tensor >= #{SETS}u {
        return;
    }
    let elements = one_of(p.elements_low, p.elements_high, tensor);
    let first = start_of(tensor, p.ends_low, p.ends_high);
    let parts = one_of(p.ends_low, p.ends_high, tensor) - first;
    let part = index - first;
    let whole = elements / 4u;
    var sum = vec4<f32>(0.0);
    for (var i = part; i < whole; i += parts) {
        let v = load(tensor, i);
        sum += v * v;
    }
    if whole % parts == part {
        let v = load(tensor, whole);
        let rest = vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(elements % 4u);
        sum += select(vec4<f32>(0.0), v * v, rest);
    }
    partial[p.start + index] = (sum.x + sum.y) + (sum.z + sum.w);
}
