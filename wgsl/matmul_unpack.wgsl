// A quantised matrix as f32 panels of 32 columns, zeros past the last row: what matmul_pack is for float ones. The
// scratch panels are all that is ever unpacked. TRANS: stored [columns, rows], the groups along the rows.
#import quantized::{quad, quad_word, scale_word}

struct Params {
    rows: u32,
    padded_rows: u32,
    columns: u32,
    start: u32,
    // Elements from one stored row to the next.
    ld: u32,
    packed_panel: u32,
}

@group(0) @binding(0) var<storage, read> b: array<u32>;
@group(0) @binding(1) var<storage, read> scales: array<u32>;
@group(0) @binding(2) var<storage, read_write> packed_out: array<vec4<f32>>;
var<immediate> p: Params;

const STEP = 32u;

fn load(element: u32) -> vec4<f32> {
    let i = element / 4u;
    return quad(i, b[quad_word(i)], scales[scale_word(i)]);
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = group.y * 32u + lane * 4u;
    let to = (group.y * p.packed_panel + lane * 4u) / 4u;
    let last = min(p.padded_rows, (group.x + 1u) * STEP);
#ifdef TRANS
    // Columns past the end repeat the last one; their products are not stored.
    var column_at: array<u32, 4>;
    for (var j = 0u; j < 4u; j++) {
        column_at[j] = p.start + min(column + j, p.columns - 1u) * p.ld;
    }
    for (var r = group.x * STEP; r < last; r += 4u) {
        // A stored row ends with zeros.
        let x = load(column_at[0] + r);
        let y = load(column_at[1] + r);
        let z = load(column_at[2] + r);
        let w = load(column_at[3] + r);
        packed_out[to + r * 8u] = vec4<f32>(x.x, y.x, z.x, w.x);
        packed_out[to + (r + 1u) * 8u] = vec4<f32>(x.y, y.y, z.y, w.y);
        packed_out[to + (r + 2u) * 8u] = vec4<f32>(x.z, y.z, z.z, w.z);
        packed_out[to + (r + 3u) * 8u] = vec4<f32>(x.w, y.w, z.w, w.w);
    }
#else
    for (var r = group.x * STEP; r < last; r++) {
        var v = vec4<f32>();
        if r < p.rows && column < p.columns {
            v = load(p.start + r * p.ld + column);
        }
        packed_out[to + r * 8u] = v;
    }
#endif
}
