// Twin: rwkv-core/src/ops/linear.rs, a linear layer over few rows; the product may be added to what is there.
//use own_columns
//
// A workgroup computes the outputs of one tile, of one row of x.

override LANES: u32 = 256u;
// The extents, where they are known when the kernel is compiled and not zero: the first weights are then read without
// waiting for the parameters.
override INPUTS: u32 = 0u;
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

fn inputs() -> u32 {
    if INPUTS != 0u {
        return INPUTS;
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

@compute @workgroup_size(LANES)
fn linear(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    let width4 = inputs() / 4u;
    let spans = (width4 - 1u) / HELD + 1u;
    let m = matrix_at(params.format, 0u, inputs(), outputs());
    let end_of_tile = min((group.x + 1u) * tile(), outputs());
    let last = end_of_tile - 1u;
    let kept = rows_kept(m, lane);
    var fetched = fetch(m, Call(0u, group.x * tile(), end_of_tile, last), lane);
    for (var first = group.x * tile(); first < end_of_tile; first += kept) {
        let end = min(first + kept, end_of_tile);
        let row = first + lane.index;
        let at = group.y * outputs() + row;
        let adds = params.accumulate != 0u && row < end;
        var before = 0.0;
        if adds {
            before = y[at]; // here, so that it is not waited for in the end
        }
        for (var span = 0u; span < spans; span++) {
            let call = Call(span, first, end, last);
            if spans > 1u {
                fetched = fetch(m, call, lane);
            }
            if spans > 1u || first == group.x * tile() {
                for (var begin = 0u; begin < HELD; begin += LANES) {
                    let i = begin + place_of(lane);
                    var element = vec4(0.0);
                    if i < HELD && span * HELD + i < width4 {
                        element = x[group.y * width4 + span * HELD + i];
                    }
                    hold(m, i, element, lane);
                }
                workgroupBarrier();
            }
            multiply(m, call, &fetched, lane);
            workgroupBarrier();
        }
        if row < end {
            let sum = product(row, lane);
            y[at] = select(sum, before + sum, adds);
        }
        workgroupBarrier(); // before others are kept
    }
}
