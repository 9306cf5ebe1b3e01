//! `wkv7_chunked_factors.wgsl` against [`rwkv_core::ops::wkv7_chunked::Factors`] in `f64`.

use proptest::prelude::*;
use rwkv_core::compare::nmse;
use rwkv_core::ops::wkv7_chunked::{BLOCK, Factors, Inputs, chunks};

use super::super::wkv7_chunked::CHUNKS;
use super::super::wkv7_chunked::tests::kinds;
use super::super::wkv7_scan;
use super::{Dims, Error, HEAD_SIZE as N, OPERANDS, VARIANTS, lower, workgroup_bytes};
use crate::gpu::variants_for_tests;
use crate::kernels::MAX_GROUPS;
use crate::kernels::intervals::floats;
use crate::kernels::testing::{U, bits, compare, wide};
use crate::kernels::wkv7::tests::limits;
use crate::kernels::wkv7_scan::tests::Call;

/// What of a chunk the kernel and its twin have, in groups that are compared as one: none of them is nothing.
#[derive(Default)]
struct Found {
    /// `w`, `r'`.
    asked: [Vec<f64>; 2],
    /// `b`, `k`.
    written: [Vec<f64>; 2],
    /// `u`, `y'`.
    given: [Vec<f64>; 2],
    kept: [Vec<f64>; 2],
}

/// Weights of pairs and their substitution round as often as the state update does for the tokens of a chunk and its
/// readout, so that factors are within what it may be off. What a block keeps is a product, or that less one a sum of terms of
/// one sign: of each token four roundings at most.
#[test]
fn agrees_with_its_twin() {
    let compiled: Vec<_> = CHUNKS
        .into_iter()
        .flat_map(|chunk| {
            let chunks = [("CHUNK", f64::from(u32::try_from(chunk).unwrap()))];
            variants_for_tests(VARIANTS, &chunks).into_iter().map(move |of| (chunk, of))
        })
        .collect();
    let config = ProptestConfig { cases: 24, ..ProptestConfig::with_source_file(file!()) };
    let lengths = proptest::collection::vec(prop_oneof![Just(16usize), Just(64), 0..=70usize], 1..=4);
    proptest!(config, |(heads in 1..=3usize, lengths in lengths, kind in kinds(), seed: u64)| {
        let call = Call::draw_with(heads, &lengths, seed, &|dims, seed| kind.draw(dims, seed));
        let wkv7_scan::Dims { rows, segments, y_stride, .. } = call.dims;
        let buffers = [
            bytemuck::cast_slice(&call.segments).to_vec(),
            bits(&call.operands),
            bits(&vec![f32::NAN; call.operands.len()]),
            bits(&vec![f32::NAN; rows * y_stride]),
        ];
        for (chunk, (device, kernel)) in &compiled {
            let dims = Dims { rows, segments, heads, chunk: *chunk, y_stride };
            let (params, groups) = lower(dims).unwrap();
            let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
            prop_assert!(after[..2] == buffers[..2], "what is only read is as it was");
            let [mut factors, mut y] = [2, 3].map(|at| floats(&after[at]));
            let mut found = Found::default();
            for (case, segment) in call.cases.iter().zip(&call.segments) {
                let [r, lw, k, v, a, b] = &case.operands.each_ref().map(|x| wide(x));
                let x = Inputs { r, lw, k, v, a, b };
                for (tokens, h) in chunks(case.dims, *chunk) {
                    let want = Factors::new(case.dims, x, tokens.clone(), h);
                    for (at, t) in tokens.clone().enumerate() {
                        let row = segment.first as usize + t;
                        let own = (row * heads + h) * OPERANDS * N;
                        // What was compared is as if it had not been written.
                        let mut take = |which: usize| {
                            let own = &mut factors[own + which * N..][..N];
                            own.iter_mut().map(|x| f64::from(std::mem::replace(x, f32::NAN))).collect::<Vec<_>>()
                        };
                        let add = |to: &mut [Vec<f64>; 2], got: Vec<f64>, want: &[f64], at: usize| {
                            to[0].extend(got);
                            to[1].extend(&want[at * N..][..N]);
                        };
                        for (which, want) in [(0, &want.w), (1, &want.r)] {
                            add(&mut found.asked, take(which), want, at);
                        }
                        for (which, want) in [(2, &want.b), (3, &want.k)] {
                            add(&mut found.written, take(which), want, at);
                        }
                        add(&mut found.given, take(4), &want.u, at);
                        if (at + 1).is_multiple_of(BLOCK) || t + 1 == tokens.end {
                            add(&mut found.kept, take(5), &want.kept, at / BLOCK);
                        }
                        let own = &mut y[row * y_stride + h * N..][..N];
                        let read = own.iter_mut().map(|x| f64::from(std::mem::replace(x, f32::NAN)));
                        add(&mut found.given, read.collect(), &want.y, at);
                    }
                }
            }
            prop_assert!(factors.iter().chain(&y).all(|x| x.is_nan()), "nothing else is written");
            for (what, [got, want]) in
                [("w, r", &found.asked), ("b, k", &found.written), ("u, y", &found.given)]
            {
                if !want.is_empty() {
                    nmse(got, want, limits(*chunk).1)
                        .map_err(|e| TestCaseError::fail(format!("chunks of {chunk}, {what}: {e}")))?;
                }
            }
            let [got, want] = &found.kept;
            // A half may be told either way.
            let alike = |(&got, &want): (&f64, &f64)| match (got > 0.0, want > 0.0) {
                (true, false) => got - 1.0,
                (false, true) => got + 1.0,
                _ => got,
            };
            #[expect(clippy::cast_possible_truncation, reason = "they were f32")]
            let got: Vec<f32> = got.iter().zip(want).map(|of| alike(of) as f32).collect();
            compare("kept", &got, want, |at| 4.0 * BLOCK as f64 * U * want[at].abs())?;
        }
    });
}

#[test]
fn refuses_what_it_cannot_run() {
    let kernel = &VARIANTS[0];
    assert_eq!(kernel.workgroup_bytes as usize, workgroup_bytes(16), "as the WGSL declares");
    assert!(workgroup_bytes(32) <= 16 << 10, "on every device");
    let name = kernel.name;
    let plain = Dims { rows: 70, segments: 2, heads: 3, chunk: 32, y_stride: 192 };
    let lowered = |dims| lower(dims).map(|(of, groups)| (of.heads, of.segments, of.y_stride, groups));
    assert_eq!(lowered(plain), Ok((3, 2, 192, [3, 4, 1])), "plain");
    let stride = Error::Stride { kernel: name, width: 192, offset: 0, stride: 191 };
    assert_eq!(lowered(Dims { y_stride: 191, ..plain }), Err(stride), "y");
    let groups = |got| Err(Error::Groups { kernel: name, got });
    assert_eq!(lowered(Dims { segments: 65_534, ..plain }), groups([3, 65_536]), "segments");
    assert!(lowered(Dims { segments: MAX_GROUPS as usize - 2, ..plain }).is_ok(), "the most");
    for dims in [
        Dims { rows: usize::MAX, ..plain },
        Dims { heads: usize::MAX, ..plain },
        Dims { segments: usize::MAX, ..plain },
        Dims { rows: 1 << 22, ..plain },
    ] {
        assert!(lowered(dims).is_err(), "{dims:?}");
    }
}
