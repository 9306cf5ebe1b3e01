//! `wkv7_fours.wgsl` and its variants against [`rwkv_core::ops::wkv7`] in `f64`, and its numerics contract.

use proptest::prelude::*;

use super::{Dims, ROWS, STAGES, Segment, VARIANTS, lower, workgroup_bytes};
use crate::gpu::{Device, device_for_tests, variants_for_tests};
use crate::kernels::intervals::floats;
use crate::kernels::testing::bits;
use crate::kernels::wkv7::tests::limits;
use crate::kernels::wkv7_chunked::tests::{PLAIN, kinds, refuses};
use crate::kernels::wkv7_scan::{self, tests::Call};
use crate::pipeline::Pipeline;

/// A variant with so many rows to a workgroup.
type Compiled = (usize, &'static Device, Pipeline);

/// Those that the device can run, with as many tokens staged as they say and as it has memory for.
fn compiled() -> Vec<Compiled> {
    let Some(device) = device_for_tests() else { return Vec::new() };
    let room = device.capabilities().workgroup_bytes as usize;
    let mut all = Vec::new();
    for rows in ROWS {
        let own = ("ROWS", f64::from(u32::try_from(rows).unwrap()));
        all.extend(variants_for_tests(VARIANTS, &[own]).into_iter().map(|(of, kernel)| (rows, of, kernel)));
        for stage in STAGES.into_iter().filter(|&stage| workgroup_bytes(rows, stage) <= room) {
            let stage = ("STAGE", f64::from(u32::try_from(stage).unwrap()));
            let subgroup: Vec<_> = VARIANTS.iter().filter(|of| of.features.subgroup).copied().collect();
            let compiled = variants_for_tests(&subgroup, &[own, stage]);
            all.extend(compiled.into_iter().map(|(of, kernel)| (rows, of, kernel)));
        }
    }
    all
}

/// States and outputs after some of the segments of a call; `state` is what is there before.
fn run(
    (rows_each, device, kernel): &Compiled,
    call: &Call,
    segments: &[Segment],
    state: &[f32],
) -> [Vec<f32>; 2] {
    let wkv7_scan::Dims { rows, heads, stride, offset, y_stride, .. } = call.dims;
    let dims = Dims { rows, segments: segments.len(), heads, stride, offset, y_stride };
    let (params, groups) = lower(dims, *rows_each).unwrap();
    let y = vec![f32::NAN; rows * y_stride];
    let buffers = [bytemuck::cast_slice(segments).to_vec(), bits(&call.operands), bits(state), bits(&y)];
    let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
    assert!(after[..2] == buffers[..2], "what is only read is as it was");
    [floats(&after[2]), floats(&after[3])]
}

fn label((rows, _, kernel): &Compiled) -> String {
    format!("{}, {rows} rows", kernel.kernel().label())
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    // Around groups of four, and around what is staged at a time.
    let edges = prop::sample::select(vec![0usize, 3, 4, 5, 7, 8, 9, 31, 32, 33, 64, 65]);
    proptest::collection::vec(prop_oneof![1 => edges, 1 => 1..=40usize], 1..=3)
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 16, ..ProptestConfig::with_source_file(file!()) }
}

/// Within what the token-by-token form may be off. A state is rounded once for a token where `u` is moved on and once where what
/// the token removes is taken from it, and the increments more seldom than there: about `2 u^2 |s|^2`, which the limit's
/// 16 covers as well. What a token asks has as many roundings as there, and those of the products with the tokens of its
/// group, three at most.
#[test]
fn agrees_with_its_twin() {
    let compiled = compiled();
    proptest!(config(), |(heads in 1..=3usize, lengths in lengths(), kind in kinds(), seed: u64)| {
        let call = Call::draw_with(heads, &lengths, seed, &|dims, seed| kind.draw(dims, seed));
        for of in &compiled {
            let after = run(of, &call, &call.segments, &call.state);
            call.holds(&label(of), after, limits)?;
        }
    });
}

/// A segment has its bits whatever is beside it, and in two calls, cut after a group of four, those of one.
#[test]
fn a_segment_has_its_bits_alone_and_by_fours() {
    let compiled = compiled();
    proptest!(config(), |(heads in 1..=2usize, lengths in lengths(), cut in 0..10u32, seed: u64)| {
        let call = Call::draw(heads, &lengths, seed);
        for of in &compiled {
            let all = run(of, &call, &call.segments, &call.state);
            for (s, &segment) in call.segments.iter().enumerate() {
                let first = (4 * cut).min(segment.rows);
                call.holds_cut(s, first, &all, &label(of), |segments, state| run(of, &call, segments, state))?;
            }
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    refuses("wkv7_fours", |dims| {
        lower(dims, 16).map(|(of, groups)| (of.heads, of.stride, of.offset, groups))
    });
    assert_eq!(lower(PLAIN, 32).map(|(_, groups)| groups), Ok([6, 2, 1]), "more rows to a workgroup");
}

#[test]
fn the_memory_is_what_the_kernel_declares() {
    let bytes = |suffix| VARIANTS.iter().find(|of| of.suffix == suffix).unwrap().workgroup_bytes;
    assert_eq!(bytes("subgroup") as usize, workgroup_bytes(16, 8), "at the defaults");
}
