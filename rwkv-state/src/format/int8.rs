//! Rows of bytes, a scale for every 16 of them, and a power-of-two [exponent](super::exponent) for the row.
//!
//! ```text
//! y[j]   = x[j] * 2^-e
//! s      = max over the block |y| / 127, rounded up to a half
//! q[j]   = round(y[j] / s)                 in [-127, 127]; all 0 where s is 0
//! x'[j]  = q[j] * s * 2^e
//! ```
//!
//! Because `s` is rounded up, `127 s` reaches the block's largest magnitude and no `q` is cut off. The exponent costs a
//! byte per row (1.4 % at 64 columns) and buys every finite `f32`: without it a scale would overflow at magnitudes of
//! 8.3e6 and lose its precision below 8e-3. The last block of a row is shorter where 16 does not divide its length.
//!
//! For states at rest, and bases that are stored seldom: a change of less than half a unit, `1/254` of the block's
//! largest magnitude, is lost to rounding to nearest at every step, unless [`encode_with_feedback`] carries it over.

use half::f16;
use rwkv_core::fast::vectorised;

use super::Fault;
use super::exponent::{NotFinite, RANGE, fresh, largest, lower, magnitude, raise};
use super::rounding::Rounding;

/// Consecutive elements of a row that share a scale.
pub const BLOCK: usize = 16;

/// Elements that are worked on at a time: blocks alone are too short for vectors.
const AT_ONCE: usize = 4 * BLOCK;

/// Encodes a row and returns its exponent. `scales` holds one for each [`BLOCK`]; `first` is the index of the row's
/// first element in its state, of which [`Rounding::Stochastic`] and [`Rounding::Dither`] are functions.
///
/// # Errors
///
/// If a value is not finite.
///
/// # Panics
///
/// If the slices' lengths disagree.
pub fn encode(
    row: &[f32],
    rounding: Rounding,
    first: u64,
    values: &mut [i8],
    scales: &mut [f16],
) -> Result<i8, NotFinite> {
    check_lengths(row, values, scales);
    match rounding {
        Rounding::Nearest => vectorised(
            #[inline(always)]
            || encode_by(|units, _| units.round_ties_even(), row, values, scales),
        ),
        _ => encode_by(
            |units, index| rounding.round(units, first.wrapping_add(index as u64)),
            row,
            values,
            scales,
        ),
    }
}

/// As [`encode`]; `round` rounds the units of the element of an index.
#[inline(always)]
fn encode_by(
    round: impl Fn(f32, usize) -> f32,
    row: &[f32],
    values: &mut [i8],
    scales: &mut [f16],
) -> Result<i8, NotFinite> {
    let exponent = fresh(largest(row)?);
    let mut each = [0.0; AT_ONCE];
    let stretches =
        row.chunks(AT_ONCE).zip(values.chunks_mut(AT_ONCE)).zip(scales.chunks_mut(AT_ONCE / BLOCK));
    for (((row, values), scales), first) in stretches.zip((0..).step_by(AT_ONCE)) {
        for ((block, stored), each) in row.chunks(BLOCK).zip(scales).zip(each.chunks_mut(BLOCK)) {
            let largest = block.iter().fold(0, |largest, &x| magnitude(lower(x, exponent)).max(largest));
            *stored = scale_of(f32::from_bits(largest));
            each.fill(stored.to_f32());
        }
        encode_stretch(&round, first, row, exponent, &each, values);
    }
    Ok(exponent)
}

/// Encodes elements, of which the first has index `first`, by the scale of each.
#[inline(always)]
#[expect(
    clippy::cast_possible_truncation,
    reason = "at most 127 units, since 127 scales reach the largest magnitude; of zeros 0 / 0, which is cast to 0"
)]
fn encode_stretch(
    round: impl Fn(f32, usize) -> f32,
    first: usize,
    row: &[f32],
    exponent: i8,
    scales: &[f32],
    values: &mut [i8],
) {
    for (j, ((&x, &scale), value)) in row.iter().zip(scales).zip(values).enumerate() {
        let y = lower(x, exponent);
        *value = round(y.abs() / scale, first + j).copysign(y) as i32 as i8;
    }
}

/// Encodes `row + residual` and leaves in `residual` what that lost, so that no change is ever lost for good: over any
/// number of steps the errors add up to no more than the last residual, but for the rounding of `f32` sums.
///
/// # Errors
///
/// If a value or a residual is not finite; the residual is then as it was.
///
/// # Panics
///
/// If the slices' lengths disagree.
pub fn encode_with_feedback(
    row: &[f32],
    residual: &mut [f32],
    rounding: Rounding,
    first: u64,
    values: &mut [i8],
    scales: &mut [f16],
) -> Result<i8, NotFinite> {
    assert_eq!(row.len(), residual.len(), "lengths of the row and its residual");
    largest(row)?;
    largest(residual)?;
    let sums = row.iter().zip(&*residual).map(|(x, r)| (x + r).clamp(f32::MIN, f32::MAX));
    let target: Vec<f32> = sums.collect();
    let exponent = encode(&target, rounding, first, values, scales)?;
    decode(values, scales, exponent, residual);
    for (r, x) in residual.iter_mut().zip(target) {
        *r = x - *r;
    }
    Ok(exponent)
}

/// Decodes a row.
///
/// # Panics
///
/// If the slices' lengths disagree.
pub fn decode(values: &[i8], scales: &[f16], exponent: i8, row: &mut [f32]) {
    check_lengths(row, values, scales);
    vectorised(
        #[inline(always)]
        || {
            let mut each = [0.0; AT_ONCE];
            let stretches = row.chunks_mut(AT_ONCE).zip(values.chunks(AT_ONCE));
            for ((row, values), scales) in stretches.zip(scales.chunks(AT_ONCE / BLOCK)) {
                for (each, scale) in each.chunks_mut(BLOCK).zip(scales) {
                    each.fill(scale.to_f32());
                }
                for ((x, &value), scale) in row.iter_mut().zip(values).zip(&each) {
                    *x = raise(f32::from(value) * scale, exponent);
                }
            }
        },
    );
}

/// Bounds the error of every element of a block, from the largest magnitudes of the block and of its row:
///
/// ```text
/// step     = block / 127 * (1 + 2^-10) + max(2^-30 row, 2^-150)
/// |x' - x| <= (u + 2^-16) * step + 2^-150        u = 1/2 to nearest, 1 otherwise
/// ```
///
/// Rounding a scale up costs at most `2^-10` of it, or `2^-24 * 2^e` where it is a subnormal half, and a fresh exponent
/// has `2^e <= 2^-6 row`, or is at its lower end -126. `2^-16` is for the rounding of `y / s` itself (at most `2^-24`
/// of 127), the last term for a result that is a subnormal `f32`.
#[must_use]
pub fn error_bound(block_largest: f32, row_largest: f32, rounding: Rounding) -> f64 {
    let (block, row) = (f64::from(block_largest), f64::from(row_largest));
    let step = block / 127.0 * (1.0 + 2f64.powi(-10)) + (2f64.powi(-30) * row).max(2f64.powi(-150));
    (rounding.units() + 2f64.powi(-16)) * step + 2f64.powi(-150)
}

/// The least half of which 127 reach `largest`, a scaled magnitude below `2^7`.
#[inline(always)]
fn scale_of(largest: f32) -> f16 {
    let nearest = f16::from_f32(largest / 127.0);
    // The product is exact: 11 bits times 7.
    let short = nearest.to_f32() * 127.0 < largest;
    if short { f16::from_bits(nearest.to_bits() + 1) } else { nearest }
}

fn check_lengths(row: &[f32], values: &[i8], scales: &[f16]) {
    assert_eq!(row.len(), values.len(), "lengths of the row and its bytes");
    assert_eq!(row.len().div_ceil(BLOCK), scales.len(), "a scale for each block");
}

/// Whether a row is one that [`encode`] could have written: then it decodes to finite values. Else where, and what is
/// wrong.
pub(super) fn check(values: &[i8], scales: &[f16], exponent: i8) -> Result<(), (usize, Fault)> {
    if !RANGE.contains(&exponent) {
        return Err((0, Fault::Exponent { exponent }));
    }
    if let Some(b) = scales.iter().position(|s| !s.is_finite() || s.is_sign_negative()) {
        return Err((b * BLOCK, Fault::Scale { scale: scales[b].to_f32() }));
    }
    let bad = values.iter().position(|&v| v == i8::MIN);
    bad.map_or(Ok(()), |j| Err((j, Fault::Byte)))
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::super::draw;
    use super::super::exponent::largest;
    use super::{BLOCK, Rounding, decode, encode, encode_with_feedback, error_bound, scale_of};

    struct Row {
        values: Vec<i8>,
        scales: Vec<f16>,
    }

    impl Row {
        fn new(n: usize) -> Self {
            Self { values: vec![i8::MIN; n], scales: vec![f16::NAN; n.div_ceil(BLOCK)] }
        }

        fn decode(&self, exponent: i8) -> Vec<f32> {
            let mut back = vec![f32::NAN; self.values.len()];
            decode(&self.values, &self.scales, exponent, &mut back);
            back
        }
    }

    fn store(row: &[f32], rounding: Rounding) -> Vec<f32> {
        let mut stored = Row::new(row.len());
        let exponent = encode(row, rounding, 0, &mut stored.values, &mut stored.scales).unwrap();
        stored.decode(exponent)
    }

    fn store_with_feedback(row: &[f32], residual: &mut [f32]) -> Vec<f32> {
        let mut stored = Row::new(row.len());
        let (values, scales) = (&mut stored.values, &mut stored.scales);
        let exponent = encode_with_feedback(row, residual, Rounding::Nearest, 0, values, scales).unwrap();
        stored.decode(exponent)
    }

    proptest! {
        #[test]
        fn within_the_bound(row in draw::row(0..80), seed: u64, step: u32) {
            let row_largest = largest(&row).unwrap();
            for rounding in [Rounding::Nearest, Rounding::Stochastic { seed }, Rounding::Dither { step }] {
                let back = store(&row, rounding);
                for (block, back) in row.chunks(BLOCK).zip(back.chunks(BLOCK)) {
                    let bound = error_bound(largest(block).unwrap(), row_largest, rounding);
                    for (&x, &got) in block.iter().zip(back) {
                        let error = (f64::from(got) - f64::from(x)).abs();
                        prop_assert!(got.is_finite() && error <= bound, "{:?}: {} to {}", rounding, x, got);
                        prop_assert!(x != 0.0 || got == 0.0, "{:?}: zero stays zero, not {}", rounding, got);
                    }
                }
            }
        }

        /// No byte is cut off, and the largest magnitude of a block takes all of its range.
        #[test]
        fn the_range_is_used(row in prop::collection::vec(-1e4f32..1e4, 1..40)) {
            let mut stored = Row::new(row.len());
            encode(&row, Rounding::Nearest, 0, &mut stored.values, &mut stored.scales).unwrap();
            prop_assert!(stored.values.iter().all(|&q| q != i8::MIN), "symmetric");
            for (block, values) in row.chunks(BLOCK).zip(stored.values.chunks(BLOCK)) {
                let most = values.iter().map(|q| q.unsigned_abs()).max().unwrap();
                prop_assert!(most == 127 || largest(block).unwrap() < 1e-2, "{} of 127", most);
            }
        }

        /// The least that reaches, for every magnitude that a scaled row can have.
        #[test]
        fn scales_round_up(bits in 0u32..0x4300_0000) {
            let most = f32::from_bits(bits);
            let scale = scale_of(most);
            prop_assert!(scale.is_finite() && scale.to_f32() * 127.0 >= most, "{} of {}", scale, most);
            let below = scale.to_bits().checked_sub(1).map(f16::from_bits);
            prop_assert!(below.is_none_or(|s| s.to_f32() * 127.0 < most), "less than {} does for {}", scale, most);
        }

        /// A constant signal stored again and again: with feedback the errors of all steps together are no more than
        /// the residual that is left; without it each step makes the same one.
        #[test]
        fn feedback_bounds_the_sum_of_errors(row in prop::collection::vec(-1e3f32..1e3, 1..40)) {
            const STEPS: u16 = 200;
            let row_largest = largest(&row).unwrap();
            let (mut residual, mut sums) = (vec![0.0; row.len()], vec![0.0f64; row.len()]);
            for _ in 0..STEPS {
                let back = store_with_feedback(&row, &mut residual);
                for ((sum, got), x) in sums.iter_mut().zip(back).zip(&row) {
                    *sum += f64::from(got) - f64::from(*x);
                }
            }
            // A residual may lift a block's largest magnitude by itself, and each of the f32 sums rounds once.
            let bound = error_bound(row_largest, row_largest, Rounding::Nearest);
            let bound = bound * (1.0 + 1.0 / 127.0) + f64::from(STEPS) * f64::from(row_largest) * 2f64.powi(-23);
            for (sum, r) in sums.iter().zip(&residual) {
                prop_assert!(sum.abs() <= bound && f64::from(r.abs()) <= bound, "{} and {}, not {}", sum, r, bound);
            }
        }

        /// Any finite row with any residual that came of it: still finite.
        #[test]
        fn feedback_stays_finite(row in draw::row(1..40)) {
            let mut residual = vec![0.0; row.len()];
            for _ in 0..4 {
                let back = store_with_feedback(&row, &mut residual);
                prop_assert!(back.iter().chain(&residual).all(|v| v.is_finite()), "{:?}", residual);
            }
        }
    }

    /// An entry that should grow by a tenth of a unit per step, beside one that holds the block's scale.
    #[test]
    fn feedback_keeps_the_drift_that_rounding_loses() {
        const STEPS: u16 = 100;
        let unit = 1.0; // 127 units to the largest magnitude
        let drift = 0.1 * unit;
        let run = |residual: Option<&mut [f32]>| {
            let mut state = vec![127.0, 10.0];
            let mut residual = residual;
            for _ in 0..STEPS {
                state[1] += drift;
                state = match residual.as_deref_mut() {
                    Some(residual) => store_with_feedback(&state, residual),
                    None => store(&state, Rounding::Nearest),
                };
            }
            state[1]
        };
        assert_eq!(run(None), 10.0, "frozen: each step's tenth is rounded away");
        let with = run(Some(&mut [0.0; 2]));
        assert!((with - (10.0 + drift * f32::from(STEPS))).abs() <= unit, "{with}");
    }

    #[test]
    fn elements_draw_by_their_index() {
        let mut row = [1.0; 2 * BLOCK];
        (row[0], row[BLOCK]) = (200.0, 200.0);
        let rounding = Rounding::Stochastic { seed: 7 };
        let store = |row: &[f32], first| {
            let mut stored = Row::new(row.len());
            encode(row, rounding, first, &mut stored.values, &mut stored.scales).unwrap();
            stored.values
        };
        let whole = store(&row, 1000);
        assert_eq!(
            whole[BLOCK..],
            store(&row[BLOCK..], 1016),
            "the same elements, wherever the slice begins"
        );
        assert_ne!(whole[..BLOCK], whole[BLOCK..], "equal blocks are drawn independently");
    }

    /// A residual on top of the largest `f32` saturates.
    #[test]
    fn feedback_does_not_overflow() {
        let mut residual = [1e36, -1e36];
        assert_eq!(
            store_with_feedback(&[f32::MAX, f32::MIN], &mut residual),
            [f32::MAX, f32::MIN],
            "saturated"
        );
        assert_eq!(residual, [0.0; 2], "nothing is left of it");
    }

    #[test]
    fn the_drift_of_a_constant_error_without_feedback() {
        let row = [127.0, 10.4];
        let sum: f32 = (0..100).map(|_| store(&row, Rounding::Nearest)[1] - row[1]).sum();
        assert!((sum + 40.0).abs() < 0.1, "a hundred times -0.4, not {sum}");
    }

    #[test]
    fn what_is_not_finite_is_an_error() {
        let mut stored = Row::new(2);
        let error =
            encode(&[0.0, f32::INFINITY], Rounding::Nearest, 0, &mut stored.values, &mut stored.scales);
        assert_eq!(error.unwrap_err().index, 1, "where");
        for (row, residual, index) in
            [([f32::INFINITY, 0.0], [0.0; 2], 0), ([0.0; 2], [0.0, f32::INFINITY], 1)]
        {
            let mut r = residual;
            let (values, scales) = (&mut stored.values, &mut stored.scales);
            let got = encode_with_feedback(&row, &mut r, Rounding::Nearest, 0, values, scales);
            assert_eq!(got.unwrap_err().index, index, "where");
            assert_eq!(r, residual, "as it was");
        }
    }
}
