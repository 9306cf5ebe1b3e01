// Sums of columns over a workgroup that holds rows of them, eight columns to an invocation.
//
// The kernel declares LANES, and COLUMNS, a multiple of 8 that divides LANES. Invocation l holds columns
// 8 (l % (COLUMNS / 8)) and on, of row l / (COLUMNS / 8).

var<workgroup> held: array<vec4<f32>, LANES * 2u>; // [rows, COLUMNS]

// The sum of column l % COLUMNS over eight of the rows, for invocation l: those LANES / COLUMNS invocations that have
// the same column have different rows, and all rows between them. Every invocation must call it.
fn column_part(low: vec4<f32>, high: vec4<f32>, l: u32) -> f32 {
    held[2u * l] = low;
    held[2u * l + 1u] = high;
    workgroupBarrier();
    let column = l % COLUMNS;
    var sum = 0.0;
    for (var row = l / COLUMNS; row < 8u * LANES / COLUMNS; row += LANES / COLUMNS) {
        let at = row * COLUMNS + column;
        sum += held[at / 4u][at % 4u];
    }
    workgroupBarrier(); // before the next call writes where this one reads
    return sum;
}
