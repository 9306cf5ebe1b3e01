// Twin: rwkv-core/src/ops/matmul.rs, rows times several matrices.
//use activation
//use blocks
//
// One workgroup per ROWS x COLS tile of one job's output, one invocation per eight rows and four columns of it. The
// inner dimension passes in steps through workgroup memory; while one step is multiplied, the loads of the next are
// under way. For four inputs an invocation reads twelve vectors and does 128 multiply-adds.
//
// Every output is one chain of multiply-adds, inputs in ascending order, whatever the tile: it depends neither on the
// other rows nor on ROWS. Past the last input x counts as zero and the weight is any of the matrix.

// Rows of a tile: 32, 64 or 128. Of 128, a step takes 13.25 KiB.
override ROWS: u32 = 64u;
// Whether matrices are [K, O], not [O, K].
override TRANSPOSED: bool = false;

const COLS: u32 = 64u;  // outputs of a tile
const STEP: u32 = 16u;  // inputs at a time
const SLOTS: u32 = COLS * STEP / 8u; // eights of weights at a time
const TEAMS: u32 = COLS / 4u; // invocations side by side along the columns

struct Params {
    rows: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> tiles: array<vec4<u32>>;   // three to a tile of outputs, see `job_of`
@group(0) @binding(2) var<storage, read> weights: array<vec4<u32>>; // see `Matrix`
@group(0) @binding(3) var<storage, read> x: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

struct Job {
    inputs: u32,  // K, a multiple of 8 unless TRANSPOSED
    outputs: u32, // O, a multiple of 8 if TRANSPOSED
    matrix: Matrix,
    x: u32,       // where row 0 starts, and the distance to the next
    x_stride: u32,
    y: u32,
    y_stride: u32,
    activation: u32,
    accumulate: bool,
    col: u32, // the tile's first output
    row: u32, // the tile's first row
}

// A step of x: [STEP, ROWS], and one vector more per input, so that neighbours fall into other banks.
override X_LEN: u32 = STEP * (ROWS / 4u + 1u);
var<workgroup> x_step: array<vec4<f32>, X_LEN>;
// A step of W, with such vectors too: [COLS, STEP], or [STEP, COLS] if TRANSPOSED, which is smaller.
const W_PITCH: u32 = STEP / 4u + 1u;
const W_PITCH_TRANSPOSED: u32 = COLS / 4u + 1u;
var<workgroup> w_step: array<vec4<f32>, COLS * W_PITCH>;

// The job of a tile. It is not looked for: in values that pass through a loop, NVIDIA's compiler does not see that all
// invocations have the same, and keeps a copy in the registers of each.
fn job_of(tile: vec2<u32>) -> Job {
    let a = tiles[3u * tile.x];      // first output, inputs, outputs, weights
    let b = tiles[3u * tile.x + 1u]; // x, x_stride, y, y_stride
    let c = tiles[3u * tile.x + 2u]; // scales, whether to add, weights of a row, then by bytes: format, nothing, activation
    let matrix = Matrix(c.w & 0xFFu, a.w, c.x, c.z);
    return Job(a.y, a.z, matrix, b.x, b.y, b.z, b.w, c.w >> 16u, c.y != 0u, a.x, tile.y * ROWS);
}

// Four rows of x at one input, zero past the last. Rows past the last are that row again, and never stored.
fn load_x(job: Job, quad: u32, k: u32) -> vec4<f32> {
    if k >= job.inputs {
        return vec4(0.0);
    }
    let row = min(job.row + 4u * quad + vec4(0u, 1u, 2u, 3u), vec4(params.rows - 1u));
    let at = job.x + row * job.x_stride + k;
    return vec4(x[at.x], x[at.y], x[at.z], x[at.w]);
}

// Of a step of W, the eight weights at place `slot`; none past the last place.
fn load_w(job: Job, slot: u32, k: u32) -> vec4<u32> {
    if slot >= SLOTS {
        return vec4(0u);
    }
    if TRANSPOSED {
        let octets = job.outputs / 8u;
        let input = min(k + slot / (COLS / 8u), job.inputs - 1u);
        let octet = min(job.col / 8u + slot % (COLS / 8u), octets - 1u);
        return eight(job.matrix, input, octet);
    }
    let octets = job.inputs / 8u;
    let output = min(job.col + slot / (STEP / 8u), job.outputs - 1u);
    let octet = min(k / 8u + slot % (STEP / 8u), octets - 1u);
    return eight(job.matrix, output, octet);
}

fn stage_w(job: Job, slot: u32, w: vec4<u32>) {
    if slot >= SLOTS {
        return;
    }
    var at: u32;
    if TRANSPOSED {
        at = slot / (COLS / 8u) * W_PITCH_TRANSPOSED + slot % (COLS / 8u) * 2u;
    } else {
        at = slot / (STEP / 8u) * W_PITCH + slot % (STEP / 8u) * 2u;
    }
    w_step[at] = first4(job.matrix, w);
    w_step[at + 1u] = last4(job.matrix, w);
}

// Four inputs of a team's four columns: [input, column].
fn staged_w(team: u32, k: u32) -> mat4x4<f32> {
    if TRANSPOSED {
        let at = k * W_PITCH_TRANSPOSED + team;
        return mat4x4(
            w_step[at],
            w_step[at + W_PITCH_TRANSPOSED],
            w_step[at + 2u * W_PITCH_TRANSPOSED],
            w_step[at + 3u * W_PITCH_TRANSPOSED],
        );
    }
    let at = team * W_PITCH + k / 4u;
    return transpose(mat4x4(
        w_step[at],
        w_step[at + TEAMS * W_PITCH],
        w_step[at + 2u * TEAMS * W_PITCH],
        w_step[at + 3u * TEAMS * W_PITCH],
    ));
}

// The columns of `staged_w`, from the tile's first.
fn columns(team: u32) -> vec4<u32> {
    if TRANSPOSED {
        return 4u * team + vec4(0u, 1u, 2u, 3u);
    }
    return team + TEAMS * vec4(0u, 1u, 2u, 3u);
}

// Adds one input's products to four rows of four columns.
fn add(sums: mat4x4<f32>, rows: vec4<f32>, w: vec4<f32>) -> mat4x4<f32> {
    return mat4x4(
        fma(vec4(rows.x), w, sums[0]),
        fma(vec4(rows.y), w, sums[1]),
        fma(vec4(rows.z), w, sums[2]),
        fma(vec4(rows.w), w, sums[3]),
    );
}

override LANES: u32 = 2u * ROWS;

@compute @workgroup_size(LANES)
fn matmul(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let job = job_of(group.yx);
    let pitch = ROWS / 4u + 1u;

    // What of a step this invocation loads: two of its vectors of x, neighbours beside each other along the inputs ..
    let x_k = lane % STEP;
    let x_quad = lane / STEP;
    let x_at = x_k * pitch + x_quad;
    // .. and, of the weights, the slots `lane` and `lane + LANES`, as far as there are.

    // What of the tile it computes.
    let team = lane % TEAMS;
    let quad = lane / TEAMS; // and the one half a tile below
    var low = mat4x4<f32>();
    var high = mat4x4<f32>();

    var x0 = load_x(job, x_quad, x_k);
    var x1 = load_x(job, x_quad + ROWS / 8u, x_k);
    var w0 = load_w(job, lane, 0u);
    var w1 = load_w(job, lane + LANES, 0u);
    for (var k = 0u; k < job.inputs; k += STEP) {
        workgroupBarrier(); // the step before is no longer read
        x_step[x_at] = x0;
        x_step[x_at + ROWS / 8u] = x1;
        stage_w(job, lane, w0);
        stage_w(job, lane + LANES, w1);
        workgroupBarrier();
        if k + STEP < job.inputs {
            x0 = load_x(job, x_quad, k + STEP + x_k);
            x1 = load_x(job, x_quad + ROWS / 8u, k + STEP + x_k);
            w0 = load_w(job, lane, k + STEP);
            w1 = load_w(job, lane + LANES, k + STEP);
        }
        for (var i = 0u; i < STEP; i += 4u) {
            let w = staged_w(team, i);
            let at = i * pitch + quad;
            low = add(low, x_step[at], w[0]);
            high = add(high, x_step[at + ROWS / 8u], w[0]);
            low = add(low, x_step[at + pitch], w[1]);
            high = add(high, x_step[at + pitch + ROWS / 8u], w[1]);
            low = add(low, x_step[at + 2u * pitch], w[2]);
            high = add(high, x_step[at + 2u * pitch + ROWS / 8u], w[2]);
            low = add(low, x_step[at + 3u * pitch], w[3]);
            high = add(high, x_step[at + 3u * pitch + ROWS / 8u], w[3]);
        }
    }

    // One sum at a time: all the others move up, so that each is in a register that is known before the kernel runs.
    for (var r = 0u; r < 8u; r++) {
        let row = job.row + 4u * quad + r % 4u + r / 4u * (ROWS / 2u);
        var sums = low[0];
        low = mat4x4(low[1], low[2], low[3], high[0]);
        high = mat4x4(high[1], high[2], high[3], high[0]);
        var cols = job.col + columns(team);
        for (var c = 0u; c < 4u; c++) {
            if row < params.rows && cols.x < job.outputs {
                let at = job.y + row * job.y_stride + cols.x;
                var product = activate(job.activation, sums.x);
                if job.accumulate {
                    product += y[at];
                }
                y[at] = product;
            }
            sums = sums.yzwx;
            cols = cols.yzwx;
        }
    }
}
