// Twin: rwkv-core/src/ops/layer_norm.rs, the layer norm of each row that is asked for.
//use reduce
//
// One workgroup per row of y. The mean comes first and the variance from what it leaves, since the one-pass form
// cancels; the row is read three times, the second and third time from a cache.

override LANES: u32 = 256u;

struct Params {
    width: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<f32>;       // [S, D]
@group(0) @binding(2) var<storage, read> rows: array<u32>;    // [T], which row of x each row of y is of
@group(0) @binding(3) var<storage, read> gain: array<f32>;    // [D]
@group(0) @binding(4) var<storage, read> bias: array<f32>;    // [D]
@group(0) @binding(5) var<storage, read_write> y: array<f32>; // [T, D]

@compute @workgroup_size(LANES)
fn layer_norm(@builtin(workgroup_id) row: vec3<u32>, lane: Lane) {
    let start = rows[row.x] * params.width;
    let to = row.x * params.width;
    let n = f32(params.width);

    var part = 0.0;
    for (var j = lane.index; j < params.width; j += LANES) {
        part += x[start + j];
    }
    let mean = workgroup_sum(part, lane) / n;

    part = 0.0;
    for (var j = lane.index; j < params.width; j += LANES) {
        let centred = x[start + j] - mean;
        part += centred * centred;
    }
    let scale = inverseSqrt(workgroup_sum(part, lane) / n + params.eps);

    for (var j = lane.index; j < params.width; j += LANES) {
        y[to + j] = (x[start + j] - mean) * scale * gain[j] + bias[j];
    }
}
