// Twin: rwkv-core/src/ops/time_mix.rs, what precedes the state update, for many rows side by side.
//use reduce
//use sigmoid
//use expm1
//
// One workgroup per head of a row, one channel by each invocation.

const N: u32 = 64u;
const LANES: u32 = N;

struct Params {
    width: u32,             // D
    inputs: u32,            // P
    first_layer: u32,       // whether there is no value residual
    decay_scale: f32,
    kappa_eps_squared: f32, // shut out before the root, as in kappa.wgsl
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> inputs: array<f32>;          // [T, P], r k v first
@group(0) @binding(2) var<storage, read> up: array<f32>;              // [T, 4, D], w a v g
@group(0) @binding(3) var<storage, read> vectors: array<f32>;         // [8, D], w0 a0 v0 k_k k_a first
@group(0) @binding(4) var<storage, read_write> v_first: array<f32>;   // [T, D]
@group(0) @binding(5) var<storage, read_write> operands: array<f32>;  // [T, H, 6, N], w - 1, k, kappa, b, r, v

@compute @workgroup_size(LANES)
fn time_mix_operands(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {
    let width = params.width;
    let row = group.y;
    let channel = group.x * N + lane.index;
    let projected = row * params.inputs + channel;
    let r = inputs[projected];
    let k = inputs[projected + width];
    var v = inputs[projected + 2u * width];
    let lora = row * 4u * width + channel;
    let eta = sigmoid(vectors[width + channel] + up[lora + width]);
    if params.first_layer != 0u {
        v_first[row * width + channel] = v;
    } else {
        let first = v_first[row * width + channel];
        v += (first - v) * sigmoid(vectors[2u * width + channel] + up[lora + 2u * width]);
    }
    let removal = k * vectors[3u * width + channel];
    let square = workgroup_sum(removal * removal, lane);
    let kappa = removal * inverseSqrt(max(square, params.kappa_eps_squared));

    let at = (row * (width / N) + group.x) * 6u * N + lane.index;
    operands[at] = expm1(-params.decay_scale * sigmoid(vectors[channel] + up[lora]));
    operands[at + N] = k * (1.0 + (eta - 1.0) * vectors[4u * width + channel]);
    operands[at + 2u * N] = kappa;
    operands[at + 3u * N] = kappa * eta;
    operands[at + 4u * N] = r;
    operands[at + 5u * N] = v;
}
