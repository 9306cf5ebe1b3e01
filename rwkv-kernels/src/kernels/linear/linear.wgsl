// Twin: rwkv-core/src/ops/linear.rs, a linear layer over few rows; the product may be added to what is there.
//use mat_vec
//
// A workgroup computes as many outputs as it has teams, times TEAM_ROWS, of one row of x.

override LANES: u32 = 256u;
override TEAM_ROWS: u32 = 1u;
// Elements of a row of x that are held in workgroup memory, all or none: blocks are read by lanes that are far apart in x.
override HELD: u32 = 0u;

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

fn input(i: u32) -> vec4<f32> {
    if HELD != 0u {
        return held[spread(i)];
    }
    return x[start + i];
}

@compute @workgroup_size(LANES)
fn linear(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    start = group.y * params.inputs / 4u;
    let team = team_of(lane);
    let m = matrix_at(params.format, 0u, params.inputs, params.outputs);
    let end = min((group.x + 1u) * params.tile, params.outputs);
    let last = end - 1u;
    let step = team.count * TEAM_ROWS;
    var fetched = fetch(m, group.x * params.tile + team.index * TEAM_ROWS, last, team);
    if HELD != 0u {
        for (var i = lane.index; i < HELD / 4u; i += LANES) {
            held[spread(i)] = x[start + i];
        }
        workgroupBarrier();
    }
    for (var first = group.x * params.tile; first < end; first += step) {
        let row = first + team.index * TEAM_ROWS;
        let sum = row_products(m, row, last, fetched, team, lane);
        if first + step < end {
            fetched = fetch(m, row + step, last, team);
        }
        // One lane for each of the two rows, so that what they wait for is waited for once.
        let own = row + team.lane;
        if team.lane < TEAM_ROWS && own <= last {
            let at = group.y * params.outputs + own;
            let product = select(sum.x, sum.y, team.lane == 1u);
            y[at] = select(product, y[at] + product, params.accumulate != 0u);
        }
    }
}
