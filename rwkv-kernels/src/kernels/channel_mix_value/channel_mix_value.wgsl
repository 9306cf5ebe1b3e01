// Twin: rwkv-core/src/ops/channel_mix_value.rs, the channel mix's value layer, added to the residual.
//use scan
//use blocks
//use columns
//
// A workgroup computes COLUMNS outputs of one row. The matrix lies hidden-major, so that a hidden unit which is zero
// leaves a whole row of it unread. Each workgroup lists the units that are not zero for itself, in a fixed order,
// as many at a time as it has room for.

override LANES: u32 = 256u;
override COLUMNS: u32 = 32u;
override PARTS: u32 = 8u; // fours of units that a lane looks at before they are listed, at most 8: enough for all is best
// The extents, where they are known when the kernel is compiled and not zero.
override WIDTH: u32 = 0u;
override HIDDEN: u32 = 0u;

// Units that a lane reads the weights of before it multiplies those of the first: few are not zero, and each waits for
// the memory.
const AHEAD: u32 = 4u;

struct Params {
    width: u32,  // D
    hidden: u32, // F
    format: u32, // of the matrix
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>; // [F, D], see `Matrix`
@group(0) @binding(2) var<storage, read> hidden: array<vec4<f32>>;  // [T, F]
@group(0) @binding(3) var<storage, read_write> x: array<f32>;       // [T, D]

override ALL: bool = false; // whether units that are zero are read all the same, to measure what that costs

// The list is in `held`, which is not needed before it is done with: as f32, which hold any such index.
override ROOM: u32 = 8u * LANES;
var<workgroup> sums: array<f32, LANES>;

fn width() -> u32 {
    if WIDTH != 0u {
        return WIDTH;
    }
    return params.width;
}

fn hidden_units() -> u32 {
    if HIDDEN != 0u {
        return HIDDEN;
    }
    return params.hidden;
}

@compute @workgroup_size(LANES)
fn channel_mix_value(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    let l = lane.index;
    let width8 = width() / 8u;
    let hidden4 = hidden_units() / 4u;
    let start = group.y * hidden4;
    let m = matrix_at(params.format, 0u, width(), hidden_units());
    // Lanes of a row, and the column of this one, in elements of eight weights. The last columns may not be there.
    let lanes = COLUMNS / 8u;
    let column = min(group.x * lanes + l % lanes, width8 - 1u);
    var low = vec4(0.0);
    var high = vec4(0.0);
    let own = group.x * COLUMNS + l;
    let owns = l < COLUMNS && own < width();
    var before = 0.0;
    if owns {
        before = x[group.y * width() + own];
    }

    for (var base = 0u; base < hidden4; base += PARTS * LANES) {
        // Which of the lane's units are not zero, one bit each.
        var bits = 0u;
        for (var j = 0u; j < PARTS; j++) {
            let at = base + j * LANES + l;
            if at < hidden4 {
                let read = (hidden[start + at] != vec4(0.0)) | vec4(ALL);
                bits |= dot(vec4<u32>(read), vec4(1u, 2u, 4u, 8u)) << (4u * j);
            }
        }
        let scanned = workgroup_scan(countOneBits(bits), lane);
        // As a rule, all have room at once.
        for (var listed = 0u; listed < scanned.y; listed += ROOM) {
            var place = scanned.x;
            for (var rest = bits; rest != 0u; rest &= rest - 1u) {
                if place >= listed && place - listed < ROOM {
                    let bit = firstTrailingBit(rest);
                    held[place - listed] = f32(4u * (base + bit / 4u * LANES + l) + bit % 4u);
                }
                place++;
            }
            workgroupBarrier();
            let count = min(scanned.y - listed, ROOM);
            let step = LANES / lanes;
            for (var first = l / lanes; first < count; first += AHEAD * step) {
                var w: array<vec4<u32>, AHEAD>;
                var value: array<f32, AHEAD>; // zero where there is no unit
                for (var k = 0u; k < AHEAD; k++) {
                    let i = first + k * step;
                    if i < count {
                        let unit = u32(held[i]);
                        w[k] = eight(m, unit, column);
                        value[k] = hidden[start + unit / 4u][unit % 4u];
                    }
                }
                for (var k = 0u; k < AHEAD; k++) {
                    low += value[k] * first4(m, w[k]);
                    high += value[k] * last4(m, w[k]);
                }
            }
            workgroupBarrier(); // before the list is written again, or the sums where it is
        }
    }

    hold_columns(low, high, l);
    workgroupBarrier();
    sums[l] = column_part(l);
    workgroupBarrier();
    if owns {
        var sum = 0.0;
        for (var i = l; i < LANES; i += COLUMNS) {
            sum += sums[i];
        }
        x[group.y * width() + own] = before + sum;
    }
}
