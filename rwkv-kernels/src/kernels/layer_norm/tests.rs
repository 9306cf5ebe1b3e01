//! `layer_norm.wgsl` and its variants against [`rwkv_core::ops::layer_norm`] in `f64`, and the sums they use.

use proptest::prelude::*;
use rwkv_core::ops::layer_norm::{self as twin, LN_EPS};
use rwkv_core::rng::SplitMix64;

use super::{Dims, Error, MAX_GROUPS, VARIANTS, lower};
use crate::gpu::{Device, variants_for_tests};
use crate::kernels::packed::{self, tests::EXPONENTS};
use crate::pipeline::Pipeline;
use crate::{Access, Binding, Element, Kernel, Scalar};

/// Operands of one call.
struct Case {
    dims: Dims,
    x: Vec<f32>,
    rows: Vec<u32>,
    gain: Vec<f32>,
    bias: Vec<f32>,
}

impl Case {
    fn draw(dims: Dims, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let x = draw_rows(dims.of, dims.width, &mut rng);
        let rows = (0..dims.rows).map(|_| u32::try_from(rng.next_u64() % dims.of as u64).unwrap()).collect();
        let mut draw = |lo, hi| (0..dims.width).map(|_| rng.uniform(lo, hi)).collect();
        Self { dims, x, rows, gain: draw(-2.0, 2.0), bias: draw(-1.0, 1.0) }
    }

    /// The rows that are asked for, `[T, D]`.
    fn asked(&self) -> Vec<f32> {
        let row = |&row: &u32| &self.x[row as usize * self.dims.width..][..self.dims.width];
        self.rows.iter().flat_map(row).copied().collect()
    }

    fn twin(&self) -> Vec<f64> {
        let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<_>>();
        let mut y = vec![f64::NAN; self.rows.len() * self.dims.width];
        twin::layer_norm(&wide(&self.asked()), &wide(&self.gain), &wide(&self.bias), LN_EPS, &mut y);
        y
    }

    fn run(&self, device: &Device, kernel: &Pipeline, halves: Option<u8>) -> Vec<f32> {
        let (params, groups) = lower(self.dims, LN_EPS).unwrap();
        let poison = vec![f32::NAN; self.rows.len() * self.dims.width];
        let buffers = [bits(&self.x), self.rows.clone(), bits(&self.gain), bits(&self.bias), bits(&poison)];
        let mut after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        let y = after.pop().unwrap();
        assert_eq!(after, buffers[..4], "the operands are untouched");
        packed::tests::floats(&y, self.dims.width, halves)
    }
}

/// Rows `[T, D]` of every scale, some far from zero, some constant, some with one channel that outweighs the others, as
/// the residual stream of a trained model has.
pub(in crate::kernels) fn draw_rows(rows: usize, width: usize, rng: &mut SplitMix64) -> Vec<f32> {
    let mut x = Vec::new();
    for _ in 0..rows {
        let kind = rng.next_u64() % 4;
        let scale = rng.uniform(-10.0, 10.0).exp2();
        let offset = if kind == 1 { rng.uniform(-8.0, 8.0) * scale } else { 0.0 };
        let spread = if kind == 2 { 0.0 } else { scale };
        let constant = if kind == 2 { rng.uniform(-100.0, 100.0) } else { offset };
        let start = x.len();
        x.extend((0..width).map(|_| constant + spread * rng.normal()));
        if kind == 3 {
            x[start + width / 2] *= 300.0;
        }
    }
    x
}

/// The error that each element of `y` may have when `lanes` invocations share a row of `x`.
///
/// Let `u` bound every rounding, relatively: 2^-23, since WGSL lets a sum or a product round either way. A
/// division is off by 2.5 ulp, at most 5 u, and `inverseSqrt` by 2 ulp, at most 4 u. A term of a sum passes
/// `m <= D / lanes + 1 + lanes` additions: those of its lane, and at worst one for each other lane (the tree passes
/// fewer, but a subgroup adds in an order of its own; so do lanes that take four channels at a time and add the four
/// sums by pairs). With `d = x - mean` and `s = 1 / sqrt(var + eps)`:
///
/// - the mean is off by `e <= (m + 5) u mean|x|`, and so is each `d`, and by `u |d|` of its own;
/// - the variance about a mean that is off by `e` is larger by `e^2`; computed from `d`, squared, summed and
///   divided it is off by `(2 + 1 + m + 5) u` of itself, and by `u` when eps is added; so is `s` by half of all that,
///   `e^2 s^2 / 2 + (m + 9) u / 2`, and by 4 u of its own;
/// - `d s gain + bias` rounds three times more, the last time relatively to the sum.
///
/// Together `|gain| (e s + |d| s (that of s + 3 u)) + u |y|`; a tenth more for the products of errors.
pub(in crate::kernels) fn limits(x: &[f32], gain: &[f32], want: &[f64], lanes: usize) -> Vec<f64> {
    let (u, width) = (f64::from(f32::EPSILON), gain.len());
    let n = width as f64;
    let m = (width.div_ceil(lanes) + lanes.min(width)) as f64;
    let mut limits = Vec::new();
    for (row, want) in x.chunks(width).zip(want.chunks(width)) {
        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let size = row.iter().map(|&x| f64::from(x.abs())).sum::<f64>() / n;
        let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
        let s = 1.0 / (variance + LN_EPS).sqrt();
        let e = (m + 5.0) * u * size;
        let of_s = (e * s).powi(2) / 2.0 + (m + 9.0) * u / 2.0 + 4.0 * u;
        for ((x, gain), want) in row.iter().zip(gain).zip(want) {
            let d = (f64::from(*x) - mean).abs();
            let gain = f64::from(gain.abs());
            limits.push(1.1 * (gain * (e * s + d * s * (of_s + 3.0 * u)) + u * want.abs()));
        }
    }
    limits
}

/// The first element that is off by more than its limit.
pub(in crate::kernels) fn compare(got: &[f32], want: &[f64], limits: &[f64]) -> Result<(), String> {
    assert_eq!(got.len(), want.len(), "lengths");
    let off = |i: &usize| {
        let error = (f64::from(got[*i]) - want[*i]).abs();
        error.is_nan() || error > limits[*i]
    };
    match (0..got.len()).find(off) {
        Some(i) => Err(format!("[{i}]: {:e}, not {:e} within {:e}", got[i], want[i], limits[i])),
        None => Ok(()),
    }
}

pub(in crate::kernels) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

pub(in crate::kernels) fn floats(bits: Vec<u32>) -> Vec<f32> {
    bits.into_iter().map(f32::from_bits).collect()
}

/// The widths that matter: fewer channels than lanes, no multiple of them, several rounds; and any.
fn widths() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1usize), Just(3), Just(64), Just(192), Just(256), Just(257), Just(1000), 1..=600usize]
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 48, ..ProptestConfig::with_source_file(file!()) }
}

/// Workgroups smaller than a subgroup, of several, and the default. On Mesa's software driver a subgroup has 8
/// invocations, and under `LP_NATIVE_VECTOR_WIDTH=128 MESA_SHADER_CACHE_DISABLE=true` 4 (under 512, 16): without the
/// second, it runs what it compiled for 8.
const LANES: [u16; 5] = [1, 4, 32, 128, 256];

#[test]
fn agrees_with_its_twin() {
    for (lanes, halves) in LANES.into_iter().zip(EXPONENTS.into_iter().cycle()) {
        let overrides = [("LANES", lanes.into()), packed::halves(halves)];
        let variants = variants_for_tests(VARIANTS, &overrides);
        proptest!(config(), |(of in 1..=5usize, rows in 1..=9usize, width in widths(), seed: u64)| {
            // Halves lie two by two.
            let width = if halves.is_some() { width.next_multiple_of(2) } else { width };
            let case = Case::draw(Dims { of, rows, width }, seed);
            let mut want = case.twin();
            let mut limits = limits(&case.asked(), &case.gain, &want, lanes.into());
            for (want, limit) in want.iter_mut().zip(&mut limits) {
                (*want, *limit) = packed::tests::rounded(*want, *limit, halves);
            }
            for (device, kernel) in &variants {
                compare(&case.run(device, kernel, halves), &want, &limits)
                    .map_err(|e| TestCaseError::fail(format!("{}{e}", kernel.kernel().label())))?;
            }
        });
    }
}

/// The numerics contract: the same call gives the same bits, and so does a row beside any others.
#[test]
fn a_row_has_its_bits_whatever_is_beside_it() {
    let variants = variants_for_tests(VARIANTS, &[]);
    proptest!(config(), |(rows in 2..=9usize, picked in 0..9usize, width in widths(), seed: u64)| {
        let case = Case::draw(Dims { of: 4, rows, width }, seed);
        let row = picked % rows * width..(picked % rows + 1) * width;
        let x = case.asked()[row.clone()].to_vec();
        let (gain, bias) = (case.gain.clone(), case.bias.clone());
        let alone = Case { dims: Dims { of: 1, rows: 1, width }, x, rows: vec![0], gain, bias };
        for (device, kernel) in &variants {
            let all = bits(&case.run(device, kernel, None));
            prop_assert_eq!(&all, &bits(&case.run(device, kernel, None)), "again");
            prop_assert_eq!(&all[row.clone()], &bits(&alone.run(device, kernel, None)), "alone");
        }
    });
}

/// The reduction of a variant, twice in a row: the sums of `x` and of `2 x` over each workgroup, as every
/// lane has them. Nothing if the device cannot run it.
fn sums(variant: &Kernel, lanes: u16, x: &[f32]) -> Option<[Vec<f32>; 2]> {
    const ELEMENT: Option<Element> = Some(Element { scalar: Scalar::F32, lanes: 1 });
    let helper = match variant.suffix {
        "" => include_str!("../../wgsl/reduce.wgsl"),
        _ => include_str!("../../wgsl/reduce_subgroup.wgsl"),
    };
    let source = format!(
        "override LANES: u32 = 256u;\n\
         @group(0) @binding(0) var<storage, read> x: array<f32>;\n\
         @group(0) @binding(1) var<storage, read_write> once: array<f32>;\n\
         @group(0) @binding(2) var<storage, read_write> twice: array<f32>;\n\
         {helper}\
         @compute @workgroup_size(LANES)\n\
         fn sums(@builtin(workgroup_id) group: vec3<u32>, lane: Lane) {{\n\
             let at = group.x * LANES + lane.index;\n\
             once[at] = workgroup_sum(x[at], lane);\n\
             twice[at] = workgroup_sum(2.0 * x[at], lane);\n\
         }}"
    );
    let bindings = &[
        Binding { name: "x", access: Access::Read, element: ELEMENT },
        Binding { name: "once", access: Access::ReadWrite, element: ELEMENT },
        Binding { name: "twice", access: Access::ReadWrite, element: ELEMENT },
    ];
    let kernel = Kernel { name: "sums", source: source.leak(), bindings, params_bytes: 0, ..*variant };
    let (device, pipeline) = variants_for_tests(&[kernel], &[("LANES", lanes.into())]).pop()?;
    let poison = vec![f32::NAN; x.len()];
    let groups = u32::try_from(x.len()).unwrap() / u32::from(lanes);
    let buffers = [x.to_vec(), poison.clone(), poison];
    let [_, once, twice] = device.run(&pipeline, &[], &buffers, [groups, 1, 1]).unwrap().try_into().unwrap();
    Some([once, twice])
}

/// Over whole numbers, whose sums are exact in any order.
#[test]
fn sums_are_exact_where_they_can_be() {
    for (variant, of) in VARIANTS.iter().flat_map(|variant| (0..=8).map(move |of| (variant, of))) {
        let mut rng = SplitMix64::new(of);
        let x: Vec<f32> = (0..50 << of).map(|_| rng.uniform(-1000.0, 1000.0).round()).collect();
        let Some([once, twice]) = sums(variant, 1 << of, &x) else { continue };
        let of_group = |x: &[f32]| vec![x.iter().sum::<f32>(); x.len()];
        let want: Vec<f32> = x.chunks(1 << of).flat_map(of_group).collect();
        assert_eq!(once, want, "{}, {} lanes", variant.label(), 1 << of);
        let want: Vec<f32> = want.iter().map(|sum| 2.0 * sum).collect();
        assert_eq!(twice, want, "{}, {} lanes, again", variant.label(), 1 << of);
    }
}

/// The portable sum adds in the order that `reduce.wgsl` states.
#[test]
fn the_portable_sum_is_a_fixed_tree() {
    for of in 0..=8 {
        let mut rng = SplitMix64::new(of);
        let x: Vec<f32> = (0..50 << of).map(|_| rng.normal()).collect();
        let Some([once, _]) = sums(&VARIANTS[0], 1 << of, &x) else { continue };
        let of_group = |x: &[f32]| {
            let mut tree = x.to_vec();
            while tree.len() > 1 {
                let (low, high) = tree.split_at(tree.len() / 2);
                tree = low.iter().zip(high).map(|(a, b)| a + b).collect();
            }
            vec![tree[0]; x.len()]
        };
        let want: Vec<f32> = x.chunks(1 << of).flat_map(of_group).collect();
        assert_eq!(bits(&once), bits(&want), "{} lanes", 1 << of);
    }
}

/// The variants are one text but for how they sum.
#[test]
fn variants_differ_in_their_sum_alone() {
    let body = |kernel: &Kernel| {
        let own = kernel.source.split_once("\n// One workgroup per row").unwrap().1;
        own.split_once("\n}\n// ").unwrap().0.to_owned()
    };
    for kernel in &VARIANTS[1..] {
        assert_eq!(body(kernel), body(&VARIANTS[0]), "{}", kernel.label());
    }
}

#[test]
fn refuses_what_it_cannot_run() {
    let lowered = |of, rows, width| {
        lower(Dims { of, rows, width }, LN_EPS).map(|(params, groups)| (params.width, groups))
    };
    assert_eq!(lowered(9, 3, 192), Ok((192, [3, 1, 1])), "plain");
    assert_eq!(lowered(9, 0, 192), Ok((192, [0, 1, 1])), "nothing to do");
    assert_eq!(lowered(0, 0, 192), Ok((192, [0, 1, 1])), "nothing at all");
    assert_eq!(lowered(3, 3, 0), Err(Error::Empty), "no channels");
    assert_eq!(lowered(1, 65_536, 1), Err(Error::Rows { got: 65_536, max: MAX_GROUPS }), "rows");
    assert!(lowered(1, 2, (1 << 31) - 512).is_ok(), "2^32 - 1024 elements");
    let far = (1 << 31) - 511;
    for (of, rows) in [(1, 2), (2, 1)] {
        assert_eq!(lowered(of, rows, far), Err(Error::Width { rows: 2, width: far }), "2^32 - 1022 elements");
    }
    assert_eq!(lowered(1, 1, usize::MAX), Err(Error::Width { rows: 1, width: usize::MAX }), "no overflow");
}
