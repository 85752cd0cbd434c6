// Rows of a table by id (forward), or the gradient of the table (BACKWARD), for the table rows
// first_row .. first_row + rows. TABLE is the table's dtype: 0 f32, 1 f16, 2 bf16.
#import index::{group_index, thread_index}

#ifdef F16
alias Elem = f16;
#else
alias Elem = f32;
#endif

struct Params {
    ids: u32,
    width: u32,
    first_row: u32,
    rows: u32,
    // Rows of the whole table; a larger id gives zeros.
    all_rows: u32,
}
var<immediate> p: Params;

#ifdef BACKWARD
@group(0) @binding(0) var<storage, read> dy: array<Elem>;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> dtable: array<f32>;

// A workgroup a position: the first that holds an id sums all of them, in order.
@compute @workgroup_size(#{WG})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let first = group_index(group, groups);
    if first >= p.ids {
        return;
    }
    let id = ids[first];
    if id < p.first_row || id - p.first_row >= p.rows {
        return;
    }
    for (var i = 0u; i < first; i++) {
        if ids[i] == id {
            return;
        }
    }
    let base = (id - p.first_row) * p.width;
    for (var column = local; column < p.width; column += #{WG}u) {
        dtable[base + column] = f32(dy[first * p.width + column]);
    }
    for (var i = first + 1u; i < p.ids; i++) {
        if ids[i] == id {
            for (var column = local; column < p.width; column += #{WG}u) {
                dtable[base + column] += f32(dy[i * p.width + column]);
            }
        }
    }
}
#else
@group(0) @binding(0) var<storage, read> table: array<u32>;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, read_write> y: array<Elem>;

fn entry(i: u32) -> f32 {
#if TABLE == 0
    return bitcast<f32>(table[i]);
#else
    let word = table[i / 2u];
#if TABLE == 1
    return unpack2x16float(word)[i % 2u];
#else
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, i % 2u == 1u));
#endif
#endif
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let i = thread_index(group, groups, local, 64u);
    if i >= p.ids * p.width {
        return;
    }
    let id = ids[i / p.width];
    if id >= p.all_rows {
        y[i] = Elem(0.0);
    } else if id >= p.first_row && id - p.first_row < p.rows {
        y[i] = Elem(entry((id - p.first_row) * p.width + i % p.width));
    }
}
#endif
