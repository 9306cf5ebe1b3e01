// The mean and the variance of a head's 64 answers.
//use sixteen
//
// `head.wgsl` has the answers, in `answer`; a barrier must come before. `moments_subgroup.wgsl` declares the same name. In two
// passes: a mean of squares keeps nothing of the variance where all are nearly the same.

// By scalars, since two invocations must not write components of one vector.
fn answers(j: u32) -> vec4<f32> {
    return vec4(answer[4u * j], answer[4u * j + 1u], answer[4u * j + 2u], answer[4u * j + 3u]);
}

fn moments(lanes: Sixteen) -> vec2<f32> {
    var sum = vec4(0.0);
    for (var j = 0u; j < 16u; j++) {
        sum += answers(j);
    }
    let mean = dot(sum, vec4(1.0)) / 64.0;
    sum = vec4(0.0);
    for (var j = 0u; j < 16u; j++) {
        let centred = answers(j) - mean;
        sum += centred * centred;
    }
    return vec2(mean, dot(sum, vec4(1.0)) / 64.0);
}
