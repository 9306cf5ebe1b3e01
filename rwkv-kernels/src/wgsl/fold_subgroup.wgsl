// Sums of up to eight values over neighbouring lanes, in subgroups: the variant of `fold.wgsl`.
//use reduce
//subgroups of 8
//
// Of two values a lane keeps one and gives its neighbour the other, which does so the other way round. Eight become one to a
// lane in seven such exchanges; by themselves they would take three each.
//
// As in `reduce_subgroup.wgsl` subgroups are full, and nothing is assumed of how invocations fall into them. The order of a sum
// is fixed.

// Which of the workgroup's lanes this is, those of a subgroup one after the other.
fn place_of(lane: Lane) -> u32 {
    return lane.subgroup * lane.subgroup_size + lane.of_subgroup;
}

// Lanes over which is summed: of one subgroup, and of one row.
fn folded(lane: Lane) -> u32 {
    return min(min(lane.subgroup_size, LANES), ROW_LANES & (~ROW_LANES + 1u));
}

// The largest of eight lanes from a multiple of eight on. Every invocation of the workgroup must call it.
fn largest_of_eight(x: u32, lane: Lane) -> u32 {
    var largest = x;
    for (var apart = 1u; apart < 8u; apart *= 2u) {
        largest = max(largest, subgroupShuffleXor(largest, apart));
    }
    return largest;
}

fn exchanged(a: f32, b: f32, apart: u32, lane: Lane) -> f32 {
    let upper = (lane.of_subgroup & apart) != 0u;
    return select(a, b, upper) + subgroupShuffleXor(select(b, a, upper), apart);
}

fn exchanged4(x: vec4<f32>, lane: Lane) -> f32 {
    return exchanged(exchanged(x.x, x.y, 1u, lane), exchanged(x.z, x.w, 1u, lane), 2u, lane);
}

// Sums the first `count` of eight values, 2, 4 or 8. Every invocation of the workgroup must call it.
fn fold(low: vec4<f32>, high: vec4<f32>, count: u32, call: Call, lane: Lane) {
    var sum = 0.0;
    if count == 8u {
        sum = exchanged(exchanged4(low, lane), exchanged4(high, lane), 4u, lane);
    } else if count == 4u {
        sum = exchanged4(low, lane);
    } else {
        sum = exchanged(low.x, low.y, 1u, lane);
    }
    let size = folded(lane);
    for (var apart = count; apart < size; apart *= 2u) {
        sum += subgroupShuffleXor(sum, apart);
    }
    let which = lane.of_subgroup % size;
    if which < count {
        keep(sum, which, place_of(lane) - which, size, call);
    }
}
