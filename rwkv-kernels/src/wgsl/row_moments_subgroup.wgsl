// The mean and the variance of a row, by subgroups: the variant of `row_moments.wgsl`.
//use reduce
//subgroups of 8
//
// The elements of a subgroup are a part. Of parts P with n elements, a mean m and squares s of what differs from it, the row has the mean
// M = sum n m / sum n and the squares sum s + n (m - M)^2 (Chan, Golub, LeVeque, "Algorithms for computing the sample
// variance", 1983). As in `reduce_subgroup.wgsl` subgroups are full, and nothing is assumed of how invocations fall into them.

struct Part {
    mean: f32,
    count: u32,
}

fn part_of(sum: f32, count: u32, all: u32, lane: Lane) -> Part {
    let of_part = subgroupAdd(count);
    return Part(subgroupAdd(sum) / f32(max(of_part, 1u)), of_part);
}

fn row_moments(slot: u32, part: Part, squares: f32, all: u32, lane: Lane) -> vec2<f32> {
    let of_part = subgroupAdd(squares);
    if LANES <= 8u {
        return vec2(part.mean, of_part / f32(all)); // there is one
    }
    let most = LANES / 8u;
    let first = 3u * most * slot;
    if lane.of_subgroup == 0u {
        partials[first + lane.subgroup] = f32(part.count);
        partials[first + most + lane.subgroup] = part.mean;
        partials[first + 2u * most + lane.subgroup] = of_part;
    }
    workgroupBarrier();
    // Where subgroups are small, a lane has several.
    let size = min(lane.subgroup_size, LANES);
    var sum = 0.0;
    for (var i = lane.of_subgroup; i < lane.subgroups; i += size) {
        sum += partials[first + i] * partials[first + most + i];
    }
    let mean = subgroupAdd(sum) / f32(all);
    sum = 0.0;
    for (var i = lane.of_subgroup; i < lane.subgroups; i += size) {
        let apart = partials[first + most + i] - mean;
        sum += partials[first + 2u * most + i] + partials[first + i] * apart * apart;
    }
    return vec2(mean, subgroupAdd(sum) / f32(all));
}
