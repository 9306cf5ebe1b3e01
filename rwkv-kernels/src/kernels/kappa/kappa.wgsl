// Twin: rwkv-core/src/ops/kappa.rs, the removal key of unit length.
//use reduce
//
// One workgroup per head of a token, one channel by each invocation where a head has 64. The smaller divisor is shut
// out before the root, max(|u|, eps) = sqrt(max(|u|^2, eps^2)), so that no root is taken of 0.

override LANES: u32 = 64u;

struct Params {
    rows: u32,      // T * H
    heads: u32,     // H
    head_size: u32, // N
    eps_squared: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> k0: array<f32>;        // [T, H, N]
@group(0) @binding(2) var<storage, read> k_k: array<f32>;       // [H, N]
@group(0) @binding(3) var<storage, read_write> out: array<f32>; // [T, H, N]

@compute @workgroup_size(LANES)
fn kappa(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    for (var row = group.x; row < params.rows; row += groups.x) {
        let start = row * params.head_size;
        let head = row % params.heads * params.head_size;

        var part = 0.0;
        for (var j = lane.index; j < params.head_size; j += LANES) {
            let u = k0[start + j] * k_k[head + j];
            part += u * u;
        }
        let scale = inverseSqrt(max(workgroup_sum(part, lane), params.eps_squared));

        for (var j = lane.index; j < params.head_size; j += LANES) {
            out[start + j] = k0[start + j] * k_k[head + j] * scale;
        }
    }
}
