// Copies a strided matrix of any float dtype into f32 panels of 32 columns (or, with a panel stride of
// 32, into padded rows), zeros beyond its edges. Rows come in blocks, in order or reversed.
#ifdef S_F16
alias SElem = f16;
#else
#ifdef S_BF16
alias SElem = u32;
#else
alias SElem = f32;
#endif
#endif

struct Params {
    blocks: u32,
    // Rows of a block here and in the packed form.
    rows: u32,
    padded_rows: u32,
    columns: u32,
    reversed: u32,
    start: u32,
    batch: u32,
    block_stride: u32,
    row_stride: u32,
    column_stride: u32,
    // Packed form, in elements; columns end at `width`.
    width: u32,
    packed_row: u32,
    packed_panel: u32,
    packed_batch: u32,
}

@group(0) @binding(0) var<storage, read> source: array<SElem>;
@group(0) @binding(1) var<storage, read_write> packed_out: array<vec4<f32>>;
var<immediate> p: Params;

const STEP = 32u;

fn load(i: u32) -> f32 {
#ifdef S_BF16
    let word = source[i >> 1u];
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u));
#else
    return f32(source[i]);
#endif
}

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = group.y * 32u + lane * 4u;
    if column >= p.width {
        return;
    }
    let batch = group.z / p.blocks;
    let block = group.z % p.blocks;
    let taken = select(block, p.blocks - 1u - block, p.reversed != 0u);
    let base = p.start + batch * p.batch + taken * p.block_stride + column * p.column_stride;
    let to = batch * p.packed_batch + group.y * p.packed_panel
        + block * p.padded_rows * p.packed_row + lane * 4u;
    let last = min(p.padded_rows, (group.x + 1u) * STEP);
    for (var r = group.x * STEP; r < last; r++) {
        var v = vec4<f32>();
        let at = base + r * p.row_stride;
        if r < p.rows {
            if column + 3u < p.columns {
                v = vec4<f32>(load(at), load(at + p.column_stride), load(at + 2u * p.column_stride),
                    load(at + 3u * p.column_stride));
            } else {
                for (var j = 0u; j < 3u; j++) {
                    if column + j < p.columns {
                        v[j] = load(at + j * p.column_stride);
                    }
                }
            }
        }
        packed_out[(to + r * p.packed_row) / 4u] = v;
    }
}
