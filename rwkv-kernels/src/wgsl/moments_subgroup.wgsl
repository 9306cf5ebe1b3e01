// The mean and the variance of a head's 64 answers, each subgroup for itself: the variant of `moments.wgsl`.
//use sixteen
//subgroups of 16
//
// Every sixteenth invocation has the same four, so that a subgroup of S counts each of the 64 S / 16 times. Of a subgroup of
// more than 64 invocations, the 64 of the head alone call it. Written without loops, which would take the registers that a
// kernel needs (NVIDIA, driver 580).

fn moments(lanes: Sixteen) -> vec2<f32> {
    let first = lanes.of_subgroup % 16u;
    let own = vec4(answer[first], answer[first + 16u], answer[first + 32u], answer[first + 48u]);
    let all = f32(4u * min(lanes.subgroup_size, 64u));
    let mean = subgroupAdd(dot(own, vec4(1.0))) / all;
    let centred = own - mean;
    return vec2(mean, subgroupAdd(dot(centred, centred)) / all);
}
