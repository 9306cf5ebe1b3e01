//! What the tests of several kernels share: draws, and limits that WGSL gives ("Accuracy of Concrete Floating Point
//! Expressions").

use proptest::prelude::*;
use rwkv_core::real::sigmoid;
use rwkv_core::rng::SplitMix64;

/// Bounds a rounding, relatively: a sum or a product may round either way, hence be off by up to an ulp, which is at
/// most 2^-23 of the number. A quotient is off by 2.5 ulp, `inverseSqrt` by 2. A product that is fused with a sum
/// rounds less.
pub(super) const U: f64 = f32::EPSILON as f64;

/// What is smaller may be flushed to zero: 2^-126.
pub(super) const TINY: f64 = f32::MIN_POSITIVE as f64;

/// The error that `sigmoid.wgsl` states.
pub(super) fn sigmoid_error(x: f64) -> f64 {
    let units = if x < 0.0 { 6.5 - 2.0 * x } else { 5.1 };
    units * U * sigmoid(x) + TINY
}

pub(super) fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().copied().map(f64::from).collect()
}

pub(super) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Values of a normal distribution, one in 16 of them thirty times as large, as some channels of trained models are.
pub(super) fn values(rng: &mut SplitMix64, len: usize, scale: f32) -> Vec<f32> {
    let scale = |rng: &mut SplitMix64| if rng.next_u64().is_multiple_of(16) { 30.0 * scale } else { scale };
    (0..len).map(|_| scale(rng) * rng.normal()).collect()
}

/// What comes before a sigmoid: most of it where that bends, some where it is flat, beyond the range of `exp` too.
pub(super) fn logits(rng: &mut SplitMix64, len: usize) -> Vec<f32> {
    let draw = |rng: &mut SplitMix64| match rng.next_u64() % 16 {
        0 => 0.0,
        1 => rng.uniform(-100.0, 100.0),
        2 => rng.uniform(-1e30, 1e30),
        _ => rng.uniform(-12.0, 12.0),
    };
    (0..len).map(|_| draw(rng)).collect()
}

/// Fails at the first element that is off by more than its limit, and a thousandth for the products of errors, which
/// the limits leave out.
pub(super) fn compare(
    what: &str,
    got: &[f32],
    want: &[f64],
    limit: impl Fn(usize) -> f64,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(got.len(), want.len(), "{}: lengths", what);
    for i in 0..got.len() {
        let (error, limit) = ((f64::from(got[i]) - want[i]).abs(), 1.001 * limit(i));
        prop_assert!(
            error <= limit,
            "{what}[{i}]: {:e}, not {:e} within {limit:e}: {error:e}",
            got[i],
            want[i]
        );
    }
    Ok(())
}

/// The workgroups that were counted, and one alone, which walks over everything.
pub(super) fn grids(groups: [u32; 3]) -> [[u32; 3]; 2] {
    [groups, [1, 1, 1]]
}

/// Widths that are vectors of 4: less than a workgroup takes, as much, more.
pub(super) fn widths() -> impl Strategy<Value = usize> {
    prop_oneof![Just(4usize), Just(64), Just(256), (1..=150usize).prop_map(|n| 4 * n)]
}

/// Few cases: on a software driver each costs milliseconds.
pub(super) fn config(file: &'static str) -> ProptestConfig {
    ProptestConfig { cases: 48, ..ProptestConfig::with_source_file(file) }
}
