// Exchanges among teams of 16 invocations of a subgroup: the variant of `sixteen.wgsl`.
//subgroups of 16
//
// As in `reduce_subgroup.wgsl` they are full, and nothing is assumed of how invocations fall into them.

struct Sixteen {
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) of_subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
}

fn place_of(lanes: Sixteen) -> u32 {
    return lanes.subgroup * lanes.subgroup_size + lanes.of_subgroup;
}

fn across(x: vec4<f32>, mask: u32, lanes: Sixteen) -> vec4<f32> {
    return subgroupShuffleXor(x, mask);
}

fn four_of(x: f32, first: u32, lanes: Sixteen) -> vec4<f32> {
    let at = lanes.of_subgroup / 16u * 16u + first;
    return vec4(
        subgroupShuffle(x, at),
        subgroupShuffle(x, at + 1u),
        subgroupShuffle(x, at + 2u),
        subgroupShuffle(x, at + 3u),
    );
}
