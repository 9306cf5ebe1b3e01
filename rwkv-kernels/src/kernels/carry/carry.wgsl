// Twin: rwkv-core/src/ops/carry.rs, a part of records that is carried to others.

const LANES = 64u;

// In place of a record.
const NONE = 0xFFFFFFFFu;

struct Params {
    width: u32,  // of the part; a multiple of 4, as are
    stride: u32, // elements of a record
    offset: u32, // where in a record the part begins
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> pairs: array<vec2<u32>>;         // [T], record read, record written or NONE
@group(0) @binding(2) var<storage, read_write> records: array<vec4<u32>>; // [records, stride]

@compute @workgroup_size(LANES)
fn carry(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let pair = pairs[group.x];
    if pair.y == NONE {
        return;
    }
    let start = (pair.x * params.stride + params.offset) / 4u;
    let to = (pair.y * params.stride + params.offset) / 4u;
    for (var i = lane; i < params.width / 4u; i += LANES) {
        records[to + i] = records[start + i];
    }
}
