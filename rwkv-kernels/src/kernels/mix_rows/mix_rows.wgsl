// Twin: rwkv-core/src/ops/mix_rows.rs, layer norm and token shift of packed segments.
//use reduce
//use packed
//
// One workgroup per row, four channels at a time. The row before is normed again where it is in the same segment: that
// costs reads, mostly from a cache, and no pass between the norm and the shift. Both norms are made by the same
// operations in the same order, so that a row is the same whether it comes from the pass or, kept, from the one before.

override LANES: u32 = 256u;

// In place of a record.
const NONE: u32 = 0xFFFFFFFFu;

struct Params {
    width: u32,  // a multiple of 4, as are
    stride: u32, // elements of a record
    offset: u32, // where in a record the row begins
    mixes: u32,
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;       // [T, D]
// [T]: the record that holds the row before a segment's first, and the one that is to hold this row.
@group(0) @binding(2) var<storage, read> cursors: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read> vectors: array<vec4<f32>>; // [2 + M, D]: gain, bias, mixes
// [records, stride]. No record is both read and written in a pass.
@group(0) @binding(4) var<storage, read_write> state: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> out: array<vec2<u32>>; // [T, M, D]

struct Moments {
    mean: f32,
    scale: f32,
}

// Of the row of x at `start`. Every invocation must call it.
fn moments(start: u32, quads: u32, lane: Lane) -> Moments {
    let n = f32(params.width);
    var part = vec4(0.0);
    for (var q = lane.index; q < quads; q += LANES) {
        part += x[start + q];
    }
    let mean = workgroup_sum((part.x + part.y) + (part.z + part.w), lane) / n;

    part = vec4(0.0);
    for (var q = lane.index; q < quads; q += LANES) {
        let centred = x[start + q] - mean;
        part = fma(centred, centred, part);
    }
    let variance = workgroup_sum((part.x + part.y) + (part.z + part.w), lane) / n;
    return Moments(mean, inverseSqrt(variance + params.eps));
}

fn normed(value: vec4<f32>, row: Moments, gain: vec4<f32>, bias: vec4<f32>) -> vec4<f32> {
    return fma((value - row.mean) * row.scale, gain, bias);
}

@compute @workgroup_size(LANES)
fn mix_rows(@builtin(workgroup_id) row: vec3<u32>, lane: Lane) {
    let quads = params.width / 4u;
    let start = row.x * quads;
    let cursor = cursors[row.x];
    let own = moments(start, quads, lane);
    var other: Moments;
    if cursor.x == NONE {
        other = moments(start - quads, quads, lane);
    }
    let kept = (cursor.x * params.stride + params.offset) / 4u;
    let keep = (cursor.y * params.stride + params.offset) / 4u;

    for (var q = lane.index; q < quads; q += LANES) {
        let gain = vectors[q];
        let bias = vectors[quads + q];
        let now = normed(x[start + q], own, gain, bias);
        var before: vec4<f32>;
        if cursor.x == NONE {
            before = normed(x[start - quads + q], other, gain, bias);
        } else {
            before = state[kept + q];
        }
        if cursor.y != NONE {
            state[keep + q] = now;
        }
        for (var m = 0u; m < params.mixes; m++) {
            let mix = vectors[(2u + m) * quads + q];
            let mixed = fma(before - now, mix, now);
            let to = 2u * (row.x * params.mixes + m) * quads;
            if HALVES == 0u {
                out[to + 2u * q] = bitcast<vec2<u32>>(mixed.xy);
                out[to + 2u * q + 1u] = bitcast<vec2<u32>>(mixed.zw);
            } else {
                out[to + q] = vec2(packed(mixed.xy), packed(mixed.zw));
            }
        }
    }
}
