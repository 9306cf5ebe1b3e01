// The mean and the variance of a head's 64 answers, each subgroup for itself: the variant of `moments.wgsl`.
//use sixteen
//subgroups of 16
//
// Every sixteenth invocation has the same four, so that a subgroup sums all 64 a sixteenth of its size times. Written
// without loops, which would take the registers that a kernel needs (NVIDIA, driver 580).

fn moments(lanes: Sixteen) -> vec2<f32> {
    let first = lanes.of_subgroup % 16u;
    let own = vec4(answer[first], answer[first + 16u], answer[first + 32u], answer[first + 48u]);
    let all = f32(4u * lanes.subgroup_size);
    let mean = subgroupAdd(dot(own, vec4(1.0))) / all;
    let centred = own - mean;
    return vec2(mean, subgroupAdd(dot(centred, centred)) / all);
}
