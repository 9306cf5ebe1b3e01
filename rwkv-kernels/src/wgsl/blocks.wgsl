// Weights of matrices that may be in blocks (twin: rwkv-core/src/quant/mod.rs), of which a matrix has all in one format.
//use weights
//
// A matrix is rows of weights, in elements of 16 bytes, then the scales of its blocks, a half for each of BLOCK weights,
// row by row. The kernel declares the buffer `weights: array<vec4<u32>>`. Rows are whole blocks, but for halves.

const F16: u32 = 0u;  // 8 weights an element
const INT8: u32 = 1u; // 16, in steps
const INT4: u32 = 2u; // 32: of eight in four bytes, the first four are in the low halves of the bytes
// And of four weights in the halves of a word's bytes, the second is in the third byte, and the third in the second: `laid` of
// kernels/weights.rs.

// (naga 30 loses count of overrides where the length of an array has no name and stands before this one.)
//
// The formats that occur, a bit for each: what others would need is not even compiled.
override FORMATS: u32 = 1u;

// Where a matrix lies, and in what.
struct Matrix {
    format: u32,
    elements: u32, // its first
    scales: u32,   // its first, in halves
    row: u32,      // weights of a row
}

// Whether a matrix has a format.
fn has(m: Matrix, format: u32) -> bool {
    return FORMATS == 1u << format || ((FORMATS >> format) & 1u) != 0u && m.format == format;
}

// A matrix of so many weights that begins with an element.
fn matrix_at(format: u32, elements: u32, row: u32, rows: u32) -> Matrix {
    let m = Matrix(format, elements, 0u, row);
    return Matrix(format, elements, 8u * (elements + rows * row_elements(m)), row);
}

// Elements of a row.
fn row_elements(m: Matrix) -> u32 {
    if has(m, INT4) {
        return m.row / 32u;
    }
    if has(m, INT8) {
        return m.row / 16u;
    }
    return m.row / 8u;
}

// Where the scale of a block is: two of them share a word. Read before it is needed, and decoded when it is, so that
// other reads need not wait for it.
fn scale_word(m: Matrix, block: u32) -> u32 {
    let at = m.scales + block;
    return weights[at / 8u][at / 2u % 4u];
}

// By what its word is shifted.
fn scale_shift(m: Matrix, block: u32) -> u32 {
    return (m.scales + block) % 2u * 16u;
}

fn scale_of(word: u32, shift: u32) -> f32 {
    return unpack2x16float(word >> shift).x;
}

// Steps, exactly, without a conversion of integers, of which GPUs do few at a time. A step plus 2^n for some n is a
// float of that exponent, whose fraction has the bits of the step where they lie in the word; with the highest of them
// flipped, which adds half the range, it is not negative.

// Of a word of INT8, the weights in steps.
fn bytes(word: u32) -> vec4<f32> {
    let high = word >> 16u;
    let moved = vec4(
        (word & 0xffu) ^ 0x4b000080u, // 2^23
        (word & 0xff00u) ^ 0x47008000u, // 2^15
        (high & 0xffu) ^ 0x4b000080u,
        (high & 0xff00u) ^ 0x47008000u,
    );
    return bitcast<vec4<f32>>(moved) - vec4(8388736.0, 32896.0, 8388736.0, 32896.0);
}

// Of a word of INT4, the first four weights in steps, and the others.
fn low_halves(word: u32) -> vec4<f32> {
    let moved = vec4(
        (word & 0xfu) ^ 0x4b000008u, // 2^23
        (word & 0xf00u) ^ 0x47000800u, // 2^15
        (word & 0xf0000u) ^ 0x43080000u, // 2^7
        (word >> 12u & 0xf000u) ^ 0x45008000u, // 2^11
    );
    return (bitcast<vec4<f32>>(moved) - vec4(8388616.0, 32776.0, 136.0, 2056.0)).xzyw;
}

fn high_halves(word: u32) -> vec4<f32> {
    let moved = vec4(
        (word & 0xf0u) ^ 0x49000080u, // 2^19
        (word & 0xf000u) ^ 0x45008000u, // 2^11
        (word >> 12u & 0xf00u) ^ 0x47000800u, // 2^15
        (word >> 12u & 0xf0000u) ^ 0x43080000u, // 2^7
    );
    return (bitcast<vec4<f32>>(moved) - vec4(524296.0, 2056.0, 32776.0, 136.0)).xzyw;
}

// Eight weights of a row, as they are read: of blocks, with the word of their scale and its shift.
fn eight(m: Matrix, row: u32, at: u32) -> vec4<u32> {
    let i = row * (m.row / 8u) + at;
    if has(m, INT4) {
        let element = m.elements + i / 4u;
        return vec4(weights[element][i % 4u], 0u, scale_word(m, i / 4u), scale_shift(m, i / 4u));
    }
    if has(m, INT8) {
        let element = m.elements + i / 2u;
        let first = 2u * (i % 2u);
        let w = vec2(weights[element][first], weights[element][first + 1u]);
        return vec4(w, scale_word(m, i / 4u), scale_shift(m, i / 4u));
    }
    return weights[m.elements + i];
}

// The first four of them, and the last four.
fn first4(m: Matrix, w: vec4<u32>) -> vec4<f32> {
    if has(m, INT4) {
        return scale_of(w.z, w.w) * low_halves(w.x);
    }
    if has(m, INT8) {
        return scale_of(w.z, w.w) * bytes(w.x);
    }
    return low4(w);
}

fn last4(m: Matrix, w: vec4<u32>) -> vec4<f32> {
    if has(m, INT4) {
        return scale_of(w.z, w.w) * high_halves(w.x);
    }
    if has(m, INT8) {
        return scale_of(w.z, w.w) * bytes(w.y);
    }
    return high4(w);
}
