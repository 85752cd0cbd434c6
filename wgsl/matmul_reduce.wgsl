// Adds the partial sums of a product whose k was split, in order, and applies the epilogue.
#import activation::{activation, ended}
#import index::thread_index

#ifdef F16
alias CElem = f16;
#else
alias CElem = f32;
#endif

struct Params {
    elements: u32,
    // Elements of one batch entry: its parts lie one after the other.
    matrix: u32,
    n: u32,
    splits: u32,
    sums_start: u32,
    c_start: u32,
    has_bias: u32,
    ending: u32,
    function: u32,
    fa: f32,
    fb: f32,
}

@group(0) @binding(0) var<storage, read> parts: array<f32>;
@group(0) @binding(1) var<storage, read_write> c: array<CElem>;
@group(0) @binding(2) var<storage, read> bias: array<f32>;
@group(0) @binding(3) var<storage, read> other: array<CElem>;
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
    let at = p.sums_start + (i / p.matrix) * p.matrix * p.splits + i % p.matrix;
    var v = 0.0;
    for (var s = 0u; s < p.splits; s++) {
        v += parts[at + s * p.matrix];
    }
    if p.has_bias != 0u {
        v += bias[i % p.n];
    }
    v = activation(p.function, p.fa, p.fb, v);
    if p.ending != 0u {
        v = ended(p.ending, f32(other[p.c_start + i]), v, f32(CElem(v)));
    }
    c[p.c_start + i] = CElem(v);
}
