// Products of one vector with the rows of a matrix, one or two rows to a team.
//use reduce
//use blocks
//
// The kernel declares LANES and TEAM_ROWS (1 or 2), the buffer `weights: array<vec4<u32>>` and the function
// `input(i: u32) -> vec4<f32>`, elements 4 i and on of the vector.
//
// Two rows share each read of the vector, which pays where rows are long.

struct Rows {
    first: vec4<u32>,
    second: vec4<u32>,
    // Of blocks.
    first_scale: f32,
    second_scale: f32,
}

// Where an element of four may be held in workgroup memory, so that lanes which read every second, fourth or eighth of
// them meet in no bank.
fn spread(i: u32) -> u32 {
    return i / 8u * 8u + (i + i / 8u) % 8u;
}

// Weights that a lane multiplies. `last` is the last row there is: a team without a row of its own repeats it.
fn rows_at(m: Matrix, row: u32, last: u32, i: u32) -> Rows {
    let elements = row_elements(m);
    let first = min(row, last) * elements + i;
    let second = min(row + 1u, last) * elements + i;
    var rows: Rows;
    rows.first = weights[m.elements + first];
    if TEAM_ROWS == 2u {
        rows.second = weights[m.elements + second];
    }
    if has(m, INT4) || has(m, INT8) {
        let shift = select(1u, 0u, has(m, INT4)); // a block of bytes is of two elements
        rows.first_scale = scale(m, first >> shift);
        if TEAM_ROWS == 2u {
            rows.second_scale = scale(m, second >> shift);
        }
    }
    return rows;
}

// Reads the weights that the lane multiplies first: a kernel has more to do before it has the vector.
fn fetch(m: Matrix, row: u32, last: u32, team: Team) -> Rows {
    var rows: Rows;
    if team.lane < row_elements(m) {
        rows = rows_at(m, row, last, team.lane);
    }
    return rows;
}

// The products of two words of a row each with elements `i` and on of the vector.
fn of_bytes(first: u32, second: u32, i: u32) -> vec2<f32> {
    let x = input(i);
    var sum = vec2(dot(bytes(first), x), 0.0);
    if TEAM_ROWS == 2u {
        sum.y = dot(bytes(second), x);
    }
    return sum;
}

fn of_halves(first: u32, second: u32, i: u32) -> vec2<f32> {
    let a = input(i);
    let b = input(i + 1u);
    var sum = vec2(dot(low_halves(first), a) + dot(high_halves(first), b), 0.0);
    if TEAM_ROWS == 2u {
        sum.y = dot(low_halves(second), a) + dot(high_halves(second), b);
    }
    return sum;
}

// The products of element `i` of two rows.
fn products(m: Matrix, rows: Rows, i: u32) -> vec2<f32> {
    let p = rows.first;
    let q = rows.second;
    let scales = vec2(rows.first_scale, rows.second_scale);
    if has(m, INT4) {
        let sum = (of_halves(p.x, q.x, 8u * i) + of_halves(p.y, q.y, 8u * i + 2u))
            + (of_halves(p.z, q.z, 8u * i + 4u) + of_halves(p.w, q.w, 8u * i + 6u));
        return sum * (scales / 16.0);
    }
    if has(m, INT8) {
        let sum = (of_bytes(p.x, q.x, 4u * i) + of_bytes(p.y, q.y, 4u * i + 1u))
            + (of_bytes(p.z, q.z, 4u * i + 2u) + of_bytes(p.w, q.w, 4u * i + 3u));
        return sum * scales;
    }
    let a = input(2u * i);
    let b = input(2u * i + 1u);
    var sum = vec2(dot8(p, a, b), 0.0);
    if TEAM_ROWS == 2u {
        sum.y = dot8(q, a, b);
    }
    return sum;
}

// The products of rows `row` and `row + 1` with the vector, in each lane of the team. Every invocation of the
// workgroup must call it.
fn row_products(m: Matrix, row: u32, last: u32, fetched: Rows, team: Team, lane: Lane) -> vec2<f32> {
    let elements = row_elements(m);
    var sum = vec2(0.0);
    if team.lane < elements {
        sum = products(m, fetched, team.lane);
    }
    for (var i = team.lane + team.size; i < elements; i += team.size) {
        sum += products(m, rows_at(m, row, last, i), i);
    }
    sum.x = team_sum(sum.x, lane);
    if TEAM_ROWS == 2u {
        sum.y = team_sum(sum.y, lane);
    }
    return sum;
}
