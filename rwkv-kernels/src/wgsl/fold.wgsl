// Sums of up to eight values over neighbouring lanes, and the largest of eight lanes.
//use reduce
//
// The kernel declares LANES, ROW_LANES, which the variant needs, a struct `Call` and the function `keep`, which is given each sum,
// with `call` passed on.
// `fold_subgroup.wgsl` declares the same names.

fn place_of(lane: Lane) -> u32 {
    return lane.index;
}

// Lanes over which is summed.
fn folded(lane: Lane) -> u32 {
    return 8u;
}

// The largest of eight lanes from a multiple of eight on. Every invocation of the workgroup must call it.
fn largest_of_eight(x: u32, lane: Lane) -> u32 {
    partials[lane.index] = bitcast<f32>(x);
    workgroupBarrier();
    let first = lane.index / 8u * 8u;
    var largest = x;
    for (var i = first; i < first + 8u; i++) {
        largest = max(largest, bitcast<u32>(partials[i]));
    }
    workgroupBarrier();
    return largest;
}

// Sums the first `count` of eight values, 2, 4 or 8. Every invocation of the workgroup must call it.
fn fold(low: vec4<f32>, high: vec4<f32>, count: u32, call: Call, lane: Lane) {
    var values = array(low, high);
    for (var k = 0u; k < count; k++) {
        partials[lane.index] = values[k / 4u][k % 4u];
        workgroupBarrier();
        let place = 8u * lane.index;
        if place < LANES {
            var sum = 0.0;
            for (var i = place; i < place + 8u; i++) {
                sum += partials[i];
            }
            keep(sum, k, place, 8u, call);
        }
        workgroupBarrier();
    }
}
