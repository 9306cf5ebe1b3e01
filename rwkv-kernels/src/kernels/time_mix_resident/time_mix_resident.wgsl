// Twin: rwkv-core/src/ops/time_mix_resident.rs, all that happens in a head, on a state that is written seldom.
//use head
//use second_factors
//use base
//use segment
//
// As `time_mix`, with states in less than single precision, and written seldom. One workgroup per head and segment;
// invocation (i, g) has value row i of the keys of group g.
//
// With LAZY, what is read is a base and the entries of the tokens since, five vectors each; what is written is an entry
// for each token, and a base only where `capacity` tokens are pending. Between two bases s is the state as if it had not
// decayed since the first, so that an entry is added to it in the same way whenever it was made:
//
//     S = s diag(since)        since = the product of w since the base
//
// A segment of no rows that has a base to write folds what is pending into it.

const N: u32 = 64u;

override LANES: u32 = 256u;    // N times the groups of keys
override LORA_UP: bool = true; // whether the adapters' second factors are multiplied here
override FORMAT: u32 = 0u;
override ROUNDING: u32 = 0u;
override LAZY: bool = true;

// Entries that are read at once. More of them take memory from other workgroups: with eight, 512 sequences took 418 us on an
// H100, with one 272.
const STAGED: u32 = 2u;

struct Params {
    width: u32,       // D
    inputs: u32,      // P
    rank_w: u32,
    rank_a: u32,
    rank_v: u32,
    rank_g: u32,
    teams_w: u32,     // teams that multiply each adapter; those of g are the rest
    teams_a: u32,
    teams_v: u32,
    first_layer: u32, // whether there is no value residual
    base_stride: u32, // of a base
    slots: u32,       // where slots begin, of which each has an entry
    slot_stride: u32, // of a slot
    entry: u32,       // of the entry in a slot
    capacity: u32,    // tokens that may be pending
    decay_scale: f32,
    kappa_eps: f32,
    norm_eps: f32,    // of the group norm
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> segments: array<u32>;       // see `Segment`, and the tables that they name
@group(0) @binding(2) var<storage, read> inputs: array<f32>;         // [T, P], r k v, then the low ranks of w a v g
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;  // [ranks, D], w a v g
@group(0) @binding(4) var<storage, read> up: array<f32>;             // [T, 4, D], w a v g
@group(0) @binding(5) var<storage, read> vectors: array<f32>;        // [8, D], w0 a0 v0 k_k k_a r_k, gain, bias
@group(0) @binding(6) var<storage, read_write> state: array<u32>;    // bases, then slots
@group(0) @binding(7) var<storage, read_write> v_first: array<f32>;  // [T, D]
@group(0) @binding(8) var<storage, read_write> out: array<u32>;      // [T, D], or [T, 3, D] without NORM

// Product of w since the base, after this token, by channel.
var<workgroup> since: array<f32, N>;

// Entries, four vectors of 16 fours each: q, v, b and k.
var<workgroup> staged: array<vec4<f32>, STAGED * N>;

// Row i of the state, by key of this group; and its exponent in the base.
var<private> s: array<f32, N>;
var<private> exponent: i32;
// Of bytes, the largest magnitudes in the blocks of 16 keys, where a group has several.
var<private> blocks: array<f32, N / 16u>;

// Reads a base.
fn load_base(base: u32, i: u32, g: u32) {
    let keys = N / (LANES / N);
    exponent = exponent_of(base, i);
    for (var w = 0u; w < keys / 4u; w++) {
        let quad = load_quad(base, i, g * keys / 4u + w, exponent);
        s[4u * w] = quad.x;
        s[4u * w + 1u] = quad.y;
        s[4u * w + 2u] = quad.z;
        s[4u * w + 3u] = quad.w;
    }
}

// Rounds s to what a base can hold, and writes it if `keep`. Every invocation must call it, with a barrier between it and
// what was read of `parts` before.
fn settle(base: u32, keep: bool, head: u32, step: u32, i: u32, g: u32, l: u32) {
    let groups = LANES / N;
    let keys = N / groups;
    let together = max(groups / 4u, 1u); // groups that share a block
    if FORMAT != F32 {
        var most = 0.0;
        for (var j = 0u; j < keys; j++) {
            most = max(most, abs(s[j]));
        }
        if FORMAT == INT8 && keys > 16u {
            for (var b = 0u; b < keys / 16u; b++) {
                var of_block = 0.0;
                for (var j = 0u; j < 16u; j++) {
                    of_block = max(of_block, abs(s[16u * b + j]));
                }
                blocks[b] = of_block;
            }
        }
        parts[l] = most;
        workgroupBarrier();
        most = 0.0;
        for (var p = 0u; p < groups; p++) {
            most = max(most, parts[p * N + i]);
        }
        exponent = next_exponent(exponent, most);
    }
    let first = (head * N + i) * N; // the row's place in the layer's state
    for (var w = 0u; w < keys / 4u; w++) {
        let quad = g * keys / 4u + w;
        var scale = 0.0;
        if FORMAT == INT8 {
            scale = block_scale(quad / 4u, together, i);
        }
        let x = vec4(s[4u * w], s[4u * w + 1u], s[4u * w + 2u], s[4u * w + 3u]);
        let near = settle_quad(x, exponent, scale, step, first + 4u * quad, base, i, quad, keep);
        s[4u * w] = near.x;
        s[4u * w + 1u] = near.y;
        s[4u * w + 2u] = near.z;
        s[4u * w + 3u] = near.w;
    }
    if FORMAT == INT8 && keep {
        // Of two blocks, those who have both or, where nobody has, the first groups.
        for (var pair = g; pair < 2u; pair += min(groups, 2u)) {
            let low = block_scale(2u * pair, together, i);
            store_scales(base, i, pair, vec2(low, block_scale(2u * pair + 1u, together, i)));
        }
    }
    if FORMAT != F32 {
        if g == 0u {
            exponents[i] = bitcast<u32>(exponent);
        }
        workgroupBarrier();
        if keep && l < N / 4u {
            store_exponents(base, l);
        }
    }
}

// The scale of a block of row i.
fn block_scale(block: u32, together: u32, i: u32) -> f32 {
    return scale_of(block_most(block, together, i) * power_of_two(-exponent));
}

// The largest magnitude in a block of 16 keys of row i, of which so many groups have a part.
fn block_most(block: u32, together: u32, i: u32) -> f32 {
    let keys = N / (LANES / N);
    var most = 0.0;
    if keys > 16u {
        return blocks[block % max(keys / 16u, 1u)];
    }
    for (var p = 0u; p < together; p++) {
        most = max(most, parts[(block * together + p) * N + i]);
    }
    return most;
}

// Makes s what it is once decayed, a new base.
fn fold(base: u32, keep: bool, head: u32, step: u32, i: u32, g: u32, l: u32) {
    let keys = N / (LANES / N);
    for (var j = 0u; j < keys; j++) {
        s[j] *= since[g * keys + j];
    }
    settle(base, keep, head, step, i, g, l);
    workgroupBarrier(); // since is read, and parts
}

@compute @workgroup_size(LANES)
fn time_mix_resident(@builtin(workgroup_id) group: vec3<u32>, lanes: Sixteen) {
    let head = group.x;
    let l = place_of(lanes);
    let i = l % N;
    let g = l / N;
    let keys = N / (LANES / N);
    let width = params.width;
    let ranks = ranks_of(l);
    // As in `time_mix`.
    let segment = segment_of(group.y);
    if LORA_UP {
        fetch_factors(head, ranks, ranks.first, l);
    }
    let own = vectors_of(head, i, g);
    let own_head = head * head_len();
    let entry = params.slots + params.entry + head * N; // in a slot, this head's part of its first vector

    load_base(segment.read * params.base_stride + own_head, i, g);
    let to = segment.written * params.base_stride + own_head;
    var pending = segment.pending;
    var left = 1.0; // the channel's part of `since`, in the first group
    if LAZY {
        for (var start = 0u; start < pending; start += STAGED) {
            let some = min(pending - start, STAGED);
            for (var e = g; e < some; e += LANES / N) {
                let at = entry + segments[segment.entries + start + e] * params.slot_stride;
                let first = at + i / 16u * width + i % 16u * 4u;
                let four = vec4(state[first], state[first + 1u], state[first + 2u], state[first + 3u]);
                staged[e * N + i] = bitcast<vec4<f32>>(four);
            }
            workgroupBarrier();
            for (var p = 0u; p < some; p++) {
                let q_i = staged[p * N + i / 4u][i % 4u];
                let v_i = staged[p * N + 16u + i / 4u][i % 4u];
                let b_at = p * N + 32u + g * keys / 4u;
                for (var j = 0u; j < keys / 4u; j++) {
                    let b = staged[b_at + j];
                    let k = staged[b_at + 16u + j];
                    s[4u * j] = fma(q_i, b.x, fma(v_i, k.x, s[4u * j]));
                    s[4u * j + 1u] = fma(q_i, b.y, fma(v_i, k.y, s[4u * j + 1u]));
                    s[4u * j + 2u] = fma(q_i, b.z, fma(v_i, k.z, s[4u * j + 2u]));
                    s[4u * j + 3u] = fma(q_i, b.w, fma(v_i, k.w, s[4u * j + 3u]));
                }
            }
            workgroupBarrier();
        }
        if g == 0u && pending > 0u {
            let last = segments[segment.entries + pending - 1u];
            left = bitcast<f32>(state[entry + last * params.slot_stride + 4u * width + i]);
        }
        if g == 0u {
            since[i] = left;
        }
        workgroupBarrier();
        if segment.rows == 0u && segment.written != NONE {
            fold(to, true, head, segment.step, i, g, l);
        }
    }

    for (var t = 0u; t < segment.rows; t++) {
        let row = segment.first + t;
        if LAZY && pending == params.capacity {
            // A base that another follows is not written.
            fold(to, t + params.capacity >= segment.rows, head, segment.step + t, i, g, l);
            pending = 0u;
            left = 1.0;
        }
        let token = token_of(row, head, i, g);
        if LORA_UP {
            multiply_factors(row, t == 0u, head, ranks, lanes);
            workgroupBarrier();
        }
        make_operands(row, head, token, own, i, g);
        if LAZY {
            workgroupBarrier();
            if g == 0u {
                let before = left; // what is left of the base before this token
                left = fma(left, decay[i], left);
                let undecayed = 1.0 / left;
                since[i] = left;
                decay[i] = before;
                key[i] *= undecayed;
                rate[i] *= undecayed;
            }
        } else if makes(DECAY, g) {
            decay[i] += decay_dither(ROUNDING, segment.step + t, head * N + i);
        }
        workgroupBarrier();

        // Each group asks the state what it holds at kappa, and has its part of the norm of kappa and of the bonus.
        var q = 0.0;
        var square = 0.0;
        var extra = 0.0;
        for (var j = 0u; j < keys; j++) {
            let at = g * keys + j;
            let u = removal[at];
            if LAZY {
                q += s[j] * (decay[at] * u);
            } else {
                q += s[j] * u;
            }
            square += u * u;
            extra += bonus[at];
        }
        let asked = gathered(q, square, extra, i, g, l);
        let unit = 1.0 / max(sqrt(asked.y), params.kappa_eps);
        q = -(asked.x * unit);

        let v_i = value[i];
        var y = 0.0;
        for (var j = 0u; j < keys; j++) {
            let at = g * keys + j;
            let b = removal[at] * unit * rate[at];
            if LAZY {
                s[j] = fma(q, b, fma(v_i, key[at], s[j]));
                y += s[j] * (since[at] * receptance[at]);
            } else {
                s[j] += s[j] * decay[at] + q * b + v_i * key[at];
                y += s[j] * receptance[at];
            }
        }
        if LAZY {
            if g == 0u {
                let at = entry + segments[segment.slots + t] * params.slot_stride + i;
                state[at] = bitcast<u32>(q);
                state[at + width] = bitcast<u32>(v_i);
                state[at + 2u * width] = bitcast<u32>(removal[i] * unit * rate[i]);
                state[at + 3u * width] = bitcast<u32>(key[i]);
                state[at + 4u * width] = bitcast<u32>(left);
            }
            pending += 1u;
        }
        finish(row, head, own, y, asked.z * v_i, gate[i], lanes);
        if !LAZY {
            settle(to, t + 1u == segment.rows, head, segment.step + t + 1u, i, g, l);
        }
    }
}

fn product(operand: u32, row: u32, head: u32, i: u32) -> f32 {
    if LORA_UP {
        return product_of(operand, i);
    }
    return given(operand, row, head, i);
}
