// Weights of matrices, eight to an element of the buffer: halves, two to a word, the first in its low bits.
//
// Kernels read halves through these; `blocks.wgsl` adds the other formats.

// The products of eight weights with eight values, summed.
fn dot8(w: vec4<u32>, a: vec4<f32>, b: vec4<f32>) -> f32 {
    let w01 = unpack2x16float(w.x);
    let w23 = unpack2x16float(w.y);
    let w45 = unpack2x16float(w.z);
    let w67 = unpack2x16float(w.w);
    return dot(vec4(w01, w23), a) + dot(vec4(w45, w67), b);
}

// The first four of eight weights, and the last four.
fn low4(w: vec4<u32>) -> vec4<f32> {
    return vec4(unpack2x16float(w.x), unpack2x16float(w.y));
}

fn high4(w: vec4<u32>) -> vec4<f32> {
    return vec4(unpack2x16float(w.z), unpack2x16float(w.w));
}
