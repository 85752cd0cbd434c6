// Copies a strided matrix of any float dtype into f32 panels of 32 columns (or, with a panel stride of
// 32, into padded rows), zeros beyond its edges. Rows come in blocks, in order or reversed. LINES: they are f32 and whole
// vec4s. A thread goes down STEP rows.
#ifdef LINES
alias SElem = vec4<f32>;
#else
#ifdef S_F16
alias SElem = f16;
#else
#ifdef S_BF16
alias SElem = u32;
#else
alias SElem = f32;
#endif
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

const STEP = #{STEP}u;

#ifdef LINES
alias Columns = u32;

fn load(at: u32) -> vec4<f32> {
    return source[at / 4u];
}
#else
alias Columns = vec4<u32>;

fn element(i: u32) -> f32 {
#ifdef S_BF16
    let word = source[i >> 1u];
    return bitcast<f32>(select(word << 16u, word & 0xffff0000u, (i & 1u) == 1u));
#else
    return f32(source[i]);
#endif
}

fn load(at: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(element(at.x), element(at.y), element(at.z), element(at.w));
}
#endif

@compute @workgroup_size(8)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let column = group.y * 32u + lane * 4u;
    if column >= p.width {
        return;
    }
    let batch = group.z / p.blocks;
    let block = group.z % p.blocks;
    let taken = select(block, p.blocks - 1u - block, p.reversed != 0u);
    let columns = vec4<u32>(column) + vec4<u32>(0u, 1u, 2u, 3u);
    let inside = columns < vec4<u32>(p.columns);
    let base = p.start + batch * p.batch + taken * p.block_stride;
    // What is outside is read from the last column and put to zero.
#ifdef LINES
    var at = base + min(column, p.columns - 4u);
#else
    var at = vec4<u32>(base) + min(columns, vec4<u32>(p.columns - 1u)) * p.column_stride;
#endif
    let first = group.x * STEP;
    at += Columns(first * p.row_stride);
    var to = (batch * p.packed_batch + group.y * p.packed_panel
        + (block * p.padded_rows + first) * p.packed_row) / 4u + lane;
    let last = min(p.rows, first + STEP);
    var r = first;
    for (; r + 4u <= last; r += 4u) {
        for (var k = 0u; k < 4u; k++) {
            packed_out[to + k * p.packed_row / 4u] =
                select(vec4<f32>(), load(at + Columns(k * p.row_stride)), inside);
        }
        at += Columns(4u * p.row_stride);
        to += p.packed_row;
    }
    for (; r < last; r++) {
        packed_out[to] = select(vec4<f32>(), load(at), inside);
        at += Columns(p.row_stride);
        to += p.packed_row / 4u;
    }
    for (; r < min(p.padded_rows, first + STEP); r++) {
        packed_out[to] = vec4<f32>();
        to += p.packed_row / 4u;
    }
}
