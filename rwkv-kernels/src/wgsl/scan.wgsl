// Running sums over a workgroup.
//use reduce

var<workgroup> counts: array<u32, LANES>;

// The sum of `n` over the invocations before this one, and over all. Every invocation must call it.
fn workgroup_scan(n: u32, lane: Lane) -> vec2<u32> {
    counts[lane.index] = n;
    var sum = n;
    for (var stride = 1u; stride < LANES; stride *= 2u) {
        workgroupBarrier();
        if lane.index >= stride {
            sum += counts[lane.index - stride];
        }
        workgroupBarrier();
        counts[lane.index] = sum;
    }
    workgroupBarrier();
    let all = counts[LANES - 1u];
    workgroupBarrier(); // before the next scan writes where this one is read
    return vec2(sum - n, all);
}
