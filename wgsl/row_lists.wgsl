// For each output row the ascending list of its sources: first[row], then next[source]; the end is
// 0xffffffff. One thread makes one list, so nothing races and the order is fixed.
#import index::thread_index

struct Params {
    rows: u32,
    limit: u32,
}

@group(0) @binding(0) var<storage, read> rows: array<u32>;
@group(0) @binding(1) var<storage, read_write> first: array<u32>;
@group(0) @binding(2) var<storage, read_write> next: array<u32>;
var<immediate> p: Params;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let row = thread_index(group, groups, local, 64u);
    if row >= p.limit {
        return;
    }
    // From the end, so that each found source points at the one found before.
    var head = 0xffffffffu;
    for (var r = p.rows; r > 0u; r--) {
        if rows[r - 1u] == row {
            next[r - 1u] = head;
            head = r - 1u;
        }
    }
    first[row] = head;
}
