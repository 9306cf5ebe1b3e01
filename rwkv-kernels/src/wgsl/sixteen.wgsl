// Exchanges among teams of 16 invocations, through workgroup memory.
//
// `sixteen_subgroup.wgsl` declares the same names. The kernel declares LANES, its invocations; all of them must call what is
// here.

struct Sixteen {
    @builtin(local_invocation_index) index: u32,
}

// One vector of each invocation.
var<workgroup> exchanged: array<vec4<f32>, LANES>;

// Which of the workgroup's invocations this is, those of a team one after the other.
fn place_of(lanes: Sixteen) -> u32 {
    return lanes.index;
}

// The vector that the invocation of the same team has whose place differs by `mask`.
fn across(x: vec4<f32>, mask: u32, lanes: Sixteen) -> vec4<f32> {
    workgroupBarrier(); // what was there is no longer read
    exchanged[lanes.index] = x;
    workgroupBarrier();
    return exchanged[lanes.index ^ mask];
}

// The numbers of four neighbours in the team.
fn four_of(x: f32, first: u32, lanes: Sixteen) -> vec4<f32> {
    workgroupBarrier();
    exchanged[lanes.index].x = x;
    workgroupBarrier();
    let at = lanes.index / 16u * 16u + first;
    return vec4(exchanged[at].x, exchanged[at + 1u].x, exchanged[at + 2u].x, exchanged[at + 3u].x);
}
