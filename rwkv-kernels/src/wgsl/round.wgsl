// How states are rounded: `rwkv_state::format`, whose files exponent, float16, int8 and rounding have the formulas.

const NEAREST: u32 = 0u;
const DITHER: u32 = 1u;
const DECAY_DITHER: u32 = 2u;

// 2^e, for e in -126..=127.
fn power_of_two(e: i32) -> f32 {
    return bitcast<f32>(u32(e + 127) << 23u);
}

// floor(log2 |x|); -127 for subnormal numbers and zero.
fn binade(x: f32) -> i32 {
    return i32((bitcast<u32>(x) >> 23u) & 0xffu) - 127;
}

// The exponent of a row whose largest magnitude that is.
fn fresh(most: f32) -> i32 {
    if most == 0.0 {
        return 0;
    }
    return clamp(binade(most) - 6, -126, 121);
}

// The exponent it had, while the largest magnitude keeps within the window.
fn renewed(previous: i32, most: f32) -> i32 {
    let scaled = most * power_of_two(-previous);
    return select(fresh(most), previous, scaled >= 0.25 && scaled <= 16384.0);
}

// Stored values at their row's size, saturated.
fn raised(x: vec4<f32>, size: f32) -> vec4<f32> {
    return clamp(x * size, vec4(-3.40282347e38), vec4(3.40282347e38));
}

// The golden ratio's walk around the circle, in units of 2^-32 turns.
fn phase(step: u32, index: u32) -> u32 {
    return (step + index) * 2654435769u;
}

// A magnitude in units of what is stored, as a whole number of them.
fn rounded(magnitude: f32, rounding: u32, step: u32, index: u32) -> f32 {
    if rounding != DITHER {
        return round(magnitude);
    }
    let whole = floor(magnitude);
    // A fraction of nearly one would be beyond the largest u32.
    let fraction = u32(min(ceil((magnitude - whole) * 4294967296.0), 4294967040.0));
    return select(whole, whole + 1.0, phase(step, index) < fraction);
}

// A half near x, which is not beyond the halves.
fn half_near(x: f32, rounding: u32, step: u32, index: u32) -> f32 {
    // The spacing of halves around x; dividing by it and multiplying with it are exact.
    let unit = max(binade(x), -14) - 10;
    let units = rounded(abs(x) * power_of_two(-unit), rounding, step, index);
    return units * power_of_two(unit) * sign(x);
}

// The least half of which 127 reach a scaled magnitude below 2^7.
fn scale_of(most: f32) -> f32 {
    let bits = pack2x16float(vec2(most / 127.0, 0.0)) & 0xffffu;
    let near = unpack2x16float(bits).x;
    return select(near, unpack2x16float(bits + 1u).x, near * 127.0 < most);
}

// What is added to w - 1 of a channel.
fn decay_dither(rounding: u32, step: u32, channel: u32) -> f32 {
    if rounding != DECAY_DITHER {
        return 0.0;
    }
    return f32(bitcast<i32>(phase(step, channel))) * (1.0 / 2199023255552.0);
}
