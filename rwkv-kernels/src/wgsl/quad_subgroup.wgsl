// Sums and more over the invocations that share a row of a state, four neighbours of a subgroup: the variant of `quad.wgsl`.
//
// Subgroups have four invocations at least (the specification of WebGPU, section "Limits"). As in `reduce_subgroup.wgsl`
// they are full, and nothing is assumed of how invocations fall into them. The order of the sum is fixed.

const TEAM: u32 = 4u;

struct Quad {
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) of_subgroup: u32,
    @builtin(subgroup_size) subgroup_size: u32,
}

fn place_of(quad: Quad) -> u32 {
    return quad.subgroup * quad.subgroup_size + quad.of_subgroup;
}

fn team_sums(x: vec2<f32>) -> vec2<f32> {
    let pairs = x + subgroupShuffleXor(x, 1u);
    return pairs + subgroupShuffleXor(pairs, 2u);
}

fn team_max(x: vec4<f32>) -> vec4<f32> {
    let pairs = max(x, subgroupShuffleXor(x, 1u));
    return max(pairs, subgroupShuffleXor(pairs, 2u));
}
