// The mean and the variance of a row that a workgroup has, each invocation some of its elements.
//use reduce
//
// `row_moments_subgroup.wgsl` declares the same names, and has the row in parts, each of which is centred on a mean of its own, so that
// one exchange is enough. Here there is one part. In any case the variance is of elements that are centred: a mean of squares keeps
// nothing of it where all are nearly the same.

// The mean of the part of the row to which this invocation's elements belong, and how many those of the part are.
struct Part {
    mean: f32,
    count: u32,
}

// That, where an invocation has `count` elements whose sum is `sum`, of `all`. Every invocation must call it.
fn part_of(sum: f32, count: u32, all: u32, lane: Lane) -> Part {
    return Part(workgroup_sum(sum, lane) / f32(all), all);
}

// The mean and the variance of the row, where the squares of what an invocation's elements differ from their part's mean
// sum to `squares`. Every invocation must call it. A barrier must come before the next row or sum.
fn row_moments(part: Part, squares: f32, all: u32, lane: Lane) -> vec2<f32> {
    return vec2(part.mean, workgroup_sum(squares, lane) / f32(all));
}
