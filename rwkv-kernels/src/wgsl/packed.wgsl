// What rows are written as (twin: rwkv-core/src/ops/to_halves.rs): single precision, or halves of what a power of two divides.
//use halves
//
// Halves lie two to a word, from the word on where the row in single precision begins.

override HALVES: u32 = 0u; // 0 for single precision, 1 + e for halves of what 2^e divides

fn packed(x: vec2<f32>) -> u32 {
    return halves(bitcast<f32>((128u - HALVES) << 23u) * x);
}
