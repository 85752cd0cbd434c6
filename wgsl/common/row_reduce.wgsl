#define_import_path row_reduce
// Sums and maxima over a workgroup of WG threads, in a fixed order; every thread gets the result. With SUBGROUP the
// workgroup is one subgroup.

#ifdef SUBGROUP
fn row_sum(value: f32, local: u32) -> f32 {
    return subgroupAdd(value);
}

fn row_max(value: f32, local: u32) -> f32 {
    return subgroupMax(value);
}
#else
var<workgroup> partial: array<f32, #{WG}>;

fn row_sum(value: f32, local: u32) -> f32 {
    partial[local] = value;
    for (var stride = #{WG}u / 2u; stride > 0u; stride /= 2u) {
        workgroupBarrier();
        if local < stride {
            partial[local] += partial[local + stride];
        }
    }
    workgroupBarrier();
    let total = partial[0];
    workgroupBarrier();
    return total;
}

fn row_max(value: f32, local: u32) -> f32 {
    partial[local] = value;
    for (var stride = #{WG}u / 2u; stride > 0u; stride /= 2u) {
        workgroupBarrier();
        if local < stride {
            partial[local] = max(partial[local], partial[local + stride]);
        }
    }
    workgroupBarrier();
    let largest = partial[0];
    workgroupBarrier();
    return largest;
}
#endif
