// The mean and the variance of a row, by subgroups: the variant of `row_moments.wgsl`.
//use reduce
//subgroups of 8
//
// The elements of a subgroup are a part. Of parts P with n elements, a mean m and squares s of what differs from it, the row has the mean
// M = sum n m / sum n and the squares sum s + n (m - M)^2 (Chan, Golub, LeVeque, "Algorithms for computing the sample
// variance", 1983). As in `reduce_subgroup.wgsl` subgroups are full, and nothing is assumed of how invocations fall into them. LANES is
// eight at least.

struct Part {
    mean: f32,
    count: u32,
}

fn part_of(sum: f32, count: u32, all: u32, lane: Lane) -> Part {
    let of_part = subgroupAdd(count);
    return Part(subgroupAdd(sum) / f32(max(of_part, 1u)), of_part);
}

struct KeptPart {
    count: f32,
    mean: f32,
    squares: f32,
}

// Part i, nothing beyond the last.
fn kept_part(most: u32, i: u32, lane: Lane) -> KeptPart {
    if i < lane.subgroups {
        return KeptPart(partials[i], partials[most + i], partials[2u * most + i]);
    }
    return KeptPart();
}

fn squares_about(mean: f32, kept: KeptPart) -> f32 {
    let apart = kept.mean - mean;
    return kept.squares + kept.count * apart * apart;
}

fn row_moments(part: Part, squares: f32, all: u32, lane: Lane) -> vec2<f32> {
    let of_part = subgroupAdd(squares);
    let most = LANES / 8u;
    if lane.of_subgroup == 0u {
        partials[lane.subgroup] = f32(part.count);
        partials[most + lane.subgroup] = part.mean;
        partials[2u * most + lane.subgroup] = of_part;
    }
    workgroupBarrier();
    let own = kept_part(most, lane.of_subgroup, lane);
    var sum = own.count * own.mean;
    // Not as loops that are run once as a rule: those took 0.5 us.
    let size = min(lane.subgroup_size, LANES);
    let has_others = lane.subgroups > size;
    if has_others {
        for (var i = lane.of_subgroup + size; i < lane.subgroups; i += size) {
            let other = kept_part(most, i, lane);
            sum += other.count * other.mean;
        }
    }
    let mean = subgroupAdd(sum) / f32(all);
    sum = squares_about(mean, own);
    if has_others {
        for (var i = lane.of_subgroup + size; i < lane.subgroups; i += size) {
            sum += squares_about(mean, kept_part(most, i, lane));
        }
    }
    return vec2(mean, subgroupAdd(sum) / f32(all));
}
