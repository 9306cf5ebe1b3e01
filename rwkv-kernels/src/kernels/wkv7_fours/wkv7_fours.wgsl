// Twin: rwkv-core/src/ops/wkv7.rs, the RWKV-7 state update, four tokens to a sum, over packed segments of many tokens.
//use four_keys
//use sixteen
//
// Rows of a state never interact: a workgroup has ROWS of a head, and a team of 16 invocations two of them, or one if the
// workgroup has 8, which is for so few heads that more would leave half of the processors without any. Each invocation has
// four keys of each row of its team. A sum over a team is mostly waiting, and what a token removes of the state waits for
// one. So four tokens share it: with `u` what they make of the state but for what they remove, and `b[s,t]` the direction of
// token s as it is decayed when token t is past,
//
//     u[t] = u[t-1] + (u[t-1] (w[t] - 1) + v[t] k[t])
//     x[t] = u[t-1] kappa[t] - sum_{s<t} x[s] (b[s,t-1] kappa[t])
//     y[t] = u[t] r[t] - sum_{s<=t} x[s] (b[s,t] r[t])
//     S    = u[3] - sum_s x[s] b[s,3]
//
// The 16 products of directions with `kappa` and `r` are the same for all rows: teams compute those of some tokens when they
// are staged. Tokens pass through workgroup memory; while they are used, the loads of the next are under way.
//
// What this is written for, as NVIDIA's compiler (driver 580) was seen to do: sums are in the order of the text, so that
// what does not wait for each other is side by side there.

override ROWS: u32 = 16u; // of a state, to a workgroup: 8, 16 or 32
override STAGE: u32 = 8u; // tokens that are staged at a time: as many as WebGPU promises memory for; more are faster
override EACH_ROWS: u32 = select(2u, 1u, ROWS < 16u); // to a team

const N: u32 = 64u;
const TEAM: u32 = 16u;
override LANES: u32 = ROWS / EACH_ROWS * TEAM;
override TEAMS: u32 = LANES / TEAM;
const QUADS: u32 = N / 4u;           // vectors of a row
const GROUP: u32 = 4u;               // tokens to a sum
override GROUPS: u32 = STAGE / GROUP;
override TURN: u32 = select(4u, 2u, GROUPS < 4u); // groups one after the other in the text
const VECTORS: u32 = 5u * QUADS;     // of a token that is staged: w - 1, k, kappa, b, r
const TOKEN: u32 = VECTORS + QUADS;  // of a token in a head: v too
// Which of them.
const K: u32 = QUADS;
const KAPPA: u32 = 2u * QUADS;
const B: u32 = 3u * QUADS;
const R: u32 = 4u * QUADS;
// Vectors that an invocation loads at a time, and the most that they may be.
override LOADED: u32 = STAGE * VECTORS;
override EACH: u32 = (LOADED + LANES - 1u) / LANES;
const MOST: u32 = 20u; // 32 tokens, 128 invocations

struct Params {
    heads: u32,
    stride: u32,   // of a record of the state
    offset: u32,   // of the heads in a record
    y_stride: u32, // from row to row of y
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> segments: array<vec4<u32>>; // first row, rows, record read, record written
@group(0) @binding(2) var<storage, read> operands: array<vec4<f32>>; // [T, H, 6, N], w - 1, k, kappa, b, r, v
@group(0) @binding(3) var<storage, read_write> state: array<f32>;    // records, [H, key N, value N] in each
@group(0) @binding(4) var<storage, read_write> y: array<f32>;        // [T, H, N], rows of `y_stride`

var<workgroup> tokens: array<vec4<f32>, LOADED>;
// Of a group of tokens, their values of each of the workgroup's rows.
override VALUES: u32 = GROUPS * ROWS;
var<workgroup> values: array<vec4<f32>, VALUES>;
// Of a group, in row t the products of b[s,t] with r[t] up to s = t, and after it those of b[t,s-1] with kappa[s].
var<workgroup> products: array<vec4<f32>, STAGE>;

// What an invocation has loaded of the next tokens.
var<private> held: array<vec4<f32>, MOST>;
var<private> held_v: vec4<f32>;
// The state of an invocation: four keys of its own row, and of that of the other half of its team, if that has another.
var<private> own: vec4<f32>;
var<private> other: vec4<f32>;

// Where an invocation works.
struct Place {
    head: u32,
    row: u32,    // its own row of the state
    first: u32,  // the first of the workgroup's rows
    member: u32, // of its team
    l: u32,
}

// Loads tokens from row `first` on; past the last, any.
fn fetch(first: u32, end: u32, at: Place) {
    for (var e = 0u; e < EACH; e++) {
        let i = e * LANES + at.l;
        let row = min(first + i / VECTORS, end - 1u);
        held[e] = operands[(row * params.heads + at.head) * TOKEN + i % VECTORS];
    }
    // Each has one vector of values at most.
    let row = min(first + at.l / (ROWS / 4u), end - 1u);
    held_v = operands[(row * params.heads + at.head) * TOKEN + VECTORS + at.first / 4u + at.l % (ROWS / 4u)];
}

// Stages them. Tokens past the last leave the state as it is.
fn stage(first: u32, end: u32, at: Place) {
    for (var e = 0u; e < EACH; e++) {
        let i = e * LANES + at.l;
        let which = i % VECTORS / QUADS * QUADS;
        let changes = which < KAPPA || which == B;
        if i < LOADED {
            tokens[i] = select(held[e], vec4(0.0), changes && first + i / VECTORS >= end);
        }
    }
    let t = at.l / (ROWS / 4u);
    if t < STAGE {
        let row = t / GROUP * ROWS + at.l % (ROWS / 4u) * 4u;
        values[row][t % GROUP] = held_v.x;
        values[row + 1u][t % GROUP] = held_v.y;
        values[row + 2u][t % GROUP] = held_v.z;
        values[row + 3u][t % GROUP] = held_v.w;
    }
}

// Sums over pairs of invocations whose places in their team differ by `mask`: of `x` in the one where that bit is 0, of `y` in
// the other.
fn halved(x: vec4<f32>, y: vec4<f32>, mask: u32, at: Place, lanes: Sixteen) -> vec4<f32> {
    let upper = (at.member & mask) != 0u;
    return select(x, y, upper) + across(select(y, x, upper), mask, lanes);
}

// Sums over four invocations, those whose places differ in the last two bits: in each the element of that number.
fn quartered(x: vec4<f32>, at: Place, lanes: Sixteen) -> f32 {
    let two = halved(vec4(x.xy, 0.0, 0.0), vec4(x.zw, 0.0, 0.0), 2u, at, lanes);
    return halved(vec4(two.x, 0.0, 0.0, 0.0), vec4(two.y, 0.0, 0.0, 0.0), 1u, at, lanes).x;
}

// Computes the products of the tokens that are staged, and decays their `b` to the end of their group.
fn prepare(at: Place, lanes: Sixteen) {
    for (var before = 0u; before < GROUPS; before += TEAMS) {
        let group = before + at.l / TEAM;
        let zero = group % GROUPS * GROUP * VECTORS + at.member;
        let one = zero + VECTORS;
        let two = one + VECTORS;
        let three = two + VECTORS;
        var b0 = tokens[zero + B];
        var b1 = tokens[one + B];
        var b2 = tokens[two + B];
        let b3 = tokens[three + B];
        var p0: vec4<f32>;
        var p1: vec4<f32>;
        var p2: vec4<f32>;
        var p3: vec4<f32>;
        p0.x = dot(b0, tokens[zero + R]);
        p0.y = dot(b0, tokens[one + KAPPA]);
        b0 = fma(b0, tokens[one], b0);
        p1.x = dot(b0, tokens[one + R]);
        p1.y = dot(b1, tokens[one + R]);
        p0.z = dot(b0, tokens[two + KAPPA]);
        p1.z = dot(b1, tokens[two + KAPPA]);
        b0 = fma(b0, tokens[two], b0);
        b1 = fma(b1, tokens[two], b1);
        p2.x = dot(b0, tokens[two + R]);
        p2.y = dot(b1, tokens[two + R]);
        p2.z = dot(b2, tokens[two + R]);
        p0.w = dot(b0, tokens[three + KAPPA]);
        p1.w = dot(b1, tokens[three + KAPPA]);
        p2.w = dot(b2, tokens[three + KAPPA]);
        b0 = fma(b0, tokens[three], b0);
        b1 = fma(b1, tokens[three], b1);
        b2 = fma(b2, tokens[three], b2);
        p3.x = dot(b0, tokens[three + R]);
        p3.y = dot(b1, tokens[three + R]);
        p3.z = dot(b2, tokens[three + R]);
        p3.w = dot(b3, tokens[three + R]);
        let even = halved(p0, p2, 8u, at, lanes);
        let odd = halved(p1, p3, 8u, at, lanes);
        let product = quartered(halved(even, odd, 4u, at, lanes), at, lanes);
        if group < GROUPS {
            products[group * GROUP + at.member / GROUP][at.member % GROUP] = product;
            tokens[zero + B] = b0;
            tokens[one + B] = b1;
            tokens[two + B] = b2;
        }
    }
}

// Moves `u` on over a token. Returns the invocation's part of what it asks and of what it is answered, each for both rows; where
// there is one, the second of each is zero.
fn step(token: u32, v_own: f32, v_other: f32) -> vec4<f32> {
    let kappa = tokens[token + KAPPA];
    let w = tokens[token];
    let k = tokens[token + K];
    let r = tokens[token + R];
    let asked = own;
    let asked_other = other;
    own += fma(own, w, v_own * k);
    if EACH_ROWS == 2u {
        other += fma(other, w, v_other * k);
    }
    var sums = vec4(asked.x, asked_other.x, own.x, other.x) * vec4(kappa.xx, r.xx);
    sums = fma(vec4(asked.y, asked_other.y, own.y, other.y), vec4(kappa.yy, r.yy), sums);
    sums = fma(vec4(asked.z, asked_other.z, own.z, other.z), vec4(kappa.zz, r.zz), sums);
    return fma(vec4(asked.w, asked_other.w, own.w, other.w), vec4(kappa.ww, r.ww), sums);
}

// What four tokens remove of a row, of what they ask of `u`.
fn removed(asked: vec4<f32>, group: u32) -> vec4<f32> {
    let of_first = products[group * GROUP];
    let of_second = products[group * GROUP + 1u];
    let of_third = products[group * GROUP + 2u];
    let second = fma(-asked.x, of_first.y, asked.y);
    let third = fma(-second, of_second.z, fma(-asked.x, of_first.z, asked.z));
    let fourth = fma(-second, of_second.w, fma(-asked.x, of_first.w, asked.w));
    return vec4(asked.x, second, third, fma(-third, of_third.w, fourth));
}

// Moves the state on over a group of tokens that are staged, of which the first is row `first`.
fn advance(group: u32, first: u32, end: u32, at: Place, lanes: Sixteen) {
    let zero = group * GROUP * VECTORS + at.member;
    let one = zero + VECTORS;
    let two = one + VECTORS;
    let three = two + VECTORS;
    let v_own = values[group * ROWS + at.row - at.first];
    var v_other: vec4<f32>;
    if EACH_ROWS == 2u {
        v_other = values[group * ROWS + ((at.row - at.first) ^ 1u)];
    }
    let t0 = step(zero, v_own.x, v_other.x);
    let t1 = step(one, v_own.y, v_other.y);
    let t2 = step(two, v_own.z, v_other.z);
    let t3 = step(three, v_own.w, v_other.w);
    // Each half of a team keeps the sums of its own row, and of it the first four members what is asked; of one row both halves
    // come to the same.
    var asked = vec4(t0.x, t1.x, t2.x, t3.x);
    var answered = vec4(t0.z, t1.z, t2.z, t3.z);
    if EACH_ROWS == 2u {
        asked += across(vec4(t0.y, t1.y, t2.y, t3.y), 8u, lanes);
        answered += across(vec4(t0.w, t1.w, t2.w, t3.w), 8u, lanes);
    }
    var sum = quartered(halved(asked, answered, 4u, at, lanes), at, lanes);
    if EACH_ROWS == 1u {
        sum += across(vec4(sum, 0.0, 0.0, 0.0), 8u, lanes).x;
    }
    let x_own = removed(four_of(sum, at.member & 8u, lanes), group);
    own = fma(vec4(-x_own.x), tokens[zero + B], own);
    own = fma(vec4(-x_own.y), tokens[one + B], own);
    own = fma(vec4(-x_own.z), tokens[two + B], own);
    own = fma(vec4(-x_own.w), tokens[three + B], own);
    if EACH_ROWS == 2u {
        let x_other = removed(four_of(sum, (at.member & 8u) ^ 8u, lanes), group);
        other = fma(vec4(-x_other.x), tokens[zero + B], other);
        other = fma(vec4(-x_other.y), tokens[one + B], other);
        other = fma(vec4(-x_other.z), tokens[two + B], other);
        other = fma(vec4(-x_other.w), tokens[three + B], other);
    }

    let t = at.member % GROUP;
    if (at.member & 4u) != 0u && at.member / 8u < EACH_ROWS && first + t < end {
        let up_to = vec4(0u, 1u, 2u, 3u) <= vec4(t);
        let read = select(vec4(0.0), products[group * GROUP + t], up_to);
        y[(first + t) * params.y_stride + at.head * N + at.row] = sum - dot(x_own, read);
    }
}

@compute @workgroup_size(LANES)
fn wkv7_fours(@builtin(workgroup_id) group: vec3<u32>, lanes: Sixteen) {
    let segment = segments[group.y];
    let l = place_of(lanes);
    let member = l % TEAM;
    let rows = group.x % (N / ROWS) * ROWS;
    let row = rows + l / TEAM * EACH_ROWS + member / 8u % EACH_ROWS;
    let at = Place(group.x / (N / ROWS), row, rows, member, l);
    let keys = params.offset + (at.head * N + 4u * member) * N;
    own = load(segment.z * params.stride + keys + at.row);
    if EACH_ROWS == 2u {
        other = load(segment.z * params.stride + keys + (at.row ^ 1u));
    }

    let end = segment.x + segment.y;
    if segment.y > 0u {
        fetch(segment.x, end, at);
        for (var first = segment.x; first < end; first += STAGE) {
            workgroupBarrier(); // the tokens before are no longer read
            stage(first, end, at);
            workgroupBarrier();
            fetch(first + STAGE, end, at);
            prepare(at, lanes);
            workgroupBarrier();
            // Several groups at a time, so that what one reads need not wait for what the one before sums.
            for (var g = 0u; g < GROUPS && first + g * GROUP < end; g += TURN) {
                advance(g, first + g * GROUP, end, at, lanes);
                advance(g + 1u, first + (g + 1u) * GROUP, end, at, lanes);
                if TURN > 2u {
                    advance(g + 2u, first + (g + 2u) * GROUP, end, at, lanes);
                    advance(g + 3u, first + (g + 3u) * GROUP, end, at, lanes);
                }
            }
        }
    }

    save(segment.w * params.stride + keys + at.row, own);
    if EACH_ROWS == 2u {
        save(segment.w * params.stride + keys + (at.row ^ 1u), other);
    }
}
