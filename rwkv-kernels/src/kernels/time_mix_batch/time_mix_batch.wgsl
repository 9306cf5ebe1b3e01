// Twin: rwkv-core/src/ops/time_mix.rs, all that happens in a head between the projections and the output layer.
//use head
//
// As `time_mix` does it, for many sequences side by side, where the bytes of the states are what takes the time: they are read
// and written 16 at a time. Invocation (c, g), c = place % QUADS, has the values 4 c to 4 c + 3 of the keys of group g in
// private memory while the segment's tokens pass.

const N: u32 = 64u;
const QUADS: u32 = N / 4u;

override LANES: u32 = 64u; // QUADS times the groups of keys, and a multiple of N

struct Params {
    width: u32,       // D
    inputs: u32,      // P
    rank_w: u32,      // unused, as are the other ranks and teams
    rank_a: u32,
    rank_v: u32,
    rank_g: u32,
    teams_w: u32,
    teams_a: u32,
    teams_v: u32,
    stride: u32,      // of a record of the state, a multiple of 4
    offset: u32,      // of the heads in a record, a multiple of 4
    first_layer: u32, // whether there is no value residual
    decay_scale: f32,
    kappa_eps: f32,
    norm_eps: f32,    // of the group norm
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> segments: array<vec4<u32>>;        // first row, rows, record read, record written
@group(0) @binding(2) var<storage, read> inputs: array<f32>;                // [T, P], r k v, then what is not read
@group(0) @binding(3) var<storage, read> weights: array<vec4<u32>>;         // not read
@group(0) @binding(4) var<storage, read> up: array<f32>;                    // [T, 4, D], w a v g
@group(0) @binding(5) var<storage, read> vectors: array<f32>;               // [8, D], w0 a0 v0 k_k k_a r_k, gain, bias
@group(0) @binding(6) var<storage, read_write> state: array<vec4<f32>>;     // records, [H, key N, value N] in each
@group(0) @binding(7) var<storage, read_write> v_first: array<f32>;         // [T, D]
@group(0) @binding(8) var<storage, read_write> out: array<u32>;             // [T, D], or [T, 3, D] without NORM

override KEY_GROUPS: u32 = N / QUADS * GROUPS;
override KEYS: u32 = N / KEY_GROUPS; // of a group
override HELD: u32 = 4u * LANES;

// What the groups' keys have of the state's answers to kappa and to the receptance, [group, value].
var<workgroup> asked: array<f32, HELD>;
var<workgroup> answered: array<f32, HELD>;
// And of the square of the norm of kappa and of the bonus.
var<workgroup> parts_of_norm: array<f32, KEY_GROUPS>;
var<workgroup> parts_of_bonus: array<f32, KEY_GROUPS>;

@compute @workgroup_size(LANES)
fn time_mix_batch(@builtin(workgroup_id) group: vec3<u32>, lanes: Sixteen) {
    let head = group.x;
    let l = place_of(lanes);
    let segment = segments[group.y];
    let i = l % N; // the channel of which it makes operands
    let c = l % QUADS;
    let first = l / QUADS * KEYS;
    let own = vectors_of(head, i, l / N);

    // Four values of each key of the group.
    var s: array<vec4<f32>, QUADS>;
    let heads = params.offset / 4u + (head * N + first) * QUADS + c;
    for (var j = 0u; j < KEYS; j++) {
        s[j] = state[segment.z * (params.stride / 4u) + heads + j * QUADS];
    }

    let end = segment.x + segment.y;
    for (var row = segment.x; row < end; row++) {
        make_operands(row, head, token_of(row, head, i, l / N), own, i, l / N);
        workgroupBarrier();

        var q = vec4(0.0);
        var square = 0.0;
        var extra = 0.0;
        for (var j = 0u; j < KEYS; j++) {
            let u = removal[first + j];
            q += s[j] * u;
            square += u * u;
            extra += bonus[first + j];
        }
        for (var k = 0u; k < 4u; k++) {
            asked[4u * l + k] = q[k];
        }
        if c == 0u {
            parts_of_norm[l / QUADS] = square;
            parts_of_bonus[l / QUADS] = extra;
        }
        workgroupBarrier();
        q = vec4(0.0);
        square = 0.0;
        extra = 0.0;
        for (var p = 0u; p < KEY_GROUPS; p++) {
            let at = p * N + 4u * c;
            q += vec4(asked[at], asked[at + 1u], asked[at + 2u], asked[at + 3u]);
            square += parts_of_norm[p];
            extra += parts_of_bonus[p];
        }
        let unit = 1.0 / max(sqrt(square), params.kappa_eps);
        q *= unit;

        let v = vec4(value[4u * c], value[4u * c + 1u], value[4u * c + 2u], value[4u * c + 3u]);
        var y = vec4(0.0);
        for (var j = 0u; j < KEYS; j++) {
            let at = first + j;
            let kappa = removal[at] * unit;
            s[j] += s[j] * decay[at] - q * (kappa * rate[at]) + v * key[at];
            y += s[j] * receptance[at];
        }
        for (var k = 0u; k < 4u; k++) {
            answered[4u * l + k] = y[k];
        }
        // Before what is left to do for the row, so that neither waits for the other.
        if row + 1u == end {
            store(s, segment.w, heads);
        }
        workgroupBarrier();
        var own_y = 0.0;
        if l < N {
            for (var p = 0u; p < KEY_GROUPS; p++) {
                own_y += answered[p * N + i];
            }
        }
        finish(row, head, own, own_y, extra * value[i], gate[i], lanes);
    }
    if segment.y == 0u {
        store(s, segment.w, heads);
    }
}

fn product(operand: u32, row: u32, head: u32, i: u32) -> f32 {
    return given(operand, row, head, i);
}

fn store(s: array<vec4<f32>, QUADS>, record: u32, heads: u32) {
    for (var j = 0u; j < KEYS; j++) {
        state[record * (params.stride / 4u) + heads + j * QUADS] = s[j];
    }
}
