#define_import_path lanes
// Loads that the 8 threads of a workgroup share where they are one subgroup (LANES 8, else 1): each loads other vectors and
// they are handed round. A driver on the CPU checks the bounds of a load that is the same for all threads once for each
// component, which costs more than the arithmetic on it.

const LANES: u32 = #{LANES}u;

// The `x` of thread `lane` of LANES.
fn from_lane(x: vec4<f32>, lane: u32) -> vec4<f32> {
#if LANES == 1
    return x;
#else
    return subgroupShuffle(x, lane);
#endif
}
