// Products of one vector with the rows of a matrix, one or two rows to a team.
//use reduce
//use weights
//
// The kernel declares LANES and TEAM_ROWS (1 or 2), the matrix `weights: array<vec4<u32>>` and the function
// `input(i: u32) -> vec4<f32>`, elements 4 i and on of the vector. Rows have `width8` elements of eight weights.
//
// Two rows share each read of the vector, which pays where rows are long.

struct Rows {
    first: vec4<u32>,
    second: vec4<u32>,
}

// Reads the weights that the lane multiplies first: a kernel has more to do before it has the vector.
// `last` is the last row there is: a team without a row of its own repeats it.
fn fetch(row: u32, last: u32, team: Team, width8: u32) -> Rows {
    var rows: Rows;
    if team.lane < width8 {
        rows.first = weights[min(row, last) * width8 + team.lane];
        if TEAM_ROWS == 2u {
            rows.second = weights[min(row + 1u, last) * width8 + team.lane];
        }
    }
    return rows;
}

// The products of rows `row` and `row + 1` with the vector, in each lane of the team. Every invocation of the
// workgroup must call it.
fn row_products(row: u32, last: u32, fetched: Rows, team: Team, width8: u32, lane: Lane) -> vec2<f32> {
    var sum = vec2(0.0);
    if team.lane < width8 {
        let a = input(2u * team.lane);
        let b = input(2u * team.lane + 1u);
        sum.x = dot8(fetched.first, a, b);
        if TEAM_ROWS == 2u {
            sum.y = dot8(fetched.second, a, b);
        }
    }
    let first = min(row, last) * width8;
    let second = min(row + 1u, last) * width8;
    for (var i = team.lane + team.size; i < width8; i += team.size) {
        let a = input(2u * i);
        let b = input(2u * i + 1u);
        sum.x += dot8(weights[first + i], a, b);
        if TEAM_ROWS == 2u {
            sum.y += dot8(weights[second + i], a, b);
        }
    }
    sum.x = team_sum(sum.x, lane);
    if TEAM_ROWS == 2u {
        sum.y = team_sum(sum.y, lane);
    }
    return sum;
}
