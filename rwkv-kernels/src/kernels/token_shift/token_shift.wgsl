// Twin: rwkv-core/src/ops/token_shift.rs, the token shift, here of packed segments.
//
// An invocation reads four channels of a row and of the row before it, and writes them mixed M times. It also keeps
// the last row of a segment: no record that a segment is kept in is one that another starts from.

const LANES = 64u;
const NONE = 0xffffffffu;

struct Params {
    len: u32,    // vectors of x
    width: u32,  // vectors of a row
    planes: u32, // M
    stride: u32, // elements of a record of the state
    offset: u32, // elements of it that precede the row of this shift
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;         // [T, D]
@group(0) @binding(2) var<storage, read> cursors: array<vec2<u32>>;   // [T]: records of the row before and this
@group(0) @binding(3) var<storage, read> mixes: array<vec4<f32>>;     // [M, D]
@group(0) @binding(4) var<storage, read_write> state: array<f32>;     // [records, stride]
@group(0) @binding(5) var<storage, read_write> out: array<vec4<f32>>; // [T, M, D]

@compute @workgroup_size(LANES)
fn token_shift(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.len; i += groups.x * LANES) {
        let t = i / params.width;
        let j = i % params.width;
        let cursor = cursors[t];
        let row = x[i];
        var before: vec4<f32>;
        if cursor.x == NONE {
            before = x[i - params.width];
        } else {
            let at = cursor.x * params.stride + params.offset + 4u * j;
            before = vec4(state[at], state[at + 1u], state[at + 2u], state[at + 3u]);
        }
        if cursor.y != NONE {
            let at = cursor.y * params.stride + params.offset + 4u * j;
            for (var c = 0u; c < 4u; c++) {
                state[at + c] = row[c];
            }
        }
        for (var m = 0u; m < params.planes; m++) {
            out[(t * params.planes + m) * params.width + j] = row + (before - row) * mixes[m * params.width + j];
        }
    }
}
