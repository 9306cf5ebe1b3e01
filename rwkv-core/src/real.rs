//! The number types: what the operations compute in, and what weights are stored in.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{AddAssign, MulAssign};

use half::slice::HalfFloatSliceExt as _;
use half::{bf16, f16};
use num_traits::Float;

/// What an operation computes in: `f32` in use, `f64` for error analysis.
pub trait Real: Float + AddAssign + MulAssign + Sum + Debug + Default + Send + Sync + 'static {
    /// Rounds a constant or a measured value to this type.
    fn of(value: f64) -> Self;

    /// Widens to `f64`, exactly.
    fn wide(self) -> f64;
}

impl Real for f32 {
    #[inline]
    #[expect(clippy::cast_possible_truncation, reason = "rounding is the point")]
    fn of(value: f64) -> Self {
        value as Self
    }

    #[inline]
    fn wide(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    #[inline]
    fn of(value: f64) -> Self {
        value
    }

    #[inline]
    fn wide(self) -> f64 {
        self
    }
}

/// What a weight is stored in. Widening to any [`Real`] is exact (`f64` weights exist for tests alone).
pub trait Weight: Copy + Debug + Default + Send + Sync + 'static {
    /// The stored value in the type that computes.
    fn widen<R: Real>(self) -> R;
}

impl Weight for f16 {
    #[inline]
    fn widen<R: Real>(self) -> R {
        R::of(self.to_f64())
    }
}

impl Weight for bf16 {
    #[inline]
    fn widen<R: Real>(self) -> R {
        R::of(self.to_f64())
    }
}

impl Weight for f32 {
    #[inline]
    fn widen<R: Real>(self) -> R {
        R::of(f64::from(self))
    }
}

impl Weight for f64 {
    #[inline]
    fn widen<R: Real>(self) -> R {
        R::of(self)
    }
}

/// The logistic function, `1 / (1 + exp(-x))`, without overflow on either side.
#[inline]
#[must_use]
pub fn sigmoid<R: Real>(x: R) -> R {
    let e = (-x.abs()).exp();
    if x >= R::zero() { R::one() / (R::one() + e) } else { e / (R::one() + e) }
}

/// Weights as stored: any of the types that checkpoints have.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// Single precision.
    F32(Vec<f32>),
    /// Half precision.
    F16(Vec<f16>),
    /// Brain float.
    BF16(Vec<bf16>),
}

/// Which of the types of [`Elements`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Brain float.
    BF16,
}

impl Elements {
    /// Their type.
    #[must_use]
    pub const fn element_type(&self) -> ElementType {
        match self {
            Self::F32(_) => ElementType::F32,
            Self::F16(_) => ElementType::F16,
            Self::BF16(_) => ElementType::BF16,
        }
    }

    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::F32(v) => v.len(),
            Self::F16(v) => v.len(),
            Self::BF16(v) => v.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that they take.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        match self {
            Self::F32(v) => v.len() * 4,
            Self::F16(v) => v.len() * 2,
            Self::BF16(v) => v.len() * 2,
        }
    }

    /// All of them, widened.
    #[must_use]
    pub fn widen<R: Real>(&self) -> Vec<R> {
        match self {
            Self::F32(v) => v.iter().map(|w| w.widen()).collect(),
            Self::F16(v) => v.iter().map(|w| w.widen()).collect(),
            Self::BF16(v) => v.iter().map(|w| w.widen()).collect(),
        }
    }

    /// All of them in single precision: as [`Self::widen`], several at a time.
    #[must_use]
    pub fn into_f32(self) -> Vec<f32> {
        let mut wide = vec![0.0; if let Self::F32(_) = self { 0 } else { self.len() }];
        match self {
            Self::F32(v) => return v,
            Self::F16(v) => v.convert_to_f32_slice(&mut wide),
            Self::BF16(v) => v.convert_to_f32_slice(&mut wide),
        }
        wide
    }
}

#[cfg(test)]
mod tests {
    use super::{Real, sigmoid};

    #[test]
    fn sigmoid_keeps_its_tail() {
        for x in [-90.0f32, -30.0, -1.0] {
            let want = f32::of(f64::from(x).exp() / (1.0 + f64::from(x).exp()));
            assert!((sigmoid(x) - want).abs() <= want * 1e-6 && want > 0.0, "{x}: {} {want}", sigmoid(x));
        }
        assert_eq!((sigmoid(200f32), sigmoid(-200f32)), (1.0, 0.0), "no overflow");
    }
}
