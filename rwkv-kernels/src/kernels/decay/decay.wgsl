// Twin: rwkv-core/src/ops/decay.rs, the logarithm of the decay.
//use sigmoid

const LANES = 64u;

struct Params {
    len: u32, // vectors
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> lw: array<vec4<f32>>; // [T, D]: wl, then lw

@compute @workgroup_size(LANES)
fn decay(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.len; i += groups.x * LANES) {
        lw[i] = -params.scale * sigmoid4(lw[i]);
    }
}
