// Twin: rwkv-core/src/ops/wkv7.rs, the RWKV-7 state update.
//use expm1
//
// One workgroup per head, one invocation per value row i. A row lives in private memory while the tokens
// pass; the vectors that all rows of the head share pass through workgroup memory, loaded once per token,
// one channel by each invocation. Rows never interact, so the barriers guard those vectors alone.

const N: u32 = 64u;

struct Params {
    heads: u32,
    tokens: u32,
    before: u32, // where in `state` the heads are
    after: u32,  // where they go: elsewhere, or the same place
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> r: array<f32>;           // [T, H, N]
@group(0) @binding(2) var<storage, read> lw: array<f32>;          // [T, H, N], ln of the decay
@group(0) @binding(3) var<storage, read> k: array<f32>;           // [T, H, N]
@group(0) @binding(4) var<storage, read> v: array<f32>;           // [T, H, N]
@group(0) @binding(5) var<storage, read> a: array<f32>;           // [T, H, N]
@group(0) @binding(6) var<storage, read> b: array<f32>;           // [T, H, N]
@group(0) @binding(7) var<storage, read_write> state: array<f32>; // at `before` and `after`, [H, key N, value N]
@group(0) @binding(8) var<storage, read_write> y: array<f32>;     // [T, H, N]

// One token of this head, by key channel j.
var<workgroup> r_t: array<f32, N>;
var<workgroup> decay_t: array<f32, N>; // w - 1
var<workgroup> k_t: array<f32, N>;
var<workgroup> a_t: array<f32, N>;
var<workgroup> b_t: array<f32, N>;

@compute @workgroup_size(64)
fn wkv7(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) i: u32) {
    let h = group.x;
    var s: array<f32, N>; // row i of the state, by key channel
    for (var j = 0u; j < N; j++) {
        s[j] = state[params.before + (h * N + j) * N + i];
    }
    for (var t = 0u; t < params.tokens; t++) {
        let at = (t * params.heads + h) * N;
        workgroupBarrier(); // no row still reads the token before
        r_t[i] = r[at + i];
        decay_t[i] = expm1(lw[at + i]);
        k_t[i] = k[at + i];
        a_t[i] = a[at + i];
        b_t[i] = b[at + i];
        let v_i = v[at + i];
        workgroupBarrier();

        var q = 0.0;
        for (var j = 0u; j < N; j++) {
            q += s[j] * a_t[j];
        }
        var out = 0.0;
        for (var j = 0u; j < N; j++) {
            s[j] += s[j] * decay_t[j] + q * b_t[j] + v_i * k_t[j];
            out += s[j] * r_t[j];
        }
        y[at + i] = out;
    }
    for (var j = 0u; j < N; j++) {
        state[params.after + (h * N + j) * N + i] = s[j];
    }
}
