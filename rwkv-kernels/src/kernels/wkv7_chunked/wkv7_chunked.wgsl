// Twin: rwkv-core/src/ops/wkv7_chunked.rs, what of chunks of tokens waits for the state, over packed segments.
//use four_keys
//
// Rows of a state never interact: a workgroup has 16 rows of a head. By blocks of 16 tokens, it multiplies the state that the
// chunk met by what the tokens ask and remove of it, and adds to the state the product of what they write; both products have
// tiles in registers, and factors that pass through workgroup memory. While a block's are used, those of the next are under
// way.

override CHUNK: u32 = 16u; // tokens, a multiple of BLOCK

const N: u32 = 64u;
const LANES: u32 = 128u;
const ROWS: u32 = 16u; // of a state, to a workgroup: each invocation has some at i and at i + PAIR
const PAIR: u32 = ROWS / 2u;
const BLOCK: u32 = 16u;
const QUADS: u32 = N / 4u;       // vectors of a row
const TOKEN: u32 = 6u * QUADS;   // vectors of a token in a head
const EACH: u32 = 2u * BLOCK * QUADS / LANES; // vectors that an invocation loads at a time
const ASK: u32 = 0u; // where it has them
const TELL: u32 = EACH;

// Which of the factors.
const W: u32 = 0u;
const B: u32 = 2u;
const U: u32 = 4u;
const KEPT: u32 = 5u;
// Which of the operands.
const V: u32 = 5u;

struct Params {
    heads: u32,
    stride: u32,   // of a record of the state
    offset: u32,   // of the heads in a record
    y_stride: u32, // from row to row of y
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> segments: array<vec4<u32>>; // first row, rows, record read, record written
@group(0) @binding(2) var<storage, read> operands: array<vec4<f32>>; // [T, H, 6, N], of which v is the last
@group(0) @binding(3) var<storage, read> factors: array<vec4<f32>>;  // [T, H, 6, N], w, r, b, k, u, and of a block's last token what it keeps
@group(0) @binding(4) var<storage, read_write> state: array<f32>;    // records, [H, key N, value N] in each
@group(0) @binding(5) var<storage, read_write> y: array<f32>;        // [T, H, N], rows of `y_stride`

// `w` and `r`, or `b` and `k`, of the 16 tokens of a block.
var<workgroup> stage: array<vec4<f32>, 2u * BLOCK * QUADS>;
// The state that the chunk met.
var<workgroup> met: array<vec4<f32>, ROWS * QUADS>;
// What the tokens write along `b`, and `v`, each for rows i and i + PAIR.
var<workgroup> written: array<vec2<f32>, 2u * BLOCK * PAIR>;

// What an invocation has loaded of the next factors, those to ask by and those to tell, and of `u`, `v` and `y` where it
// computes those.
var<private> held: array<vec4<f32>, 2u * EACH>;
var<private> u: vec2<f32>;
var<private> v: vec2<f32>;
var<private> given: vec2<f32>;

// The state of an invocation: of rows i and i + PAIR, four keys.
var<private> low: vec4<f32>;
var<private> high: vec4<f32>;

struct Place {
    head: u32,
    row: u32, // the first of the workgroup's rows of the state
    l: u32,
}

// Neighbouring rows are in other banks.
fn place(row: u32, quad: u32) -> u32 {
    return row * QUADS + (quad ^ (row % 8u));
}

// Where the vectors of a row begin.
fn token(row: u32, at: Place) -> u32 {
    return (row * params.heads + at.head) * TOKEN;
}

// Loads two factors of a block that begins at row `first`; past the last row, any.
fn fetch(first: u32, end: u32, which: u32, into: u32, at: Place) {
    for (var e = 0u; e < EACH; e++) {
        let t = e * LANES / QUADS + at.l / QUADS;
        let row = min(first + t % BLOCK, end - 1u);
        held[into + e] = factors[token(row, at) + (which + t / BLOCK) * QUADS + at.l % QUADS];
    }
}

fn put(which: u32, at: Place) {
    workgroupBarrier(); // what was there is no longer read
    for (var e = 0u; e < EACH; e++) {
        stage[place(e * LANES / QUADS + at.l / QUADS, at.l % QUADS)] = held[which + e];
    }
    workgroupBarrier();
}

// Loads what an invocation adds to its two products of a token.
fn fetch_own(first: u32, end: u32, at: Place) {
    let row = min(first + at.l / PAIR, end - 1u);
    let i = at.row + at.l % PAIR;
    let vectors = token(row, at) + i / 4u;
    u = vec2(factors[vectors + U * QUADS][i % 4u], factors[vectors + U * QUADS + PAIR / 4u][i % 4u]);
    v = vec2(operands[vectors + V * QUADS][i % 4u], operands[vectors + V * QUADS + PAIR / 4u][i % 4u]);
    let source = row * params.y_stride + at.head * N + i;
    given = vec2(y[source], y[source + PAIR]);
}

fn total(x: vec4<f32>) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}

// What a token of the block removes and reads of the state that the chunk met, in two rows.
fn ask(first: u32, count: u32, at: Place) {
    let t = at.l / PAIR;
    let i = at.l % PAIR;
    var w_low = vec4(0.0);
    var w_high = vec4(0.0);
    var r_low = vec4(0.0);
    var r_high = vec4(0.0);
    for (var q = 0u; q < QUADS; q++) {
        let w = stage[place(t, q)];
        let r = stage[place(BLOCK + t, q)];
        let s_low = met[place(i, q)];
        let s_high = met[place(i + PAIR, q)];
        w_low = fma(w, s_low, w_low);
        w_high = fma(w, s_high, w_high);
        r_low = fma(r, s_low, r_low);
        r_high = fma(r, s_high, r_high);
    }
    written[at.l] = vec2(total(w_low), total(w_high)) + u;
    written[BLOCK * PAIR + at.l] = v;
    if t < count {
        let to = (first + t) * params.y_stride + at.head * N + at.row + i;
        y[to] = total(r_low) + given.x;
        y[to + PAIR] = total(r_high) + given.y;
    }
}

// Which four keys of which two rows of the state an invocation has.
fn quad_of(l: u32) -> u32 {
    return l % 8u + l / 32u % 2u * 8u;
}

fn row_of(l: u32) -> u32 {
    return l / 8u % 4u + l / 64u * 4u;
}

// Writes the block's tokens into the state.
fn tell(count: u32, kept: vec4<f32>, at: Place) {
    let quad = quad_of(at.l);
    let i = row_of(at.l);
    var add_low = vec4(0.0);
    var add_high = vec4(0.0);
    for (var t = 0u; t < count; t++) {
        let b = stage[place(t, quad)];
        let k = stage[place(BLOCK + t, quad)];
        let q_i = written[t * PAIR + i];
        let v_i = written[(BLOCK + t) * PAIR + i];
        add_low = fma(vec4(v_i.x), k, fma(vec4(q_i.x), b, add_low));
        add_high = fma(vec4(v_i.y), k, fma(vec4(q_i.y), b, add_high));
    }
    // Where most is kept, that less one.
    let lost = kept > vec4(0.0);
    low = select(low, vec4(0.0), lost) + fma(low, kept, add_low);
    high = select(high, vec4(0.0), lost) + fma(high, kept, add_high);
}

@compute @workgroup_size(LANES)
fn wkv7_chunked(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) l: u32) {
    let segment = segments[group.y];
    let at = Place(group.x / (N / ROWS), group.x % (N / ROWS) * ROWS, l);
    let quad = quad_of(l);
    let i = row_of(l);
    let own = params.offset + (at.head * N + 4u * quad) * N + at.row + i;
    low = load(segment.z * params.stride + own);
    high = load(segment.z * params.stride + own + PAIR);

    let end = segment.x + segment.y;
    if segment.y > 0u {
        fetch(segment.x, end, W, ASK, at);
        fetch(segment.x, end, B, TELL, at);
        fetch_own(segment.x, end, at);
        for (var first = segment.x; first < end; first += BLOCK) {
            let count = min(end - first, BLOCK);
            if (first - segment.x) % CHUNK == 0u {
                // Whoever reads it is past a barrier since.
                met[place(i, quad)] = low;
                met[place(i + PAIR, quad)] = high;
            }
            put(ASK, at);
            fetch(first + BLOCK, end, W, ASK, at);
            let kept = factors[token(first + count - 1u, at) + KEPT * QUADS + quad];
            ask(first, count, at);
            put(TELL, at);
            fetch(first + BLOCK, end, B, TELL, at);
            fetch_own(first + BLOCK, end, at);
            if count == BLOCK {
                tell(BLOCK, kept, at);
            } else {
                tell(count, kept, at);
            }
        }
    }

    save(segment.w * params.stride + own, low);
    save(segment.w * params.stride + own + PAIR, high);
}
