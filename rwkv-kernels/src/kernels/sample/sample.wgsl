// Twin: rwkv-core/src/ops/sample.rs, the choice of the next token of each row.
//
// One workgroup per row. A logit is held as its key, a u32 of the same order, with the penalties taken off and those
// that are masked below all others. What invocations share they add and compare as integers, so that the result has
// the same bits whichever comes first.
//
//   top     the largest key, of equals that of the lowest token: one pass over the row, and all of greedy
//   top-k   a radix selection: a pass for each digit that is needed to tell where to cut, as a rule one or two
//   top-p   the same, with weights for ones
//   draw    the largest z + g of what is left, in one more pass
//
// LANES, the size of the workgroup and the radix of the selection, is a power of two, at least 2.

override LANES: u32 = 256u;

struct Params {
    vocab: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> samplers: array<u32>;     // [rows, SAMPLER]
@group(0) @binding(2) var<storage, read> logits: array<f32>;       // [rows, V]
@group(0) @binding(3) var<storage, read> mask: array<u32>;         // [V / 32, rounded up], bit 1: never chosen
@group(0) @binding(4) var<storage, read_write> counts: array<u32>; // [any, V], one more of the token chosen
@group(0) @binding(5) var<storage, read_write> tokens: array<u32>; // [rows]

// Where the words of a sampler are, and how many.
const TEMPERATURE: u32 = 0u;
const TOP_K: u32 = 1u;
const TOP_P: u32 = 2u;
const PRESENCE_PENALTY: u32 = 3u;
const FREQUENCY_PENALTY: u32 = 4u;
const SEED: u32 = 5u;
const POSITION: u32 = 7u;
const COUNTS: u32 = 9u;
const SAMPLER: u32 = 10u;

// The row of counts of a row that has none.
const UNCOUNTED: u32 = 0xffffffffu;

// What a row gives for which there is no token.
const ALL_MASKED: u32 = 0xffffffffu;
const NOT_FINITE: u32 = 0xfffffffeu;

// ---- Keys ----

const NEGATIVE_INFINITY: u32 = 0xff800000u; // bits
const MASKED: u32 = 0u;                     // below the keys of all numbers
const INFINITE: u32 = 0xff800000u;          // the key of infinity
const NO_NUMBER: u32 = 0xffffffffu;         // above it

// A row's place in [rows, V], that of its counts, and its penalties, which are none without counts.
struct Row {
    start: u32,
    counts: u32,
    presence: f32,
    frequency: f32,
}

// Keys have the order of the numbers. The zeros have one key.
fn key_of(number: f32) -> u32 {
    let bits = bitcast<u32>(number);
    if bits >= 0x80000000u {
        return select(~bits, 0x80000000u, bits == 0x80000000u);
    }
    return bits | 0x80000000u;
}

fn number_of(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key ^ 0x80000000u, key >= 0x80000000u));
}

// The key of a token's penalised logit, of which `word` is the mask's; tokens beyond the vocabulary are masked. What is
// not finite is told by its bits, since a compiler may take it that there is no such number.
fn key_with(token: u32, logit: f32, word: u32, row: Row) -> u32 {
    let bits = bitcast<u32>(logit);
    let hidden = (word >> (token % 32u)) & 1u;
    if token >= params.vocab || hidden == 1u || bits == NEGATIVE_INFINITY {
        return MASKED;
    }
    if (bits & 0x7fffffffu) >= 0x7f800000u {
        return NO_NUMBER;
    }
    if row.presence != 0.0 || row.frequency != 0.0 {
        let count = counts[row.counts + token];
        if count > 0u {
            // Finite less infinite at worst: infinite.
            let penalised = logit - (row.presence + row.frequency * f32(count));
            return select(key_of(penalised), MASKED, bitcast<u32>(penalised) == NEGATIVE_INFINITY);
        }
    }
    return key_of(logit);
}

// Four tokens, each `step` after the one before: logits and words of the mask.
struct Four {
    tokens: vec4<u32>,
    logits: vec4<f32>,
    words: vec4<u32>,
}

// All loads, so that they are under way together.
fn four_at(token: u32, step: u32, row: Row) -> Four {
    let all = token + vec4(0u, step, 2u * step, 3u * step);
    let inside = min(all, vec4(params.vocab - 1u));
    let at = row.start + inside;
    let words = inside / 32u;
    return Four(
        all,
        vec4(logits[at.x], logits[at.y], logits[at.z], logits[at.w]),
        vec4(mask[words.x], mask[words.y], mask[words.z], mask[words.w]),
    );
}

fn keys_of(four: Four, row: Row) -> vec4<u32> {
    return vec4(
        key_with(four.tokens.x, four.logits.x, four.words.x, row),
        key_with(four.tokens.y, four.logits.y, four.words.y, row),
        key_with(four.tokens.z, four.logits.z, four.words.z, row),
        key_with(four.tokens.w, four.logits.w, four.words.w, row),
    );
}

fn keys_at(token: u32, step: u32, row: Row) -> vec4<u32> {
    return keys_of(four_at(token, step, row), row);
}

// ---- The largest of all invocations' ----

var<workgroup> most: atomic<u32>;
var<workgroup> lowest: atomic<u32>;
var<workgroup> agreed: vec2<u32>;

// Before a search: what is to be beaten or met.
fn open_search(least: u32, lane: u32) {
    if lane == 0u {
        atomicStore(&most, least);
        atomicStore(&lowest, 0xffffffffu);
    }
    workgroupBarrier();
}

// The largest key, and the lowest token that has it.
fn close_search(key: u32, token: u32, lane: u32) -> vec2<u32> {
    atomicMax(&most, key);
    workgroupBarrier();
    if atomicLoad(&most) == key {
        atomicMin(&lowest, token);
    }
    workgroupBarrier();
    if lane == 0u {
        agreed = vec2(atomicLoad(&most), atomicLoad(&lowest));
    }
    return workgroupUniformLoad(&agreed);
}

// ---- Sums and products of 64 bits, the low word first ----

fn add(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2(low, a.y + b.y + u32(low < b.x));
}

fn subtract(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2(a.x - b.x, a.y - b.y - u32(a.x < b.x));
}

fn less(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y < b.y || (a.y == b.y && a.x < b.x);
}

// By halves of 16 bits: no sum exceeds (2^16 - 1)^2 + 2^16 - 1 < 2^32.
fn multiply(a: u32, b: u32) -> vec2<u32> {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let middle = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (middle & 0xffffu);
    return vec2(a * b, (a >> 16u) * (b >> 16u) + (middle >> 16u) + (other >> 16u));
}

// ---- What top-k and top-p leave ----

// How far top-k looks with its first digit, in keys: four octaves. What is beyond is told apart later, if need be.
const TOP_K_REACH: u32 = 0x1ffffffu;

// The last token that is kept. Its distance is that of its key from the top.
struct Cut {
    distance: u32,
    token: u32,
}

fn keeps(cut: Cut, distance: u32, token: u32) -> bool {
    return distance < cut.distance || (distance == cut.distance && token <= cut.token);
}

// z, the tempered logit.
fn tempered(key: u32, top: u32, temperature: f32) -> f32 {
    return (number_of(key) - number_of(top)) / temperature;
}

// exp(z) in units of 2^-40, rounded down. The sum over fewer than 2^24 tokens fits 64 bits.
fn weight_of(z: f32) -> vec2<u32> {
    let scaled = 256.0 * min(exp(z), 1.0);
    let high = floor(scaled);
    return vec2(u32((scaled - high) * 4294967296.0), u32(high));
}

// Of each bucket how many tokens it has, and the two words of their weight.
var<workgroup> n_in: array<atomic<u32>, LANES>;
var<workgroup> low_of: array<atomic<u32>, LANES>;
var<workgroup> high_of: array<atomic<u32>, LANES>;
var<workgroup> sums: array<vec2<u32>, LANES>;
// The bucket of the cut, how much of it is kept in two words, and whether that is all of it.
var<workgroup> found: vec4<u32>;

fn pour(bucket: u32, n: u32, weight: vec2<u32>, weighted: bool) {
    atomicAdd(&n_in[bucket], n);
    if weighted {
        let before = atomicAdd(&low_of[bucket], weight.x);
        let high = weight.y + u32(before + weight.x < before);
        if high > 0u {
            atomicAdd(&high_of[bucket], high);
        }
    }
}

// The sum over all invocations up to this one. `sums` has all of them.
fn running_sum(own: vec2<u32>, lane: u32) -> vec2<u32> {
    var sum = own;
    for (var reach = 1u; reach < LANES; reach *= 2u) {
        sums[lane] = sum;
        workgroupBarrier();
        if lane >= reach {
            sum = add(sum, sums[lane - reach]);
        }
        workgroupBarrier();
    }
    sums[lane] = sum;
    return sum;
}

// Buckets of 2^shift hold values up to `span`.
fn shift_for(span: u32) -> u32 {
    let bits = 32u - countLeadingZeros(span);
    let digit = firstTrailingBit(LANES);
    return max(bits, digit) - digit;
}

// Where top-k or, if `weighted`, top-p cuts what is kept already.
//
// Values `first` to `last`, of which the cut is one, fall into buckets of 2^shift; the last bucket takes all that are
// beyond it. The values are distances, and of tokens at one and the same distance the tokens themselves. Each round
// finds the bucket of the cut. It is over as soon as all of that is kept, which is so of a single token: after the first
// round, each takes a bit at least of the 32 of a distance or the 24 of a token.
fn narrow(kept: Cut, top: u32, weighted: bool, at: u32, row: Row, lane: u32) -> Cut {
    let temperature = bitcast<f32>(samplers[at + TEMPERATURE]);
    let top_p = bitcast<f32>(samplers[at + TOP_P]);
    var need = vec2(samplers[at + TOP_K], 0u);
    var reach = TOP_K_REACH;
    if weighted {
        // All that are fainter make up less than half of what may be left out, but for rounding.
        let faint = temperature * log(0.5 * (1.0 - top_p) / f32(params.vocab));
        reach = top - key_of(number_of(top) + faint);
    }
    var first = 0u;
    var last = 0xffffffffu;
    var shift = shift_for(reach);
    var tied = false;
    var tie = 0u;

    for (var round = 0u; round < 64u; round++) {
        atomicStore(&n_in[lane], 0u);
        atomicStore(&low_of[lane], 0u);
        atomicStore(&high_of[lane], 0u);
        if lane == 0u {
            found = vec4(LANES, 0u, 0u, 0u);
        }
        workgroupBarrier();

        var n_beyond = 0u;
        var beyond = vec2(0u);
        for (var block = 0u; block < params.vocab; block += 4u * LANES) {
            let keys = keys_at(block + lane, LANES, row);
            for (var i = 0u; i < 4u; i++) {
                let token = block + lane + i * LANES;
                let distance = top - keys[i];
                let value = select(distance, token, tied);
                if keys[i] == MASKED || value < first || value > last || (tied && distance != tie)
                    || !keeps(kept, distance, token) {
                    continue;
                }
                var weight = vec2(0u);
                if weighted {
                    weight = weight_of(tempered(keys[i], top, temperature));
                }
                let bucket = (value - first) >> shift;
                if bucket < LANES - 1u {
                    pour(bucket, 1u, weight, weighted);
                } else {
                    n_beyond += 1u;
                    beyond = add(beyond, weight);
                }
            }
        }
        if n_beyond > 0u {
            pour(LANES - 1u, n_beyond, beyond, weighted);
        }
        workgroupBarrier();

        let n = atomicLoad(&n_in[lane]);
        var own = vec2(n, 0u);
        if weighted {
            own = vec2(atomicLoad(&low_of[lane]), atomicLoad(&high_of[lane]));
        }
        let sum = running_sum(own, lane);
        let total = workgroupUniformLoad(&sums[LANES - 1u]);
        if weighted && round == 0u {
            // p, which is below 1, of the total, and never nothing.
            let share = u32(top_p * 4294967296.0);
            need = add(multiply(total.y, share), vec2(multiply(total.x, share).y, 0u));
            need.x = max(need.x, u32(need.y == 0u));
        }
        let before = subtract(sum, own);
        if less(before, need) && !less(sum, need) {
            found = vec4(lane, subtract(need, before), u32(n == 1u || all(sum == need)));
        }
        let cut = workgroupUniformLoad(&found);
        if cut.x == LANES {
            return kept; // all of fewer than k
        }

        first += cut.x << shift;
        if cut.x < LANES - 1u {
            last = min(last, first + ((1u << shift) - 1u));
        }
        if cut.w == 1u {
            let end = Cut(select(last, tie, tied), select(0xffffffffu, last, tied));
            if keeps(kept, end.distance, end.token) {
                return end;
            }
            return kept;
        }
        need = cut.yz;
        if first == last {
            tied = true;
            tie = first;
            first = 0u;
            last = params.vocab - 1u;
        }
        shift = shift_for(last - first);
    }
    return kept; // never
}

// ---- The draw ----

// Sets these words apart from any other use of the same seed: "draw".
const DOMAIN: u32 = 0x64726177u;

// Four random words, for tokens 4 * index and the three that follow: Philox4x32-10.
fn noise(at: u32, index: u32) -> vec4<u32> {
    var counter = vec4(index, samplers[at + POSITION], samplers[at + POSITION + 1u], DOMAIN);
    var key = vec2(samplers[at + SEED], samplers[at + SEED + 1u]);
    for (var round = 0u; round < 10u; round++) {
        let a = multiply(0xd2511f53u, counter.x);
        let b = multiply(0xcd9e8d57u, counter.z);
        counter = vec4(b.y ^ counter.y ^ key.x, b.x, a.y ^ counter.w ^ key.y, a.x);
        key += vec2(0x9e3779b9u, 0xbb67ae85u);
    }
    return counter;
}

// ln x of a normal x > 0. The builtin is of no use here: near 1 its error is bounded absolutely, and u is there.
//
// x = 2^e m with m from sqrt(1/2) to sqrt(2), and ln m = 2 atanh s = 2 s + s (2/3 s^2 + 2/5 s^4 + ..),
// s = (m - 1) / (m + 1), |s| <= 0.1716. Relative error, with u = 2^-23:
//   truncation   what is left out is < 2/11 s^10 / (1 - s^2) / 2 < 2.2e-9
//   s            m - 1 is exact, the sum u, the division 2.5 u: 3.5 u, and 2 s exactly twice that number
//   series       at most 0.01 of the sum, and off by 3.5 u of s and less than 10 u of its own: 0.2 u
//   ln m         one more sum, u: 4.8 u
//   e ln 2       1.5 u of itself and, where e is not 0, at most twice ln x, as |ln m| <= ln 2 / 2; |ln m| is at most ln x
//   the sum      u
// Together at most 2 * 1.5 u + 4.8 u + u < 9 u.
fn ln(x: f32) -> f32 {
    let from_root = bitcast<i32>(x) - 0x3f3504f3; // the bits of sqrt(1/2)
    let e = from_root >> 23u;
    let f = bitcast<f32>(bitcast<i32>(x) - (e << 23u)) - 1.0;
    let s = f / (2.0 + f);
    let q = s * s;
    let series = q * (2.0 / 3.0 + q * (2.0 / 5.0 + q * (2.0 / 7.0 + q * (2.0 / 9.0))));
    return f32(e) * 0.69314718 + (2.0 * s + s * series);
}

// u in units of 2^-24, odd.
fn cell(bits: u32) -> u32 {
    return 2u * (bits >> 9u) + 1u;
}

fn gumbel(bits: u32) -> f32 {
    return -ln(-ln(f32(cell(bits)) / 16777216.0));
}

// A bound of `gumbel` without a logarithm: -ln u > 1 - u >= 2^-i gives g < i ln 2. The thousandth is for rounding.
fn gumbel_bound(bits: u32) -> f32 {
    return 0.6932 * f32(24u - firstLeadingBit(0x1000000u - cell(bits))) + 0.001;
}
const GUMBEL_BOUND: f32 = 0.6932 * 24.0 + 0.001;

// The token of the largest z + g. That of the top token, for which z = 0, is known first: most others cannot reach it, or
// one that was seen since, whatever their noise, so that it need not be drawn, or not be taken to its logarithms.
fn draw(kept: Cut, top: vec2<u32>, at: u32, row: Row, lane: u32) -> u32 {
    let temperature = bitcast<f32>(samplers[at + TEMPERATURE]);
    // The thousandth is for a compiler that rounds otherwise here than below: the top token meets what it has to.
    open_search(key_of(gumbel(noise(at, top.y / 4u)[top.y % 4u]) - 0.001), lane);
    var best = MASKED;
    var token = 0xffffffffu;
    for (var index = lane; 4u * index < params.vocab; index += LANES) {
        let keys = keys_at(4u * index, 1u, row);
        let bar = number_of(atomicLoad(&most));
        var z = vec4(-3e38);
        for (var i = 0u; i < 4u; i++) {
            if keys[i] != MASKED && keeps(kept, top.x - keys[i], 4u * index + i) {
                z[i] = tempered(keys[i], top.x, temperature);
            }
        }
        if max(max(z.x, z.y), max(z.z, z.w)) + GUMBEL_BOUND < bar {
            continue;
        }
        let words = noise(at, index);
        for (var i = 0u; i < 4u; i++) {
            if z[i] + gumbel_bound(words[i]) < bar {
                continue;
            }
            let key = key_of(z[i] + gumbel(words[i]));
            if key > best {
                best = key;
                token = 4u * index + i;
                atomicMax(&most, key);
            }
        }
    }
    return close_search(best, token, lane).y;
}

@compute @workgroup_size(LANES)
fn sample(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let at = group.x * SAMPLER;
    let counted = samplers[at + COUNTS] != UNCOUNTED;
    let row = Row(
        group.x * params.vocab,
        select(0u, samplers[at + COUNTS] * params.vocab, counted),
        select(0.0, bitcast<f32>(samplers[at + PRESENCE_PENALTY]), counted),
        select(0.0, bitcast<f32>(samplers[at + FREQUENCY_PENALTY]), counted),
    );
    open_search(MASKED, lane);
    var best = MASKED;
    var token = 0xffffffffu;
    for (var block = 0u; block < params.vocab; block += 8u * LANES) {
        let fours = array(four_at(block + lane, LANES, row), four_at(block + 4u * LANES + lane, LANES, row));
        for (var half = 0u; half < 2u; half++) {
            let keys = keys_of(fours[half], row);
            for (var i = 0u; i < 4u; i++) {
                if keys[i] > best {
                    best = keys[i];
                    token = fours[half].tokens[i];
                }
            }
        }
    }
    let top = close_search(best, token, lane);
    if top.x == MASKED || top.x >= INFINITE {
        if lane == 0u {
            tokens[group.x] = select(NOT_FINITE, ALL_MASKED, top.x == MASKED);
        }
        return;
    }

    var chosen = top.y;
    let top_k = samplers[at + TOP_K];
    if bitcast<f32>(samplers[at + TEMPERATURE]) > 0.0 && top_k != 1u {
        var kept = Cut(0xffffffffu, 0xffffffffu);
        for (var stage = 0u; stage < 2u; stage++) {
            let weighted = stage == 1u;
            let fewer = top_k > 0u && top_k < params.vocab;
            if select(fewer, bitcast<f32>(samplers[at + TOP_P]) < 1.0, weighted) {
                kept = narrow(kept, top.x, weighted, at, row, lane);
            }
        }
        chosen = draw(kept, top, at, row, lane);
    }
    storageBarrier(); // all have read the counts
    if lane == 0u {
        tokens[group.x] = chosen;
        if counted {
            let count = row.counts + chosen;
            counts[count] = max(counts[count], counts[count] + 1u); // or as it is, at its largest
        }
    }
}
