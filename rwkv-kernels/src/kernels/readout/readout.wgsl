// Twin: rwkv-core/src/ops/readout.rs, the group norm, the bonus and the gate.
//use reduce
//
// One workgroup per head of a token, one channel by each invocation where a head has 64. The output takes the place
// of y, since a kernel has eight storage buffers: an invocation writes only where no other reads.

override LANES: u32 = 64u;

struct Params {
    rows: u32,      // T * H
    heads: u32,     // H
    head_size: u32, // N
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> r: array<f32>;       // [T, H, N]
@group(0) @binding(2) var<storage, read> k: array<f32>;       // [T, H, N]
@group(0) @binding(3) var<storage, read> v: array<f32>;       // [T, H, N]
@group(0) @binding(4) var<storage, read> gate: array<f32>;    // [T, H, N]
@group(0) @binding(5) var<storage, read> gain: array<f32>;    // [H, N]
@group(0) @binding(6) var<storage, read> bias: array<f32>;    // [H, N]
@group(0) @binding(7) var<storage, read> r_k: array<f32>;     // [H, N]
@group(0) @binding(8) var<storage, read_write> y: array<f32>; // [T, H, N]: y, then the output

@compute @workgroup_size(LANES)
fn readout(@builtin(workgroup_id) group: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>, lane: Lane) {
    let n = f32(params.head_size);
    for (var row = group.x; row < params.rows; row += groups.x) {
        let start = row * params.head_size;
        let head = row % params.heads * params.head_size;

        var part = 0.0;
        var part_of_bonus = 0.0;
        for (var j = lane.index; j < params.head_size; j += LANES) {
            part += y[start + j];
            part_of_bonus += r[start + j] * k[start + j] * r_k[head + j];
        }
        let mean = workgroup_sum(part, lane) / n;
        let bonus = workgroup_sum(part_of_bonus, lane);

        part = 0.0;
        for (var j = lane.index; j < params.head_size; j += LANES) {
            let centred = y[start + j] - mean;
            part += centred * centred;
        }
        let scale = inverseSqrt(workgroup_sum(part, lane) / n + params.eps);

        for (var j = lane.index; j < params.head_size; j += LANES) {
            let norm = (y[start + j] - mean) * scale * gain[head + j] + bias[head + j];
            y[start + j] = (norm + bonus * v[start + j]) * gate[start + j];
        }
    }
}
