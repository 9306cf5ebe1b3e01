// Twin: rwkv-core/src/ops/mix_rows.rs, layer norm and token shift of packed segments.
//use reduce
//use packed
//
// With PLANES each row is summed first: twin rwkv-core/src/ops/add_planes.rs.
//
// One workgroup per run of rows, four channels at a time, and whatever it reads is under way before the first of it is used: what a
// few rows take is mostly waiting. The row before the first is summed and normed again where it is in the same segment: that
// costs reads, mostly from a cache, and no pass between the norm and the shift. Both are made by the same
// operations in the same order, so that a row is the same whether it comes from the pass or, kept, from the one before.

override LANES: u32 = 256u;
override EACH: u32 = 2u;   // vectors of a row to an invocation, at most MOST: 4 LANES EACH channels
override PLANES: u32 = 0u; // to be added to each row of x

const MOST: u32 = 8u;
const MIXES: u32 = 6u; // at most

// In place of a record.
const NONE: u32 = 0xFFFFFFFFu;
// In place of both records of a row: there is no row.
const END: u32 = 0xFFFFFFFEu;

struct Params {
    width: u32,  // a multiple of 4, as are
    stride: u32, // elements of a record
    offset: u32, // where in a record the row begins
    mixes: u32,
    eps: f32,
    run: u32,    // rows of a workgroup; one with PLANES, which are of few rows, so that the rest need not be in their code
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;       // [T, D]
@group(0) @binding(2) var<storage, read> planes: array<vec4<f32>>;  // [T, PLANES, D]
// [T]: the record that holds the row before a segment's first, and the one that is to hold this row. Where a run has
// several rows, one more, END.
@group(0) @binding(3) var<storage, read> cursors: array<vec2<u32>>;
@group(0) @binding(4) var<storage, read> vectors: array<vec4<f32>>; // [2 + M, D]: gain, bias, mixes
// [records, stride]. No record is both read and written in a pass.
@group(0) @binding(5) var<storage, read_write> state: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> sum: array<vec4<f32>>; // [T, D], written if there are planes
@group(0) @binding(7) var<storage, read_write> out: array<vec2<u32>>; // [T, M, D]

// What an invocation has of a row.
struct Row {
    held: array<vec4<f32>, MOST>,
}

// What it has of the vectors, for four channels.
struct Vectors {
    gain: vec4<f32>,
    bias: vec4<f32>,
    mixes: array<vec4<f32>, MIXES>,
}

// Row t of x, with its planes.
fn row_of(t: u32, quads: u32, lane: Lane) -> Row {
    var row: Row;
    for (var e = 0u; e < EACH; e++) {
        let q = lane.index + e * LANES;
        if q < quads {
            var added = vec4(0.0);
            for (var p = 0u; p < PLANES; p++) {
                added += planes[(t * PLANES + p) * quads + q];
            }
            row.held[e] = x[t * quads + q];
            if PLANES > 0u {
                row.held[e] += added;
            }
        }
    }
    return row;
}

// A row, normed. Every invocation must call it.
fn normed(row: Row, by: array<Vectors, MOST>, quads: u32, lane: Lane) -> Row {
    let n = f32(params.width);
    var part = vec4(0.0);
    for (var e = 0u; e < EACH; e++) {
        part += row.held[e]; // zero past the last
    }
    let mean = workgroup_sum_in(0u, (part.x + part.y) + (part.z + part.w), lane) / n;

    part = vec4(0.0);
    for (var e = 0u; e < EACH; e++) {
        if lane.index + e * LANES < quads {
            let centred = row.held[e] - mean;
            part = fma(centred, centred, part);
        }
    }
    let variance = workgroup_sum_in(1u, (part.x + part.y) + (part.z + part.w), lane) / n;
    let scale = inverseSqrt(variance + params.eps);
    var all: Row;
    for (var e = 0u; e < EACH; e++) {
        all.held[e] = fma((row.held[e] - mean) * scale, by[e].gain, by[e].bias);
    }
    return all;
}

// The row that a record holds.
fn kept_row(record: u32, quads: u32, lane: Lane) -> Row {
    var row: Row;
    for (var e = 0u; e < EACH; e++) {
        let q = lane.index + e * LANES;
        if q < quads {
            row.held[e] = state[(record * params.stride + params.offset) / 4u + q];
        }
    }
    return row;
}

// The cursor of a row that comes after another of a run.
fn next_cursor(row: u32, end: u32) -> vec2<u32> {
    if PLANES == 0u && row < end {
        return cursors[row];
    }
    return vec2(END);
}

// That row, if there is one.
fn next_row(cursor: vec2<u32>, row: u32, quads: u32, lane: Lane) -> Row {
    if cursor.x != END {
        return row_of(row, quads, lane);
    }
    return Row();
}

@compute @workgroup_size(LANES)
fn mix_rows(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    let quads = params.width / 4u;
    let first = group.x * params.run;
    let end = first + params.run;
    var cursor = cursors[first];

    var own = row_of(first, quads, lane);
    var by: array<Vectors, MOST>;
    for (var e = 0u; e < EACH; e++) {
        let q = lane.index + e * LANES;
        if q < quads {
            by[e].gain = vectors[q];
            by[e].bias = vectors[quads + q];
            for (var m = 0u; m < MIXES; m++) {
                if m < params.mixes {
                    by[e].mixes[m] = vectors[(2u + m) * quads + q];
                }
            }
        }
    }
    // The row before, normed: of the pass inside of a segment.
    let inside = cursor.x == NONE;
    var before: Row;
    if inside {
        before = row_of(first - 1u, quads, lane);
    } else {
        before = kept_row(cursor.x, quads, lane);
    }
    var after = next_cursor(first + 1u, end);
    var next = next_row(after, first + 1u, quads, lane);
    var now = normed(own, by, quads, lane);
    if inside {
        before = normed(before, by, quads, lane);
    }

    for (var row = first;; row++) {
        for (var e = 0u; e < EACH; e++) {
            let q = lane.index + e * LANES;
            if q < quads {
                if cursor.y != NONE {
                    state[(cursor.y * params.stride + params.offset) / 4u + q] = now.held[e];
                }
                if PLANES > 0u {
                    sum[row * quads + q] = own.held[e];
                }
                for (var m = 0u; m < MIXES; m++) {
                    if m < params.mixes {
                        let mixed = fma(before.held[e] - now.held[e], by[e].mixes[m], now.held[e]);
                        let to = 2u * (row * params.mixes + m) * quads;
                        if HALVES == 0u {
                            out[to + 2u * q] = bitcast<vec2<u32>>(mixed.xy);
                            out[to + 2u * q + 1u] = bitcast<vec2<u32>>(mixed.zw);
                        } else {
                            out[to + q] = vec2(packed(mixed.xy), packed(mixed.zw));
                        }
                    }
                }
            }
        }
        cursor = after;
        if PLANES > 0u || cursor.x == END {
            break;
        }
        before = now;
        if cursor.x != NONE {
            before = kept_row(cursor.x, quads, lane);
        }
        own = next;
        after = next_cursor(row + 2u, end);
        next = next_row(after, row + 2u, quads, lane);
        now = normed(own, by, quads, lane);
    }
}
