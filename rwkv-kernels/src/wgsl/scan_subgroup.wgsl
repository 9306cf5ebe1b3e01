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
    var before = subgroupExclusiveAdd(n);
    var all = 0u;
    for (var i = 0u; i < lane.subgroups; i++) {
        if i < lane.subgroup {
            before += counts[i];
        }
        all += counts[i];
    }
    workgroupBarrier(); // before the next scan writes where this one is read
    return vec2(before, all);
}
