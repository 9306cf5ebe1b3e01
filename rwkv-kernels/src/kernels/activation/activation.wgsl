// Twin: rwkv-core/src/ops/activation.rs, a function of each value, in place.
//use activation
//
// Each invocation takes every n-th value, n the invocations of the dispatch.

struct Params {
    len: u32,
    activation: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> x: array<f32>;

@compute @workgroup_size(256)
fn activation(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.len; i += 256u * groups.x) {
        x[i] = activate(params.activation, x[i]);
    }
}
