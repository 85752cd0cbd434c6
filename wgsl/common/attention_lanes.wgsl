#define_import_path attention_lanes
// How the attention kernels for CPU drivers lay out heads, and share the loads of a step's keys, values or rows.
#import lanes::LANES

// Keys, or rows, of one step.
const STEP: u32 = #{KEYS}u;
// A head is BLOCKS × BLOCK vec4s, so that each loop is short enough to be unrolled by the driver.
const BLOCKS: u32 = #{BLOCKS}u;
const BLOCK: u32 = #{BLOCK}u;
const VECTORS: u32 = BLOCKS * BLOCK;
// Vectors of a step that each of LANES threads loads.
const LOADS: u32 = (STEP * VECTORS + LANES - 1u) / LANES;

// Of the places `at` where a step's heads begin, those of the vectors that thread `lane` loads.
fn origins(at: array<u32, STEP>, lane: u32) -> array<u32, LOADS> {
    var heads = at;
    var origin: array<u32, LOADS>;
    for (var l = 0u; l < LOADS; l++) {
        origin[l] = heads[0];
        for (var j = 1u; j < STEP; j++) {
            origin[l] = select(origin[l], heads[j], l * LANES + lane >= j * VECTORS);
        }
    }
    return origin;
}
