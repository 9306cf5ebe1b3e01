// Sums of columns over a workgroup that holds rows of them, eight columns to an invocation.
//
// The kernel declares LANES, and COLUMNS, a multiple of 8 that divides LANES. Invocation l holds columns
// 8 (l % (COLUMNS / 8)) and on, of row l / (COLUMNS / 8).

// The eight of each invocation, [8, LANES + 4]: by scalars, since two invocations must not write components of one
// vector, and four words apart, so that neighbours neither write nor read words of one bank.
var<workgroup> held: array<f32, 8u * (LANES + 4u)>;

// The sum of column l % COLUMNS over eight of the rows, for invocation l: those LANES / COLUMNS invocations that have
// the same column have different rows, and all rows between them. Every invocation must call it.
fn column_part(low: vec4<f32>, high: vec4<f32>, l: u32) -> f32 {
    let stride = LANES + 4u;
    held[l] = low.x;
    held[stride + l] = low.y;
    held[2u * stride + l] = low.z;
    held[3u * stride + l] = low.w;
    held[4u * stride + l] = high.x;
    held[5u * stride + l] = high.y;
    held[6u * stride + l] = high.z;
    held[7u * stride + l] = high.w;
    workgroupBarrier();
    let column = l % COLUMNS;
    let start = column % 8u * stride + column / 8u;
    var sum = 0.0;
    for (var row = l / COLUMNS; row < 8u * LANES / COLUMNS; row += LANES / COLUMNS) {
        sum += held[start + row * (COLUMNS / 8u)];
    }
    workgroupBarrier(); // before the next call writes where this one reads
    return sum;
}
