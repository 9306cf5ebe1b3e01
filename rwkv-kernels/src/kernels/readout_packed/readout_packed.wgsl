// Twin: rwkv-core/src/ops/readout.rs, the group norm, the bonus and the gate, of what `wkv7_scan` answers.
//use reduce
//use packed
//
// One workgroup per head of a row, two neighbouring channels by each invocation, so that halves go two to a word. Without
// BONUS, of what `time_mix` or `time_mix_resident` leave without NORM.

const N: u32 = 64u;
const LANES: u32 = N / 2u;

override BONUS: bool = true; // whether the bonus is summed here

struct Params {
    width: u32, // D
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> operands: array<vec2<f32>>;  // [T, H, 6, N], of which 1 k, 4 r, 5 v; or [T, 3, D], see `head.wgsl`
@group(0) @binding(2) var<storage, read> up: array<vec2<f32>>;        // [T, 4, D], 0 the answers, 3 the gate; not read without BONUS
@group(0) @binding(3) var<storage, read> vectors: array<vec2<f32>>;   // [8, D], 5 r_k, 6 gain, 7 bias
@group(0) @binding(4) var<storage, read_write> out: array<u32>;       // [T, D]

@compute @workgroup_size(LANES)
fn readout_packed(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    let width = params.width / 2u;
    let row = group.y;
    let channel = group.x * LANES + lane.index;
    var y: vec2<f32>;
    var bonus: vec2<f32>;
    var gate: vec2<f32>;
    if BONUS {
        let at = (row * (width / LANES) + group.x) * 6u * LANES + lane.index;
        let answers = row * 4u * width + channel;
        y = up[answers];
        gate = up[answers + 3u * width];
        let v = operands[at + 5u * LANES];
        let weighted = operands[at + 4u * LANES] * operands[at + LANES] * vectors[5u * width + channel];
        bonus = workgroup_sum(weighted.x + weighted.y, lane) * v;
    } else {
        let at = row * 3u * width + channel;
        y = operands[at];
        bonus = operands[at + width];
        gate = operands[at + 2u * width];
    }

    let mean = workgroup_sum(y.x + y.y, lane) / f32(N);
    let centred = y - mean;
    let variance = workgroup_sum(dot(centred, centred), lane) / f32(N);
    let scale = inverseSqrt(variance + params.eps);
    let normed = centred * scale * vectors[6u * width + channel] + vectors[7u * width + channel];
    let gated = (normed + bonus) * gate;
    let to = row * params.width;
    if HALVES == 0u {
        out[to + 2u * channel] = bitcast<u32>(gated.x);
        out[to + 2u * channel + 1u] = bitcast<u32>(gated.y);
    } else {
        out[to + channel] = packed(gated);
    }
}
