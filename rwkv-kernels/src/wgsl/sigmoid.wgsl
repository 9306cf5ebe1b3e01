// 1 / (1 + exp(-x)) for any finite x, of one value and of four.
//
// exp(-|x|) does not overflow, and below 0 it is the numerator, so that a small value keeps its digits. From 88 on it
// is less than 2^-126, the smallest that a device need not flush to zero.
//
// Error, with s = sigmoid(x) and the bounds of WGSL ("Accuracy of Concrete Floating Point Expressions": exp
// (3 + 2|x|) ulp, a sum 1 ulp, a quotient 2.5 ulp), where an ulp is at most u = 2^-23, relatively:
//   e       (3 + 2|x|) u e, and 2^-126 where it is flushed or held at 88
//   x >= 0  1 / (1 + e) passes on the part e / (1 + e) of that, and (3 + 2x) e / (1 + e) < 1.54: < 5.1 u s
//   x < 0   e / (1 + e) passes on the part 1 / (1 + e): < (6.5 + 2|x|) u s + 2^-126
fn sigmoid(x: f32) -> f32 {
    let e = exp(-min(abs(x), 88.0));
    return select(e, 1.0, x >= 0.0) / (1.0 + e);
}

fn sigmoid4(x: vec4<f32>) -> vec4<f32> {
    return vec4(sigmoid(x.x), sigmoid(x.y), sigmoid(x.z), sigmoid(x.w));
}
