// Running sums over a workgroup, by subgroups: the variant of `scan.wgsl`.
//use reduce
//
// The order of invocations is that of subgroups and, in each, of its invocations.

var<workgroup> counts: array<u32, LANES>;

// The sum of `n` over the invocations before this one, and over all. Every invocation must call it.
fn workgroup_scan(n: u32, lane: Lane) -> vec2<u32> {
    let own = subgroupAdd(n);
    if subgroupBroadcastFirst(lane.index) == lane.index {
        counts[lane.subgroup] = own;
    }
    workgroupBarrier();
    // A lane has one subgroup's, and others where those are small.
    var all = 0u;
    if lane.of_subgroup < lane.subgroups {
        all = counts[lane.of_subgroup];
    }
    var before = select(0u, all, lane.of_subgroup < lane.subgroup);
    let size = min(lane.subgroup_size, LANES);
    if lane.subgroups > size {
        for (var i = lane.of_subgroup + size; i < lane.subgroups; i += size) {
            all += counts[i];
            before += select(0u, counts[i], i < lane.subgroup);
        }
    }
    before = subgroupAdd(before) + subgroupExclusiveAdd(n);
    all = subgroupAdd(all);
    workgroupBarrier(); // before the next scan writes where this one is read
    return vec2(before, all);
}
