//! How a value between two stored ones becomes one of them.
//!
//! Rounded to nearest at every step, an entry that changes by less than half a unit per step freezes: a decay `w` with
//! `1 - w < 2^-12` is lost in half precision, and the true state decays away under a frozen copy. Three remedies, of
//! which one is enough: round seldom (store once per many steps), [`Rounding::Stochastic`] or [`Rounding::Dither`], or
//! add [`decay_dither`] to the decay.

use rwkv_core::rng::philox4x32;

/// How a value between two stored ones becomes one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// The nearest, the even one of two: at rest, or when stored seldom.
    #[default]
    Nearest,
    /// Upwards with a probability equal to the fraction (to within `2^-32`): unbiased. A pure function of the seed and
    /// the element's index; take another seed at each step.
    Stochastic {
        /// The key of the Philox generator, whose counter is the element's index.
        seed: u64,
    },
    /// Upwards when the fraction is above a threshold that walks evenly through `[0, 1)` from step to step and from
    /// element to element: over many steps unbiased, with less noise than random draws.
    Dither {
        /// How often this state has been stored.
        step: u32,
    },
}

/// `2^32 / golden ratio`: the multiplier of Fibonacci hashing (Knuth, The Art of Computer Programming, volume 3,
/// section 6.4). Its multiples fill the circle more evenly than those of any other constant.
const GOLDEN: u32 = 2_654_435_769;

impl Rounding {
    /// How far a result may be from its value, in units: bounds [`Rounding::round`].
    #[must_use]
    pub const fn units(self) -> f64 {
        match self {
            Self::Nearest => 0.5,
            Self::Stochastic { .. } | Self::Dither { .. } => 1.0,
        }
    }

    /// Rounds `magnitude >= 0`, the magnitude of element `index` counted in units of the stored format, to a whole
    /// number of them. Whole numbers, and zero, stay as they are.
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the phase counts modulo 2^32")]
    pub fn round(self, magnitude: f32, index: u64) -> f32 {
        let threshold = match self {
            Self::Nearest => return magnitude.round_ties_even(),
            Self::Stochastic { seed } => {
                let ([low, high], key) = (words(index), words(seed));
                philox4x32([low, high, 0, 0], key)[0]
            }
            Self::Dither { step } => phase(step, index as u32),
        };
        let whole = magnitude.floor();
        let fraction = f64::from(magnitude - whole) * 4_294_967_296.0;
        if f64::from(threshold) < fraction { whole + 1.0 } else { whole }
    }
}

/// What a stepping loop that stores its state in half precision adds to `w - 1` of a channel, in `[-2^-10, 2^-10]`:
///
/// ```text
/// S' = round(S + S * (w - 1 + dither) + ...)
/// ```
///
/// One unit of a half is `2^-11` to `2^-10` of its value, so that this moves `S` by up to one or two units, as often up
/// as down: its mean over the steps vanishes, and with it the freezing. `step` counts the tokens of the sequence.
///
/// It needs nothing but this addition, but it is not quite unbiased. Up to `h` units either way (`1 <= h < 2`, by the
/// place of `S` in its binade) cross 2 rounding boundaries, or 4 from `h = 1.5` on, so that a change of much less than a
/// unit comes out multiplied by `1 / h` or `2 / h`: by 2/3 to 4/3, and a decay through a whole binade takes
/// `0.75 / ln 2 = 1.08` times as long as it should. [`Rounding::Dither`] has no such bias.
///
/// The phase (steps plus channel), the multiplier `2654435769` and the scale `2^-41` are those of the half-precision
/// WKV kernels of Albatross, the RWKV authors' inference engine.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "a dither needs no more than the leading 24 bits")]
pub const fn decay_dither(step: u32, channel: u32) -> f32 {
    const SCALE: f32 = 1.0 / (1u64 << 41) as f32;
    phase(step, channel).cast_signed() as f32 * SCALE
}

/// The golden ratio's walk around the circle, in units of `2^-32` turns.
const fn phase(step: u32, index: u32) -> u32 {
    step.wrapping_add(index).wrapping_mul(GOLDEN)
}

/// The low and the high half.
#[expect(clippy::cast_possible_truncation, reason = "the halves")]
const fn words(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use half::f16;
    use proptest::prelude::*;

    use super::{Rounding, decay_dither, phase};

    proptest! {
        /// One of the two neighbours, whole numbers untouched, the same every time.
        #[test]
        fn never_strays_a_whole_unit(m in 0f32..4096.0, whole in 0u16..4096, seed: u64, step: u32, index: u64) {
            for rounding in [Rounding::Nearest, Rounding::Stochastic { seed }, Rounding::Dither { step }] {
                let got = rounding.round(m, index);
                prop_assert!(got == m.floor() || got == m.ceil(), "{:?}: {} to {}", rounding, m, got);
                prop_assert!(f64::from((got - m).abs()) <= rounding.units(), "{:?}: {} to {}", rounding, m, got);
                let whole = f32::from(whole);
                prop_assert_eq!(rounding.round(whole, index), whole, "{:?}", rounding);
                prop_assert_eq!(rounding.round(m, index), got, "{:?} is a pure function", rounding);
            }
        }

        /// The mean of `T` draws of a fraction `p` has the standard deviation `sqrt(p (1 - p) / T)`; six of them
        /// are exceeded once in 10^9.
        #[test]
        fn stochastic_is_unbiased(m in 0f32..100.0, start: u64, index: u64) {
            const DRAWS: u16 = 4096;
            let seeds = (0..DRAWS).map(|i| start.wrapping_add(u64::from(i)));
            let mean = seeds.map(|seed| f64::from(Rounding::Stochastic { seed }.round(m, index))).sum::<f64>()
                / f64::from(DRAWS);
            let p = f64::from(m.fract());
            let limit = 6.0 * (p * (1.0 - p) / f64::from(DRAWS)).sqrt() + 1.0 / f64::from(DRAWS);
            prop_assert!((mean - f64::from(m)).abs() <= limit, "{} to {} on average, limit {}", m, mean, limit);
        }

        /// Along the elements just as along the seeds: neighbours are drawn independently.
        #[test]
        fn stochastic_is_unbiased_along_a_row(m in 0f32..100.0, seed: u64, high: u32) {
            const DRAWS: u16 = 4096;
            let first = u64::from(high) << 32;
            let rounding = Rounding::Stochastic { seed };
            let mean = (0..DRAWS).map(|i| f64::from(rounding.round(m, first + u64::from(i)))).sum::<f64>()
                / f64::from(DRAWS);
            let p = f64::from(m.fract());
            let limit = 6.0 * (p * (1.0 - p) / f64::from(DRAWS)).sqrt() + 1.0 / f64::from(DRAWS);
            prop_assert!((mean - f64::from(m)).abs() <= limit, "{} to {} on average, limit {}", m, mean, limit);
        }

        /// The walk is far more even than chance: of `T` steps the share below any fraction is right to within
        /// `3 (1 + ln T) / T` (chance: `1 / sqrt T`).
        #[test]
        fn dither_is_even(m in 0f32..100.0, start in 0u32..u32::MAX - 4096, index in 0u64..1 << 31) {
            const STEPS: u16 = 4096;
            let steps = (0..STEPS).map(|i| start + u32::from(i));
            let mean = steps.map(|step| f64::from(Rounding::Dither { step }.round(m, index))).sum::<f64>()
                / f64::from(STEPS);
            let limit = 3.0 * (1.0 + f64::from(STEPS).ln()) / f64::from(STEPS);
            prop_assert!((mean - f64::from(m)).abs() <= limit, "{} to {} on average, limit {}", m, mean, limit);
        }
    }

    #[test]
    fn ties_and_whole_numbers() {
        let nearest = [0.5, 1.5, 2.5].map(|m| Rounding::Nearest.round(m, 0));
        assert_eq!(nearest, [0.0, 2.0, 2.0], "ties to even");
        assert_eq!(phase(0, 0), 0, "the lowest threshold");
        assert_eq!(Rounding::Dither { step: 0 }.round(5.0, 0), 5.0, "even that leaves whole numbers alone");
        assert_eq!(Rounding::Dither { step: 0 }.round(5.001, 0), 6.0, "and no others");
        assert_eq!(phase(1, 0), 0x9e37_79b9, "2^32 / 1.618...");
    }

    #[test]
    fn decay_dither_has_no_mean() {
        const STEPS: u16 = 1024;
        let mut reach = 0.0f32;
        for channel in 0..64 {
            let draws: Vec<f32> = (0..STEPS).map(|step| decay_dither(u32::from(step), channel)).collect();
            reach = draws.iter().fold(reach, |r, d| r.max(d.abs()));
            let mean = draws.iter().sum::<f32>() / f32::from(STEPS);
            assert!(mean.abs() < 0.01 * 2f32.powi(-10), "channel {channel}: {mean}");
        }
        assert!((0.99..=1.0).contains(&(reach * 1024.0)), "reaches {reach}, not 2^-10");
        assert_eq!(decay_dither(1, 0), decay_dither(0, 1), "the phase is step plus channel");
        assert_eq!(decay_dither(1, 0), -1_640_531_527.0 * 2f32.powi(-41), "the constants");
    }

    /// Why there is more than rounding to nearest: `S <- S w`, stored as a half at each step, with `1 - w = 1e-4`, less
    /// than half a unit of any half. After 4096 steps 0.664 of it should be left.
    #[test]
    fn what_nearest_freezes_the_others_let_decay() {
        const DECAY: f32 = -1e-4;
        const STEPS: u32 = 4096;
        let unit = |s: f32| super::super::exponent::power_of_two(super::super::exponent::binade(s) - 10);
        let store = |s: f32, rounding: Rounding, index| rounding.round(s / unit(s), index) * unit(s);
        let run = |index: u64, rounding: &dyn Fn(u32) -> Rounding, dither: &dyn Fn(u32) -> f32| {
            (0..STEPS).fold(1.7, |s, t| {
                let stored = store(s + s * (DECAY + dither(t)), rounding(t), index);
                assert_eq!(f16::from_f32(stored).to_f32(), stored, "a half holds it");
                stored
            })
        };
        let start = store(1.7, Rounding::Nearest, 0);
        assert_eq!(run(0, &|_| Rounding::Nearest, &|_| 0.0), start, "frozen");
        // What part of the decay that should be there is, on average over 64 channels.
        let part = |last: &dyn Fn(u32) -> f32| {
            let mean = (0..64).map(|i| f64::from(last(i))).sum::<f64>() / 64.0;
            (mean / f64::from(start)).ln() / (f64::from(STEPS) * f64::from(DECAY))
        };
        let stochastic = |t: u32| Rounding::Stochastic { seed: u64::from(t) };
        let got = part(&|i| run(u64::from(i), &stochastic, &|_| 0.0));
        assert!((0.98..1.02).contains(&got), "stochastic: {got}");
        let got = part(&|i| run(u64::from(i), &|step| Rounding::Dither { step }, &|_| 0.0));
        assert!((0.98..1.02).contains(&got), "dither: {got}");
        let got = part(&|i| run(0, &|_| Rounding::Nearest, &|t| decay_dither(t, i)));
        assert!((0.66..1.34).contains(&got), "decay dither: {got}");
        // Through a binade the documented 1.08 times as long.
        let steps = |channel| {
            let mut s = store(1.999, Rounding::Nearest, 0);
            let below_one = |&t: &u32| {
                s = store(s + s * (DECAY + decay_dither(t, channel)), Rounding::Nearest, 0);
                s <= 1.0
            };
            (0..).find(below_one).unwrap()
        };
        let mean = (0..64).map(|channel| f64::from(steps(channel))).sum::<f64>() / 64.0;
        let got = mean * f64::from(-DECAY) / 2f64.ln();
        assert!((1.05..1.11).contains(&got), "a binade of decay dither: {got}");
    }
}
