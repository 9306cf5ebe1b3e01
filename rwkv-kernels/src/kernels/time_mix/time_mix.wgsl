// Twin: rwkv-core/src/ops/time_mix.rs, all that happens in a head between the projections and the output layer.
//use head
//use second_factors
//
// One workgroup per head and segment. The state lies in private memory while the segment's tokens pass: invocation
// (i, g), i = place % N, has value row i of the keys of group g. A segment is read from one record and written to
// another, so that what its sequence was before outlives the pass.

const N: u32 = 64u;

override LANES: u32 = 256u; // N times the groups of keys

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
    stride: u32,      // of a record of the state
    offset: u32,      // of the heads in a record
    first_layer: u32, // whether there is no value residual
    decay_scale: f32,
    kappa_eps: f32,
    norm_eps: f32,    // of the group norm
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> segments: array<vec4<u32>>;    // first row, rows, record read, record written
@group(0) @binding(2) var<storage, read> inputs: array<f32>;            // [T, P], r k v, then the low ranks of w a v g
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;     // [ranks, D], w a v g
@group(0) @binding(4) var<storage, read> up: array<f32>;                // not read: `time_mix_batch` has it
@group(0) @binding(5) var<storage, read> vectors: array<f32>;           // [8, D], w0 a0 v0 k_k k_a r_k, gain, bias
@group(0) @binding(6) var<storage, read_write> state: array<f32>;       // records, [H, key N, value N] in each
@group(0) @binding(7) var<storage, read_write> v_first: array<f32>;     // [T, D]
@group(0) @binding(8) var<storage, read_write> out: array<u32>;         // [T, D], or [T, 3, D] without NORM

@compute @workgroup_size(LANES)
fn time_mix(@builtin(workgroup_id) group: vec3<u32>, lanes: Sixteen) {
    let head = group.x;
    let l = place_of(lanes);
    let i = l % N;
    let g = l / N;
    let groups = LANES / N;
    let keys = N / groups;
    let ranks = ranks_of(l);
    // What other reads wait for is read first, and what waits for nothing meanwhile.
    let segment = segments[group.y];
    fetch_factors(head, ranks, ranks.first, l);
    let own = vectors_of(head, i, g);

    // Row i of the state, by key of this group.
    var s: array<f32, N>;
    let heads = params.offset + (head * N + g * keys) * N + i;
    for (var j = 0u; j < keys; j++) {
        s[j] = state[segment.z * params.stride + heads + j * N];
    }

    let end = segment.x + segment.y;
    for (var row = segment.x; row < end; row++) {
        let token = token_of(row, head, i, g);
        multiply_factors(row, row == segment.x, head, ranks, lanes);
        workgroupBarrier();
        make_operands(row, head, token, own, i, g);
        workgroupBarrier();

        // Each group asks the state what it holds at kappa, and has its part of the norm of kappa and of the bonus.
        var q = 0.0;
        var square = 0.0;
        var extra = 0.0;
        for (var j = 0u; j < keys; j++) {
            let u = removal[g * keys + j];
            q += s[j] * u;
            square += u * u;
            extra += bonus[g * keys + j];
        }
        let asked = gathered(q, square, extra, i, g, l);
        let unit = 1.0 / max(sqrt(asked.y), params.kappa_eps);
        q = asked.x * unit;

        let v_i = value[i];
        var y = 0.0;
        for (var j = 0u; j < keys; j++) {
            let at = g * keys + j;
            let kappa = removal[at] * unit;
            s[j] += s[j] * decay[at] - q * (kappa * rate[at]) + v_i * key[at];
            y += s[j] * receptance[at];
        }
        // Before what is left to do for the row, so that neither waits for the other.
        if row + 1u == end {
            store(s, segment.w, heads);
        }
        finish(row, head, own, y, asked.z * v_i, gate[i], lanes);
    }
    if segment.y == 0u {
        store(s, segment.w, heads);
    }
}

fn product(operand: u32, row: u32, head: u32, i: u32) -> f32 {
    return product_of(operand, i);
}

fn store(s: array<f32, N>, record: u32, heads: u32) {
    for (var j = 0u; j < N / (LANES / N); j++) {
        state[record * params.stride + heads + j * N] = s[j];
    }
}
