// Four keys of a row of a state, which lie N words apart.
//
// The kernel declares N and the buffer `state: array<f32>`.

fn load(at: u32) -> vec4<f32> {
    return vec4(state[at], state[at + N], state[at + 2u * N], state[at + 3u * N]);
}

fn save(at: u32, x: vec4<f32>) {
    state[at] = x.x;
    state[at + N] = x.y;
    state[at + 2u * N] = x.z;
    state[at + 3u * N] = x.w;
}
