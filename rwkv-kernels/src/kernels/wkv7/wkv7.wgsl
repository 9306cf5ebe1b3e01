// Twin: rwkv-core/src/ops/wkv7.rs, the RWKV-7 state update.
//
// One workgroup per head, one invocation per value row i. A row lives in private memory while the tokens
// pass; the vectors that all rows of the head share pass through workgroup memory, loaded once per token,
// one channel by each invocation. Rows never interact, so the barriers guard those vectors alone.

const N: u32 = 64u;

struct Params {
    heads: u32,
    tokens: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> r: array<f32>;           // [T, H, N]
@group(0) @binding(2) var<storage, read> lw: array<f32>;          // [T, H, N], ln of the decay
@group(0) @binding(3) var<storage, read> k: array<f32>;           // [T, H, N]
@group(0) @binding(4) var<storage, read> v: array<f32>;           // [T, H, N]
@group(0) @binding(5) var<storage, read> a: array<f32>;           // [T, H, N]
@group(0) @binding(6) var<storage, read> b: array<f32>;           // [T, H, N]
@group(0) @binding(7) var<storage, read_write> state: array<f32>; // [H, key N, value N]
@group(0) @binding(8) var<storage, read_write> y: array<f32>;     // [T, H, N]

// One token of this head, by key channel j.
var<workgroup> r_t: array<f32, N>;
var<workgroup> decay_t: array<f32, N>; // w - 1
var<workgroup> k_t: array<f32, N>;
var<workgroup> a_t: array<f32, N>;
var<workgroup> b_t: array<f32, N>;

// exp(x) - 1 for x in [-0.6066, 0], the range of lw. exp(x) - 1.0 as written would keep nothing of a slow
// decay: near 1 floats lie 2^-24 apart. This is x + x^2 p(x), p the Taylor polynomial up to x^9 / 9!.
//
// Relative error, with E = expm1(x), |E| >= 0.7497 |x|, and every operation off by u at most, relatively:
//   truncation   the series alternates: <= |x|^10 / 10! / |E| <= 0.6066^9 / (10! * 0.7497) < 4.1e-9
//   p            1/2 is exact, the rest of p <= 0.21 p and off by < 3.5 u, the last addition u: < 1.75 u
//   x * (x * p)  3.75 u of x^2 p, and |x^2 p / E| <= (0.6066 - 0.4547) / 0.4547 < 0.335: < 1.26 u
//   the sum      u
// Together < 2.26 u + 4.1e-9. WGSL lets a sum or product round either way, u = 2^-23: < 2.8e-7. (Rounding
// to nearest, u = 2^-24: < 1.4e-7.) Where x^2 underflows the result is x, off by |x| / 2.
fn expm1(x: f32) -> f32 {
    var p = 1.0 / 362880.0;
    p = p * x + 1.0 / 40320.0;
    p = p * x + 1.0 / 5040.0;
    p = p * x + 1.0 / 720.0;
    p = p * x + 1.0 / 120.0;
    p = p * x + 1.0 / 24.0;
    p = p * x + 1.0 / 6.0;
    p = p * x + 1.0 / 2.0;
    return x + x * (x * p);
}

@compute @workgroup_size(64)
fn wkv7(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) i: u32) {
    let h = group.x;
    var s: array<f32, N>; // row i of the state, by key channel
    for (var j = 0u; j < N; j++) {
        s[j] = state[(h * N + j) * N + i];
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
        state[(h * N + j) * N + i] = s[j];
    }
}
