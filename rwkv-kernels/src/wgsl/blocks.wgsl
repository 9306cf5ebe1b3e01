// Weights of matrices that may be in blocks (twin: rwkv-core/src/quant/mod.rs), of which a matrix has all in one format.
//use weights
//
// A matrix is rows of weights, in elements of 16 bytes, then the scales of its blocks, a half for each of BLOCK weights,
// row by row. The kernel declares the buffer `weights: array<vec4<u32>>`. Rows are whole blocks, but for halves.

const F16: u32 = 0u;  // 8 weights an element
const INT8: u32 = 1u; // 16, in steps
const INT4: u32 = 2u; // 32: of eight in four bytes, the first four are in the low halves of the bytes

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

// A scale, by its number in the matrix.
fn scale(m: Matrix, i: u32) -> f32 {
    let at = m.scales + i;
    let two = unpack2x16float(weights[at / 8u][at / 2u % 4u]);
    return select(two.x, two.y, at % 2u == 1u);
}

// Of a word of INT8, the weights in steps.
fn bytes(word: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xI8(word));
}

// Of a word of INT4, the first four weights in steps, and the others; sixteen times as large.
fn low_halves(word: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xI8((word << 4u) & 0xf0f0f0f0u));
}

fn high_halves(word: u32) -> vec4<f32> {
    return vec4<f32>(unpack4xI8(word & 0xf0f0f0f0u));
}

// Eight weights of a row, as they are read: of blocks with their scale, as a float.
fn eight(m: Matrix, row: u32, at: u32) -> vec4<u32> {
    let i = row * (m.row / 8u) + at;
    if has(m, INT4) {
        return vec4(weights[m.elements + i / 4u][i % 4u], bitcast<u32>(scale(m, i / 4u) / 16.0), 0u, 0u);
    }
    if has(m, INT8) {
        let element = m.elements + i / 2u;
        let first = 2u * (i % 2u);
        return vec4(weights[element][first], weights[element][first + 1u], bitcast<u32>(scale(m, i / 4u)), 0u);
    }
    return weights[m.elements + i];
}

// The first four of them, and the last four.
fn first4(m: Matrix, w: vec4<u32>) -> vec4<f32> {
    if has(m, INT4) {
        return bitcast<f32>(w.y) * low_halves(w.x);
    }
    if has(m, INT8) {
        return bitcast<f32>(w.z) * bytes(w.x);
    }
    return low4(w);
}

fn last4(m: Matrix, w: vec4<u32>) -> vec4<f32> {
    if has(m, INT4) {
        return bitcast<f32>(w.y) * high_halves(w.x);
    }
    if has(m, INT8) {
        return bitcast<f32>(w.z) * bytes(w.y);
    }
    return high4(w);
}
