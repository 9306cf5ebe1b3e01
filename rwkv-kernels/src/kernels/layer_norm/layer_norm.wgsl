// Twin: rwkv-core/src/ops/layer_norm.rs, the layer norm of each row that is asked for.
//use reduce
//use packed
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
@group(0) @binding(5) var<storage, read_write> y: array<u32>; // [T, D]

fn normed(value: f32, mean: f32, scale: f32, j: u32) -> f32 {
    return (value - mean) * scale * gain[j] + bias[j];
}

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

    if HALVES == 0u {
        for (var j = lane.index; j < params.width; j += LANES) {
            y[to + j] = bitcast<u32>(normed(x[start + j], mean, scale, j));
        }
    } else {
        for (var pair = lane.index; pair < params.width / 2u; pair += LANES) {
            let j = 2u * pair;
            let one = normed(x[start + j], mean, scale, j);
            y[to + pair] = packed(vec2(one, normed(x[start + j + 1u], mean, scale, j + 1u)));
        }
    }
}
