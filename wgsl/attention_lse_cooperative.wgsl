// The log-sum-exp of the scores of each query row, f32 [B, H, T], on matrix units: the first of the two passes over the keys
// of flash attention there (attention_cooperative.wgsl).
#import attention_mask::{Params, NOTHING, visible_keys, row_visible, query_head, key_head, row_at}
#import matrix_units::{AMatrix, BLOCKS, BMatrix, Columns, Elem, FRAGMENTS, PAD, Row, SIZE, THREADS, next_row}
#import attention_units::{EACH, Fours, K, OTHERS, PER_ROW, Q, ROWS, SCORES_LINE, bits_of_key, load, read_own, row_bits, score, scores, stage}

@group(0) @binding(0) var<storage, read> q: array<vec4<f16>>;
@group(0) @binding(1) var<storage, read> k: array<vec4<f16>>;
@group(0) @binding(2) var<storage, read> query_bits: array<u32>;
@group(0) @binding(3) var<storage, read> key_bits: array<u32>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;
var<immediate> p: Params;

var<workgroup> tile_bits: array<u32, OTHERS>;
// Each thread's largest score, and its sum of exponentials.
var<workgroup> partial: array<vec2<f32>, THREADS>;

fn stored(which: u32, i: u32) -> vec4<Elem> {
    if which == Q {
        return q[i];
    }
    return k[i];
}

@compute @workgroup_size(#{THREADS})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    let shared_heads = p.heads / p.kv_heads;
    let rows = p.queries * shared_heads;
    let line = local / PER_ROW;
    let x = local % PER_ROW;
    for (var round = 0u; round < BLOCKS; round += subgroups) {
        let first = group.x * ROWS + round * SIZE;
        let strips = min(subgroups, BLOCKS - round);
        let mine = select(0u, 1u, subgroup < strips);
        let row = first + line;
        let visible = row_visible(p, row);
        let bits = row_bits(group.z, row);
        var own = read_own(Q, group, first, local, subgroup * SIZE, mine);
        var peak = NOTHING;
        var sum = 0.0;
        var next: Fours;
        load(&next, K, group, 0u, local);
        // No row of this workgroup sees a key past its last row's.
        let end = visible_keys(p, (min(first + ROWS, rows) - 1u) / shared_heads);
        for (var key = 0u; key < end; key += OTHERS) {
            stage(&next, local);
            workgroupBarrier();
            load(&next, K, group, key + OTHERS, local);
            score(&own, subgroup * SIZE, mine);
            if local < OTHERS {
                tile_bits[local] = bits_of_key(group.z, key + local);
            }
            workgroupBarrier();
            var highest = peak;
            for (var i = 0u; i < EACH; i++) {
                let j = x + PER_ROW * i;
                if key + j < visible && (bits & tile_bits[j]) != 0u {
                    highest = max(highest, scores[line * SCORES_LINE + j] * p.scale);
                }
            }
            sum *= exp(peak - highest);
            peak = highest;
            for (var i = 0u; i < EACH; i++) {
                let j = x + PER_ROW * i;
                if key + j < visible && (bits & tile_bits[j]) != 0u {
                    sum += exp(scores[line * SCORES_LINE + j] * p.scale - peak);
                }
            }
        }
        // Each thread has seen its own keys only.
        partial[local] = vec2<f32>(peak, sum);
        workgroupBarrier();
        if x == 0u && line < strips * SIZE && row < rows {
            for (var i = 1u; i < PER_ROW; i++) {
                let other = partial[local + i];
                let highest = max(peak, other.x);
                sum = sum * exp(peak - highest) + other.y * exp(other.x - highest);
                peak = highest;
            }
            // A row that sees no key has NOTHING as its log-sum-exp.
            lse[row_at(p, group.z, group.y, row)] = select(NOTHING, peak + log(sum), sum > 0.0);
        }
        workgroupBarrier();
    }
}
