// Twin: rwkv-core/src/ops/learning_rate.rs: the rate, the key that it modulates and the two directions.
//use sigmoid

const LANES = 64u;

struct Params {
    len: u32,   // vectors of a row, times T
    width: u32, // vectors of a row
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> k_a: array<vec4<f32>>;     // [D]
@group(0) @binding(2) var<storage, read_write> k: array<vec4<f32>>; // [T, D]: k0, then k
@group(0) @binding(3) var<storage, read_write> a: array<vec4<f32>>; // [T, D]: al, then a
@group(0) @binding(4) var<storage, read_write> b: array<vec4<f32>>; // [T, D]: kappa, then b

@compute @workgroup_size(LANES)
fn learning_rate(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.len; i += groups.x * LANES) {
        let eta = sigmoid4(a[i]);
        let kappa = b[i];
        k[i] *= 1.0 + (eta - 1.0) * k_a[i % params.width];
        a[i] = -kappa;
        b[i] = kappa * eta;
    }
}
