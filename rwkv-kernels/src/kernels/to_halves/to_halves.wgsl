// Twin: rwkv-core/src/ops/to_halves.rs, rows as halves, each from the word on where it begins in single precision.
//use halves

const LANES = 64u;

struct Params {
    len: u32,    // vectors of y, in single precision
    width: u32,  // vectors of a row
    offset: u32, // vectors of x before row 0, and from row to row
    stride: u32,
    scale: f32,  // a power of two
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;       // [T, D], rows of `stride`
@group(0) @binding(2) var<storage, read_write> y: array<vec2<u32>>; // [T, D]: of each row the first half

@compute @workgroup_size(LANES)
fn to_halves(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
    for (var i = id.x; i < params.len; i += groups.x * LANES) {
        let row = i / params.width;
        let four = params.scale * x[params.offset + row * params.stride + i % params.width];
        y[row * params.width + i] = vec2(halves(four.xy), halves(four.zw));
    }
}
