// Twin: rwkv-core/src/ops/mix_in.rs, norm, token shift and stacked matrices of one token.
//use own_columns
//use row_moments
//use activation
//
// A workgroup computes the rows of one tile: rows of one matrix, all of one mix. Each norms and mixes the token again,
// which lies in a cache by then; a dispatch for it would cost more. The first weights are read before that, since
// they do not depend on it.

override LANES: u32 = 256u;
override WIDTH: u32 = 64u; // D, at most 16 LANES, and 32 ROW_LANES, of which there are at most LANES / 2

// Elements of the row that a lane holds, at most.
const OWN: u32 = 4u;

struct Params {
    eps: f32,
    stride: u32, // of a record of the state
    offset: u32, // of the shift in a record
}

const NONE: u32 = 0xffffffffu;

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> tiles: array<vec4<u32>>;       // two to a tile, see `Tile`
@group(0) @binding(2) var<storage, read> cursor: array<vec2<u32>>;      // [1], record read or NONE, record written or NONE
@group(0) @binding(3) var<storage, read> x: array<vec4<f32>>;           // [D]
@group(0) @binding(4) var<storage, read> vectors: array<vec4<f32>>;     // [2 + M, D], gain, bias, mixes
@group(0) @binding(5) var<storage, read> weights: array<vec4<u32>>;     // [rows, D], matrix by matrix, see `Matrix`
@group(0) @binding(6) var<storage, read_write> state: array<vec4<f32>>; // records
@group(0) @binding(7) var<storage, read_write> y: array<f32>;           // [rows]

struct Tile {
    first: u32, // of y
    end: u32,
    mix: u32, // or NONE
    activation: u32,
    format: u32,
    elements: u32, // of its first row
    scales: u32,   // of its first row, in halves
}

fn tile_at(i: u32) -> Tile {
    let a = tiles[2u * i];
    let b = tiles[2u * i + 1u];
    return Tile(a.x, a.y, a.z, a.w, b.x, b.y, b.z);
}

@compute @workgroup_size(LANES)
fn mix_in(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    let tile = tile_at(group.x);
    let m = Matrix(tile.format, tile.elements, tile.scales, WIDTH);
    let before = cursor[0].x;
    let after = cursor[0].y;
    let rows = tile.end - tile.first;
    let last = rows - 1u;
    let width4 = WIDTH / 4u;
    let own = (HELD + LANES - 1u) / LANES; // of the row's elements, held by this lane
    let place = place_of(lane);
    let mixes = tile.mix != NONE;

    // All that is read comes before the first barrier, and what is waited for first before the weights: those would be in
    // its way.
    var row: array<vec4<f32>, OWN>;
    var gain: array<vec4<f32>, OWN>;
    var bias: array<vec4<f32>, OWN>;
    var shift: array<vec4<f32>, OWN>;
    var mix: array<vec4<f32>, OWN>;
    for (var j = 0u; j < own; j++) {
        let i = place + j * LANES;
        if i < width4 {
            row[j] = x[i];
            gain[j] = vectors[i];
            bias[j] = vectors[width4 + i];
            if mixes {
                if before != NONE {
                    shift[j] = state[(before * params.stride + params.offset) / 4u + i];
                } // else it is zero: the start of a sequence
                mix[j] = vectors[(2u + tile.mix) * width4 + i];
            }
        }
    }
    // There are rows. But what is read in a branch is read there, while a compiler moves other reads to where they are needed, behind
    // all that is waited for: 1 us of 8 to 16 (H200, driver 580).
    var fetched: Batch;
    if rows > 0u {
        fetched = fetch(m, Call(0u, 0u, rows, last), lane);
    }
    var sum = 0.0;
    var count = 0u;
    for (var j = 0u; j < own; j++) {
        if place + j * LANES < width4 {
            sum += (row[j].x + row[j].y) + (row[j].z + row[j].w);
            count += 4u;
        }
    }
    let part = part_of(sum, count, WIDTH, lane);
    sum = 0.0;
    for (var j = 0u; j < own; j++) {
        if place + j * LANES < width4 {
            let centred = row[j] - part.mean;
            sum += dot(centred, centred);
        }
    }
    let moments = row_moments(part, sum, WIDTH, lane);
    let scale = inverseSqrt(moments.y + params.eps);

    for (var j = 0u; j < own; j++) {
        let i = place + j * LANES;
        var mixed = vec4(0.0);
        if i < width4 {
            let normed = (row[j] - moments.x) * scale * gain[j] + bias[j];
            if group.x == 0u && after != NONE {
                // Out of place: other workgroups still read the record before.
                state[(after * params.stride + params.offset) / 4u + i] = normed;
            }
            mixed = select(normed, normed + (shift[j] - normed) * mix[j], mixes);
        }
        hold(m, i, mixed, lane);
    }
    workgroupBarrier();

    let kept = rows_kept(m, lane);
    for (var first = 0u; first < rows; first += kept) {
        let end = min(first + kept, rows);
        multiply(m, Call(0u, first, end, last), &fetched, lane);
        workgroupBarrier();
        let row = first + lane.index;
        if row < end {
            y[tile.first + row] = activate(tile.activation, product(row, lane));
        }
        workgroupBarrier(); // before others are kept
    }
}
