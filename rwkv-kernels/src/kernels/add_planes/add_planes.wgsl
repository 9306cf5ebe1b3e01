// Twin: rwkv-core/src/ops/add_planes.rs, the addition of a product whose inputs were divided.

const LANES = 64u;

struct Params {
    width: u32,  // vectors of a row
    planes: u32, // P
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;       // [T, P, D]
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>; // [T, D]

@compute @workgroup_size(LANES)
fn add_planes(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < params.width {
        let at = id.y * params.planes * params.width + id.x;
        var sum = vec4(0.0);
        for (var p = 0u; p < params.planes; p++) {
            sum += x[at + p * params.width];
        }
        y[id.y * params.width + id.x] += sum;
    }
}
