//! `embedding.wgsl` and its variants against [`rwkv_core::ops::embedding`] in `f64`.

use half::f16;
use proptest::prelude::*;
use rwkv_core::ops::embedding as twin;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, MAX_GROUPS, VARIANTS, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::layer_norm::tests::{bits, compare, draw_rows, floats, limits};
use crate::pipeline::Pipeline;

/// Operands of one call.
struct Case {
    dims: Dims,
    tokens: Vec<u32>,
    table: Vec<f16>,
    gain: Vec<f32>,
    bias: Vec<f32>,
}

impl Case {
    fn draw(dims: Dims, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let tokens =
            (0..dims.rows).map(|_| u32::try_from(rng.next_u64() % dims.vocab as u64).unwrap()).collect();
        // The largest that `draw_rows` draws are beyond half precision.
        let of = |x: f32| f16::from_f32(x.clamp(-6e4, 6e4));
        let table = draw_rows(dims.vocab, dims.width, &mut rng).into_iter().map(of).collect();
        let mut draw = |lo, hi| (0..dims.width).map(|_| rng.uniform(lo, hi)).collect();
        Self { dims, tokens, table, gain: draw(-2.0, 2.0), bias: draw(-1.0, 1.0) }
    }

    /// What is wanted, and how far off it may be.
    fn twin(&self, lanes: usize) -> (Vec<f64>, Vec<f64>) {
        let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<_>>();
        let mut x = vec![f64::NAN; self.dims.rows * self.dims.width];
        twin::embedding(&self.tokens, &self.table, &wide(&self.gain), &wide(&self.bias), &mut x);
        let row = |&token: &u32| &self.table[token as usize * self.dims.width..][..self.dims.width];
        let rows: Vec<f32> = self.tokens.iter().flat_map(row).map(|w| w.to_f32()).collect();
        let limits = limits(&rows, &self.gain, &x, lanes);
        (x, limits)
    }

    fn run(&self, device: &Device, kernel: &Pipeline) -> Vec<f32> {
        let (params, groups) = lower(self.dims).unwrap();
        let pair = |w: &[f16]| u32::from(w[0].to_bits()) | u32::from(w[1].to_bits()) << 16;
        let table = self.table.chunks_exact(2).map(pair).collect();
        let poison = vec![f32::NAN; self.dims.rows * self.dims.width];
        let buffers = [self.tokens.clone(), table, bits(&self.gain), bits(&self.bias), bits(&poison)];
        let mut after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        let x = after.pop().unwrap();
        assert_eq!(after, buffers[..4], "the operands are untouched");
        floats(x)
    }
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 32, ..ProptestConfig::with_source_file(file!()) }
}

#[test]
fn agrees_with_its_twin() {
    for lanes in [4u16, 256] {
        let variants = variants_for_tests(VARIANTS, &[("LANES", lanes.into())]);
        let widths =
            prop_oneof![Just(4usize), Just(192), Just(1024), Just(1100), (1..=150usize).prop_map(|q| 4 * q)];
        proptest!(config(), |(rows in 1..=130usize, vocab in 1..=9usize, width in widths, seed: u64)| {
            let case = Case::draw(Dims { rows, vocab, width }, seed);
            let (want, limits) = case.twin(lanes.into());
            for (device, kernel) in &variants {
                let got = case.run(device, kernel);
                compare(&got, &want, &limits)
                    .map_err(|e| TestCaseError::fail(format!("{}{e}", kernel.kernel().label())))?;
                // Equal tokens have equal bits, wherever they stand.
                for (t, token) in case.tokens.iter().enumerate() {
                    let first = case.tokens.iter().position(|other| other == token).unwrap();
                    let row = |t: usize| bits(&got[t * width..][..width]);
                    prop_assert_eq!(row(t), row(first), "rows {} and {}", t, first);
                }
            }
        });
    }
}

/// What lies behind the table in memory, here guard bytes that are NaN, is not read.
#[test]
fn a_token_outside_the_vocabulary_reads_the_last_row() {
    let mut case = Case::draw(Dims { rows: 4, vocab: 5, width: 12 }, 3);
    case.tokens = vec![5, 6, u32::MAX, 4];
    for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
        let got = case.run(device, kernel);
        let (last, others) = (bits(&got[36..]), bits(&got[..36]));
        assert!(got[36..].iter().all(|x| x.is_finite()), "{got:?}");
        assert!(others.chunks(12).all(|row| row == last), "{}: {got:?}", kernel.kernel().label());
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let lowered = |rows, vocab, width| {
        lower(Dims { rows, vocab, width }).map(|(params, groups)| (params.vocab, params.width, groups))
    };
    assert_eq!(lowered(3, 7, 192), Ok((7, 192, [3, 1, 1])), "plain");
    assert_eq!(lowered(0, 7, 192), Ok((7, 192, [0, 1, 1])), "nothing to do");
    assert_eq!(lowered(3, 0, 192), Err(Error::Vocab), "no table");
    for width in [0, 2, 191] {
        assert_eq!(lowered(3, 7, width), Err(Error::Width { got: width }), "width");
    }
    assert_eq!(lowered(65_536, 7, 4), Err(Error::Rows { got: 65_536, max: MAX_GROUPS }), "rows");
    assert!(lowered(1, (1 << 20) - 1, 4096).is_ok(), "2^32 - 4096 elements");
    let beyond = |rows, width| Err(Error::Index { rows, width });
    assert_eq!(lowered(1, 1 << 20, 4096), beyond(1 << 20, 4096), "2^32 elements of the table");
    assert_eq!(lowered(1 << 15, 1, 1 << 17), beyond(1 << 15, 1 << 17), "2^32 elements of x");
    assert_eq!(lowered(1, usize::MAX, 4), beyond(usize::MAX, 4), "no overflow");
}
