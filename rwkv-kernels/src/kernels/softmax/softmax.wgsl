// Twin: rwkv-core/src/ops/softmax.rs, the probabilities of each row of logits.
//use reduce
//
// One workgroup per row. The largest logit is taken off first, so that nothing overflows. A row is read three times,
// the second and third time from a cache, and four logits of each invocation are under way together.

override LANES: u32 = 256u;

struct Params {
    vocab: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<f32>;  // [T, V]
@group(0) @binding(2) var<storage, read_write> p: array<f32>; // [T, V]

var<workgroup> maxima: array<f32, LANES>;

// The largest `x` of all invocations, in each of them.
fn workgroup_max(x: f32, lane: Lane) -> f32 {
    maxima[lane.index] = x;
    for (var stride = LANES / 2u; stride > 0u; stride /= 2u) {
        workgroupBarrier();
        if lane.index < stride {
            maxima[lane.index] = max(maxima[lane.index], maxima[lane.index + stride]);
        }
    }
    workgroupBarrier();
    return maxima[0];
}

// Four logits of a row; for those beyond it the last, which leaves the maximum as it is.
fn logits_at(start: u32, j: vec4<u32>) -> vec4<f32> {
    let at = start + min(j, vec4(params.vocab - 1u));
    return vec4(logits[at.x], logits[at.y], logits[at.z], logits[at.w]);
}

@compute @workgroup_size(LANES)
fn softmax(@builtin(workgroup_id) row: vec3<u32>, lane: Lane) {
    let start = row.x * params.vocab;
    let four = lane.index + LANES * vec4(0u, 1u, 2u, 3u);

    var largest = vec4(-3.4028234e38);
    for (var j = 0u; j < params.vocab; j += 4u * LANES) {
        largest = max(largest, logits_at(start, j + four));
    }
    let top = workgroup_max(max(max(largest.x, largest.y), max(largest.z, largest.w)), lane);

    var part = vec4(0.0);
    for (var j = 0u; j < params.vocab; j += 4u * LANES) {
        let e = exp(logits_at(start, j + four) - top);
        part += select(vec4(0.0), e, j + four < vec4(params.vocab));
    }
    let scale = 1.0 / workgroup_sum((part.x + part.y) + (part.z + part.w), lane);

    for (var j = 0u; j < params.vocab; j += 4u * LANES) {
        let y = exp(logits_at(start, j + four) - top) * scale;
        for (var i = 0u; i < 4u; i++) {
            if j + four[i] < params.vocab {
                p[start + j + four[i]] = y[i];
            }
        }
    }
}
