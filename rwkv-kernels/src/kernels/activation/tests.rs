//! `activation.wgsl` against [`rwkv_core::ops::activation`] in `f64`, and the codes of its helper.

use proptest::prelude::*;
use rwkv_core::ops::activation::Activation;
use rwkv_core::rng::SplitMix64;

use super::{Error, VARIANTS, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::MAX_GROUPS;
use crate::kernels::layer_norm::tests::compare;
use crate::pipeline::Pipeline;

/// Each of them, under its name in the WGSL.
pub(in crate::kernels) const ALL: [(&str, Activation); 4] = [
    ("IDENTITY", Activation::Identity),
    ("TANH", Activation::Tanh),
    ("SIGMOID", Activation::Sigmoid),
    ("SQUARED_RELU", Activation::SquaredRelu),
];

/// How far off the activation of `x` may be, where `x` itself is off by up to `e`.
///
/// Let `u = 2^-23` bound every rounding and every ulp, relatively. By the WGSL specification (section "Accuracy of
/// Concrete Floating Point Expressions") `exp(x)` is off by `3 + 2 |x|` ulp, `E = (3 + 2 |x|) u`; a division by 2.5 ulp,
/// at most 5 u; `tanh` is as good as `sinh / cosh` and those as `(exp(x) -+ exp(-x)) / 2`:
///
/// - tanh, `t` its absolute value: numerator and denominator are both off by `(E + u) cosh(x)` at most, the quotient by
///   `(E + u) (1 + t) + 5 u t`. Arguments are cut off at 10, where 1 - t is 4.2e-9 and E no larger than 23 u.
/// - sigmoid, `s` its value: as `1 / (1 + exp(-x))` and as `exp(x) / (1 + exp(x))` alike, an error of the exponential
///   reaches the quotient by a factor `1 - s`, and there are a sum and a division: `s (E (1 - s) + 6 u)`. What is less
///   than the least normal number may be flushed to zero.
/// - squared `ReLU`: one product, `u` of itself.
///
/// `e` passes at most by their slopes: 1, 1 / 4, and `2 |x| + e`. A tenth more for the products of errors.
pub(in crate::kernels) fn limit(activation: Activation, x: f64, e: f64) -> f64 {
    let u = f64::from(f32::EPSILON);
    let of_exp = |x: f64| (3.0 + 2.0 * x.abs()) * u;
    let own = match activation {
        Activation::Identity => e,
        Activation::Tanh => {
            let t = x.tanh().abs();
            (of_exp(x.clamp(-10.0, 10.0)) + u) * (1.0 + t) + 5.0 * u * t + 4.2e-9 + e
        }
        Activation::Sigmoid => {
            let s = rwkv_core::real::sigmoid(x);
            let rest = rwkv_core::real::sigmoid(-x);
            s * (of_exp(x) * rest + 6.0 * u) + 2.0 * f64::from(f32::MIN_POSITIVE) + e / 4.0
        }
        Activation::SquaredRelu => {
            let positive = x.max(0.0);
            u * positive * positive + (2.0 * positive + e) * e
        }
    };
    1.1 * own
}

fn run(device: &Device, kernel: &Pipeline, activation: Activation, x: &[f32]) -> Vec<f32> {
    let (params, groups) = lower(x.len(), activation).unwrap();
    device.run(kernel, bytemuck::bytes_of(&params), &[x.to_vec()], groups).unwrap().remove(0)
}

fn check(device: &Device, kernel: &Pipeline, activation: Activation, x: &[f32]) -> Result<(), String> {
    let mut want: Vec<f64> = x.iter().copied().map(f64::from).collect();
    let limits: Vec<f64> = want.iter().map(|&x| limit(activation, x, 0.0)).collect();
    activation.apply(&mut want);
    let got = run(device, kernel, activation, x);
    compare(&got, &want, &limits).map_err(|e| format!("{activation:?}{e}"))
}

/// Lengths beside a multiple of the workgroup, values of every size.
#[test]
fn agrees_with_its_twin() {
    let variants = variants_for_tests(VARIANTS, &[]);
    let config = ProptestConfig { cases: 32, ..ProptestConfig::with_source_file(file!()) };
    let lengths = prop_oneof![Just(1usize), Just(255), Just(256), Just(257), 1..=3000usize];
    proptest!(config, |(len in lengths, size in -6f32..12.0, seed: u64)| {
        let mut rng = SplitMix64::new(seed);
        let x: Vec<f32> = (0..len).map(|_| size.exp2() * rng.normal()).collect();
        for (device, kernel) in &variants {
            for (_, activation) in ALL {
                check(device, kernel, activation, &x).map_err(TestCaseError::fail)?;
            }
        }
    });
}

/// Where `exp` or `tanh` as such overflows, and the hidden values of a trained channel mix, 1e5 once squared.
#[test]
fn large_values_are_no_fault() {
    let large = [0.0, 9.9, 10.1, 44.0, 87.0, 88.7, 89.0, 104.0, 316.0, 1e4, 1e9, 1e19];
    let x: Vec<f32> = large.iter().flat_map(|&x| [x, -x]).collect();
    let beyond = [1e30, -1e30, f32::MAX, -f32::MAX];
    for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
        for (_, activation) in ALL {
            check(device, kernel, activation, &x).unwrap();
            if activation == Activation::SquaredRelu {
                check(device, kernel, activation, &[-1e30, -f32::MAX]).unwrap(); // the square of 1e30 is none of f32
            } else {
                check(device, kernel, activation, &beyond).unwrap();
            }
        }
    }
}

/// More values than one round of a dispatch of all workgroups takes.
#[test]
fn a_dispatch_goes_round() {
    let x: Vec<f32> = (0..1000u16).map(f32::from).collect();
    for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
        let (params, _) = lower(x.len(), Activation::SquaredRelu).unwrap();
        let after =
            device.run(kernel, bytemuck::bytes_of(&params), std::slice::from_ref(&x), [1, 1, 1]).unwrap();
        let want: Vec<f32> = x.iter().map(|x| x * x).collect();
        assert_eq!(after, [want], "whole numbers");
    }
}

#[test]
fn codes_are_those_of_the_enum() {
    let helper = include_str!("../../wgsl/activation.wgsl");
    for (name, activation) in ALL {
        let line = format!("const {name}: u32 = {}u;", activation as u32);
        assert!(helper.contains(&line), "{line}");
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let lowered =
        |len| lower(len, Activation::Tanh).map(|(params, groups)| (params.len, params.activation, groups));
    assert_eq!(lowered(0), Ok((0, 1, [0, 1, 1])), "nothing to do");
    assert_eq!(lowered(257), Ok((257, 1, [2, 1, 1])), "plain");
    let most = u32::MAX - 256 * MAX_GROUPS;
    assert_eq!(lowered(most as usize), Ok((most, 1, [MAX_GROUPS, 1, 1])), "the most");
    for got in [most as usize + 1, usize::MAX] {
        assert_eq!(lowered(got), Err(Error::Len { got }), "more");
    }
}
