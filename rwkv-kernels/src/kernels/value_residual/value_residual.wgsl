// Twin: rwkv-core/src/ops/value_residual.rs, the value drawn towards the first layer's.
//use sigmoid

const LANES = 64u;

struct Params {
    len: u32, // vectors
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> v_first: array<vec4<f32>>; // [T, D]
@group(0) @binding(2) var<storage, read> vl: array<vec4<f32>>;      // [T, D]
@group(0) @binding(3) var<storage, read_write> v: array<vec4<f32>>; // [T, D]

@compute @workgroup_size(LANES)
fn value_residual(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.len; i += groups.x * LANES) {
        v[i] += (v_first[i] - v[i]) * sigmoid4(vl[i]);
    }
}
