// Rotary embedding, half rotation: dimension i of a head turns with dimension i + half. Queries and, with PAIR, keys of the
// same tokens; a workgroup takes `chunk` tokens. HALF is half a head's dimensions in units of V.
#import index::{group_index, share}

#ifdef VEC4
alias V = vec4<f32>;
#ifdef F16
alias Stored = vec4<f16>;
#else
alias Stored = vec4<f32>;
#endif
#else
alias V = f32;
#ifdef F16
alias Stored = f16;
#else
alias Stored = f32;
#endif
#endif

struct Params {
    // Of the batch.
    rows: u32,
    // Of a sample.
    tokens: u32,
    q_heads: u32,
    k_heads: u32,
    // cos and sin are shared by the batch.
    shared_angles: u32,
    // −1 turns back: the backward.
    direction: f32,
    chunk: u32,
}

@group(0) @binding(0) var<storage, read> cosine: array<V>;
@group(0) @binding(1) var<storage, read> sine: array<V>;
@group(0) @binding(2) var<storage, read> q: array<Stored>;
@group(0) @binding(3) var<storage, read_write> turned_q: array<Stored>;
#ifdef PAIR
@group(0) @binding(4) var<storage, read> k: array<Stored>;
@group(0) @binding(5) var<storage, read_write> turned_k: array<Stored>;
#endif
var<immediate> p: Params;

// Threads stand side by side along half a head, and where it is shorter than the workgroup, by heads.
const BY_HEADS: u32 = max(#{WG}u / #{HALF}u, 1u);
// Vectors to a thread's next head. Added, as CPU drivers multiply integers slowly.
const NEXT: u32 = BY_HEADS * 2u * #{HALF}u;

@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let own = share(group_index(group, groups), p.chunk, p.rows);
    let first_head = local / #{HALF}u;
    if first_head >= BY_HEADS {
        return;
    }
    for (var row = own.x; row < own.y; row++) {
        let angles = select(row, row % p.tokens, p.shared_angles != 0u) * #{HALF}u;
        for (var i = local % #{HALF}u; i < #{HALF}u; i += #{WG}u) {
            let c = cosine[angles + i];
            let s = sine[angles + i] * p.direction;
            var low = (row * p.q_heads + first_head) * #{HALF}u * 2u + i;
            for (var head = first_head; head < p.q_heads; head += BY_HEADS) {
                let a = V(q[low]);
                let b = V(q[low + #{HALF}u]);
                turned_q[low] = Stored(a * c - b * s);
                turned_q[low + #{HALF}u] = Stored(b * c + a * s);
                low += NEXT;
            }
#ifdef PAIR
            low = (row * p.k_heads + first_head) * #{HALF}u * 2u + i;
            for (var head = first_head; head < p.k_heads; head += BY_HEADS) {
                let a = V(k[low]);
                let b = V(k[low + #{HALF}u]);
                turned_k[low] = Stored(a * c - b * s);
                turned_k[low + #{HALF}u] = Stored(b * c + a * s);
                low += NEXT;
            }
#endif
        }
    }
}
