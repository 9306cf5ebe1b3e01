//! `softmax.wgsl` against [`rwkv_core::ops::softmax`] in `f64`.

use proptest::prelude::*;
use rwkv_core::ops::softmax::softmax;
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, MAX_GROUPS, VARIANTS, lower};
use crate::gpu::{Device, device_for_tests, variants_for_tests};
use crate::pipeline::Pipeline;

/// Logits `[T, V]`.
#[derive(Clone, Debug)]
struct Case {
    dims: Dims,
    logits: Vec<f32>,
}

impl Case {
    /// Rows of every spread, far from zero, of equals, with a peak, masked in part; one logit at least is finite.
    fn draw(rows: usize, vocab: usize, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let mut logits = Vec::new();
        for _ in 0..rows {
            let [spread, shift, hidden, peak] = [
                [0.0, 1.0, 3.0, 30.0, 1e30],
                [0.0, 0.0, 20.0, -1000.0, 1e6],
                [0.0, 0.0, 0.0, 0.2, 0.99],
                [0.0, 0.0, 10.0, 20.0, 200.0],
            ]
            .map(|of| of[usize::try_from(rng.next_u64() % 5).unwrap()]);
            let at = usize::try_from(rng.next_u64() % vocab as u64).unwrap();
            logits.extend((0..vocab).map(|j| match spread * rng.normal() + shift {
                x if j == at => x + peak,
                _ if rng.uniform(0.0, 1.0) < hidden => f32::NEG_INFINITY,
                x => x,
            }));
        }
        Self { dims: Dims { rows, vocab }, logits }
    }

    fn run(&self, device: &Device, kernel: &Pipeline) -> Vec<f32> {
        let (params, groups) = lower(self.dims).unwrap();
        let buffers = [self.logits.clone(), vec![f32::NAN; self.logits.len()]];
        let mut after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        let p = after.pop().unwrap();
        assert_eq!(after, buffers[..1], "the logits are untouched");
        p
    }

    /// The first probability that is off by more than its limit when `lanes` invocations share a row.
    ///
    /// Let `u = 2^-23` bound every rounding, relatively. With `d = x - max x`, which is off by `u |d|`, `exp d` is off by
    /// that and by its own `(3 + 2 |d|) u`: `e(d) = (3 + 3 |d|) u`. The sum is off by the mean of these, weighted with
    /// the probabilities, and by `m u`, where a term passes `m <= V / 4 lanes + 3 + lanes` additions; its reciprocal by
    /// 2.5 u (2.5 ulp), and the product by `u`. Together `e(d) + mean e + (m + 3.5) u` of the probability; a tenth more
    /// for the products of errors. What is below the normal numbers may be 0: `2^-126` is added.
    fn compare(&self, got: &[f32], lanes: usize) -> Result<(), String> {
        let (u, vocab) = (f64::from(f32::EPSILON), self.dims.vocab);
        assert_eq!(got.len(), self.logits.len(), "lengths");
        let m = (vocab.div_ceil(4 * lanes) + 3 + lanes) as f64;
        for (row, (x, got)) in self.logits.chunks(vocab).zip(got.chunks(vocab)).enumerate() {
            let x: Vec<f64> = x.iter().copied().map(f64::from).collect();
            let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let mut want = x.clone();
            softmax(&mut want);
            let off = |d: f64| (3.0 + 3.0 * d.abs()) * u;
            let weighted = |(x, p): (&f64, &f64)| if *p > 0.0 { p * off(x - top) } else { 0.0 };
            let mean: f64 = x.iter().zip(&want).map(weighted).sum();
            for j in 0..vocab {
                let of_p = if want[j] > 0.0 { off(x[j] - top) + mean + (m + 3.5) * u } else { 0.0 };
                let limit = 1.1 * want[j] * of_p + 0.5_f64.powi(126);
                let error = (f64::from(got[j]) - want[j]).abs();
                if error.is_nan() || error > limit {
                    return Err(format!("[{row}, {j}]: {:e}, not {:e} within {limit:e}", got[j], want[j]));
                }
            }
        }
        Ok(())
    }
}

/// Fewer logits than lanes, around whole rounds, and any.
fn vocabs() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1usize), Just(3), 255..=257usize, 1023..=1025usize, 1..=3000usize]
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 60, ..ProptestConfig::with_source_file(file!()) }
}

#[test]
fn agrees_with_its_twin() {
    for lanes in [1u16, 32, 256, 1024] {
        let variants = match device_for_tests() {
            Some(device) if device.capabilities().invocations >= lanes.into() => {
                variants_for_tests(VARIANTS, &[("LANES", lanes.into())])
            }
            _ => continue,
        };
        proptest!(config(), |(rows in 1..=6usize, vocab in vocabs(), seed: u64)| {
            let case = Case::draw(rows, vocab, seed);
            for (device, kernel) in &variants {
                case.compare(&case.run(device, kernel), lanes.into())
                    .map_err(|e| TestCaseError::fail(format!("{}, {lanes} lanes: {e}", kernel.kernel().label())))?;
            }
        });
    }
}

#[test]
fn agrees_with_its_twin_where_logits_are_many() {
    for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
        for seed in 0..4 {
            let case = Case::draw(2, 65_536 + 37, seed);
            case.compare(&case.run(device, kernel), 256).unwrap();
        }
    }
}

/// The numerics contract: the same call gives the same bits, and so does a row beside any others.
#[test]
fn a_row_has_its_bits_whatever_is_beside_it() {
    let variants = variants_for_tests(VARIANTS, &[]);
    let bits = |p: Vec<f32>| p.iter().map(|p| p.to_bits()).collect::<Vec<_>>();
    proptest!(config(), |(rows in 2..=6usize, picked in 0..6usize, vocab in vocabs(), seed: u64)| {
        let case = Case::draw(rows, vocab, seed);
        let row = picked % rows * vocab..(picked % rows + 1) * vocab;
        let alone = Case { dims: Dims { rows: 1, vocab }, logits: case.logits[row.clone()].to_vec() };
        for (device, kernel) in &variants {
            let all = bits(case.run(device, kernel));
            prop_assert_eq!(&all, &bits(case.run(device, kernel)), "again");
            prop_assert_eq!(&all[row.clone()], &bits(alone.run(device, kernel)), "alone");
        }
    });
}

/// Where every step is exact: equals, what is masked, and the largest and lowest that there are.
#[test]
fn masked_and_huge_logits() {
    let (masked, lowest, most) = (f32::NEG_INFINITY, f32::MIN, f32::MAX);
    for (logits, want) in [
        (&[masked, most, most][..], &[0.0, 0.5, 0.5][..]),
        (&[lowest, most], &[0.0, 1.0]),
        (&[lowest, masked, lowest], &[0.5, 0.0, 0.5]),
        (&[masked, -0.0, 0.0, masked, 0.0, -0.0], &[0.0, 0.25, 0.25, 0.0, 0.25, 0.25]),
        (&[3.0], &[1.0]),
    ] {
        let case = Case { dims: Dims { rows: 1, vocab: logits.len() }, logits: logits.to_vec() };
        for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
            let close = |(got, want): (&f32, &f32)| (got - want).abs() <= 8.0 * f32::EPSILON * want;
            let got = case.run(device, kernel);
            assert!(got.iter().zip(want).all(close), "{got:?}, not {want:?}");
        }
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let lowered = |rows, vocab| lower(Dims { rows, vocab }).map(|(params, groups)| (params.vocab, groups));
    assert_eq!(lowered(3, 65_536), Ok((65_536, [3, 1, 1])), "plain");
    assert_eq!(lowered(0, 7), Ok((7, [0, 1, 1])), "nothing to do");
    assert_eq!(lowered(1, 0), Err(Error::Empty), "no logits");
    assert_eq!(lowered(65_536, 1), Err(Error::Rows { got: 65_536, max: MAX_GROUPS }), "rows");
    assert!(lowered(2, (1 << 31) - 2048).is_ok(), "2^32 - 4096 logits");
    let far = (1 << 31) - 2047;
    assert_eq!(lowered(2, far), Err(Error::Vocab { rows: 2, vocab: far }), "2^32 - 4094 logits");
    assert_eq!(lowered(1, usize::MAX), Err(Error::Vocab { rows: 1, vocab: usize::MAX }), "no overflow");
}
