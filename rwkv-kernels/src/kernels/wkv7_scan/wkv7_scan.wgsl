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

@compute @workgroup_size(LANES)
fn wkv7_scan(@builtin(workgroup_id) group: vec3<u32>, quad: Quad) {
    let head = group.x / TEAM;
    let segment = segments[group.y];
    let l = place_of(quad);
    let i = group.x % TEAM * ROWS + l / TEAM;
    let member = l % TEAM;

    // Of row i of the state, the keys 4 (m TEAM + member) and the next three for each m.
    var s: array<vec4<f32>, QUADS>;
    let at = params.offset + (head * N + 4u * member) * N + i;
    for (var m = 0u; m < QUADS; m++) {
        let source = segment.z * params.stride + at + m * TEAM * 4u * N;
        s[m] = vec4(state[source], state[source + N], state[source + 2u * N], state[source + 3u * N]);
    }

    let end = segment.x + segment.y;
    var held: array<vec4<f32>, EACH>;
    if segment.y > 0u {
        for (var e = 0u; e < EACH; e++) {
            held[e] = operand(segment.x, end, head, e * LANES + l);
        }
    }
    for (var first = segment.x; first < end; first += CHUNK) {
        workgroupBarrier(); // the tokens before are no longer read
        for (var e = 0u; e < EACH; e++) {
            tokens[e * LANES + l] = held[e];
        }
        workgroupBarrier();
        for (var e = 0u; e < EACH; e++) {
            held[e] = operand(first + CHUNK, end, head, e * LANES + l);
        }
        for (var t = 0u; t < min(CHUNK, end - first); t++) {
            let vectors = t * TOKEN + member;
            var part = vec4(0.0);
            for (var m = 0u; m < QUADS; m++) {
                part = fma(s[m], tokens[vectors + 2u * N / 4u + m * TEAM], part);
            }
            let q = -team_sum((part.x + part.y) + (part.z + part.w));
            let v_i = tokens[t * TOKEN + 5u * N / 4u + i / 4u][i % 4u];
            part = vec4(0.0);
            for (var m = 0u; m < QUADS; m++) {
                let quad = vectors + m * TEAM;
                let added = fma(vec4(q), tokens[quad + 3u * N / 4u], v_i * tokens[quad + N / 4u]);
                s[m] += fma(s[m], tokens[quad], added);
                part = fma(s[m], tokens[quad + 4u * N / 4u], part);
            }
            let answer = team_sum((part.x + part.y) + (part.z + part.w));
            if member == 0u {
                y[(first + t) * params.y_stride + head * N + i] = answer;
            }
        }
    }

    for (var m = 0u; m < QUADS; m++) {
        let to = segment.w * params.stride + at + m * TEAM * 4u * N;
        state[to] = s[m].x;
        state[to + N] = s[m].y;
        state[to + 2u * N] = s[m].z;
        state[to + 3u * N] = s[m].w;
    }
}

// The vector at a place among those of the tokens from `first` on; of tokens past the last, any.
fn operand(first: u32, end: u32, head: u32, place: u32) -> vec4<f32> {
    let row = min(first + place / TOKEN, end - 1u);
    return operands[(row * params.heads + head) * TOKEN + place % TOKEN];
}
