// loss = lse − logit of the label, and with BACKWARD dlogits = (p − onehot) · upstream of the row;
// a workgroup a row, nothing for ignored rows.
#import index::group_index
#ifndef BACKWARD
#import row_reduce::{row_max, row_sum}
#endif

#ifdef VEC4
alias V = vec4<f32>;
#ifdef F16
alias Stored = vec4<f16>;
#else
alias Stored = vec4<f32>;
#endif
fn total(v: V) -> f32 {
    return (v.x + v.y) + (v.z + v.w);
}
fn largest(v: V) -> f32 {
    return max(max(v.x, v.y), max(v.z, v.w));
}
fn component(v: V, i: u32) -> f32 {
    return v[i];
}
fn one_hot(i: u32, label: u32) -> V {
    return select(V(0.0), V(1.0), vec4<u32>(4u * i) + vec4<u32>(0u, 1u, 2u, 3u) == vec4<u32>(label));
}
const LANES: u32 = 4u;
#else
alias V = f32;
#ifdef F16
alias Stored = f16;
#else
alias Stored = f32;
#endif
fn total(v: V) -> f32 {
    return v;
}
fn largest(v: V) -> f32 {
    return v;
}
fn component(v: V, i: u32) -> f32 {
    return v;
}
fn one_hot(i: u32, label: u32) -> V {
    return select(0.0, 1.0, i == label);
}
const LANES: u32 = 1u;
#endif

const IGNORE: u32 = 0xffffffffu;

struct Params {
    rows: u32,
    // Elements of a row, in units of V.
    width: u32,
    first_row: u32,
}
var<immediate> p: Params;

@group(0) @binding(0) var<storage, read> logits: array<Stored>;
@group(0) @binding(1) var<storage, read> labels: array<u32>;
#ifdef BACKWARD
@group(0) @binding(2) var<storage, read> lse: array<f32>;
@group(0) @binding(3) var<storage, read> upstream: array<f32>;
@group(0) @binding(4) var<storage, read_write> dlogits: array<Stored>;
#else
@group(0) @binding(2) var<storage, read_write> loss: array<f32>;
@group(0) @binding(3) var<storage, read_write> lse: array<f32>;
#endif

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let row = group_index(group, groups);
    if row >= p.rows {
        return;
    }
    let base = row * p.width;
    let place = p.first_row + row;
    let label = labels[place];
#ifdef BACKWARD
    let scale = select(upstream[place], 0.0, label == IGNORE);
    let shift = lse[place];
    for (var i = local; i < p.width; i += #{WG}u) {
        let probability = exp(V(logits[base + i]) - shift);
        dlogits[base + i] = Stored((probability - one_hot(i, label)) * scale);
    }
#else
    var top = V(-3.4e38);
    for (var i = local; i < p.width; i += #{WG}u) {
        top = max(top, V(logits[base + i]));
    }
    let peak = row_max(largest(top), local);
    var sums = V(0.0);
    for (var i = local; i < p.width; i += #{WG}u) {
        sums += exp(V(logits[base + i]) - peak);
    }
    let log_sum = log(row_sum(total(sums), local));
    if local == 0u {
        lse[place] = peak + log_sum;
        if label == IGNORE {
            loss[place] = 0.0;
        } else {
            // From the peak: peak + log_sum would round away digits of a small loss.
            let logit = component(V(logits[base + label / LANES]), label % LANES);
            loss[place] = (peak - logit) + log_sum;
        }
    }
#endif
}
