// Sums over a workgroup, by subgroups: the variant of `reduce.wgsl`.
//
// Nothing is assumed of how invocations fall into subgroups or how large those are, but that they are full: the
// workgroup is a multiple of them, or less than one. What falls where and in which order a subgroup adds is the
// device's: the same at every call on one device, but not across devices.

struct Lane {
    @builtin(local_invocation_index) index: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) of_subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
}

var<workgroup> partials: array<f32, LANES>;

// The sum of `x` over all invocations, in each of them. Every invocation must call it.
//
// An `x` passes at most size - 1 additions in a subgroup of that size, then as many over the subgroups, each of whose
// lanes may have added several.
fn workgroup_sum(x: f32, lane: Lane) -> f32 {
    let sum = workgroup_sum_in(0u, x, lane);
    workgroupBarrier(); // before the next sum writes where this one is read
    return sum;
}

// The same, without the last barrier where it can: of sums in turn, one is in slot 0 and the next in slot 1.
fn workgroup_sum_in(slot: u32, x: f32, lane: Lane) -> f32 {
    let first = slot * (LANES / 2u); // subgroups have four invocations at least
    let partial = subgroupAdd(x);
    if lane.of_subgroup == 0u {
        partials[first + lane.subgroup] = partial;
    }
    workgroupBarrier();
    var sum = 0.0;
    if lane.of_subgroup < lane.subgroups {
        sum = partials[first + lane.of_subgroup];
    }
    // There are no others where subgroups are large.
    let size = min(lane.subgroup_size, LANES);
    for (var i = lane.of_subgroup + size; i < lane.subgroups; i += size) {
        sum += partials[first + i];
    }
    return subgroupAdd(sum);
}
