// One token of a head: from the projections to the operands of the state update, from the state's answer to the output.
//use sigmoid
//use expm1
//use packed
//use moments
//
// The kernel declares N, LANES, the parameters and bindings used below, and the function `product`, which gives what the adapter
// for one of the operands comes to in a channel of a row. Invocation (i, g), i = place % N, has channel i; of the groups g, of N
// invocations each, as many as there are make different operands, and the first has the norm.
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
var<workgroup> gate: array<f32, N>;

// The operands that have adapters, in the order of those. With the rate come the receptance, the key and all that is
// made of them.
const DECAY: u32 = 0u;
const RATE: u32 = 1u;
const VALUE: u32 = 2u;
const GATE: u32 = 3u;

// Whether a group makes an operand.
fn makes(operand: u32, g: u32) -> bool {
    return g == operand % GROUPS;
}

// The vectors of a channel, as far as an invocation needs them.
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

// What is read of a token in a channel, but for what becomes of its low ranks, as far as an invocation needs it.
struct Token {
    receptance: f32,
    key: f32,
    value: f32,
    first: f32, // v of the first layer
}

fn vectors_of(head: u32, i: u32, g: u32) -> Vectors {
    let width = params.width;
    let channel = head * N + i;
    var own: Vectors;
    if makes(DECAY, g) {
        own.w0 = vectors[channel];
    }
    if makes(RATE, g) {
        own.a0 = vectors[width + channel];
        own.k_k = vectors[3u * width + channel];
        own.k_a = vectors[4u * width + channel];
        own.r_k = vectors[5u * width + channel];
    }
    if makes(VALUE, g) {
        own.v0 = vectors[2u * width + channel];
    }
    if g == 0u {
        own.gain = vectors[6u * width + channel];
        own.bias = vectors[7u * width + channel];
    }
    return own;
}

// A kernel calls it before the first barrier of a row, so that what it reads is under way meanwhile.
fn token_of(row: u32, head: u32, i: u32, g: u32) -> Token {
    let width = params.width;
    let channel = head * N + i;
    let at = row * params.inputs + channel;
    var token: Token;
    if makes(RATE, g) {
        token.receptance = inputs[at];
        token.key = inputs[at + width];
    }
    if makes(VALUE, g) {
        token.value = inputs[at + 2u * width];
        if params.first_layer == 0u {
            token.first = v_first[row * width + channel];
        }
    }
    return token;
}

// A product that is given.
fn given(operand: u32, row: u32, head: u32, i: u32) -> f32 {
    return up[(row * 4u + operand) * params.width + head * N + i];
}

// Makes the operands of a row. A barrier must come before they are read, and another before those of the next row are made: the
// first of `finish` is enough.
fn make_operands(row: u32, head: u32, token: Token, own: Vectors, i: u32, g: u32) {
    if makes(DECAY, g) {
        decay[i] = expm1(-params.decay_scale * sigmoid(own.w0 + product(DECAY, row, head, i)));
    }
    if makes(RATE, g) {
        let eta = sigmoid(own.a0 + product(RATE, row, head, i));
        let k = token.key * (1.0 + (eta - 1.0) * own.k_a);
        receptance[i] = token.receptance;
        rate[i] = eta;
        key[i] = k;
        removal[i] = token.key * own.k_k;
        bonus[i] = token.receptance * k * own.r_k;
    }
    if makes(VALUE, g) {
        var v = token.value;
        if params.first_layer != 0u {
            v_first[row * params.width + head * N + i] = v;
        } else {
            v += (token.first - v) * sigmoid(own.v0 + product(VALUE, row, head, i));
        }
        value[i] = v;
    }
    if makes(GATE, g) {
        gate[i] = product(GATE, row, head, i);
    }
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

// What the groups' answers y come to: normed, with the bonus, gated, written, if NORM. Every invocation must call it. Of
// a row's operands nothing is read after its first barrier, since another group may make those of the next row by then. After
// it an invocation of another group than the first reads nothing that the first writes before the next barrier.
fn finish(row: u32, head: u32, own: Vectors, y: f32, bonus: f32, gate: f32, lanes: Sixteen) {
    let l = place_of(lanes);
    let i = l % N;
    let g = l / N;
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
        let of_all = moments(lanes);
        let scale = inverseSqrt(of_all.y + params.norm_eps);
        let normed = (answer[i] - of_all.x) * scale * own.gain + own.bias;
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
