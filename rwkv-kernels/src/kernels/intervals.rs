//! What the tests of the fused kernels share: intervals that hold whatever rounding can do, weights in halves, buffers
//! of words.

use std::fmt::Debug;
use std::ops::{Add, Div, Mul, Sub};

use proptest::test_runner::TestCaseError;
use rwkv_core::Real;
use rwkv_core::ops::activation::Activation;
use rwkv_core::quant::{BLOCK, Blocks, Format};
use rwkv_core::real;
use rwkv_core::rng::SplitMix64;

use super::testing::{TINY, U};
use super::weights;
use crate::Kernel;
use crate::gpu::device_for_tests;

/// All that an expression may give in `f32` on any device, and its exact value.
///
/// Operations widen what they give by their error in WGSL, times `1 ulp <= U`; one of 2 ulp and more, whose result may
/// be in the binade below, by twice that. So a formula written in intervals is its own error analysis.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Interval {
    lo: f64,
    hi: f64,
}

impl Interval {
    pub(super) const ZERO: Self = Self { lo: 0.0, hi: 0.0 };

    /// Nothing but this `f32`.
    pub(super) fn exact(x: f32) -> Self {
        Self { lo: x.into(), hi: x.into() }
    }

    /// A constant, rounded to `f32`.
    pub(super) fn constant(x: f64) -> Self {
        Self { lo: x, hi: x }.off(1.0)
    }

    /// Off by so many roundings.
    fn off(self, roundings: f64) -> Self {
        assert!(self.lo <= self.hi, "{self:?}: of what is not defined");
        let by = |x: f64| x.abs() * roundings * U + TINY;
        Self { lo: self.lo - by(self.lo), hi: self.hi + by(self.hi) }
    }

    /// Of a function that never falls.
    fn map(self, f: impl Fn(f64) -> f64) -> Self {
        Self { lo: f(self.lo), hi: f(self.hi) }
    }

    pub(super) fn size(self) -> f64 {
        self.lo.abs().max(self.hi.abs())
    }

    pub(super) fn square(self) -> Self {
        let least = if self.lo <= 0.0 && self.hi >= 0.0 { 0.0 } else { self.lo.abs().min(self.hi.abs()) };
        Self { lo: least.powi(2), hi: self.size().powi(2) }.off(1.0)
    }

    /// Off by so much more.
    pub(super) fn widened(self, by: f64) -> Self {
        Self { lo: self.lo - by, hi: self.hi + by }
    }

    /// As a row is written: see [`packed`](super::packed).
    pub(super) fn rounded(self, exponent: Option<u8>) -> Self {
        let [lo, hi] = [self.lo, self.hi].map(|x| super::packed::tests::rounded(x, 0.0, exponent));
        Self { lo: lo.0 - lo.1, hi: hi.0 + hi.1 }
    }

    pub(super) fn max(self, least: Self) -> Self {
        Self { lo: self.lo.max(least.lo), hi: self.hi.max(least.hi) }
    }

    /// Of what is not negative: 2 ulp and a division.
    pub(super) fn sqrt(self) -> Self {
        self.map(|x| x.max(0.0).sqrt()).off(9.0)
    }

    /// Of what is positive: 2 ulp.
    pub(super) fn inverse_sqrt(self) -> Self {
        Self { lo: self.hi, hi: self.lo }.map(|x| 1.0 / x.sqrt()).off(4.0)
    }

    /// Of what is positive, as all that is divided by here.
    pub(super) fn recip(self) -> Self {
        Self { lo: self.hi, hi: self.lo }.map(|x| 1.0 / x).off(5.0)
    }

    /// `1 / (1 + exp(-x))`: `exp` is off by `3 + 2 |x|` ulp, of which the share of `exp(-x)` in the sum stays, `1 - s`;
    /// then come a sum and a division.
    pub(super) fn sigmoid(self) -> Self {
        let s = self.map(real::sigmoid);
        s.off((1.0 - s.lo) * (3.0 + 2.0 * self.size()) * 2.0 + 6.0)
    }

    /// Within what `expm1.wgsl` states.
    pub(super) fn exp_m1(self) -> Self {
        self.map(f64::exp_m1).off(2.8e-7 / U)
    }

    /// As WGSL has it, off by 1e-5.
    fn tanh(self) -> Self {
        Self { lo: self.lo.tanh() - 1e-5, hi: self.hi.tanh() + 1e-5 }
    }

    pub(super) fn activated(self, by: Activation) -> Self {
        match by {
            Activation::Identity => self,
            Activation::Tanh => self.tanh(),
            Activation::Sigmoid => self.sigmoid(),
            Activation::SquaredRelu => self.max(Self::ZERO).square(),
        }
    }

    /// Whether it holds `x`, which is finite then.
    fn holds(self, x: f64) -> bool {
        self.lo <= x && x <= self.hi && x.is_finite()
    }
}

impl Debug for Interval {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:e} +- {:e}", f64::midpoint(self.lo, self.hi), (self.hi - self.lo) / 2.0)
    }
}

impl Add for Interval {
    type Output = Self;
    fn add(self, x: Self) -> Self {
        Self { lo: self.lo + x.lo, hi: self.hi + x.hi }.off(1.0)
    }
}

impl Sub for Interval {
    type Output = Self;
    fn sub(self, x: Self) -> Self {
        Self { lo: self.lo - x.hi, hi: self.hi - x.lo }.off(1.0)
    }
}

impl Mul for Interval {
    type Output = Self;
    fn mul(self, x: Self) -> Self {
        let ends = [self.lo * x.lo, self.lo * x.hi, self.hi * x.lo, self.hi * x.hi];
        let (lo, hi) = (ends.into_iter().fold(f64::MAX, f64::min), ends.into_iter().fold(f64::MIN, f64::max));
        Self { lo, hi }.off(1.0)
    }
}

/// By a count: 2.5 ulp.
impl Div<usize> for Interval {
    type Output = Self;
    fn div(self, n: usize) -> Self {
        self.map(|x| x / n as f64).off(5.0)
    }
}

/// A sum before it is known in which order it was taken.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum {
    lo: f64,
    hi: f64,
    size: f64,
}

impl Sum {
    /// Of an order in which no term passes more than so many additions (of something: adding a zero is exact), each of
    /// them off by `U` of a sum that is at most as large as all terms together.
    pub(super) fn by(self, additions: usize) -> Interval {
        let off = self.size * additions as f64 * U;
        Interval { lo: self.lo - off, hi: self.hi + off }
    }
}

impl FromIterator<Interval> for Sum {
    fn from_iter<I: IntoIterator<Item = Interval>>(terms: I) -> Self {
        terms.into_iter().fold(Self::default(), |sum, x| Self {
            lo: sum.lo + x.lo,
            hi: sum.hi + x.hi,
            size: sum.size + x.size(),
        })
    }
}

/// The mean and the variance of a row as `row_moments.wgsl` and its variant have them, whatever the parts.
///
/// A term of a part's mean passes at most two additions in its four and one for each of the `n / 4 - 1` others, there or where
/// the parts are joined; a square, which `dot` adds, three in its four: `2 + n / 4` are enough for both. A division for the part
/// and one for the row (2.5 ulp each) and a product come to eleven more. So all means are off by no more than
/// `d = (13 + n / 4) U max |x|`, and what parts of `p` elements differ from the row's mean, `a` exactly, by `2 d`. The squares
/// then sum to `sum s + p d^2 + p (|a| + 2 d)^2` at most where `sum s + p a^2 = n V` is wanted, and `sum p |a| <= n sqrt V`:
/// `V` is off by `4 d sqrt V + 5 d^2`, and by the roundings of its own sum, to which come that of what is squared, twice, those
/// of the square, of a product and a sum, and of the division, five.
pub(super) fn row_moments(row: &[f32]) -> [Interval; 2] {
    let n = row.len() as f64;
    let additions = 2.0 + n / 4.0;
    let mean = row.iter().copied().map(f64::from).sum::<f64>() / n;
    let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    let largest = row.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let d = (additions + 11.0) * U * f64::from(largest);
    let at = |x| Interval { lo: x, hi: x };
    let variance = at(variance).widened(4.0 * d * variance.sqrt() + 5.0 * d * d).max(Interval::ZERO);
    [at(mean).widened(d + TINY), variance.off(additions + 10.0)]
}

/// Fails unless each interval holds its number.
pub(super) fn held<R: Real>(what: &str, got: &[R], want: &[Interval]) -> Result<(), TestCaseError> {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    match got.iter().zip(want).position(|(got, want)| !want.holds(got.wide())) {
        Some(i) => Err(TestCaseError::fail(format!("{what}[{i}]: {:?} is not {:?}", got[i], want[i]))),
        None => Ok(()),
    }
}

/// Weights as the kernels read them.
#[derive(Clone, Debug)]
pub(super) struct Halves(Vec<u16>);

impl Halves {
    /// Of sizes up to 2 and down to 2^-7, and one in sixteen below the normal halves.
    pub(super) fn draw(rng: &mut SplitMix64, len: usize) -> Self {
        let draw = |_| {
            let bits = rng.next_u64().to_le_bytes();
            let exponent = if bits[2].is_multiple_of(16) { 0 } else { 8 + u16::from(bits[3] % 8) };
            u16::from_le_bytes([bits[0], bits[1]]) & 0x83FF | exponent << 10
        };
        Self((0..len).map(draw).collect())
    }

    /// What they are.
    pub(super) fn values(&self) -> Vec<f32> {
        let value = |half: &u16| {
            let (exponent, fraction) = (i32::from(half >> 10 & 31), f32::from(half & 0x3FF));
            let size = match exponent {
                0 => fraction * 2f32.powi(-24),
                _ => (1024.0 + fraction) * 2f32.powi(exponent - 25),
            };
            if half >> 15 == 1 { -size } else { size }
        };
        self.0.iter().map(value).collect()
    }

    /// Two to a word.
    pub(super) fn words(&self) -> Vec<u32> {
        self.0.chunks_exact(2).map(|two| u32::from(two[0]) | u32::from(two[1]) << 16).collect()
    }

    /// Makes some of them NaN.
    pub(super) fn poison(&mut self, which: std::ops::Range<usize>) {
        self.0[which].fill(0x7FFF);
    }
}

/// A matrix as the kernels read it.
#[derive(Clone, Debug)]
pub(super) enum Weights {
    Halves { columns: usize, of: Halves },
    Blocks(Blocks),
}

impl Weights {
    /// Of any size a block, some of zeros and some with an outlier.
    pub(super) fn draw(rng: &mut SplitMix64, format: Option<Format>, [rows, columns]: [usize; 2]) -> Self {
        let Some(format) = format else {
            return Self::Halves { columns, of: Halves::draw(rng, rows * columns) };
        };
        let mut values: Vec<f32> = (0..rows * columns).map(|_| rng.normal()).collect();
        for block in values.chunks_mut(BLOCK) {
            let scale = if below(rng, 8) == 0 { 0.0 } else { rng.uniform(-24.0, 2.0).exp2() };
            block.iter_mut().for_each(|w| *w *= scale);
            block[0] *= if below(rng, 4) == 0 { 30.0 } else { 1.0 };
        }
        Self::Blocks(Blocks::encode(format, columns, &values).unwrap())
    }

    /// What they are.
    pub(super) fn values(&self) -> Vec<f32> {
        match self {
            Self::Halves { of, .. } => of.values(),
            Self::Blocks(blocks) => blocks.decode().weights().to_vec(),
        }
    }

    pub(super) fn words(&self) -> Vec<u32> {
        match self {
            Self::Halves { of, .. } => {
                let mut words = of.words();
                words.resize(words.len().next_multiple_of(4), 0); // the next matrix begins with an element
                words
            }
            Self::Blocks(blocks) => {
                weights::bytes(blocks).as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
            }
        }
    }

    /// Words, with some rows NaN: of blocks the scales.
    pub(super) fn poisoned(&self, rows: impl Iterator<Item = usize>) -> Vec<u32> {
        match self {
            Self::Halves { columns, of } => {
                let mut of = of.clone();
                rows.for_each(|row| of.poison(row * columns..(row + 1) * columns));
                of.words()
            }
            Self::Blocks(blocks) => {
                let mut words = self.words();
                let (start, len) = (blocks.weights().len() / 2, blocks.row_blocks());
                for half in rows.flat_map(|row| start + row * len..start + (row + 1) * len) {
                    words[half / 2] |= 0x7FFF << (half % 2 * 16);
                }
                words
            }
        }
    }

    /// Additions that a product of a row passes in a kernel, at most: in its element, for its scale, and one for each of
    /// the row's other elements.
    pub(super) fn additions(&self, columns: usize) -> usize {
        match self {
            Self::Halves { .. } => 4 + columns / 8,
            Self::Blocks(_) => 8 + columns / 16,
        }
    }

    /// The product of a row of them with a vector as `own_columns.wgsl` has it: of blocks, each of the vector loses a unit,
    /// of which the largest in its block has 32,512, or 16 times the smallest float if that is more. What that is made with, powers of two,
    /// two quotients and two products, is off by twice 5 ulp and by 2: less than 2^-19 of it.
    pub(super) fn product(&self, row: &[Interval], x: &[Interval]) -> Interval {
        let sum: Sum = row.iter().zip(x).map(|(&w, &x)| w * x).collect();
        let sum = sum.by(self.additions(row.len()));
        match self {
            Self::Halves { .. } => sum,
            Self::Blocks(_) => {
                let lost = row.chunks(BLOCK).zip(x.chunks(BLOCK)).map(|(row, x)| {
                    let largest = x.iter().fold(0.0, |largest, x| x.size().max(largest));
                    (largest * (1.0 / 32512.0 + f64::from(-19).exp2()) + 16.0 * TINY)
                        * row.iter().map(|w| w.size()).sum::<f64>()
                });
                sum.widened(lost.sum())
            }
        }
    }
}

/// Every format of weights.
pub(super) const FORMATS: [Option<Format>; 3] = [None, Some(Format::Int8), Some(Format::Int4)];

/// Any number below `n`.
pub(super) fn below(rng: &mut SplitMix64, n: u32) -> u32 {
    u32::try_from(rng.next_u64() % u64::from(n)).unwrap()
}

pub(super) fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|&bits| f32::from_bits(bits)).collect()
}

pub(super) fn exact(x: &[f32]) -> Vec<Interval> {
    x.iter().copied().map(Interval::exact).collect()
}

/// The variants that may have so many lanes: beyond WebGPU's 256, those that need more than WebGPU, where the device
/// grants it.
pub(super) fn of_lanes(variants: &[Kernel], lanes: u32) -> Vec<Kernel> {
    let granted = device_for_tests().map_or(0, |device| device.capabilities().invocations);
    let may = |kernel: &&Kernel| lanes <= 256 || kernel.features.subgroup && lanes <= granted;
    variants.iter().filter(may).copied().collect()
}
