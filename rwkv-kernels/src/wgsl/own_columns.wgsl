// Products of one vector with the rows of a matrix, where a lane has the same columns of all of them.
//use fold
//use blocks
//
// The kernel declares LANES and the buffer `weights: array<vec4<u32>>`, and gives the vector by `hold`. A lane keeps 32 of it
// in registers while it goes through the rows. It reads eight elements of weights at once, of two rows in halves, four in INT8 or
// eight in INT4, and the next eight before it multiplies these. Of rows that are longer than 32 ROW_LANES, there are several spans
// of so many columns, one after the other.
//
// Blocks are multiplied as integers, which takes less time than as floats: on an H200 a tenth (INT8) to a quarter (INT4), and more since. The vector
// becomes two balanced digits in base 256, in units of which the largest of a block has 32,512: 127 times 256. So each loses a unit
// at most, half of that where sums round to nearest: 2^-16 of the largest, where halves would lose up to 2^-11 of each. Sums over a
// block are exact.

override ROW_LANES: u32 = 32u; // that share a row: a multiple of eight
override HELD: u32 = 8u * ROW_LANES;
var<workgroup> parts: array<f32, LANES>; // of the products of rows
// A span of the vector, by their bits: for blocks, of four of it the digits, nothing, and the unit.
var<workgroup> held: array<vec4<u32>, HELD>;

struct Batch {
    elements: array<vec4<u32>, 8>,
    scales: array<u32, 8>, // of blocks, the words that they are in
}

// Teams of a workgroup. Lanes beyond them multiply in vain.
fn teams() -> u32 {
    return LANES / ROW_LANES;
}

// Rows that a team has at once.
fn rows_at_once(m: Matrix) -> u32 {
    return select(select(2u, 4u, has(m, INT8)), 8u, has(m, INT4));
}

// Row `k` of those, when the workgroup has those from `first` on.
fn row_at(first: u32, k: u32, place: u32) -> u32 {
    return first + k * teams() + place / ROW_LANES;
}

// Rows whose products there is room for, in whole steps of the workgroup: no more than it has lanes.
fn rows_kept(m: Matrix, lane: Lane) -> u32 {
    let step = teams() * rows_at_once(m);
    return LANES / (ROW_LANES / folded(lane)) / step * step;
}

// Where the part of lanes from `place` on is, in the product of a row.
fn part_at(row: u32, place: u32, size: u32) -> u32 {
    let of_row = ROW_LANES / size;
    return row % (LANES / of_row) * of_row + place % ROW_LANES / size;
}

// Keeps the sum over `size` lanes from `place` on.
fn keep(sum: f32, k: u32, place: u32, size: u32, call: Call) {
    let row = row_at(call.first, k, place);
    if place / ROW_LANES < teams() && row < call.end {
        let at = part_at(row, place, size);
        if call.span == 0u {
            parts[at] = sum;
        } else {
            parts[at] += sum; // by the lane that kept what is there
        }
    }
}

// The product of a row after `multiply`.
fn product(row: u32, lane: Lane) -> f32 {
    let size = folded(lane);
    var sum = 0.0;
    for (var place = 0u; place < ROW_LANES; place += size) {
        sum += parts[part_at(row, place, size)];
    }
    return sum;
}

// What is multiplied: a span of the rows from `first` to `end`, where there are rows up to `last`.
struct Call {
    span: u32,
    first: u32,
    end: u32,
    last: u32,
}

// Reads the weights of a lane in the first rows of a call. Beyond the last row, that is repeated.
fn fetch(m: Matrix, call: Call, lane: Lane) -> Batch {
    var batch: Batch;
    let place = place_of(lane);
    let column = place % ROW_LANES;
    let blocks = m.row / 32u;
    let block = call.span * ROW_LANES + column;
    if has(m, INT4) {
        if block < blocks {
            for (var k = 0u; k < 8u; k++) {
                let i = min(row_at(call.first, k, place), call.last) * blocks + block;
                batch.elements[k] = weights[m.elements + i];
                batch.scales[k] = scale_word(m, i);
            }
        }
    } else if has(m, INT8) {
        if block < blocks {
            for (var k = 0u; k < 4u; k++) {
                let i = min(row_at(call.first, k, place), call.last) * blocks + block;
                batch.elements[2u * k] = weights[m.elements + 2u * i];
                batch.elements[2u * k + 1u] = weights[m.elements + 2u * i + 1u];
                batch.scales[k] = scale_word(m, i);
            }
        }
    } else {
        for (var k = 0u; k < 2u; k++) {
            let row = m.elements + min(row_at(call.first, k, place), call.last) * (m.row / 8u);
            for (var j = 0u; j < 4u; j++) {
                let i = element_of_halves(call.span, j, column);
                if i < m.row / 8u {
                    batch.elements[4u * k + j] = weights[row + i];
                }
            }
        }
    }
    return batch;
}

// Which elements of a row in halves a lane has, four of a span: neighbours have neighbours.
fn element_of_halves(span: u32, j: u32, column: u32) -> u32 {
    return (4u * span + j) * ROW_LANES + column;
}

// Where an element of the vector is held, so that lanes which read every second or eighth of them meet in no bank.
fn spread(i: u32) -> u32 {
    return i ^ (i / 8u % 8u);
}

// Holds element `i` of a span, four of the vector. Eight lanes one after the other have those of a block, or none of it. Every
// invocation of the workgroup must call it; a barrier must come before the span is read.
fn hold(m: Matrix, i: u32, x: vec4<f32>, lane: Lane) {
    if has(m, INT4) || has(m, INT8) {
        // By their bits, of which larger numbers have larger ones, and what is no number the largest.
        let own = bitcast<vec4<u32>>(x) & vec4(0x7fffffffu);
        let largest = largest_of_eight(max(max(own.x, own.y), max(own.z, own.w)), lane);
        if i < HELD {
            held[spread(i)] = digits(select(x, x.xzyw, has(m, INT4)), largest); // as the weights lie
        }
    } else if i < HELD {
        held[spread(i)] = bitcast<vec4<u32>>(x);
    }
}

// A byte of each of four words.
fn gathered(words: vec4<u32>, shift: u32) -> u32 {
    let x = words >> vec4(shift) & vec4(0xffu);
    return x.x | x.y << 8u | x.z << 16u | x.w << 24u;
}

// The units of the largest of a block: 127 times 256. Up to 127 more would fit too; so none that is rounded up has the other sign.
const LARGEST: f32 = 32512.0;

// The low digits of `x`, the high ones, nothing, and the unit, where the largest of the block has such bits.
fn digits(x: vec4<f32>, largest: u32) -> vec4<u32> {
    // A power of two first makes the largest 2^21 to 2^22, whatever it is. The bits of a float are its exponent plus 127 from the 23rd
    // on. Where all are tiny, the unit stays the smallest whose 16th is not smaller than floats may be.
    let exponent = max(largest >> 23u, 26u);
    let power = bitcast<f32>((275u - exponent) << 23u);
    let most = max(bitcast<f32>(largest) * power, LARGEST);
    let unit = bitcast<f32>((exponent - 21u) << 23u) * (most / LARGEST);
    // From 2^23 to 2^24, a float is 2^23 and what its bits are more than 0x4b000000.
    let whole = bitcast<vec4<u32>>(x * power * (LARGEST / most) + 12582912.0); // 2^23 + 2^22
    // Without the 2^22, and with 128 more in each digit: with its highest bit flipped, that is the digit.
    let digit = whole - 0x00400000u + 0x00008080u;
    return vec4(
        gathered(digit, 0u) ^ 0x80808080u,
        gathered(digit, 8u) ^ 0x80808080u,
        0u,
        select(0x7fc00000u, bitcast<u32>(unit), largest < 0x7f800000u), // or infinite, or no number: nor is then any product
    );
}

// Multiplies the rows of `call`, no more than there is room for, with the span that is held. Its first weights are fetched, and in
// the end those of the next rows. Every invocation of the workgroup must call it. A barrier must come before products
// are read.
fn multiply(m: Matrix, call: Call, fetched: ptr<function, Batch>, lane: Lane) {
    // With the format written out, a compiler knows how often loops are run.
    if has(m, INT4) {
        multiply_blocks(Matrix(INT4, m.elements, m.scales, m.row), call, fetched, lane);
    } else if has(m, INT8) {
        multiply_blocks(Matrix(INT8, m.elements, m.scales, m.row), call, fetched, lane);
    } else {
        multiply_halves(Matrix(F16, m.elements, m.scales, m.row), call, fetched, lane);
    }
}

// The weights that are fetched, and fetches the next.
fn advance(m: Matrix, call: Call, fetched: ptr<function, Batch>, lane: Lane) -> Batch {
    let batch = *fetched;
    let next = call.first + teams() * rows_at_once(m);
    if next <= call.last {
        *fetched = fetch(m, Call(call.span, next, call.end, call.last), lane);
    }
    return batch;
}

fn multiply_blocks(m: Matrix, call: Call, fetched: ptr<function, Batch>, lane: Lane) {
    let place = place_of(lane);
    let column = place % ROW_LANES;
    var low: array<u32, 8>;
    var high: array<u32, 8>;
    var unit = 0.0;
    for (var j = 0u; j < 8u; j++) {
        let x = held[spread(8u * column + j)];
        low[j] = x.x;
        high[j] = x.y;
        unit = bitcast<f32>(x.w); // of each the same
    }
    // In INT4 all is 16 times as much.
    unit *= select(1.0, 0.0625, has(m, INT4));
    var now = call;
    while now.first < now.end {
        let batch = advance(m, now, fetched, lane);
        var sums: array<f32, 8>;
        for (var k = 0u; k < rows_at_once(m); k++) {
            // Steps, as bytes with their signs.
            var steps: array<u32, 8>;
            for (var j = 0u; j < 4u; j++) {
                if has(m, INT4) {
                    steps[2u * j] = batch.elements[k][j] << 4u & 0xf0f0f0f0u;
                    steps[2u * j + 1u] = batch.elements[k][j] & 0xf0f0f0f0u;
                } else {
                    steps[j] = batch.elements[2u * k][j];
                    steps[4u + j] = batch.elements[2u * k + 1u][j];
                }
            }
            var sum = vec2(0);
            for (var j = 0u; j < 8u; j++) {
                sum += vec2(dot4I8Packed(steps[j], low[j]), dot4I8Packed(steps[j], high[j]));
            }
            let i = min(row_at(now.first, k, place), now.last) * (m.row / 32u) + call.span * ROW_LANES + column;
            // 32 products of at most 2^7 and 2^15 are within 2^27.
            sums[k] = f32((sum.y << 8u) + sum.x) * unit * scale_of(batch.scales[k], scale_shift(m, i));
        }
        fold(vec4(sums[0], sums[1], sums[2], sums[3]), vec4(sums[4], sums[5], sums[6], sums[7]), rows_at_once(m), now, lane);
        now.first += teams() * rows_at_once(m);
    }
}

fn multiply_halves(m: Matrix, call: Call, fetched: ptr<function, Batch>, lane: Lane) {
    var x: array<vec4<f32>, 8>;
    for (var j = 0u; j < 4u; j++) {
        let i = 2u * element_of_halves(0u, j, place_of(lane) % ROW_LANES);
        x[2u * j] = bitcast<vec4<f32>>(held[spread(i)]);
        x[2u * j + 1u] = bitcast<vec4<f32>>(held[spread(i + 1u)]);
    }
    var now = call;
    while now.first < now.end {
        let batch = advance(m, now, fetched, lane);
        var sums: vec2<f32>;
        for (var k = 0u; k < 2u; k++) {
            let i = 4u * k;
            sums[k] = (dot8(batch.elements[i], x[0], x[1]) + dot8(batch.elements[i + 1u], x[2], x[3]))
                + (dot8(batch.elements[i + 2u], x[4], x[5]) + dot8(batch.elements[i + 3u], x[6], x[7]));
        }
        fold(vec4(sums, 0.0, 0.0), vec4(0.0), 2u, now, lane);
        now.first += teams() * rows_at_once(m);
    }
}
