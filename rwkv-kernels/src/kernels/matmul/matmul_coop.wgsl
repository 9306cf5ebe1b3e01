// Twin: rwkv-core/src/ops/matmul.rs, rows times several matrices.
//use activation
//use blocks
//use halves
//subgroups of 32
enable f16;
enable wgpu_cooperative_matrix;
//
// One workgroup per ROWS x COLS tile of one job's output, one subgroup per part of it, SUB_ROWS x SUB_COLS, or SPLIT
// subgroups that take turns along the inputs. The inner dimension passes in steps through workgroup memory, as halves;
// while one step is multiplied, the loads of the next are under way.
//
// x comes as halves of what a power of two, the job's, divides: see mod.rs. Products are exact and summed in f32, 16 at a
// time, inputs in ascending order, in each of SPLIT parts: an output depends on SPLIT, but neither on the other rows nor
// on the rest of the tile.
//
// What this is written for, as NVIDIA's compiler (driver 580) was seen to do: loops over arrays of matrices stay
// loops, so that the matrices have names; a load whose result only the next round of a loop uses sinks into that round,
// so that the last is outside of the loop; halves that are loaded as such are checked and packed one by one, weights
// that are unpacked and converted back are not touched at all.

override ROWS: u32 = 64u;
override COLS: u32 = 64u;
override SUB_ROWS: u32 = 64u; // 16, 32 or 64
override SUB_COLS: u32 = 32u; // 16, 32 or 64
override SPLIT: u32 = 2u;
override STEP: u32 = 64u;     // inputs at a time, a multiple of 16 SPLIT
override AHEAD: u32 = 1u;     // steps that are loaded ahead, 1, 2 or 4
// Whether matrices are [K, O], not [O, K].
override TRANSPOSED: bool = false;

const SIDE: u32 = 16u;      // of a matrix
const SUBGROUP: u32 = 32u;  // invocations of a subgroup

// How a job stores: it overwrites, at 0, or adds, or writes halves, of what 2^(store - HALVES) divides.
const ADD: u32 = 1u;
const HALVES: u32 = 2u;
// The ways that occur, a bit for each, and the activations: what others would need is not even compiled, since what comes
// after the products takes registers from them.
override STORES: u32 = 7u;
override ACTIVATIONS: u32 = 15u;
// Whether a part is stored by its pieces: see `store_by_pieces`. Not where products are added, since what they are added to should be
// loaded for several pieces at once, nor in parts of 64 rows, which are for so many that what it takes to fetch code is little beside the
// products.
override BY_PIECES: bool = SUB_ROWS <= 32u && SUB_COLS <= 32u && (STORES >> ADD & 1u) == 0u;

override LANES: u32 = SUBGROUP * (ROWS / SUB_ROWS) * (COLS / SUB_COLS) * SPLIT;
// What an invocation loads of a step: eights of x, and of weights, which it loads by sixteens, or 32 in INT4, where they are in blocks.
override X_EACH: u32 = ROWS * STEP / 8u / LANES; // at most 8
override W_EACH: u32 = COLS * STEP / 8u / LANES; // 2, 4 or 8

struct Params {
    rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> tiles: array<vec4<u32>>;   // three to a tile of outputs, see `job_of`
@group(0) @binding(2) var<storage, read> weights: array<vec4<u32>>; // see `Matrix`
@group(0) @binding(3) var<storage, read> x: array<vec4<u32>>;       // halves, two to a word
@group(0) @binding(4) var<storage, read_write> y: array<vec4<u32>>; // single precision, or halves

struct Job {
    inputs: u32,  // K, a multiple of 8, of the matrix's or a part of them
    outputs: u32, // O, a multiple of 4, or of 8 if TRANSPOSED or stored as halves
    matrix: Matrix,
    x: u32,       // where row 0 starts, and the distance to the next, in vectors of four words
    x_stride: u32,
    y: u32,       // the same of y
    y_stride: u32,
    activation: u32,
    store: u32,
    unscale: f32, // what a product is multiplied by
    col: u32,     // the tile's first output
    row: u32,     // the tile's first row
}

// A step of x: [ROWS, STEP], and of W: [COLS, STEP], or [STEP, COLS] if TRANSPOSED. Each row has two vectors more, so
// that eight of them, which are read at once, are in different banks.
//
// All that is here takes multiples of 16 bytes: NVIDIA lays it out without gaps and reads matrices at such places alone.
// Of two workgroups side by side each has 24 KiB at most, or a processor of a H100 holds one.
override X_PITCH: u32 = STEP / 4u + 2u;
override W_PITCH: u32 = select(STEP, COLS, TRANSPOSED) / 4u + 2u;
override X_LEN: u32 = ROWS * X_PITCH;
override W_LEN: u32 = select(COLS, STEP, TRANSPOSED) * W_PITCH;
var<workgroup> x_step: array<vec4<f16>, X_LEN>;
var<workgroup> w_step: array<vec4<f16>, W_LEN>;
// One matrix of each subgroup.
const PIECE: u32 = SIDE * SIDE / 4u;
override SUMS: u32 = PIECE * (LANES / SUBGROUP);
var<workgroup> sums: array<vec4<f32>, SUMS>;

// The job of a tile. It is not looked for: in values that pass through a loop, NVIDIA's compiler does not see that all
// invocations have the same, and keeps a copy in the registers of each.
fn job_of(tile: vec2<u32>) -> Job {
    let a = tiles[3u * tile.x];      // first output, inputs, outputs, weights
    let b = tiles[3u * tile.x + 1u]; // x, x_stride, y, y_stride
    let c = tiles[3u * tile.x + 2u]; // scales, how to store, weights of a row, then by bytes: format, exponent of x, activation
    let matrix = Matrix(c.w & 0xFFu, a.w, c.x, c.z);
    let unscale = two_to(i32(c.w >> 8u & 0xFFu));
    let rows = b / 4u;
    return Job(a.y, a.z, matrix, rows.x, rows.y, rows.z, rows.w, c.w >> 16u, c.y, unscale, a.x, tile.y * ROWS);
}

fn two_to(exponent: i32) -> f32 {
    return bitcast<f32>(u32(127 + exponent) << 23u);
}

// What an invocation has loaded of a step. Of weights in blocks, a first vector has sixteen and the next their scale; or
// of INT4, the first of four has a whole block, the second its scale, and the others nothing.
struct Held {
    x0: vec4<u32>,
    x1: vec4<u32>,
    x2: vec4<u32>,
    x3: vec4<u32>,
    x4: vec4<u32>,
    x5: vec4<u32>,
    x6: vec4<u32>,
    x7: vec4<u32>,
    w0: vec4<u32>,
    w1: vec4<u32>,
    w2: vec4<u32>,
    w3: vec4<u32>,
    w4: vec4<u32>,
    w5: vec4<u32>,
    w6: vec4<u32>,
    w7: vec4<u32>,
}

// The eight inputs at place `slot` of a step. Rows past the last are that row again, and never stored; inputs past the
// last are the last ones.
fn load_x(job: Job, slot: u32, k: u32) -> vec4<u32> {
    let row = min(job.row + slot / (STEP / 8u), params.rows - 1u);
    let octet = min(k / 8u + slot % (STEP / 8u), job.inputs / 8u - 1u);
    return x[job.x + row * job.x_stride + octet];
}

// The eight weights at place `slot` of a step, in halves. Past the last output or input they are any of the matrix.
fn load_w(job: Job, slot: u32, k: u32) -> vec4<u32> {
    let octets = job.matrix.row / 8u;
    if TRANSPOSED {
        let input = min(k + slot / (COLS / 8u), job.inputs - 1u);
        let octet = min(job.col / 8u + slot % (COLS / 8u), job.outputs / 8u - 1u);
        return weights[job.matrix.elements + input * octets + octet];
    }
    let output = min(job.col + slot / (STEP / 8u), job.outputs - 1u);
    let octet = min(k / 8u + slot % (STEP / 8u), job.inputs / 8u - 1u);
    return weights[job.matrix.elements + output * octets + octet];
}

// Where in the matrix the weights at place `slot` of a step are, so many to a place, in as many. Past the last, as above.
fn some_at(job: Job, each: u32, slot: u32, k: u32) -> u32 {
    let all = job.matrix.row / each;
    if TRANSPOSED {
        let input = min(k + slot / (COLS / each), job.inputs - 1u);
        return input * all + min(job.col / each + slot % (COLS / each), all - 1u);
    }
    let output = min(job.col + slot / (STEP / each), job.outputs - 1u);
    return output * all + min(k / each + slot % (STEP / each), job.inputs / each - 1u);
}

// Whether an invocation has whole blocks, which in INT4 are one vector. In INT8 neighbours read what lies side by side.
fn whole_blocks(m: Matrix) -> bool {
    return has(m, INT4) && W_EACH > 2u;
}

fn load_sixteen(m: Matrix, sixteen: u32) -> vec4<u32> {
    if has(m, INT4) {
        let element = m.elements + sixteen / 2u;
        let first = 2u * (sixteen % 2u);
        return vec4(weights[element][first], weights[element][first + 1u], 0u, 0u);
    }
    return weights[m.elements + sixteen];
}

fn load_scale(m: Matrix, block: u32) -> vec4<u32> {
    return vec4(scale_word(m, block), scale_shift(m, block), 0u, 0u);
}

fn fetch_blocks(job: Job, lane: u32, k: u32) -> Held {
    let m = job.matrix;
    var held: Held;
    if whole_blocks(m) {
        let first = some_at(job, 32u, lane, k);
        held.w0 = weights[m.elements + first];
        held.w1 = load_scale(m, first);
        if W_EACH > 4u {
            let second = some_at(job, 32u, lane + LANES, k);
            held.w4 = weights[m.elements + second];
            held.w5 = load_scale(m, second);
        }
        return held;
    }
    let first = some_at(job, 16u, lane, k);
    held.w0 = load_sixteen(m, first);
    held.w1 = load_scale(m, first / 2u);
    if W_EACH > 2u {
        let second = some_at(job, 16u, lane + LANES, k);
        held.w2 = load_sixteen(m, second);
        held.w3 = load_scale(m, second / 2u);
    }
    if W_EACH > 4u {
        let third = some_at(job, 16u, lane + 2u * LANES, k);
        held.w4 = load_sixteen(m, third);
        held.w5 = load_scale(m, third / 2u);
        let fourth = some_at(job, 16u, lane + 3u * LANES, k);
        held.w6 = load_sixteen(m, fourth);
        held.w7 = load_scale(m, fourth / 2u);
    }
    return held;
}

fn fetch_halves(job: Job, lane: u32, k: u32) -> Held {
    var held: Held;
    held.w0 = load_w(job, lane, k);
    held.w1 = load_w(job, lane + LANES, k);
    if W_EACH > 2u {
        held.w2 = load_w(job, lane + 2u * LANES, k);
        held.w3 = load_w(job, lane + 3u * LANES, k);
    }
    if W_EACH > 4u {
        held.w4 = load_w(job, lane + 4u * LANES, k);
        held.w5 = load_w(job, lane + 5u * LANES, k);
        held.w6 = load_w(job, lane + 6u * LANES, k);
        held.w7 = load_w(job, lane + 7u * LANES, k);
    }
    return held;
}

fn fetch(job: Job, blocks: bool, lane: u32, k: u32) -> Held {
    var held: Held;
    if blocks {
        held = fetch_blocks(job, lane, k);
    } else {
        held = fetch_halves(job, lane, k);
    }
    held.x0 = load_x(job, lane, k);
    if X_EACH > 1u {
        held.x1 = load_x(job, lane + LANES, k);
    }
    if X_EACH > 2u {
        held.x2 = load_x(job, lane + 2u * LANES, k);
        held.x3 = load_x(job, lane + 3u * LANES, k);
    }
    if X_EACH > 4u {
        held.x4 = load_x(job, lane + 4u * LANES, k);
        held.x5 = load_x(job, lane + 5u * LANES, k);
        held.x6 = load_x(job, lane + 6u * LANES, k);
        held.x7 = load_x(job, lane + 7u * LANES, k);
    }
    return held;
}

// Inputs past the last are zero, whatever the weights are.
fn stage_x(job: Job, slot: u32, k: u32, octet: vec4<u32>) {
    let place = slot % (STEP / 8u);
    let inside = select(vec4(0u), octet, k + 8u * place < job.inputs);
    let at = slot / (STEP / 8u) * X_PITCH + 2u * place;
    x_step[at] = vec4<f16>(low4(inside));
    x_step[at + 1u] = vec4<f16>(high4(inside));
}

fn stage_w(slot: u32, w: vec4<u32>) {
    let at = staged_at(8u, slot);
    w_step[at] = vec4<f16>(low4(w));
    w_step[at + 1u] = vec4<f16>(high4(w));
}

// Weights in blocks become halves two at a time. As in blocks.wgsl, the bits of steps are put into the fraction of a
// number, of 1024 here or of 64, whose unit is then the step's; what is subtracted is that number and half the steps' range. That is
// exact; times the scale it is rounded once, as the decoded weight would be.

// Two weights from their steps, in the halves of a word.
fn scaled(steps: u32, zero: f16, scale: f16) -> vec2<f16> {
    return (vec2<f16>(unpack2x16float(steps)) - zero) * scale;
}

// Of a word of INT8.
fn of_bytes(word: u32, scale: f16) -> vec4<f16> {
    let a = scaled((word & 0xff00ffu) ^ 0x64806480u, 1152.0h, scale);
    let b = scaled((word >> 8u & 0xff00ffu) ^ 0x64806480u, 1152.0h, scale);
    return vec4(a.x, b.x, a.y, b.y);
}

// Of a word of INT4, the first four and the others: as they lie, see blocks.wgsl, what is made at once is neighbours.
fn of_low_halves(word: u32, scale: f16) -> vec4<f16> {
    let a = scaled((word & 0xf000fu) ^ 0x64086408u, 1032.0h, scale);
    return vec4(a, scaled((word >> 8u & 0xf000fu) ^ 0x64086408u, 1032.0h, scale));
}

fn of_high_halves(word: u32, scale: f16) -> vec4<f16> {
    let a = scaled((word & 0xf000f0u) ^ 0x54805480u, 72.0h, scale);
    return vec4(a, scaled((word >> 8u & 0xf000f0u) ^ 0x54805480u, 72.0h, scale));
}

// Where the weights at place `slot` are staged, so many to a place.
fn staged_at(each: u32, slot: u32) -> u32 {
    let width = select(STEP, COLS, TRANSPOSED) / each;
    return slot / width * W_PITCH + slot % width * (each / 4u);
}

// Eight weights of a word of INT4.
fn stage_int4(at: u32, word: u32, scale: f16) {
    w_step[at] = of_low_halves(word, scale);
    w_step[at + 1u] = of_high_halves(word, scale);
}

fn stage_sixteen(m: Matrix, slot: u32, steps: vec4<u32>, scale_at: vec4<u32>) {
    let at = staged_at(16u, slot);
    let scale = f16(scale_of(scale_at.x, scale_at.y));
    if has(m, INT4) {
        stage_int4(at, steps.x, scale);
        stage_int4(at + 2u, steps.y, scale);
    } else {
        w_step[at] = of_bytes(steps.x, scale);
        w_step[at + 1u] = of_bytes(steps.y, scale);
        w_step[at + 2u] = of_bytes(steps.z, scale);
        w_step[at + 3u] = of_bytes(steps.w, scale);
    }
}

fn stage_block(slot: u32, steps: vec4<u32>, scale_at: vec4<u32>) {
    let at = staged_at(32u, slot);
    let scale = f16(scale_of(scale_at.x, scale_at.y));
    stage_int4(at, steps.x, scale);
    stage_int4(at + 2u, steps.y, scale);
    stage_int4(at + 4u, steps.z, scale);
    stage_int4(at + 6u, steps.w, scale);
}

fn stage_blocks(m: Matrix, lane: u32, held: Held) {
    if whole_blocks(m) {
        stage_block(lane, held.w0, held.w1);
        if W_EACH > 4u {
            stage_block(lane + LANES, held.w4, held.w5);
        }
        return;
    }
    stage_sixteen(m, lane, held.w0, held.w1);
    if W_EACH > 2u {
        stage_sixteen(m, lane + LANES, held.w2, held.w3);
    }
    if W_EACH > 4u {
        stage_sixteen(m, lane + 2u * LANES, held.w4, held.w5);
        stage_sixteen(m, lane + 3u * LANES, held.w6, held.w7);
    }
}

fn stage(job: Job, blocks: bool, lane: u32, k: u32, held: Held) {
    workgroupBarrier(); // the step before is no longer read
    if blocks {
        stage_blocks(job.matrix, lane, held);
    } else {
        stage_w(lane, held.w0);
        stage_w(lane + LANES, held.w1);
        if W_EACH > 2u {
            stage_w(lane + 2u * LANES, held.w2);
            stage_w(lane + 3u * LANES, held.w3);
        }
        if W_EACH > 4u {
            stage_w(lane + 4u * LANES, held.w4);
            stage_w(lane + 5u * LANES, held.w5);
            stage_w(lane + 6u * LANES, held.w6);
            stage_w(lane + 7u * LANES, held.w7);
        }
    }
    stage_x(job, lane, k, held.x0);
    if X_EACH > 1u {
        stage_x(job, lane + LANES, k, held.x1);
    }
    if X_EACH > 2u {
        stage_x(job, lane + 2u * LANES, k, held.x2);
        stage_x(job, lane + 3u * LANES, k, held.x3);
    }
    if X_EACH > 4u {
        stage_x(job, lane + 4u * LANES, k, held.x4);
        stage_x(job, lane + 5u * LANES, k, held.x5);
        stage_x(job, lane + 6u * LANES, k, held.x6);
        stage_x(job, lane + 7u * LANES, k, held.x7);
    }
    workgroupBarrier();
}

// Where a subgroup works: its place in the tile, and among those that share it.
struct Place {
    subgroup: u32,
    slice: u32,
    row: u32,
    col: u32,
}

// Sixteen rows by sixteen inputs of x, and sixteen inputs by sixteen columns of W.
fn rows_at(row: u32, k: u32) -> coop_mat16x16<f16, A> {
    let at = row * X_PITCH + k / 4u;
    return coopLoadT<coop_mat16x16<f16, A>>(&x_step[at], X_PITCH);
}

fn cols_at(col: u32, k: u32) -> coop_mat16x16<f16, B> {
    if TRANSPOSED {
        let at = k * W_PITCH + col / 4u;
        return coopLoadT<coop_mat16x16<f16, B>>(&w_step[at], W_PITCH);
    }
    let at = col * W_PITCH + k / 4u;
    return coopLoad<coop_mat16x16<f16, B>>(&w_step[at], W_PITCH);
}

// The sums of a subgroup, by sixteen rows and by sixteen columns.
var<private> sum00: coop_mat16x16<f32, C>;
var<private> sum01: coop_mat16x16<f32, C>;
var<private> sum02: coop_mat16x16<f32, C>;
var<private> sum03: coop_mat16x16<f32, C>;
var<private> sum10: coop_mat16x16<f32, C>;
var<private> sum11: coop_mat16x16<f32, C>;
var<private> sum12: coop_mat16x16<f32, C>;
var<private> sum13: coop_mat16x16<f32, C>;
var<private> sum20: coop_mat16x16<f32, C>;
var<private> sum21: coop_mat16x16<f32, C>;
var<private> sum22: coop_mat16x16<f32, C>;
var<private> sum23: coop_mat16x16<f32, C>;
var<private> sum30: coop_mat16x16<f32, C>;
var<private> sum31: coop_mat16x16<f32, C>;
var<private> sum32: coop_mat16x16<f32, C>;
var<private> sum33: coop_mat16x16<f32, C>;

// Multiplies what is staged: of every SPLIT times 16 inputs, the subgroup's own.
fn multiply(at: Place) {
    for (var first = 0u; first < STEP; first += SIDE * SPLIT) {
        let k = first + at.slice * SIDE;
        let b0 = cols_at(at.col, k);
        var b1 = b0;
        var b2 = b0;
        var b3 = b0;
        if SUB_COLS > 16u {
            b1 = cols_at(at.col + 16u, k);
        }
        if SUB_COLS > 32u {
            b2 = cols_at(at.col + 32u, k);
            b3 = cols_at(at.col + 48u, k);
        }
        let a0 = rows_at(at.row, k);
        sum00 = coopMultiplyAdd(a0, b0, sum00);
        if SUB_COLS > 16u {
            sum01 = coopMultiplyAdd(a0, b1, sum01);
        }
        if SUB_COLS > 32u {
            sum02 = coopMultiplyAdd(a0, b2, sum02);
            sum03 = coopMultiplyAdd(a0, b3, sum03);
        }
        if SUB_ROWS > 16u {
            let a1 = rows_at(at.row + 16u, k);
            sum10 = coopMultiplyAdd(a1, b0, sum10);
            if SUB_COLS > 16u {
                sum11 = coopMultiplyAdd(a1, b1, sum11);
            }
            if SUB_COLS > 32u {
                sum12 = coopMultiplyAdd(a1, b2, sum12);
                sum13 = coopMultiplyAdd(a1, b3, sum13);
            }
        }
        if SUB_ROWS > 32u {
            let a2 = rows_at(at.row + 32u, k);
            let a3 = rows_at(at.row + 48u, k);
            sum20 = coopMultiplyAdd(a2, b0, sum20);
            sum30 = coopMultiplyAdd(a3, b0, sum30);
            if SUB_COLS > 16u {
                sum21 = coopMultiplyAdd(a2, b1, sum21);
                sum31 = coopMultiplyAdd(a3, b1, sum31);
            }
            if SUB_COLS > 32u {
                sum22 = coopMultiplyAdd(a2, b2, sum22);
                sum32 = coopMultiplyAdd(a3, b2, sum32);
                sum23 = coopMultiplyAdd(a2, b3, sum23);
                sum33 = coopMultiplyAdd(a3, b3, sum33);
            }
        }
    }
}

// What an invocation has of a piece of y, sixteen rows by sixteen columns of a part: so many vectors of it.
struct Piece {
    first: vec4<u32>,
    second: vec4<u32>,
}

// Whether a job stores so.
fn stores(job: Job, how: u32) -> bool {
    return STORES == 1u << how || ((STORES >> how) & 1u) != 0u && min(job.store, HALVES) == how;
}

// The invocation's place among those that share a part.
fn own_place(at: Place, lane: u32) -> u32 {
    return at.slice * SUBGROUP + lane % SUBGROUP;
}

// What is in y where vector v of a piece goes, if it goes there.
fn load_y(job: Job, at: Place, row: u32, col: u32, v: u32) -> vec4<u32> {
    let y_row = job.row + at.row + row + v / 4u;
    let y_col = job.col + at.col + col + v % 4u * 4u;
    if y_row < params.rows && y_col < job.outputs {
        return y[job.y + y_row * job.y_stride + y_col / 4u];
    }
    return vec4(0u);
}

// What products are added to: loaded for several pieces before the first of them is stored, since no load passes a store.
fn load_piece(job: Job, at: Place, lane: u32, row: u32, col: u32) -> Piece {
    var piece: Piece;
    if stores(job, ADD) {
        let v = own_place(at, lane);
        if v < PIECE {
            piece.first = load_y(job, at, row, col, v);
        }
        if SPLIT == 1u {
            piece.second = load_y(job, at, row, col, v + SUBGROUP);
        }
    }
    return piece;
}

// Vector v of the sum of the matrices that the subgroups of a part left in `sums`, activated.
fn product(job: Job, at: Place, v: u32) -> vec4<f32> {
    let first = (at.subgroup - at.slice) * PIECE + v;
    var sum = sums[first];
    for (var other = 1u; other < SPLIT; other++) {
        sum += sums[first + other * PIECE];
    }
    sum *= job.unscale;
    if ACTIVATIONS == 1u << IDENTITY {
        return sum;
    }
    // Pipelines that products share have this for the largest of them.
    if ACTIVATIONS == 1u << SQUARED_RELU || (BY_PIECES && job.activation == SQUARED_RELU) {
        let positive = max(sum, vec4(0.0));
        return positive * positive;
    }
    // One by one, in a loop whose end the compiler does not know, so that it takes the registers of one.
    if job.activation != IDENTITY {
        sums[first] = sum;
        let some = min(4u, job.outputs);
        for (var c = 0u; c < some; c++) {
            sums[first][c] = activate(job.activation, sums[first][c]);
        }
        sum = sums[first];
    }
    return sum;
}

fn store_y(job: Job, at: Place, row: u32, col: u32, v: u32, before: vec4<u32>) {
    let y_row = job.row + at.row + row + v / 4u;
    let y_col = job.col + at.col + col + v % 4u * 4u;
    if y_row < params.rows && y_col < job.outputs {
        var value = product(job, at, v);
        if stores(job, ADD) {
            value += bitcast<vec4<f32>>(before);
        }
        y[job.y + y_row * job.y_stride + y_col / 4u] = bitcast<vec4<u32>>(value);
    }
}

// Stores the piece that the subgroups of a part left in `sums`, so many rows and columns into it. Those that share the
// part share the piece.
fn store(job: Job, at: Place, lane: u32, row: u32, col: u32, before: Piece) {
    workgroupBarrier();
    let v = own_place(at, lane);
    if !stores(job, HALVES) {
        if v < PIECE {
            store_y(job, at, row, col, v, before.first);
        }
        if SPLIT == 1u {
            store_y(job, at, row, col, v + SUBGROUP, before.second);
        }
    } else if v < PIECE / 2u {
        let y_row = job.row + at.row + row + v / 2u;
        let y_col = job.col + at.col + col + v % 2u * 8u;
        if y_row < params.rows && y_col < job.outputs {
            let scale = two_to(i32(HALVES) - i32(job.store));
            let low = scale * product(job, at, 2u * v);
            let high = scale * product(job, at, 2u * v + 1u);
            let octet = vec4(halves(low.xy), halves(low.zw), halves(high.xy), halves(high.zw));
            y[job.y + y_row * job.y_stride + y_col / 8u] = octet;
        }
    }
    workgroupBarrier();
}

// Stores sixteen rows of a part.
fn store_rows(
    job: Job,
    at: Place,
    lane: u32,
    own: u32,
    row: u32,
    s0: coop_mat16x16<f32, C>,
    s1: coop_mat16x16<f32, C>,
    s2: coop_mat16x16<f32, C>,
    s3: coop_mat16x16<f32, C>,
) {
    let y0 = load_piece(job, at, lane, row, 0u);
    var y1: Piece;
    var y2: Piece;
    var y3: Piece;
    if SUB_COLS > 16u {
        y1 = load_piece(job, at, lane, row, 16u);
    }
    if SUB_COLS > 32u {
        y2 = load_piece(job, at, lane, row, 32u);
        y3 = load_piece(job, at, lane, row, 48u);
    }
    coopStoreT(s0, &sums[own], SIDE / 4u);
    store(job, at, lane, row, 0u, y0);
    if SUB_COLS > 16u {
        coopStoreT(s1, &sums[own], SIDE / 4u);
        store(job, at, lane, row, 16u, y1);
    }
    if SUB_COLS > 32u {
        coopStoreT(s2, &sums[own], SIDE / 4u);
        store(job, at, lane, row, 32u, y2);
        coopStoreT(s3, &sums[own], SIDE / 4u);
        store(job, at, lane, row, 48u, y3);
    }
}

// Stores a part by its pieces, in a loop whose end the compiler does not know, so that its code is there once: a processor of an
// H100 keeps some 120 KiB of code, and what the kernels of a layer have beyond that is read anew at each dispatch. (There is a row, so
// that there are no fewer pieces than a part has: four at most.)
fn store_by_pieces(job: Job, at: Place, lane: u32, own: u32) {
    let pieces = min(SUB_ROWS / SIDE * (SUB_COLS / SIDE), 4u * params.rows);
    for (var piece = 0u; piece < pieces; piece++) {
        let row = piece / (SUB_COLS / SIDE);
        let col = piece % (SUB_COLS / SIDE);
        if row == 0u && col == 0u {
            coopStoreT(sum00, &sums[own], SIDE / 4u);
        }
        if SUB_COLS > 16u && row == 0u && col == 1u {
            coopStoreT(sum01, &sums[own], SIDE / 4u);
        }
        if SUB_ROWS > 16u && row == 1u && col == 0u {
            coopStoreT(sum10, &sums[own], SIDE / 4u);
        }
        if SUB_ROWS > 16u && SUB_COLS > 16u && row == 1u && col == 1u {
            coopStoreT(sum11, &sums[own], SIDE / 4u);
        }
        store(job, at, lane, SIDE * row, SIDE * col, Piece());
    }
}

// Stages and multiplies the step at input k, which `held` has, and loads the fourth after it into its place.
fn turn(job: Job, blocks: bool, lane: u32, at: Place, k: u32, held: ptr<function, Held>) {
    stage(job, blocks, lane, k, *held);
    *held = fetch(job, blocks, lane, k + 4u * STEP);
    multiply(at);
}

// The same for one of the last four, of which some may not be there.
fn last_turn(job: Job, blocks: bool, lane: u32, at: Place, k: u32, held: Held) {
    if k < job.inputs {
        stage(job, blocks, lane, k, held);
        multiply(at);
    }
}

// The sums of a part, with one step loaded ahead, two or four. Each by a function of its own: variables of the others, though nothing
// uses them, were seen to change the code that is left, from 279 us to 350 (H200, driver 580, 2,048 x 8,192 x 2,048,
// transposed, in tiles of 128 x 128).
fn multiply_one_ahead(job: Job, blocks: bool, lane: u32, at: Place) {
    var next = fetch(job, blocks, lane, 0u);
    var k = 0u;
    for (; k + STEP < job.inputs; k += STEP) {
        stage(job, blocks, lane, k, next);
        next = fetch(job, blocks, lane, k + STEP);
        multiply(at);
    }
    stage(job, blocks, lane, k, next);
    multiply(at);
}

fn multiply_two_ahead(job: Job, blocks: bool, lane: u32, at: Place) {
    var first = fetch(job, blocks, lane, 0u);
    var second = fetch(job, blocks, lane, STEP);
    var k = 0u;
    for (; k + 2u * STEP < job.inputs; k += 2u * STEP) {
        stage(job, blocks, lane, k, first);
        first = fetch(job, blocks, lane, k + 2u * STEP);
        multiply(at);
        stage(job, blocks, lane, k + STEP, second);
        second = fetch(job, blocks, lane, k + 3u * STEP);
        multiply(at);
    }
    stage(job, blocks, lane, k, first);
    multiply(at);
    stage(job, blocks, lane, k + STEP, second);
    multiply(at);
}

fn multiply_four_ahead(job: Job, blocks: bool, lane: u32, at: Place) {
    var first = fetch(job, blocks, lane, 0u);
    var second = fetch(job, blocks, lane, STEP);
    var third = fetch(job, blocks, lane, 2u * STEP);
    var fourth = fetch(job, blocks, lane, 3u * STEP);
    var k = 0u;
    for (; k + 4u * STEP < job.inputs; k += 4u * STEP) {
        turn(job, blocks, lane, at, k, &first);
        turn(job, blocks, lane, at, k + STEP, &second);
        turn(job, blocks, lane, at, k + 2u * STEP, &third);
        turn(job, blocks, lane, at, k + 3u * STEP, &fourth);
    }
    last_turn(job, blocks, lane, at, k, first);
    last_turn(job, blocks, lane, at, k + STEP, second);
    last_turn(job, blocks, lane, at, k + 2u * STEP, third);
    last_turn(job, blocks, lane, at, k + 3u * STEP, fourth);
}

fn multiply_all(job: Job, blocks: bool, lane: u32, at: Place) {
    if AHEAD == 1u {
        multiply_one_ahead(job, blocks, lane, at);
    } else if AHEAD == 2u {
        multiply_two_ahead(job, blocks, lane, at);
    } else {
        multiply_four_ahead(job, blocks, lane, at);
    }
}

@compute @workgroup_size(LANES)
fn matmul(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let job = job_of(group.yx);
    // Which is less than their number in any case, but when that is said, NVIDIA's compiler has 1 to 2 % faster code.
    let subgroup = lane / SUBGROUP % (LANES / SUBGROUP);
    let part = subgroup / SPLIT;
    let parts = COLS / SUB_COLS;
    let at = Place(subgroup, subgroup % SPLIT, part / parts * SUB_ROWS, part % parts * SUB_COLS);

    // The loop twice, rather than the choice at every load, which then would wait for each other.
    if has(job.matrix, F16) {
        multiply_all(job, false, lane, at);
    } else {
        multiply_all(job, true, lane, at);
    }

    let own = subgroup * PIECE;
    if BY_PIECES {
        store_by_pieces(job, at, lane, own);
        return;
    }
    store_rows(job, at, lane, own, 0u, sum00, sum01, sum02, sum03);
    if SUB_ROWS > 16u {
        store_rows(job, at, lane, own, 16u, sum10, sum11, sum12, sum13);
    }
    if SUB_ROWS > 32u {
        store_rows(job, at, lane, own, 32u, sum20, sum21, sum22, sum23);
        store_rows(job, at, lane, own, 48u, sum30, sum31, sum32, sum33);
    }
}
