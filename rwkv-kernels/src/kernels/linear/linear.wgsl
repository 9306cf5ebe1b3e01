// Twin: rwkv-core/src/ops/linear.rs, a linear layer over few rows; the product may be added to what is there.
//use mat_vec
//
// A workgroup computes as many outputs as it has teams, times TEAM_ROWS, of one row of x.

override LANES: u32 = 256u;
override TEAM_ROWS: u32 = 1u;
// Of a row of x, held in workgroup memory, all or none: blocks are read by lanes that are far apart in x.
override HELD: u32 = 0u;
// The extents, where they are known when the kernel is compiled and not zero: the first weights are then read without
// waiting for the parameters. HELD is `inputs` too.
override OUTPUTS: u32 = 0u;
override TILE: u32 = 0u;

struct Params {
    inputs: u32,
    outputs: u32,
    tile: u32,       // outputs of a workgroup
    accumulate: u32, // whether to add to y
    format: u32,     // of the matrix
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>; // [outputs, inputs], see `Matrix`
@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>;       // [T, inputs]
@group(0) @binding(3) var<storage, read_write> y: array<f32>;       // [T, outputs]

var<private> start: u32; // of this row of x
override ROOM: u32 = HELD / 4u + 8u; // `spread` goes by eights
var<workgroup> held: array<vec4<f32>, ROOM>;

fn inputs() -> u32 {
    if HELD != 0u {
        return HELD;
    }
    return params.inputs;
}

fn outputs() -> u32 {
    if OUTPUTS != 0u {
        return OUTPUTS;
    }
    return params.outputs;
}

fn tile() -> u32 {
    if TILE != 0u {
        return TILE;
    }
    return params.tile;
}

fn input(i: u32) -> vec4<f32> {
    if HELD != 0u {
        return held[spread(i)];
    }
    return x[start + i];
}

@compute @workgroup_size(LANES)
fn linear(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    start = group.y * inputs() / 4u;
    let team = team_of(lane);
    let m = matrix_at(params.format, 0u, inputs(), outputs());
    let end = min((group.x + 1u) * tile(), outputs());
    let last = end - 1u;
    let step = team.count * TEAM_ROWS;
    var fetched = fetch(m, group.x * tile() + team.index * TEAM_ROWS, last, team);
    if HELD != 0u {
        for (var i = lane.index; i < HELD / 4u; i += LANES) {
            held[spread(i)] = x[start + i];
        }
        workgroupBarrier();
    }
    for (var first = group.x * tile(); first < end; first += step) {
        let row = first + team.index * TEAM_ROWS;
        // One lane for each of the two rows, so that what they wait for is waited for once.
        let own = row + team.lane;
        let owns = team.lane < TEAM_ROWS && own <= last;
        let at = group.y * outputs() + own;
        var before = 0.0;
        if owns && params.accumulate != 0u {
            before = y[at];
        }
        let sum = row_products(m, row, last, fetched, team, lane);
        if first + step < end {
            fetched = fetch(m, row + step, last, team);
        }
        if owns {
            let product = select(sum.x, sum.y, team.lane == 1u);
            y[at] = select(product, before + product, params.accumulate != 0u);
        }
    }
}
