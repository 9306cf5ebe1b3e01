// The second factors of a head's adapters, multiplied by what their first factors make of a token.
//use sixteen
//use weights
//
// The kernel declares N = 64, LANES, the parameters and bindings used below. Eight invocations read a row, which is a rank, of
// the head's channels, by 16 bytes, so that a team of 16 has two at once. Teams are divided among the adapters as
// `divided` says, in proportion to their ranks, so that all four are multiplied side by side.

override TEAMS: u32 = LANES / 16u;

// What teams have of the products, four channels to an element: [TEAMS, N / 4].
var<workgroup> sums: array<vec4<f32>, LANES>;

// Ranks of an invocation that are under way at once: all that it has of the 832 of 7.2B, with 512 lanes. On an H200, heads of 1.5B
// and 7.2B take 5.7 and 7.1 us; with eight 5.9 and 7.9, with sixteen, for which there are too few registers in some texts, up to
// 6.6 and 7.9.
const AHEAD: u32 = 14u;

// Their factors for eight channels.
var<private> factors: array<vec4<u32>, AHEAD>;

// The ranks of an invocation.
struct Ranks {
    start: u32, // where those of its adapter begin
    end: u32,   // how many its adapter has
    first: u32, // its first, from `start` on
    apart: u32, // from one of its to the next
}

// Where the teams for w, a and v end; those for g are the rest.
fn ends_of_teams() -> vec3<u32> {
    let w_end = params.teams_w;
    let a_end = w_end + params.teams_a;
    return vec3(w_end, a_end, a_end + params.teams_v);
}

fn ranks_of(place: u32) -> Ranks {
    let team = place / 16u;
    let own = place / 8u;
    let ends = ends_of_teams();
    let a_start = params.rank_w;
    let v_start = a_start + params.rank_a;
    let g_start = v_start + params.rank_v;
    if team < ends.x {
        return Ranks(0u, params.rank_w, own, 2u * params.teams_w);
    }
    if team < ends.y {
        return Ranks(a_start, params.rank_a, own - 2u * ends.x, 2u * params.teams_a);
    }
    if team < ends.z {
        return Ranks(v_start, params.rank_v, own - 2u * ends.y, 2u * params.teams_v);
    }
    return Ranks(g_start, params.rank_g, own - 2u * ends.z, 2u * (TEAMS - ends.z));
}

// Reads the factors of the ranks from `first` on. The first of a head do not depend on the token, nor on where it is: a
// kernel reads them before it knows.
fn fetch_factors(head: u32, own: Ranks, first: u32, place: u32) {
    for (var k = 0u; k < AHEAD; k++) {
        let r = first + k * own.apart;
        if r < own.end {
            factors[k] = weights[(own.start + r) * (params.width / 8u) + head * (N / 8u) + place % 8u];
        }
    }
}

// Multiplies a row's low ranks by them. For the first row of a segment, the kernel has called `fetch_factors` for the first ranks. Every
// invocation must call it; a barrier must come before `product_of`, and another before it is called again.
fn multiply_factors(row: u32, is_first: bool, head: u32, own: Ranks, lanes: Sixteen) {
    let place = place_of(lanes);
    let low_rank = row * params.inputs + 3u * params.width + own.start;
    var low = vec4(0.0);
    var high = vec4(0.0);
    for (var first = own.first; first < own.end; first += AHEAD * own.apart) {
        if !(is_first && first == own.first) {
            fetch_factors(head, own, first, place);
        }
        var x: array<f32, AHEAD>; // zero beyond the last rank
        for (var k = 0u; k < AHEAD; k++) {
            let r = first + k * own.apart;
            if r < own.end {
                x[k] = inputs[low_rank + r];
            }
        }
        for (var k = 0u; k < AHEAD; k++) {
            if first + k * own.apart < own.end {
                low += x[k] * low4(factors[k]);
                high += x[k] * high4(factors[k]);
            }
        }
    }
    // Of eight channels, four are the other half's of the team.
    let upper = (place & 8u) != 0u;
    let sum = select(low, high, upper) + across(select(high, low, upper), 8u, lanes);
    sums[place / 16u * 16u + place % 8u * 2u + place % 16u / 8u] = sum;
}

// The product of an adapter, of w, a, v and g in turn, for channel i: what its teams have of it.
fn product_of(adapter: u32, i: u32) -> f32 {
    let ends = ends_of_teams();
    let end = vec4(ends, TEAMS)[adapter];
    var sum = 0.0;
    for (var p = vec4(0u, ends)[adapter]; p < end; p++) {
        sum += sums[p * 16u + i / 4u][i % 4u];
    }
    return sum;
}
