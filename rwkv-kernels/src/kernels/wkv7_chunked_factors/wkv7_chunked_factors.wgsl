// Twin: rwkv-core/src/ops/wkv7_chunked.rs, the factors of chunks of tokens, over packed segments.
//
// A workgroup has a chunk of a head and goes through it by blocks of 16 tokens. A block's pair weights with itself and with
// the blocks before it are products of vectors which pass through workgroup memory, half of their keys at a time. Then each
// invocation has a column: of `w` and `r`, along the keys, or of `u` and `y`, along the values. Columns never interact, and
// what one has written it alone reads.
//
// A decay over some tokens is the product of theirs, each step rounded once; both factors of a weight within a block are
// relative to the start of the chunk. Decays are above exp(-exp(-1/2)), hence over 64 tokens above 1e-17, and the one factor
// below 1e17 times what it scales: of neither is a digit lost. Those of earlier blocks are relative to the end of theirs.

override CHUNK: u32 = 16u; // tokens, a multiple of BLOCK

const N: u32 = 64u;
const LANES: u32 = 2u * N;
const BLOCK: u32 = 16u;
const TOKEN: u32 = 6u * N;       // elements of a token in a head
const HALF: u32 = N / 2u;        // keys in workgroup memory at a time
const QUADS: u32 = HALF / 4u;    // vectors of those
const GROUPS: u32 = BLOCK / 4u;  // vectors of tokens in a block

// Which of the factors.
const W: u32 = 0u;
const R: u32 = 1u;
const B: u32 = 2u;
const K: u32 = 3u;
const U: u32 = 4u;
const KEPT: u32 = 5u;
// Which of the pair weights: those along `b` and along `k`, of `a`; two further on, of `r`.
const AB: u32 = 0u;
const AK: u32 = 1u;

struct Params {
    heads: u32,
    segments: u32,
    y_stride: u32, // from row to row of y
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> segments: array<vec4<u32>>;      // first row, rows, record read, record written
@group(0) @binding(2) var<storage, read> operands: array<vec4<f32>>;      // [T, H, 6, N], w - 1, k, kappa, b, r, v
@group(0) @binding(3) var<storage, read_write> factors: array<f32>;       // [T, H, 6, N], w, r, b, k, u, and of a block's last token what it keeps
@group(0) @binding(4) var<storage, read_write> y: array<f32>;             // [T, H, N], rows of `y_stride`

// Of a block, the scaled `a`, `r`, `b` and `k` of 16 tokens each; afterwards, of four tokens at a time, `w` and `u`.
var<workgroup> stage: array<vec4<f32>, 4u * BLOCK * QUADS>;
// [4, CHUNK, GROUPS]: ab, ak, rb and rk of a token of the chunk with all of a block, four at a time.
var<workgroup> pairs: array<vec4<f32>, 4u * CHUNK * GROUPS>;

// The workgroup's chunk: the row of its first token, its tokens, and its head.
struct Chunk {
    first: u32,
    count: u32,
    head: u32,
}

// Decays from the start of the chunk: up to a token and past it, to the end of its block, and to that of another.
struct Decays {
    before: vec4<f32>,
    after: vec4<f32>,
    own: vec4<f32>,
    other: vec4<f32>,
}

// The chunk with a number. The first of segment s has the number `first / CHUNK + s`, which leaves each enough.
fn chunk_of(group: vec3<u32>) -> Chunk {
    var low = 0u;
    var high = params.segments;
    while high - low > 1u {
        let middle = (low + high) / 2u;
        if segments[middle].x / CHUNK + middle <= group.y {
            low = middle;
        } else {
            high = middle;
        }
    }
    let segment = segments[low];
    let start = (group.y - segment.x / CHUNK - low) * CHUNK;
    return Chunk(segment.x + start, min(max(segment.y, start) - start, CHUNK), group.x);
}

// Where the vectors of a token begin, of the last for one past it.
fn token(chunk: Chunk, t: u32) -> u32 {
    return ((chunk.first + min(t, chunk.count - 1u)) * params.heads + chunk.head) * TOKEN;
}

fn operand(chunk: Chunk, t: u32, which: u32, quad: u32) -> vec4<f32> {
    return operands[token(chunk, t) / 4u + which * N / 4u + quad];
}

fn element(chunk: Chunk, t: u32, which: u32, column: u32) -> f32 {
    return operands[token(chunk, t) / 4u + which * N / 4u + column / 4u][column % 4u];
}

fn decays(chunk: Chunk, t: u32, other: u32, quad: u32) -> Decays {
    var p = vec4(1.0);
    var d: Decays;
    for (var block = 0u; block <= t / BLOCK; block++) {
        // Of a constant number of tokens, so that all loads can be under way at once.
        for (var e = 0u; e < BLOCK; e++) {
            let s = block * BLOCK + e;
            d.before = select(d.before, p, s == t);
            p = fma(p, select(vec4(0.0), operand(chunk, s, 0u, quad), s < chunk.count), p);
        }
        if block == other {
            d.other = p;
        }
    }
    d.after = fma(d.before, operand(chunk, t, 0u, quad), d.before);
    d.own = p;
    return d;
}

// Where the weights are of token `s` of the chunk with four of a block.
fn pair(which: u32, s: u32, group: u32) -> u32 {
    return (which * CHUNK + s) * GROUPS + group;
}

// Neighbouring rows are in other banks.
fn place(row: u32, quad: u32) -> u32 {
    return row * QUADS + (quad ^ (row % QUADS));
}

fn keep(at: u32, x: vec4<f32>) {
    factors[at] = x.x;
    factors[at + 1u] = x.y;
    factors[at + 2u] = x.z;
    factors[at + 3u] = x.w;
}

fn kept(at: u32) -> vec4<f32> {
    return vec4(factors[at], factors[at + 1u], factors[at + 2u], factors[at + 3u]);
}

// Stages the vectors of a block against those of another, or of itself; each invocation has four keys of a token.
fn put(chunk: Chunk, block: u32, other: u32, half: u32, l: u32) {
    let quad = half * QUADS + l % QUADS;
    let row = l / QUADS;
    let t = block * BLOCK + row;
    let d = decays(chunk, t, other, quad);
    var b: vec4<f32>;
    var k: vec4<f32>;
    var scale = vec4(1.0);
    if other == block {
        let inverse = 1.0 / d.after;
        b = inverse * operand(chunk, t, 3u, quad);
        k = inverse * operand(chunk, t, 1u, quad);
        let to = token(chunk, t) + 4u * quad;
        if t < chunk.count {
            keep(to + B * N, b * d.own);
            keep(to + K * N, k * d.own);
        }
    } else {
        let source = token(chunk, other * BLOCK + row) + 4u * quad;
        b = kept(source + B * N);
        k = kept(source + K * N);
        scale = 1.0 / d.other;
    }
    stage[place(row, l % QUADS)] = -operand(chunk, t, 2u, quad) * d.before * scale;
    stage[place(BLOCK + row, l % QUADS)] = operand(chunk, t, 4u, quad) * d.after * scale;
    stage[place(2u * BLOCK + row, l % QUADS)] = b;
    stage[place(3u * BLOCK + row, l % QUADS)] = k;
}

fn total(x: vec4<f32>) -> f32 {
    return (x.x + x.y) + (x.z + x.w);
}

// The pair weights of a block with another or itself: each invocation has four tokens with one of the other's.
fn weigh(chunk: Chunk, block: u32, other: u32, l: u32) {
    let s = l % BLOCK;
    let group = l / BLOCK % GROUPS;
    let kind = l / N; // AB or AK
    let column = (2u + kind) * BLOCK + s;
    let row = 4u * group;
    var a0 = vec4(0.0);
    var a1 = vec4(0.0);
    var a2 = vec4(0.0);
    var a3 = vec4(0.0);
    var r0 = vec4(0.0);
    var r1 = vec4(0.0);
    var r2 = vec4(0.0);
    var r3 = vec4(0.0);
    for (var half = 0u; half < 2u; half++) {
        workgroupBarrier(); // what was there is no longer read
        put(chunk, block, other, half, l);
        workgroupBarrier();
        for (var q = 0u; q < QUADS; q++) {
            let x = stage[place(column, q)];
            a0 = fma(stage[place(row, q)], x, a0);
            a1 = fma(stage[place(row + 1u, q)], x, a1);
            a2 = fma(stage[place(row + 2u, q)], x, a2);
            a3 = fma(stage[place(row + 3u, q)], x, a3);
            r0 = fma(stage[place(BLOCK + row, q)], x, r0);
            r1 = fma(stage[place(BLOCK + row + 1u, q)], x, r1);
            r2 = fma(stage[place(BLOCK + row + 2u, q)], x, r2);
            r3 = fma(stage[place(BLOCK + row + 3u, q)], x, r3);
        }
    }
    let a = vec4(total(a0), total(a1), total(a2), total(a3));
    let r = vec4(total(r0), total(r1), total(r2), total(r3));
    // Weights that there are not may be beyond all bounds.
    let t = vec4(row, row + 1u, row + 2u, row + 3u);
    let earlier = vec4(other < block);
    pairs[pair(kind, other * BLOCK + s, group)] = select(vec4(0.0), a, earlier | (t > vec4(s)));
    pairs[pair(kind + 2u, other * BLOCK + s, group)] = select(vec4(0.0), r, earlier | (t >= vec4(s)));
}

// What four tokens of a column have of the tokens before them, and of each other: of `w` and `r`, or of `u` and `y`.
struct Column {
    written: vec4<f32>,
    read: vec4<f32>,
}

// Adds what token `s` of the chunk contributes: along `b` by its `w` or `u`, along `k` by its `v`.
fn add(column: Column, along: u32, s: u32, group: u32, x: f32) -> Column {
    return Column(
        fma(pairs[pair(along, s, group)], vec4(x), column.written),
        fma(pairs[pair(along + 2u, s, group)], vec4(x), column.read),
    );
}

// The same of four tokens.
fn add_four(column: Column, along: u32, s: u32, group: u32, x: vec4<f32>) -> Column {
    let two = add(add(column, along, s, group, x.x), along, s + 1u, group, x.y);
    return add(add(two, along, s + 2u, group, x.z), along, s + 3u, group, x.w);
}

// Four elements of a column of operands, of tokens from `t` on.
fn four(chunk: Chunk, t: u32, which: u32, column: u32) -> vec4<f32> {
    return vec4(
        element(chunk, t, which, column),
        element(chunk, t + 1u, which, column),
        element(chunk, t + 2u, which, column),
        element(chunk, t + 3u, which, column),
    );
}

// Four tokens' own contributions, which wait for each other.
fn add_own(column: Column, s: u32, group: u32) -> Column {
    let one = add(column, AB, s, group, column.written.x);
    let two = add(one, AB, s + 1u, group, one.written.y);
    let three = add(two, AB, s + 2u, group, two.written.z);
    return add(three, AB, s + 3u, group, three.written.w);
}

@compute @workgroup_size(LANES)
fn wkv7_chunked_factors(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) l: u32) {
    let chunk = chunk_of(group);
    let column = l % N;
    let of_values = l >= N;
    let own = select(W, U, of_values) * N + column;
    var p = 1.0; // the decay from the start of the chunk, of the column's key
    for (var block = 0u; block * BLOCK < chunk.count; block++) {
        for (var other = 0u; other <= block; other++) {
            weigh(chunk, block, other, l);
        }
        workgroupBarrier();
        // The block's decay, and that less one.
        var decay = 1.0;
        var loss = 0.0;
        for (var g = 0u; g < GROUPS; g++) {
            let t = block * BLOCK + 4u * g;
            if t >= chunk.count {
                break;
            }
            var sums = Column(vec4(0.0), vec4(0.0));
            if !of_values {
                let x = four(chunk, t, 0u, column);
                let p1 = fma(p, x.x, p);
                let p2 = fma(p1, x.y, p1);
                let p3 = fma(p2, x.z, p2);
                let before = vec4(p, p1, p2, p3);
                p = fma(p3, x.w, p3);
                sums = Column(-four(chunk, t, 2u, column) * before, four(chunk, t, 4u, column) * vec4(p1, p2, p3, p));
            }
            for (var s = 0u; s <= t; s += 4u) {
                if of_values {
                    sums = add_four(sums, AK, s, g, four(chunk, s, 5u, column));
                }
                if s == t {
                    sums = add_own(sums, s, g);
                } else if s >= block * BLOCK {
                    sums = add_four(sums, AB, s, g, stage[(s % BLOCK) / 4u * LANES + l]);
                } else {
                    let earlier = vec4(
                        factors[token(chunk, s) + own],
                        factors[token(chunk, s + 1u) + own],
                        factors[token(chunk, s + 2u) + own],
                        factors[token(chunk, s + 3u) + own],
                    );
                    sums = add_four(sums, AB, s, g, earlier);
                }
            }
            stage[g * LANES + l] = sums.written;
            for (var e = 0u; e < min(chunk.count - t, 4u); e++) {
                let to = token(chunk, t + e);
                factors[to + own] = sums.written[e];
                if of_values {
                    y[(chunk.first + t + e) * params.y_stride + chunk.head * N + column] = sums.read[e];
                } else {
                    factors[to + R * N + column] = sums.read[e];
                    let x = element(chunk, t + e, 0u, column);
                    decay = fma(decay, x, decay);
                    loss = fma(x, 1.0 + loss, loss);
                    if t + e == min(block * BLOCK + BLOCK, chunk.count) - 1u {
                        factors[to + KEPT * N + column] = select(decay, loss, loss > -0.5);
                    }
                }
            }
        }
        storageBarrier(); // later blocks read this one's `b` and `k`
    }
}
