// Products of one vector with the rows of a matrix, one or two rows to a team.
//use reduce
//use blocks
//
// The kernel declares LANES and TEAM_ROWS (1 or 2), the buffer `weights: array<vec4<u32>>` and the function
// `input(i: u32) -> vec4<f32>`, elements 4 i and on of the vector.
//
// Two rows share each read of the vector, which pays where rows are long.

// Elements of a row that a lane reads before it multiplies the first of them, a stretch: at most MOST. What reads much at
// once has enough under way with one; a dispatch of little waits less with all that a lane has of a row.
override AHEAD: u32 = 1u;
const MOST: u32 = 4u;

struct Stretch {
    first: array<vec4<u32>, MOST>,
    second: array<vec4<u32>, MOST>,
    // Of blocks: words of their scales.
    first_scale: array<u32, MOST>,
    second_scale: array<u32, MOST>,
}

// Where an element of four may be held in workgroup memory, so that lanes which read every second, fourth or eighth of
// them meet in no bank.
fn spread(i: u32) -> u32 {
    return i ^ (i / 8u % 8u);
}

// Where a row begins, in elements of the matrix. A team without a row of its own repeats the last there is.
fn row_start(m: Matrix, row: u32, last: u32) -> u32 {
    return min(row, last) * row_elements(m);
}

// The block of an element of a matrix in blocks.
fn block_of(m: Matrix, element: u32) -> u32 {
    return element >> select(1u, 0u, has(m, INT4)); // one of bytes is of two elements
}

// The stretch of a lane that begins with an element of its row.
fn stretch_at(m: Matrix, row: u32, last: u32, begin: u32, team: Team) -> Stretch {
    let first = row_start(m, row, last);
    let second = row_start(m, row + 1u, last);
    var stretch: Stretch;
    for (var k = 0u; k < AHEAD; k++) {
        let i = begin + k * team.size;
        if i < row_elements(m) {
            stretch.first[k] = weights[m.elements + first + i];
            if TEAM_ROWS == 2u {
                stretch.second[k] = weights[m.elements + second + i];
            }
            if has(m, INT4) || has(m, INT8) {
                stretch.first_scale[k] = scale_word(m, block_of(m, first + i));
                if TEAM_ROWS == 2u {
                    stretch.second_scale[k] = scale_word(m, block_of(m, second + i));
                }
            }
        }
    }
    return stretch;
}

// Reads the weights that the lane multiplies first: a kernel has more to do before it has the vector.
fn fetch(m: Matrix, row: u32, last: u32, team: Team) -> Stretch {
    return stretch_at(m, row, last, team.lane, team);
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

// The products of element `i` of two rows, of which the stretch has it at `k`.
fn products(m: Matrix, stretch: Stretch, k: u32, starts: vec2<u32>, i: u32) -> vec2<f32> {
    let p = stretch.first[k];
    let q = stretch.second[k];
    if has(m, INT4) {
        let sum = (of_halves(p.x, q.x, 8u * i) + of_halves(p.y, q.y, 8u * i + 2u))
            + (of_halves(p.z, q.z, 8u * i + 4u) + of_halves(p.w, q.w, 8u * i + 6u));
        return sum * scales(m, stretch, k, starts + i);
    }
    if has(m, INT8) {
        let sum = (of_bytes(p.x, q.x, 4u * i) + of_bytes(p.y, q.y, 4u * i + 1u))
            + (of_bytes(p.z, q.z, 4u * i + 2u) + of_bytes(p.w, q.w, 4u * i + 3u));
        return sum * scales(m, stretch, k, starts + i);
    }
    let a = input(2u * i);
    let b = input(2u * i + 1u);
    var sum = vec2(dot8(p, a, b), 0.0);
    if TEAM_ROWS == 2u {
        sum.y = dot8(q, a, b);
    }
    return sum;
}

fn scales(m: Matrix, stretch: Stretch, k: u32, elements: vec2<u32>) -> vec2<f32> {
    var both = vec2(scale_of(stretch.first_scale[k], scale_shift(m, block_of(m, elements.x))), 0.0);
    if TEAM_ROWS == 2u {
        both.y = scale_of(stretch.second_scale[k], scale_shift(m, block_of(m, elements.y)));
    }
    return both;
}

// The products of rows `row` and `row + 1` with the vector, in each lane of the team. Every invocation of the
// workgroup must call it.
fn row_products(m: Matrix, row: u32, last: u32, fetched: Stretch, team: Team, lane: Lane) -> vec2<f32> {
    let elements = row_elements(m);
    let starts = vec2(row_start(m, row, last), row_start(m, row + 1u, last));
    var sum = vec2(0.0);
    var stretch = fetched;
    for (var begin = 0u; begin < elements; begin += AHEAD * team.size) {
        if begin > 0u {
            stretch = stretch_at(m, row, last, begin + team.lane, team);
        }
        for (var k = 0u; k < AHEAD; k++) {
            let i = begin + k * team.size + team.lane;
            if i < elements {
                sum += products(m, stretch, k, starts, i);
            }
        }
    }
    sum.x = team_sum(sum.x, lane);
    if TEAM_ROWS == 2u {
        sum.y = team_sum(sum.y, lane);
    }
    return sum;
}
