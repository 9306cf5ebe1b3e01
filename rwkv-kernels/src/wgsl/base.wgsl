// What states are based on while a sequence runs, in any format: `rwkv_state::base` has the layout.
//use round
//
// The kernel declares N, the overrides FORMAT and ROUNDING, and `state`, an array of words; a head of a base begins at word
// `base` of it. A quad is four neighbouring keys of a value row i.
//
// A head of a base, in words: its values, a word of one row's neighbouring keys, [keys / keys of a word, N]; for bytes the
// scales of the row's blocks of 16 keys, two to a word, [2, N]; but for single precision the exponents, [N / 4].

const F32: u32 = 0u;
const F16: u32 = 1u;
const INT8: u32 = 2u;

// The exponents of rows that are stored.
var<workgroup> exponents: array<u32, N>;

fn values_len() -> u32 {
    if FORMAT == F16 {
        return N * N / 2u;
    }
    if FORMAT == INT8 {
        return N * N / 4u;
    }
    return N * N;
}

fn head_len() -> u32 {
    if FORMAT == F16 {
        return N * N / 2u + N / 4u;
    }
    if FORMAT == INT8 {
        return N * N / 4u + 2u * N + N / 4u;
    }
    return N * N;
}

fn exponent_of(base: u32, i: u32) -> i32 {
    if FORMAT == F32 {
        return 0;
    }
    return extractBits(bitcast<i32>(state[base + head_len() - N / 4u + i / 4u]), 8u * (i % 4u), 8u);
}

// That of a row which has so large magnitudes now.
fn next_exponent(previous: i32, most: f32) -> i32 {
    if FORMAT == F16 {
        return renewed(previous, most);
    }
    return fresh(most);
}

fn load_quad(base: u32, i: u32, quad: u32, exponent: i32) -> vec4<f32> {
    if FORMAT == F16 {
        let at = base + 2u * quad * N + i;
        let halves = vec4(unpack2x16float(state[at]), unpack2x16float(state[at + N]));
        return raised(halves, power_of_two(exponent));
    }
    if FORMAT == INT8 {
        let scales = unpack2x16float(state[base + values_len() + quad / 8u * N + i]);
        let scale = select(scales.x, scales.y, quad / 4u % 2u == 1u);
        let word = bitcast<i32>(state[base + quad * N + i]);
        let bytes =
            vec4(extractBits(word, 0u, 8u), extractBits(word, 8u, 8u), extractBits(word, 16u, 8u), word >> 24u);
        return raised(vec4<f32>(bytes) * scale, power_of_two(exponent));
    }
    let at = base + 4u * quad * N + i;
    return bitcast<vec4<f32>>(vec4(state[at], state[at + N], state[at + 2u * N], state[at + 3u * N]));
}

// Rounds a quad to what a base can hold, and writes it if `keep`. `first` is the place of its first key in the layer's
// state; the scale is of bytes alone.
fn settle_quad(
    x: vec4<f32>,
    exponent: i32,
    scale: f32,
    step: u32,
    first: u32,
    base: u32,
    i: u32,
    quad: u32,
    keep: bool,
) -> vec4<f32> {
    if FORMAT == F32 {
        if keep {
            let at = base + 4u * quad * N + i;
            let words = bitcast<vec4<u32>>(x);
            state[at] = words.x;
            state[at + N] = words.y;
            state[at + 2u * N] = words.z;
            state[at + 3u * N] = words.w;
        }
        return x;
    }
    let down = x * power_of_two(-exponent);
    let size = power_of_two(exponent);
    if FORMAT == F16 {
        let near = vec4(
            half_near(down.x, ROUNDING, step, first),
            half_near(down.y, ROUNDING, step, first + 1u),
            half_near(down.z, ROUNDING, step, first + 2u),
            half_near(down.w, ROUNDING, step, first + 3u),
        );
        if keep {
            let at = base + 2u * quad * N + i;
            state[at] = pack2x16float(near.xy);
            state[at + N] = pack2x16float(near.zw);
        }
        return raised(near, size);
    }
    let whole = vec4(
        byte_near(down.x, scale, step, first),
        byte_near(down.y, scale, step, first + 1u),
        byte_near(down.z, scale, step, first + 2u),
        byte_near(down.w, scale, step, first + 3u),
    );
    if keep {
        let bytes = bitcast<vec4<u32>>(whole) & vec4(0xffu);
        state[base + quad * N + i] = bytes.x | bytes.y << 8u | bytes.z << 16u | bytes.w << 24u;
    }
    return raised(vec4<f32>(whole) * scale, size);
}

fn byte_near(x: f32, scale: f32, step: u32, index: u32) -> i32 {
    var units = 0.0;
    if scale != 0.0 {
        units = min(rounded(abs(x) / scale, ROUNDING, step, index), 127.0);
    }
    return i32(units * sign(x));
}

// Writes a row's scales of two neighbouring blocks.
fn store_scales(base: u32, i: u32, pair: u32, scales: vec2<f32>) {
    state[base + values_len() + pair * N + i] = pack2x16float(scales);
}

// Writes the exponents of four neighbouring rows.
fn store_exponents(base: u32, four: u32) {
    var word = 0u;
    for (var b = 0u; b < 4u; b++) {
        word = insertBits(word, exponents[4u * four + b], 8u * b, 8u);
    }
    state[base + head_len() - N / 4u + four] = word;
}
