// Twin: rwkv-core/src/ops/add.rs, the addition of a bias or of rows.

const LANES = 64u;

struct Params {
    len: u32,    // vectors of y
    period: u32, // vectors of x
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;       // [D], or [T, D]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>; // [T, D]

@compute @workgroup_size(LANES)
fn add(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.len; i += groups.x * LANES) {
        y[i] += x[i % params.period];
    }
}
