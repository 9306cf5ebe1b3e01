// Twin: rwkv-core/src/ops/wkv7.rs, the RWKV-7 state update, over packed segments of many tokens.
//use quad
//
// Rows of a state never interact: a workgroup has some rows of a head, so that one sequence keeps many processors busy,
// and a team of invocations has one row, each some of its keys. What a token costs is then a few multiply-adds, two
// shuffles and the reads of its vectors, which pass through workgroup memory some tokens at a time; while they are
// used, the loads of the next are under way.

const N: u32 = 64u;
const LANES: u32 = 64u;
const ROWS: u32 = LANES / TEAM; // of a state, to a workgroup
const QUADS: u32 = N / 4u / TEAM; // of the keys of a row, to an invocation
const CHUNK: u32 = 8u;          // tokens at a time
const TOKEN: u32 = 6u * N / 4u; // vectors of a token in a head
const EACH: u32 = CHUNK * TOKEN / LANES; // vectors that an invocation loads at a time

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

var<workgroup> tokens: array<vec4<f32>, CHUNK * TOKEN>;

// Of row i of the state, the keys 4 (m TEAM + member) and the next three for each m.
var<private> s: array<vec4<f32>, QUADS>;
// What an invocation has loaded of the next tokens.
var<private> held: array<vec4<f32>, EACH>;

// Where an invocation works: in which head, on which row of the state, as which of its team.
struct Place {
    head: u32,
    i: u32,
    member: u32,
    l: u32,
}

// Loads tokens from `first` on; past the last, any.
fn fetch(first: u32, end: u32, at: Place) {
    for (var e = 0u; e < EACH; e++) {
        let place = e * LANES + at.l;
        let row = min(first + place / TOKEN, end - 1u);
        held[e] = operands[(row * params.heads + at.head) * TOKEN + place % TOKEN];
    }
}

fn stage(at: Place) {
    workgroupBarrier(); // the tokens before are no longer read
    for (var e = 0u; e < EACH; e++) {
        tokens[e * LANES + at.l] = held[e];
    }
    workgroupBarrier();
}

// Moves the state on over the first of the tokens that are staged, from row `first` on. What a token is answered is summed
// together with what the next one asks, since a sum is mostly waiting.
fn advance(first: u32, count: u32, at: Place) {
    let to = first * params.y_stride + at.head * N + at.i;
    var answer = 0.0;
    for (var t = 0u; t < count; t++) {
        let vectors = t * TOKEN + at.member;
        var part = vec4(0.0);
        for (var m = 0u; m < QUADS; m++) {
            part = fma(s[m], tokens[vectors + 2u * N / 4u + m * TEAM], part);
        }
        let sums = team_sums(vec2((part.x + part.y) + (part.z + part.w), answer));
        if t > 0u && at.member == 0u {
            y[to + (t - 1u) * params.y_stride] = sums.y;
        }
        let v_i = tokens[t * TOKEN + 5u * N / 4u + at.i / 4u][at.i % 4u];
        part = vec4(0.0);
        for (var m = 0u; m < QUADS; m++) {
            let quad = vectors + m * TEAM;
            let added = fma(vec4(-sums.x), tokens[quad + 3u * N / 4u], v_i * tokens[quad + N / 4u]);
            s[m] += fma(s[m], tokens[quad], added);
            part = fma(s[m], tokens[quad + 4u * N / 4u], part);
        }
        answer = (part.x + part.y) + (part.z + part.w);
    }
    let sums = team_sums(vec2(0.0, answer));
    if at.member == 0u {
        y[to + (count - 1u) * params.y_stride] = sums.y;
    }
}

@compute @workgroup_size(LANES)
fn wkv7_scan(@builtin(workgroup_id) group: vec3<u32>, quad: Quad) {
    let segment = segments[group.y];
    let l = place_of(quad);
    let at = Place(group.x / TEAM, group.x % TEAM * ROWS + l / TEAM, l % TEAM, l);
    let own = params.offset + (at.head * N + 4u * at.member) * N + at.i;
    for (var m = 0u; m < QUADS; m++) {
        let source = segment.z * params.stride + own + m * TEAM * 4u * N;
        s[m] = vec4(state[source], state[source + N], state[source + 2u * N], state[source + 3u * N]);
    }

    let end = segment.x + segment.y;
    if segment.y > 0u {
        fetch(segment.x, end, at);
        var first = segment.x;
        // The last tokens are outside of the loop, or else the loads of the next sink to where they are used.
        for (; first + CHUNK < end; first += CHUNK) {
            stage(at);
            fetch(first + CHUNK, end, at);
            advance(first, CHUNK, at);
        }
        stage(at);
        advance(first, end - first, at);
    }

    for (var m = 0u; m < QUADS; m++) {
        let to = segment.w * params.stride + own + m * TEAM * 4u * N;
        state[to] = s[m].x;
        state[to + N] = s[m].y;
        state[to + 2u * N] = s[m].z;
        state[to + 3u * N] = s[m].w;
    }
}
