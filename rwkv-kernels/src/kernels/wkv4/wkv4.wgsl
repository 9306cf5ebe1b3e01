// Twin: rwkv-core/src/ops/wkv4.rs, the exponential average of RWKV-4.
//
// One invocation per channel, which keeps its sums in registers while the tokens pass.

const LANES = 64u;

struct Params {
    tokens: u32,
    channels: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> w: array<f32>;           // [C]
@group(0) @binding(2) var<storage, read> u: array<f32>;           // [C]
@group(0) @binding(3) var<storage, read> k: array<f32>;           // [T, C]
@group(0) @binding(4) var<storage, read> v: array<f32>;           // [T, C]
@group(0) @binding(5) var<storage, read_write> state: array<f32>; // [3, C]: numerator, denominator, max
@group(0) @binding(6) var<storage, read_write> y: array<f32>;     // [T, C]

// What two exponents weigh beside the larger of them, and that.
struct Weights {
    past: f32,
    now: f32,
    max: f32,
}

// One of them weighs 1, the other exp(-d). Beyond a distance of 88 that is less than 2^-126, which a device may flush
// to zero, and the accuracy that WGSL asks of exp decreases.
fn weigh(past: f32, now: f32) -> Weights {
    let less = exp(-min(abs(past - now), 88.0));
    if past > now {
        return Weights(1.0, less, past);
    }
    return Weights(less, 1.0, now);
}

@compute @workgroup_size(LANES)
fn wkv4(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    let n = params.channels;
    for (var c = id.x; c < n; c += groups.x * LANES) {
        let decay = w[c];
        let bonus = u[c];
        var numerator = state[c];
        var denominator = state[n + c];
        var top = state[2u * n + c];
        for (var t = 0u; t < params.tokens; t++) {
            let key = k[t * n + c];
            let value = v[t * n + c];
            let of_y = weigh(top, bonus + key);
            y[t * n + c] = (of_y.past * numerator + of_y.now * value) / (of_y.past * denominator + of_y.now);

            let kept = weigh(top - decay, key);
            numerator = kept.past * numerator + kept.now * value;
            denominator = kept.past * denominator + kept.now;
            top = kept.max;
        }
        state[c] = numerator;
        state[n + c] = denominator;
        state[2u * n + c] = top;
    }
}
