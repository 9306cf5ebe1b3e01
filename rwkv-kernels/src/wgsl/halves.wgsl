// Two numbers as halves: the largest half in place of what is beyond it, but what is no number, or infinite, as it is.

const LARGEST_HALF: f32 = 65504.0;

fn halves(x: vec2<f32>) -> u32 {
    let finite = (bitcast<vec2<u32>>(x) & vec2(0x7F800000u)) != vec2(0x7F800000u);
    return pack2x16float(select(x, clamp(x, vec2(-LARGEST_HALF), vec2(LARGEST_HALF)), finite));
}
