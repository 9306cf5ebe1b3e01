// Twin: rwkv-core/src/ops/embedding.rs, the table's row of each token through ln0.
//use reduce
//
// One workgroup per row, four channels at a time. As in the layer norm, the mean comes first; the row of the table is
// read three times, the second and third time from a cache.

override LANES: u32 = 256u;

struct Params {
    vocab: u32,
    width: u32, // a multiple of 4
    eps: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;        // [T]
@group(0) @binding(2) var<storage, read> table: array<vec2<u32>>;   // [V, D], halves, two to a word
@group(0) @binding(3) var<storage, read> gain: array<vec4<f32>>;    // [D]
@group(0) @binding(4) var<storage, read> bias: array<vec4<f32>>;    // [D]
@group(0) @binding(5) var<storage, read_write> x: array<vec4<f32>>; // [T, D]

fn widened(at: u32) -> vec4<f32> {
    let halves = table[at];
    return vec4(unpack2x16float(halves.x), unpack2x16float(halves.y));
}

@compute @workgroup_size(LANES)
fn embedding(@builtin(workgroup_id) row: vec3<u32>, lane: Lane) {
    let quads = params.width / 4u;
    // A token outside the vocabulary is the mark of a sampler that failed earlier in the pass, never the host's. Its row
    // is thrown away, and is any row of the table until then.
    let start = min(tokens[row.x], params.vocab - 1u) * quads;
    let to = row.x * quads;
    let n = f32(params.width);

    var part = vec4(0.0);
    for (var q = lane.index; q < quads; q += LANES) {
        part += widened(start + q);
    }
    let mean = workgroup_sum((part.x + part.y) + (part.z + part.w), lane) / n;

    part = vec4(0.0);
    for (var q = lane.index; q < quads; q += LANES) {
        let centred = widened(start + q) - mean;
        part += centred * centred;
    }
    let variance = workgroup_sum((part.x + part.y) + (part.z + part.w), lane) / n;
    let scale = inverseSqrt(variance + params.eps);

    for (var q = lane.index; q < quads; q += LANES) {
        x[to + q] = (widened(start + q) - mean) * scale * gain[q] + bias[q];
    }
}
