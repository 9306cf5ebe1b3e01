// Twin: rwkv-core/src/ops/wkv7.rs, the RWKV-7 state update, over packed segments of many tokens.
//use quad
//use base
//use segment
//
// Rows of a state never interact: a workgroup has some rows of a head, so that one sequence keeps many processors busy,
// and a team of invocations has one row, each some of its keys. What a token costs is then a few multiply-adds, two
// shuffles and the reads of its vectors, which pass through workgroup memory some tokens at a time; while they are
// used, the loads of the next are under way.
//
// In whatever format a state is held, it is single precision while the tokens pass: it is rounded once, when it is written.
// With LAZY what is read is a base and the entries of the tokens since, as `time_mix_resident` has them; what is written is
// a base, if there is one to write, and an entry for each of the tokens after it.

const N: u32 = 64u;
const LANES: u32 = 64u;
const ROWS: u32 = LANES / TEAM; // of a state, to a workgroup
const QUADS: u32 = N / 4u / TEAM; // of the keys of a row, to an invocation
const CHUNK: u32 = 8u;          // tokens at a time
const TOKEN: u32 = 6u * N / 4u; // vectors of a token in a head
// Vectors of a token after w - 1.
const K: u32 = N / 4u;
const KAPPA: u32 = 2u * K;
const B: u32 = 3u * K;
const R: u32 = 4u * K;
const V: u32 = 5u * K;
const EACH: u32 = CHUNK * TOKEN / LANES; // vectors that an invocation loads at a time

override FORMAT: u32 = 0u;
override ROUNDING: u32 = 0u;
override LAZY: bool = false;
// Two tokens at a time: then a sequence's results depend, but for rounding, on how its tokens are spread over calls.
override PAIRED: bool = false;

struct Params {
    heads: u32,
    stride: u32,      // of a base
    offset: u32,      // of the heads in a base
    y_stride: u32,    // from row to row of y
    slots: u32,       // where slots begin, of which each has an entry
    slot_stride: u32, // of a slot
    entry: u32,       // of the entry in a slot
    capacity: u32,    // tokens that may be pending
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> segments: array<u32>;       // first row, rows, base read, base written, or `Segment`
@group(0) @binding(2) var<storage, read> operands: array<vec4<f32>>; // [T, H, 6, N], w - 1, k, kappa, b, r, v
@group(0) @binding(3) var<storage, read_write> state: array<u32>;    // bases, then slots
@group(0) @binding(4) var<storage, read_write> y: array<f32>;        // [T, H, N], rows of `y_stride`

var<workgroup> tokens: array<vec4<f32>, CHUNK * TOKEN>;

// Of row i of the state, the keys 4 (m TEAM + member) and the next three for each m; and the row's exponent in the base.
var<private> s: array<vec4<f32>, QUADS>;
var<private> exponent: i32;
// Its part of what the last token is answered, or the last two.
var<private> answers: vec2<f32>;
// What an invocation has loaded of the next tokens.
var<private> held: array<vec4<f32>, EACH>;
// Product of w since the base, of key i.
var<private> since: f32;

// Where an invocation works: in which head, on which row of the state, as which of its team.
struct Place {
    head: u32,
    i: u32,
    member: u32,
    l: u32,
}

// Loads tokens from `first` on; past the last, any.
fn fetch(first: u32, end: u32, segment: Segment, at: Place) {
    for (var e = 0u; e < EACH; e++) {
        let place = e * LANES + at.l;
        let row = min(first + place / TOKEN, end - 1u);
        held[e] = operands[(row * params.heads + at.head) * TOKEN + place % TOKEN];
        // The dither is for the rounding that follows.
        if ROUNDING == DECAY_DITHER && place % TOKEN < N / 4u && row + 1u == segment.first + segment.rows {
            let step = segment.step + segment.rows - 1u;
            let channel = at.head * N + 4u * (place % TOKEN);
            held[e] += vec4(
                decay_dither(ROUNDING, step, channel),
                decay_dither(ROUNDING, step, channel + 1u),
                decay_dither(ROUNDING, step, channel + 2u),
                decay_dither(ROUNDING, step, channel + 3u),
            );
        }
    }
}

fn stage(at: Place) {
    workgroupBarrier(); // the tokens before are no longer read
    for (var e = 0u; e < EACH; e++) {
        tokens[e * LANES + at.l] = held[e];
    }
    workgroupBarrier();
}

// Value i of a token that is staged.
fn value_of(t: u32, i: u32) -> f32 {
    return tokens[t * TOKEN + V + i / 4u][i % 4u];
}

// Moves the state on over the first of the tokens that are staged, of which the first is row `first` of those from `start` on.
// What a token is answered is summed together with what the next one asks, since a sum is mostly waiting.
fn advance(start: u32, first: u32, count: u32, keep: bool, segment: Segment, at: Place) {
    let to = first * params.y_stride + at.head * N + at.i;
    for (var t = 0u; t < count; t++) {
        let vectors = t * TOKEN + at.member;
        var part = vec4(0.0);
        for (var m = 0u; m < QUADS; m++) {
            part = fma(s[m], tokens[vectors + KAPPA + m * TEAM], part);
        }
        let sums = team_sums(vec2(total(part), answers.x));
        if first + t > start && at.member == 0u {
            y[to + t * params.y_stride - params.y_stride] = sums.y;
        }
        let v_i = value_of(t, at.i);
        if LAZY && keep && at.member == 0u {
            write_entry(segment.slots + first + t - segment.first, t, -sums.x, v_i, at);
        }
        part = vec4(0.0);
        for (var m = 0u; m < QUADS; m++) {
            let quad = vectors + m * TEAM;
            let added = fma(vec4(-sums.x), tokens[quad + B], v_i * tokens[quad + K]);
            s[m] += fma(s[m], tokens[quad], added);
            part = fma(s[m], tokens[quad + R], part);
        }
        answers.x = total(part);
    }
}

// The same, two tokens at a time, with one sum for both. With `u` what the first token makes of the state but for what it
// removes, which is not known yet, and `x` what tokens ask,
//
//     u = s + (s (w - 1) + v k)     x = s kappa     s' = u - x b     x' = s' kappa' = u kappa' - x (b kappa')
//
// Rounding is as above, but for `u` in `x'` and the product that is taken from it.
fn advance_pairs(start: u32, first: u32, count: u32, keep: bool, segment: Segment, at: Place) {
    let to = first * params.y_stride + at.head * N + at.i;
    for (var t = 0u; t < count; t += 2u) {
        let one = t * TOKEN + at.member;
        let two = one + TOKEN;
        let v_one = value_of(t, at.i);
        var added: array<vec4<f32>, QUADS>;
        var asked = vec4(0.0);
        var later = vec4(0.0);
        var overlap = vec4(0.0);
        for (var m = 0u; m < QUADS; m++) {
            let quad = one + m * TEAM;
            let kappa_two = tokens[two + KAPPA + m * TEAM];
            added[m] = fma(s[m], tokens[quad], v_one * tokens[quad + K]);
            asked = fma(s[m], tokens[quad + KAPPA], asked);
            later = fma(s[m] + added[m], kappa_two, later);
            overlap = fma(tokens[quad + B], kappa_two, overlap);
        }
        let between = team_sums(vec2(total(overlap), 0.0)).x;
        let sums = team_sums(vec2(total(asked), total(later)));
        let answered = team_sums(answers);
        if first + t > start && at.member == 0u {
            let place = to + t * params.y_stride;
            y[place - 2u * params.y_stride] = answered.x;
            y[place - params.y_stride] = answered.y;
        }
        if LAZY && keep && at.member == 0u {
            write_entry(segment.slots + first + t - segment.first, t, -sums.x, v_one, at);
        }
        var part = vec4(0.0);
        for (var m = 0u; m < QUADS; m++) {
            let quad = one + m * TEAM;
            s[m] += fma(vec4(-sums.x), tokens[quad + B], added[m]);
            part = fma(s[m], tokens[quad + R], part);
        }
        answers.x = total(part);

        if t + 1u < count {
            let x_two = fma(-sums.x, between, sums.y);
            let v_two = value_of(t + 1u, at.i);
            if LAZY && keep && at.member == 0u {
                write_entry(segment.slots + first + t + 1u - segment.first, t + 1u, -x_two, v_two, at);
            }
            part = vec4(0.0);
            for (var m = 0u; m < QUADS; m++) {
                let quad = two + m * TEAM;
                let of_two = fma(vec4(-x_two), tokens[quad + B], v_two * tokens[quad + K]);
                s[m] += fma(s[m], tokens[quad], of_two);
                part = fma(s[m], tokens[quad + R], part);
            }
            answers.y = total(part);
        }
    }
}

fn total(x: vec4<f32>) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}

// Moves the state on over tokens that are staged.
fn advance_chunk(start: u32, first: u32, count: u32, keep: bool, segment: Segment, at: Place) {
    if PAIRED {
        advance_pairs(start, first, count, keep, segment, at);
    } else {
        advance(start, first, count, keep, segment, at);
    }
}

// Moves the state on over the rows from `start` to `end` of a segment; if `keep`, their entries are written.
fn scan(start: u32, end: u32, keep: bool, segment: Segment, at: Place) {
    if start < end {
        fetch(start, end, segment, at);
        var first = start;
        // The last tokens are outside of the loop, or else the loads of the next sink to where they are used.
        for (; first + CHUNK < end; first += CHUNK) {
            stage(at);
            fetch(first + CHUNK, end, segment, at);
            advance_chunk(start, first, CHUNK, keep, segment, at);
        }
        stage(at);
        advance_chunk(start, first, end - first, keep, segment, at);
        // The last one or two wait for their answers.
        let answered = team_sums(answers);
        if at.member == 0u {
            let last = (end - 1u) * params.y_stride + at.head * N + at.i;
            if PAIRED && (end - start) % 2u == 0u {
                y[last - params.y_stride] = answered.x;
                y[last] = answered.y;
            } else {
                y[last] = answered.x;
            }
        }
    }
}

// Where the entry in a slot begins that is listed at `place`, of this head.
fn entry_at(place: u32, head: u32) -> u32 {
    return params.slots + segments[place] * params.slot_stride + params.entry + head * N;
}

// Writes key and value i of the entry of a token that is staged.
fn write_entry(place: u32, t: u32, q: f32, v: f32, at: Place) {
    let width = params.heads * N;
    let own = t * TOKEN + at.i / 4u;
    since = fma(since, tokens[own][at.i % 4u], since);
    let undecayed = 1.0 / since;
    let to = entry_at(place, at.head) + at.i;
    state[to] = bitcast<u32>(q);
    state[to + width] = bitcast<u32>(v);
    state[to + 2u * width] = bitcast<u32>(tokens[own + B][at.i % 4u] * undecayed);
    state[to + 3u * width] = bitcast<u32>(tokens[own + K][at.i % 4u] * undecayed);
    state[to + 4u * width] = bitcast<u32>(since);
}

fn four(first: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4(state[first], state[first + 1u], state[first + 2u], state[first + 3u]));
}

// Makes of the base the state that it is with what is pending.
fn add_pending(segment: Segment, at: Place) {
    let width = params.heads * N;
    since = 1.0;
    for (var p = 0u; p < segment.pending; p++) {
        let own = entry_at(segment.entries + p, at.head);
        let q_i = bitcast<f32>(state[own + at.i]);
        let v_i = bitcast<f32>(state[own + width + at.i]);
        for (var m = 0u; m < QUADS; m++) {
            let keys = own + 4u * (m * TEAM + at.member);
            s[m] = fma(vec4(q_i), four(keys + 2u * width), fma(vec4(v_i), four(keys + 3u * width), s[m]));
        }
    }
    if segment.pending > 0u {
        let own = entry_at(segment.entries + segment.pending - 1u, at.head) + 4u * width;
        for (var m = 0u; m < QUADS; m++) {
            s[m] *= four(own + 4u * (m * TEAM + at.member));
        }
        since = bitcast<f32>(state[own + at.i]);
    }
}

// Of a segment's rows, how many are pending in the end: the last ones.
fn pending_of(segment: Segment) -> u32 {
    if !LAZY || segment.rows == 0u {
        return 0u;
    }
    if segment.written == NONE {
        return segment.rows;
    }
    // A full list is folded before the token that finds it so.
    return (segment.rows - (params.capacity - segment.pending) - 1u) % params.capacity + 1u;
}

// Writes the state into a base, and rounds it to what it can hold.
fn settle(base: u32, step: u32, at: Place) {
    var scales = vec4(0.0); // of the row's blocks of 16 keys
    if FORMAT != F32 {
        const SHARE = 4u / TEAM; // quads of a block, to an invocation
        var blocks = vec4(0.0);
        for (var block = 0u; block < 4u; block++) {
            var most = vec4(0.0);
            for (var m = 0u; m < SHARE; m++) {
                most = max(most, abs(s[block * SHARE + m]));
            }
            blocks[block] = max(max(most.x, most.y), max(most.z, most.w));
        }
        blocks = team_max(blocks);
        exponent = next_exponent(exponent, max(max(blocks.x, blocks.y), max(blocks.z, blocks.w)));
        if FORMAT == INT8 {
            blocks *= power_of_two(-exponent);
            scales = vec4(scale_of(blocks.x), scale_of(blocks.y), scale_of(blocks.z), scale_of(blocks.w));
        }
    }
    let row = (at.head * N + at.i) * N; // its place in the layer's state
    for (var m = 0u; m < QUADS; m++) {
        let quad = m * TEAM + at.member;
        s[m] = settle_quad(s[m], exponent, scales[quad / 4u], step, row + 4u * quad, base, at.i, quad, true);
    }
    if FORMAT == INT8 && at.member == 0u {
        store_scales(base, at.i, 0u, scales.xy);
        store_scales(base, at.i, 1u, scales.zw);
    }
    if FORMAT != F32 {
        if at.member == 0u {
            exponents[at.i] = bitcast<u32>(exponent);
        }
        workgroupBarrier();
        // The first invocation of four rows.
        if at.member == 0u && at.i % 4u == 0u {
            store_exponents(base, at.i / 4u);
        }
    }
}

@compute @workgroup_size(LANES)
fn wkv7_scan(@builtin(workgroup_id) group: vec3<u32>, quad: Quad) {
    var segment: Segment;
    if LAZY || FORMAT != F32 {
        segment = segment_of(group.y);
    } else {
        let own = group.y * 4u;
        segment.first = segments[own];
        segment.rows = segments[own + 1u];
        segment.read = segments[own + 2u];
        segment.written = segments[own + 3u];
    }
    let l = place_of(quad);
    let at = Place(group.x / TEAM, group.x % TEAM * ROWS + l / TEAM, l % TEAM, l);
    let heads = params.offset + at.head * head_len();
    let base = segment.read * params.stride + heads;
    exponent = exponent_of(base, at.i);
    for (var m = 0u; m < QUADS; m++) {
        s[m] = load_quad(base, at.i, m * TEAM + at.member, exponent);
    }
    if LAZY {
        add_pending(segment, at);
    }

    let end = segment.first + segment.rows;
    let pending = pending_of(segment);
    scan(segment.first, end - pending, false, segment, at);
    if segment.written != NONE {
        settle(segment.written * params.stride + heads, segment.step + segment.rows - pending, at);
        since = 1.0;
    }
    if LAZY {
        scan(end - pending, end, true, segment, at);
    }
}
