// Twin: rwkv-core/src/ops/time_mix.rs, all that happens in a head between the projections and the output layer.
//use columns
//use weights
//use sigmoid
//use expm1
//
// One workgroup per head and segment. The state lies in private memory while the segment's tokens pass: invocation
// (i, g), i = index % N, has value row i of the keys of group g. A segment is read from one record and written to
// another, so that what its sequence was before outlives the pass.
//
// With LORA_UP the adapters' second factors are multiplied here, with 16-byte loads: eight invocations, a team, to a
// row of the head's 64 channels. The groups, of eight teams, are divided among the adapters as `lower` says, in
// proportion to their ranks, so that all four are summed at once: there must be four groups. Otherwise `up` has the
// products.

const N: u32 = 64u;
const COLUMNS: u32 = N;

override LANES: u32 = 256u; // N times the groups of keys
override LORA_UP: bool = true;

struct Params {
    width: u32,       // D
    inputs: u32,      // P
    rank_w: u32,
    rank_a: u32,
    rank_v: u32,
    rank_g: u32,
    groups_w: u32,    // groups that multiply each adapter; those of g are the rest
    groups_a: u32,
    groups_v: u32,
    stride: u32,      // of a record of the state
    offset: u32,      // of the heads in a record
    first_layer: u32, // whether there is no value residual
    decay_scale: f32,
    kappa_eps: f32,
    norm_eps: f32,    // of the group norm
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> segments: array<vec4<u32>>;    // first row, rows, record read, record written
@group(0) @binding(2) var<storage, read> inputs: array<f32>;            // [T, P], r k v, then the low ranks of w a v g
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;     // [ranks, D], w a v g
@group(0) @binding(4) var<storage, read> up: array<f32>;                // [T, 4, D], w a v g
@group(0) @binding(5) var<storage, read> vectors: array<f32>;           // [8, D], w0 a0 v0 k_k k_a r_k, gain, bias
@group(0) @binding(6) var<storage, read_write> state: array<f32>;       // records, [H, key N, value N] in each
@group(0) @binding(7) var<storage, read_write> v_first: array<f32>;     // [T, D]
@group(0) @binding(8) var<storage, read_write> out: array<f32>;         // [T, D]

// One token of this head, by channel.
var<workgroup> receptance: array<f32, N>;
var<workgroup> decay: array<f32, N>; // w - 1
var<workgroup> key: array<f32, N>;
var<workgroup> value: array<f32, N>;
var<workgroup> removal: array<f32, N>; // kappa before it is normalised
var<workgroup> rate: array<f32, N>; // eta
var<workgroup> bonus: array<f32, N>; // r k r_k
var<workgroup> gate: array<f32, N>;
var<workgroup> answer: array<f32, N>; // what the state answers

// What invocations have of a sum over the groups.
var<workgroup> parts: array<f32, LANES * 2u>;
var<workgroup> squares: array<f32, LANES / N>;
var<workgroup> bonuses: array<f32, LANES / N>;

// By scalars, since two invocations must not write components of one vector.
fn answers(j: u32) -> vec4<f32> {
    return vec4(answer[4u * j], answer[4u * j + 1u], answer[4u * j + 2u], answer[4u * j + 3u]);
}

// A part of an adapter's low ranks times its second factor, for eight channels of the head, held until it is summed. Team
// `team` of `teams` takes every so manieth rank.
fn lora_up(row: u32, head: u32, start: u32, rank: u32, team: u32, teams: u32, l: u32) {
    let width8 = params.width / 8u;
    let column = head * (N / 8u) + l % 8u;
    let low_rank = row * params.inputs + 3u * params.width + start;
    var low = vec4(0.0);
    var high = vec4(0.0);
    for (var r = team; r < rank; r += teams) {
        let x = inputs[low_rank + r];
        let w = weights[(start + r) * width8 + column];
        low += x * low4(w);
        high += x * high4(w);
    }
    hold_columns(low, high, l);
}

// The product of an adapter for channel i: what its groups, from `g` to before `end`, have of it.
fn lora_of(g: u32, end: u32, i: u32) -> f32 {
    var sum = 0.0;
    for (var p = g; p < end; p++) {
        sum += parts[p * N + i];
    }
    return sum;
}

@compute @workgroup_size(LANES)
fn time_mix(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) l: u32) {
    let head = group.x;
    let segment = segments[group.y];
    let i = l % N;
    let g = l / N;
    let groups = LANES / N;
    let keys = N / groups;
    let channel = head * N + i;
    let width = params.width;

    // The vectors of this channel.
    var own: array<f32, 8>;
    for (var j = 0u; j < 8u; j++) {
        own[j] = vectors[j * width + channel];
    }

    // Row i of the state, by key of this group.
    var s: array<f32, N>;
    let heads = params.offset + (head * N + g * keys) * N + i;
    for (var j = 0u; j < keys; j++) {
        s[j] = state[segment.z * params.stride + heads + j * N];
    }

    for (var row = segment.x; row < segment.x + segment.y; row++) {
        // All that is read of a token comes before the first barrier.
        let at = row * params.inputs + channel;
        let r = inputs[at];
        let k = inputs[at + width];
        var v = inputs[at + 2u * width];
        var first = v;
        if params.first_layer == 0u {
            first = v_first[row * width + channel];
        }
        let a_groups = params.groups_w;
        let v_groups = a_groups + params.groups_a;
        let g_groups = v_groups + params.groups_v;
        if LORA_UP {
            let team = l / 8u;
            let a_start = params.rank_w;
            let v_start = a_start + params.rank_a;
            let g_start = v_start + params.rank_v;
            if g < a_groups {
                lora_up(row, head, 0u, params.rank_w, team, 8u * params.groups_w, l);
            } else if g < v_groups {
                lora_up(row, head, a_start, params.rank_a, team - 8u * a_groups, 8u * params.groups_a, l);
            } else if g < g_groups {
                lora_up(row, head, v_start, params.rank_v, team - 8u * v_groups, 8u * params.groups_v, l);
            } else {
                lora_up(row, head, g_start, params.rank_g, team - 8u * g_groups, 8u * (groups - g_groups), l);
            }
            workgroupBarrier();
            var part = 0.0;
            for (var t = 0u; t < 8u; t++) {
                part += held_column(8u * g + t, i);
            }
            parts[l] = part;
            workgroupBarrier();
        }
        if g == 0u {
            var lora = vec4(0.0);
            if LORA_UP {
                lora = vec4(
                    lora_of(0u, a_groups, i),
                    lora_of(a_groups, v_groups, i),
                    lora_of(v_groups, g_groups, i),
                    lora_of(g_groups, groups, i),
                );
            } else {
                let at = row * 4u * width + channel;
                lora = vec4(up[at], up[at + width], up[at + 2u * width], up[at + 3u * width]);
            }
            let eta = sigmoid(own[1] + lora.y);
            if params.first_layer != 0u {
                v_first[row * width + channel] = v;
            } else {
                v += (first - v) * sigmoid(own[2] + lora.z);
            }
            let modulated = k * (1.0 + (eta - 1.0) * own[4]);
            receptance[i] = r;
            decay[i] = expm1(-params.decay_scale * sigmoid(own[0] + lora.x));
            key[i] = modulated;
            value[i] = v;
            removal[i] = k * own[3];
            rate[i] = eta;
            bonus[i] = r * modulated * own[5];
            gate[i] = lora.w;
        }
        workgroupBarrier();

        // Each group asks the state what it holds at kappa, and has its part of the norm of kappa and of the bonus.
        var q = 0.0;
        var square = 0.0;
        var extra = 0.0;
        for (var j = 0u; j < keys; j++) {
            let u = removal[g * keys + j];
            q += s[j] * u;
            square += u * u;
            extra += bonus[g * keys + j];
        }
        parts[l] = q;
        if i == 0u {
            squares[g] = square;
            bonuses[g] = extra;
        }
        workgroupBarrier();
        q = 0.0;
        square = 0.0;
        extra = 0.0;
        for (var p = 0u; p < groups; p++) {
            q += parts[p * N + i];
            square += squares[p];
            extra += bonuses[p];
        }
        let unit = 1.0 / max(sqrt(square), params.kappa_eps);
        q *= unit;

        let v_i = value[i];
        var y = 0.0;
        for (var j = 0u; j < keys; j++) {
            let at = g * keys + j;
            let kappa = removal[at] * unit;
            s[j] += s[j] * decay[at] - q * (kappa * rate[at]) + v_i * key[at];
            y += s[j] * receptance[at];
        }
        parts[LANES + l] = y;
        workgroupBarrier();
        if g == 0u {
            y = 0.0;
            for (var p = 0u; p < groups; p++) {
                y += parts[LANES + p * N + i];
            }
            answer[i] = y;
        }
        workgroupBarrier();
        if g == 0u {
            var sum = vec4(0.0);
            for (var j = 0u; j < N / 4u; j++) {
                sum += answers(j);
            }
            let mean = dot(sum, vec4(1.0)) / f32(N);
            sum = vec4(0.0);
            for (var j = 0u; j < N / 4u; j++) {
                let centred = answers(j) - mean;
                sum += centred * centred;
            }
            let scale = inverseSqrt(dot(sum, vec4(1.0)) / f32(N) + params.norm_eps);
            let normed = (y - mean) * scale * own[6] + own[7];
            out[row * width + channel] = (normed + extra * v_i) * gate[i];
        }
        // No barrier: after the last one, an invocation reads nothing that another writes before the next one.
    }

    for (var j = 0u; j < keys; j++) {
        state[segment.w * params.stride + heads + j * N] = s[j];
    }
}
