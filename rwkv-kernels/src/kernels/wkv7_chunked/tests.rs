//! `wkv7_chunked_factors.wgsl` and `wkv7_chunked.wgsl`, one after the other, against [`rwkv_core::ops::wkv7`] in `f64`, and
//! their numerics contract.

use proptest::prelude::*;
use rwkv_core::ops::wkv7;
use rwkv_core::rng::SplitMix64;

use super::{CHUNKS, Dims, Error, HEAD_SIZE as N, Segment, VARIANTS, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::MAX_GROUPS;
use crate::kernels::intervals::floats;
use crate::kernels::testing::bits;
use crate::kernels::wkv7::tests::{Case, limits};
use crate::kernels::wkv7_chunked_factors as factors;
use crate::kernels::wkv7_scan::{self, tests::Call};
use crate::pipeline::Pipeline;

/// What decays and keys are like, beyond what [`Case::draw`] has.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) enum Kind {
    Any,
    /// The fastest decay everywhere.
    Fastest,
    /// The same, and little that is written: what is left of the state is small beside what it was.
    Fading,
    /// None anywhere.
    NoDecay,
    /// The fastest in every other channel, none in the others.
    Alternating,
    /// In turns of eight tokens.
    Bursts,
    /// The same key at every token, removed and replaced as a whole: inverses of its pair weights are the worst there are.
    OneKey,
}

/// All of them.
pub(in crate::kernels) fn kinds() -> impl Strategy<Value = Kind> {
    use Kind::{Alternating, Any, Bursts, Fading, Fastest, NoDecay, OneKey};
    prop_oneof![1 => Just(Any), 1 => prop::sample::select(vec![
        Fastest, Fading, NoDecay, Alternating, Bursts, OneKey
    ])]
}

impl Kind {
    pub(in crate::kernels) fn draw(self, dims: wkv7::Dims, seed: u64) -> Case {
        let mut case = Case::draw(dims, seed);
        let width = dims.heads * N;
        let [_, lw, _, v, a, b] = &mut case.operands;
        let fast = |at: usize| match self {
            Self::Fastest | Self::Fading => true,
            Self::Alternating => at.is_multiple_of(2),
            Self::Bursts => (at / width / 8).is_multiple_of(2),
            Self::Any | Self::NoDecay | Self::OneKey => false,
        };
        if matches!(self, Self::Fading) {
            v.iter_mut().for_each(|v| *v *= 1e-5);
        }
        match self {
            Self::Any => {}
            Self::OneKey => {
                let mut rng = SplitMix64::new(seed);
                let key: Vec<f32> = (0..N).map(|_| rng.normal()).collect();
                let norm = key.iter().map(|x| x * x).sum::<f32>().sqrt();
                lw.fill(-1e-6);
                for (at, (a, b)) in a.iter_mut().zip(b).enumerate() {
                    (*a, *b) = (-key[at % N] / norm, key[at % N] / norm);
                }
            }
            _ => lw.iter_mut().enumerate().for_each(|(at, lw)| *lw = if fast(at) { -0.6065 } else { 0.0 }),
        }
        case
    }
}

/// Both kernels, compiled for chunks of so many tokens, where the device has the memory.
fn compiled() -> Vec<(usize, &'static Device, [Pipeline; 2])> {
    let mut all = Vec::new();
    for chunk in CHUNKS {
        let overrides = [("CHUNK", f64::from(u32::try_from(chunk).unwrap()))];
        let both = variants_for_tests(factors::VARIANTS, &overrides)
            .into_iter()
            .zip(variants_for_tests(VARIANTS, &overrides));
        all.extend(both.map(|((device, of_factors), (_, update))| (chunk, device, [of_factors, update])));
    }
    all
}

/// States and outputs after some of the segments of a call; `state` is what is there before.
fn run(
    (chunk, device, [of_factors, update]): &(usize, &Device, [Pipeline; 2]),
    call: &Call,
    segments: &[Segment],
    state: &[f32],
) -> [Vec<f32>; 2] {
    let wkv7_scan::Dims { rows, heads, stride, offset, y_stride, .. } = call.dims;
    let dims = Dims { rows, segments: segments.len(), heads, stride, offset, y_stride };
    let y = vec![f32::NAN; rows * y_stride];
    let before = [bytemuck::cast_slice(segments).to_vec(), bits(&call.operands)];
    let [of_segments, operands] = before.clone();
    let of = factors::Dims { rows, segments: segments.len(), heads, chunk: *chunk, y_stride };
    let (params, groups) = factors::lower(of).unwrap();
    let poison = vec![f32::NAN; call.operands.len()];
    let buffers = [of_segments, operands, bits(&poison), bits(&y)];
    let mut after = device.run(of_factors, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
    let (y, own) = (after.pop().unwrap(), after.pop().unwrap());
    assert!(after == before, "what is only read is as it was");

    let (params, groups) = lower(dims).unwrap();
    let [of_segments, operands] = before;
    let buffers = [of_segments, operands, own, bits(state), y];
    let after = device.run(update, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
    assert!(after[..3] == buffers[..3], "what is only read is as it was");
    [floats(&after[3]), floats(&after[4])]
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    let edges = prop::sample::select(vec![0usize, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80]);
    proptest::collection::vec(prop_oneof![1 => edges, 1 => 1..=40usize], 1..=4)
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 24, ..ProptestConfig::with_source_file(file!()) }
}

/// Within what the token-by-token form may be off. A chunk rounds a state once for 16 tokens, instead of once for each;
/// what a token adds to it passes through pair weights and their substitution, of no more roundings than there are tokens in
/// the chunk and terms in a product: the same count as there.
#[test]
fn agrees_with_its_twin() {
    let compiled = compiled();
    proptest!(config(), |(heads in 1..=3usize, lengths in lengths(), kind in kinds(), seed: u64)| {
        let call = Call::draw_with(heads, &lengths, seed, &|dims, seed| kind.draw(dims, seed));
        for of in &compiled {
            let after = run(of, &call, &call.segments, &call.state);
            call.holds(&format!("chunks of {}", of.0), after, limits)?;
        }
    });
}

/// A segment has its bits whatever is beside it, and in two calls, cut where a chunk ends, those of one.
#[test]
fn a_segment_has_its_bits_alone_and_by_chunks() {
    let compiled = compiled();
    proptest!(config(), |(heads in 1..=2usize, lengths in lengths(), cut in 0..5u32, seed: u64)| {
        let call = Call::draw(heads, &lengths, seed);
        for of in &compiled {
            let all = run(of, &call, &call.segments, &call.state);
            for (s, &segment) in call.segments.iter().enumerate() {
                let first = (cut * u32::try_from(of.0).unwrap()).min(segment.rows);
                call.holds_cut(s, first, &all, &format!("chunks of {}", of.0), |segments, state| run(of, &call, segments, state))?;
            }
        }
    });
}

/// That a kernel of which four workgroups share a head takes what it can run, and nothing else.
pub(in crate::kernels) fn refuses(
    name: &'static str,
    lowered: impl Fn(Dims) -> Result<(u32, u32, u32, [u32; 3]), Error>,
) {
    let state = 3 * N * N;
    let plain = PLAIN;
    assert_eq!(lowered(plain), Ok((3, 12_298, 10, [12, 2, 1])), "plain");
    let stride = |width, offset, stride| Err(Error::Stride { kernel: name, width, offset, stride });
    assert_eq!(lowered(Dims { offset: 11, ..plain }), stride(state, 11, state + 10), "record");
    assert_eq!(lowered(Dims { y_stride: 191, ..plain }), stride(192, 0, 191), "y");
    let groups = |got| Err(Error::Groups { kernel: name, got });
    assert_eq!(lowered(Dims { segments: 65_536, ..plain }), groups([12, 65_536]), "segments");
    assert!(lowered(Dims { segments: MAX_GROUPS as usize, ..plain }).is_ok(), "the most");
    for dims in [
        Dims { rows: usize::MAX, ..plain },
        Dims { heads: usize::MAX, ..plain },
        Dims { offset: usize::MAX, stride: usize::MAX, ..plain },
        Dims { rows: 1 << 22, ..plain },
    ] {
        assert!(lowered(dims).is_err(), "{dims:?}");
    }
}

/// Extents of a call that is in order.
pub(in crate::kernels) const PLAIN: Dims =
    Dims { rows: 9, segments: 2, heads: 3, stride: 3 * N * N + 10, offset: 10, y_stride: 192 };

#[test]
fn refuses_what_it_cannot_run() {
    refuses("wkv7_chunked", |dims| lower(dims).map(|(of, groups)| (of.heads, of.stride, of.offset, groups)));
}
