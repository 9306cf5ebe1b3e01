// One token of a head: from the projections to the operands of the state update, from the state's answer to the output.
//use columns
//use weights
//use sigmoid
//use expm1
//use packed
//
// The kernel declares N, COLUMNS = N, LANES, LORA_UP, the parameters and bindings used below. Invocation
// (i, g), i = index % N, has channel i; of the groups g, of N invocations each, the first alone has the operands.
//
// With LORA_UP the adapters' second factors are multiplied here, with 16-byte loads: eight invocations, a team, to a
// row of the head's 64 channels. The groups, of eight teams, are divided among the adapters as `lower` says, in
// proportion to their ranks, so that all four are summed at once: there must be four groups. Otherwise `up` has the
// products.
//
// Without NORM the group norm, the bonus and the gate are left to `readout_packed`, for which a row is [3, D]: the state's
// answers, what the bonus adds to them, and the gate.

override NORM: bool = true;
override PARTS: u32 = LANES * 2u;
override GROUPS: u32 = LANES / N;

// What invocations have of a sum over the groups.
var<workgroup> parts: array<f32, PARTS>;
var<workgroup> squares: array<f32, GROUPS>;
var<workgroup> bonuses: array<f32, GROUPS>;
var<workgroup> answer: array<f32, N>; // what the state answers
var<workgroup> gated: array<f32, N>; // and what it comes to

// One token of the head, by channel.
var<workgroup> receptance: array<f32, N>;
var<workgroup> decay: array<f32, N>; // w - 1
var<workgroup> key: array<f32, N>;
var<workgroup> value: array<f32, N>;
var<workgroup> removal: array<f32, N>; // kappa before it is normalised
var<workgroup> rate: array<f32, N>; // eta
var<workgroup> bonus: array<f32, N>; // r k r_k

// The vectors of a channel.
struct Vectors {
    w0: f32,
    a0: f32,
    v0: f32,
    k_k: f32,
    k_a: f32,
    r_k: f32,
    gain: f32,
    bias: f32,
}

// A token's operands in a channel.
struct Operands {
    receptance: f32,
    decay: f32,   // w - 1
    key: f32,
    value: f32,
    removal: f32, // kappa before it is normalised
    rate: f32,    // eta
    bonus: f32,   // r k r_k
    gate: f32,
}

fn vectors_of(channel: u32) -> Vectors {
    let width = params.width;
    return Vectors(
        vectors[channel],
        vectors[width + channel],
        vectors[2u * width + channel],
        vectors[3u * width + channel],
        vectors[4u * width + channel],
        vectors[5u * width + channel],
        vectors[6u * width + channel],
        vectors[7u * width + channel],
    );
}

// By scalars, since two invocations must not write components of one vector.
fn answers(j: u32) -> vec4<f32> {
    return vec4(answer[4u * j], answer[4u * j + 1u], answer[4u * j + 2u], answer[4u * j + 3u]);
}

// Ranks of a team that are under way at once.
const AHEAD: u32 = 8u;

// The adapter of a group, and which of the teams for it a lane is in. A team takes every `teams`th rank.
struct Adapter {
    start: u32, // of its ranks
    rank: u32,
    team: u32,
    teams: u32,
}

// Where the groups for w, a and v end; those for g are the rest.
fn ends_of_groups() -> vec3<u32> {
    let w_end = params.groups_w;
    let a_end = w_end + params.groups_a;
    return vec3(w_end, a_end, a_end + params.groups_v);
}

fn adapter_of(g: u32, l: u32) -> Adapter {
    let team = l / 8u;
    let ends = ends_of_groups();
    let a_start = params.rank_w;
    let v_start = a_start + params.rank_a;
    let g_start = v_start + params.rank_v;
    if g < ends.x {
        return Adapter(0u, params.rank_w, team, 8u * params.groups_w);
    }
    if g < ends.y {
        return Adapter(a_start, params.rank_a, team - 8u * ends.x, 8u * params.groups_a);
    }
    if g < ends.z {
        return Adapter(v_start, params.rank_v, team - 8u * ends.y, 8u * params.groups_v);
    }
    return Adapter(g_start, params.rank_g, team - 8u * ends.z, 8u * (GROUPS - ends.z));
}

// Second factors for eight channels of the head, of AHEAD ranks of a team.
var<private> factors: array<vec4<u32>, AHEAD>;

// Reads those from rank `first` on. The first of a head do not depend on the token, nor on where it is: a kernel reads
// them before it knows.
fn fetch_factors(head: u32, own: Adapter, first: u32, l: u32) {
    for (var k = 0u; k < AHEAD; k++) {
        let r = first + k * own.teams;
        if r < own.rank {
            factors[k] = weights[(own.start + r) * (params.width / 8u) + head * (N / 8u) + l % 8u];
        }
    }
}

// A part of an adapter's low ranks times its second factor, held until it is summed. For the first row of a segment, the
// kernel has called `fetch_factors` for the first factors.
fn lora_up(row: u32, is_first: bool, head: u32, own: Adapter, l: u32) {
    let low_rank = row * params.inputs + 3u * params.width + own.start;
    var low = vec4(0.0);
    var high = vec4(0.0);
    for (var first = own.team; first < own.rank; first += AHEAD * own.teams) {
        if !(is_first && first == own.team) {
            fetch_factors(head, own, first, l);
        }
        var x: array<f32, AHEAD>; // zero beyond the last rank
        for (var k = 0u; k < AHEAD; k++) {
            let r = first + k * own.teams;
            if r < own.rank {
                x[k] = inputs[low_rank + r];
            }
        }
        for (var k = 0u; k < AHEAD; k++) {
            if first + k * own.teams < own.rank {
                low += x[k] * low4(factors[k]);
                high += x[k] * high4(factors[k]);
            }
        }
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

// The operands of a row, which may be the first of its segment. Every invocation must call it; those of the first group
// alone get them.
fn operands_of(row: u32, is_first: bool, head: u32, own: Vectors, i: u32, g: u32, l: u32) -> Operands {
    // All that is read of a token comes before the first barrier.
    let width = params.width;
    let channel = head * N + i;
    let at = row * params.inputs + channel;
    let r = inputs[at];
    let k = inputs[at + width];
    var v = inputs[at + 2u * width];
    var first = v;
    if params.first_layer == 0u {
        first = v_first[row * width + channel];
    }
    if LORA_UP {
        lora_up(row, is_first, head, adapter_of(g, l), l);
        workgroupBarrier();
        var part = 0.0;
        for (var t = 0u; t < 8u; t++) {
            part += held_column(8u * g + t, i);
        }
        parts[l] = part;
        workgroupBarrier();
    }
    var token: Operands;
    if g == 0u {
        var lora = vec4(0.0);
        if LORA_UP {
            let ends = ends_of_groups();
            lora = vec4(
                lora_of(0u, ends.x, i),
                lora_of(ends.x, ends.y, i),
                lora_of(ends.y, ends.z, i),
                lora_of(ends.z, GROUPS, i),
            );
        } else {
            let at = row * 4u * width + channel;
            lora = vec4(up[at], up[at + width], up[at + 2u * width], up[at + 3u * width]);
        }
        let eta = sigmoid(own.a0 + lora.y);
        if params.first_layer != 0u {
            v_first[row * width + channel] = v;
        } else {
            v += (first - v) * sigmoid(own.v0 + lora.z);
        }
        let modulated = k * (1.0 + (eta - 1.0) * own.k_a);
        token.receptance = r;
        token.decay = expm1(-params.decay_scale * sigmoid(own.w0 + lora.x));
        token.key = modulated;
        token.value = v;
        token.removal = k * own.k_k;
        token.rate = eta;
        token.bonus = r * modulated * own.r_k;
        token.gate = lora.w;
    }
    return token;
}

// What the groups have of the state's answer to kappa, of the square of its norm and of the bonus, summed. Every invocation
// must call it.
fn gathered(q: f32, square: f32, extra: f32, i: u32, g: u32, l: u32) -> vec3<f32> {
    parts[l] = q;
    if i == 0u {
        squares[g] = square;
        bonuses[g] = extra;
    }
    workgroupBarrier();
    var sum = vec3(0.0);
    for (var p = 0u; p < LANES / N; p++) {
        sum += vec3(parts[p * N + i], squares[p], bonuses[p]);
    }
    return sum;
}

// What the groups' answers y come to: normed, with the bonus, gated, written, if NORM. Every invocation must call it. After it an
// invocation of another group than the first reads nothing that the first writes before the next barrier.
fn finish(row: u32, head: u32, own: Vectors, y: f32, bonus: f32, gate: f32, i: u32, g: u32, l: u32) {
    parts[LANES + l] = y;
    workgroupBarrier();
    if g == 0u {
        var sum = 0.0;
        for (var p = 0u; p < LANES / N; p++) {
            sum += parts[LANES + p * N + i];
        }
        answer[i] = sum;
        if !NORM {
            let to = 3u * row * params.width + head * N + i;
            out[to] = bitcast<u32>(sum);
            out[to + params.width] = bitcast<u32>(bonus);
            out[to + 2u * params.width] = bitcast<u32>(gate);
        }
    }
    if !NORM {
        return;
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
        let normed = (answer[i] - mean) * scale * own.gain + own.bias;
        let own_gated = (normed + bonus) * gate;
        if HALVES == 0u {
            out[row * params.width + head * N + i] = bitcast<u32>(own_gated);
        } else {
            gated[i] = own_gated;
        }
    }
    if HALVES != 0u {
        workgroupBarrier();
        if l < N / 2u {
            let two = vec2(gated[2u * l], gated[2u * l + 1u]);
            out[row * params.width + head * (N / 2u) + l] = packed(two);
        }
    }
}
