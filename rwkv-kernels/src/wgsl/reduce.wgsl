// Sums over a workgroup, in a fixed tree.
//
// The same bits on every device that rounds to nearest. The kernel declares LANES, the size of its one-dimensional
// workgroup: a power of two. Its entry point takes a `Lane` and passes it on. `reduce_subgroup.wgsl` declares the same
// names.

struct Lane {
    @builtin(local_invocation_index) index: u32,
}

var<workgroup> partials: array<f32, LANES>;

// The sum of `x` over all invocations, in each of them. Every invocation must call it.
//
// partials[i] ends as a sum of log2(LANES) levels: ((x[0] + x[L/2]) + (x[L/4] + x[3L/4])) + .., so that an `x` passes
// log2(LANES) additions.
fn workgroup_sum(x: f32, lane: Lane) -> f32 {
    partials[lane.index] = x;
    for (var stride = LANES / 2u; stride > 0u; stride /= 2u) {
        workgroupBarrier();
        if lane.index < stride {
            partials[lane.index] += partials[lane.index + stride];
        }
    }
    workgroupBarrier();
    let sum = partials[0];
    workgroupBarrier(); // before the next sum writes where this one is read
    return sum;
}

// The same; in `reduce_subgroup.wgsl`, of sums in turn, one is in slot 0 and the next in slot 1.
fn workgroup_sum_in(slot: u32, x: f32, lane: Lane) -> f32 {
    return workgroup_sum(x, lane);
}
