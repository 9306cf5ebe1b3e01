// Sums and more over the invocations that share a row of a state: here each has a row of its own.
//
// `quad_subgroup.wgsl` declares the same names.

// Invocations to a row.
const TEAM: u32 = 1u;

struct Quad {
    @builtin(local_invocation_index) index: u32,
}

// Which of the workgroup's invocations this is, those of a team one after the other.
fn place_of(quad: Quad) -> u32 {
    return quad.index;
}

// The sums of `x` over a team, in each of its invocations.
fn team_sums(x: vec2<f32>) -> vec2<f32> {
    return x;
}

// The largest of `x`, in the same way.
fn team_max(x: vec4<f32>) -> vec4<f32> {
    return x;
}
