// Products of one vector with the rows of a matrix, where a lane has the same columns of all of them.
//use fold
//use blocks
//use spread
//
// The kernel declares LANES, the buffer `weights: array<vec4<u32>>` and the function `input(i: u32) -> vec4<f32>`,
// elements 4 i and on of the vector. A lane keeps 32 of the vector in registers while it goes through the rows. It reads
// eight elements of weights at once, of two rows in halves, four in INT8 or eight in INT4, and the next eight before it multiplies
// these. Rows that are longer than 32 ROW_LANES have several spans of so many columns, one multiplied after the other.
//
// Blocks are multiplied as integers, which on an H200 takes a fifth to a third less time than as floats. The 32 of a lane
// become three balanced digits in base 256 each, in units of a power of two of which the largest has 2^21 to 2^22. So each
// loses half a unit at most, 2^-22 of the largest; sums over a block are exact.

override ROW_LANES: u32 = 32u; // that share a row: a multiple of eight
override PLACES: u32 = LANES;
var<workgroup> parts: array<f32, PLACES>; // of the products of rows

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

// Rows whose products there is room for, and a lane to each: whole steps of the workgroup.
fn rows_kept(m: Matrix, lane: Lane) -> u32 {
    let step = teams() * rows_at_once(m);
    return min(PLACES / (ROW_LANES / folded(lane)), LANES) / step * step;
}

// Where the part of lanes from `place` on is, in the product of a row.
fn part_at(row: u32, place: u32, size: u32) -> u32 {
    let of_row = ROW_LANES / size;
    return row % (PLACES / of_row) * of_row + place % ROW_LANES / size;
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

// 32 elements of the vector as digits, four of a kind to a word.
struct Digits {
    low: array<u32, 8>,
    middle: array<u32, 8>,
    high: array<u32, 8>,
    unit: f32,
    sum: u32, // of all of them in units, modulo 2^32
}

// A byte of each of four words.
fn gathered(words: vec4<u32>, shift: u32) -> u32 {
    let x = words >> vec4(shift) & vec4(0xffu);
    return x.x | x.y << 8u | x.z << 16u | x.w << 24u;
}

fn digits(m: Matrix, block: u32) -> Digits {
    var x: array<vec4<f32>, 8>;
    var largest = vec4(0.0);
    if block < m.row / 32u {
        for (var j = 0u; j < 8u; j++) {
            x[j] = input(8u * block + j);
            largest = max(largest, abs(x[j]));
        }
    }
    // The bits of a float are its exponent plus 127 from the 23rd on. The unit is not smaller than floats may be.
    let exponent = max(bitcast<u32>(max(max(largest.x, largest.y), max(largest.z, largest.w))) >> 23u, 22u);
    let inverse = bitcast<f32>((275u - exponent) << 23u);
    var digits: Digits;
    var sum = vec4(0u);
    var beyond = vec4(0u);
    for (var j = 0u; j < 8u; j++) {
        // From 2^23 to 2^24, a float is 2^23 and what its bits are more than 0x4b000000.
        let units = bitcast<vec4<u32>>(x[j] * inverse + 12582912.0); // 2^23 + 2^22
        sum += units;
        beyond |= units ^ vec4(0x4b000000u);
        // Without the 2^22, and with 128 more in each digit: with its highest bit flipped, that is the digit.
        let digit = units - 0x00400000u + 0x00808080u;
        digits.low[j] = gathered(digit, 0u) ^ 0x80808080u;
        digits.middle[j] = gathered(digit, 8u) ^ 0x80808080u;
        digits.high[j] = gathered(digit, 16u) ^ 0x80808080u;
    }
    digits.sum = (sum.x + sum.y) + (sum.z + sum.w) - 32u * 0x4b400000u;
    // What is no number, or infinite, is not in that range: nor is then any product.
    let finite = ((beyond.x | beyond.y) | (beyond.z | beyond.w)) < 0x01000000u;
    digits.unit = bitcast<f32>(select(0x7fc00000u, (exponent - 21u) << 23u, finite));
    return digits;
}

// Multiplies all spans of the rows of `call`, no more than there is room for. The first weights are fetched, and in the end
// those of the next rows. Every invocation of the workgroup must call it.
fn multiply(m: Matrix, call: Call, fetched: ptr<function, Batch>, lane: Lane) {
    let spans = (m.row - 1u) / (32u * ROW_LANES) + 1u;
    for (var span = 0u; span < spans; span++) {
        let now = Call(span, call.first, call.end, call.last);
        if spans > 1u {
            *fetched = fetch(m, now, lane);
        }
        if has(m, INT4) {
            multiply_int4(m, now, fetched, lane);
        } else if has(m, INT8) {
            multiply_int8(m, now, fetched, lane);
        } else {
            multiply_halves(m, now, fetched, lane);
        }
    }
    workgroupBarrier();
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

fn multiply_int4(m: Matrix, call: Call, fetched: ptr<function, Batch>, lane: Lane) {
    let place = place_of(lane);
    let block = call.span * ROW_LANES + place % ROW_LANES;
    let x = digits(m, block);
    var now = call;
    while now.first < now.end {
        let batch = advance(m, now, fetched, lane);
        var sums: array<f32, 8>;
        for (var k = 0u; k < 8u; k++) {
            // A step is 8 less than its four bits with the highest flipped. All is modulo 2^32, and less than 2^31 in the end.
            var low = bitcast<i32>(0u - 8u * x.sum);
            var middle = 0;
            var high = 0;
            for (var j = 0u; j < 4u; j++) {
                let word = batch.elements[k][j] ^ 0x88888888u;
                let a = word & 0x0f0f0f0fu;
                let b = word >> 4u & 0x0f0f0f0fu;
                low += dot4I8Packed(a, x.low[2u * j]) + dot4I8Packed(b, x.low[2u * j + 1u]);
                middle += dot4I8Packed(a, x.middle[2u * j]) + dot4I8Packed(b, x.middle[2u * j + 1u]);
                high += dot4I8Packed(a, x.high[2u * j]) + dot4I8Packed(b, x.high[2u * j + 1u]);
            }
            let i = min(row_at(now.first, k, place), now.last) * (m.row / 32u) + block;
            sums[k] = f32((high << 16u) + (middle << 8u) + low) * (x.unit * scale_of(batch.scales[k], scale_shift(m, i)));
        }
        fold(vec4(sums[0], sums[1], sums[2], sums[3]), vec4(sums[4], sums[5], sums[6], sums[7]), 8u, now, lane);
        now.first += teams() * rows_at_once(m);
    }
}

fn multiply_int8(m: Matrix, call: Call, fetched: ptr<function, Batch>, lane: Lane) {
    let place = place_of(lane);
    let block = call.span * ROW_LANES + place % ROW_LANES;
    let x = digits(m, block);
    var now = call;
    while now.first < now.end {
        let batch = advance(m, now, fetched, lane);
        var sums: vec4<f32>;
        for (var k = 0u; k < 4u; k++) {
            var low = 0;
            var middle = 0;
            var high = 0;
            for (var j = 0u; j < 4u; j++) {
                let a = batch.elements[2u * k][j];
                let b = batch.elements[2u * k + 1u][j];
                low += dot4I8Packed(a, x.low[j]) + dot4I8Packed(b, x.low[j + 4u]);
                middle += dot4I8Packed(a, x.middle[j]) + dot4I8Packed(b, x.middle[j + 4u]);
                high += dot4I8Packed(a, x.high[j]) + dot4I8Packed(b, x.high[j + 4u]);
            }
            let i = min(row_at(now.first, k, place), now.last) * (m.row / 32u) + block;
            // 32 products of at most 2^7 and 2^6, times 2^8, are within 2^26.
            let all = f32((high << 8u) + middle) * 256.0 + f32(low);
            sums[k] = all * (x.unit * scale_of(batch.scales[k], scale_shift(m, i)));
        }
        fold(sums, vec4(0.0), 4u, now, lane);
        now.first += teams() * rows_at_once(m);
    }
}

fn multiply_halves(m: Matrix, call: Call, fetched: ptr<function, Batch>, lane: Lane) {
    var x: array<vec4<f32>, 8>;
    for (var j = 0u; j < 4u; j++) {
        let i = element_of_halves(call.span, j, place_of(lane) % ROW_LANES);
        if i < m.row / 8u {
            x[2u * j] = input(2u * i);
            x[2u * j + 1u] = input(2u * i + 1u);
        }
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
