// Sums of columns over a workgroup that holds rows of them, eight columns to an invocation.
//
// The kernel declares LANES, and COLUMNS, a multiple of 8 that divides LANES. Invocation l holds columns
// 8 (l % (COLUMNS / 8)) and on, of row l / (COLUMNS / 8).

override COLUMNS_HELD: u32 = 8u * (LANES + 4u); // named: see blocks.wgsl

// The eight of each invocation, [8, LANES + 4]: by scalars, since two invocations must not write components of one
// vector, and four words apart, so that neighbours neither write nor read words of one bank.
var<workgroup> held: array<f32, COLUMNS_HELD>;

// Holds the columns of invocation l.
fn hold_columns(low: vec4<f32>, high: vec4<f32>, l: u32) {
    let stride = LANES + 4u;
    held[l] = low.x;
    held[stride + l] = low.y;
    held[2u * stride + l] = low.z;
    held[3u * stride + l] = low.w;
    held[4u * stride + l] = high.x;
    held[5u * stride + l] = high.y;
    held[6u * stride + l] = high.z;
    held[7u * stride + l] = high.w;
}

// What is held of a column in a row. A barrier must come before, and another before columns are held again.
fn held_column(row: u32, column: u32) -> f32 {
    return held[column % 8u * (LANES + 4u) + row * (COLUMNS / 8u) + column / 8u];
}

// The sum of column l % COLUMNS over eight of the rows, for invocation l: those LANES / COLUMNS invocations that have
// the same column have different rows, and all rows between them.
fn column_part(l: u32) -> f32 {
    var sum = 0.0;
    for (var row = l / COLUMNS; row < 8u * LANES / COLUMNS; row += LANES / COLUMNS) {
        sum += held_column(row, l % COLUMNS);
    }
    return sum;
}
