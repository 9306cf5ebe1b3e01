//! `sample.wgsl` against [`rwkv_core::ops::sample`]: the same token, but where rounding decides.

use std::cell::Cell;
use std::mem::offset_of;

use proptest::prelude::*;
use rwkv_core::Real as _;
use rwkv_core::ops::sample::{Counts, Error as SamplerError, Sampler};
use rwkv_core::rng::{SplitMix64, philox4x32};

use super::{
    ALL_MASKED, Dims, Error, MAX_GROUPS, NOT_FINITE, SamplerRow, UNCOUNTED, VARIANTS, lower, mask, words,
};
use crate::Kernel;
use crate::gpu::{Device, device_for_tests, variants_for_tests};
use crate::pipeline::Pipeline;

/// Bounds every rounding, relatively: WGSL lets a sum or a product round either way.
const U: f64 = f32::EPSILON as f64;

/// What outputs are filled with before.
const POISON: u32 = f32::NAN.to_bits();

const ALL: Sampler = Sampler {
    temperature: 1.0,
    top_k: 0,
    top_p: 1.0,
    presence_penalty: 0.0,
    frequency_penalty: 0.0,
    seed: 0,
};

/// One row.
#[derive(Clone, Debug)]
struct Row {
    sampler: Sampler,
    position: u64,
    /// `[V]`.
    logits: Vec<f32>,
    /// `[V]`.
    counts: Vec<u32>,
}

/// One call. Its rows have the mask in common.
#[derive(Clone, Debug)]
struct Case {
    masked: Vec<u32>,
    rows: Vec<Row>,
}

fn below(n: usize, rng: &mut SplitMix64) -> usize {
    usize::try_from(rng.next_u64() % n as u64).unwrap()
}

impl Row {
    fn new(sampler: Sampler, logits: &[f32]) -> Self {
        Self { sampler, position: 0, logits: logits.to_vec(), counts: vec![0; logits.len()] }
    }

    /// Logits of any spread, far from zero, equal in part or in all, with peaks, masked in part; every setting at the
    /// value that turns it off, at one that leaves little, and at any.
    fn draw(vocab: usize, rng: &mut SplitMix64) -> Self {
        let grid = [0.0, 0.0, 2.0, 0.25, 1e-3][below(5, rng)];
        let scale = [0.0, 0.2, 1.0, 3.0, 3.0, 3.0, 10.0, 1e30][below(8, rng)];
        let shift = [0.0, 0.0, -7.0, 1000.0][below(4, rng)];
        let hidden = [0.0, 0.0, 0.1, 0.97][below(4, rng)];
        let mut logit = || match scale * rng.normal() {
            _ if rng.uniform(0.0, 1.0) < hidden => f32::NEG_INFINITY,
            x if grid > 0.0 => (x / grid).round() * grid + shift,
            x => x + shift,
        };
        let mut logits: Vec<f32> = (0..vocab).map(|_| logit()).collect();
        let peak = [0.0, 0.0, 8.0, 16.0][below(4, rng)];
        (0..3).for_each(|_| logits[below(vocab, rng)] += peak);
        let mut counts = vec![0; vocab];
        (0..[0, 60, 60][below(3, rng)]).for_each(|_| counts[below(vocab.min(40), rng)] += 1);
        let penalties = match rng.next_u64() % 5 {
            0..=1 => [0.0; 2],
            2 => [0.25, -0.5],
            3 => [rng.uniform(-2.0, 2.0), 0.0],
            _ => [rng.uniform(-2.0, 2.0), rng.uniform(-1.0, 1.0)],
        };
        let sampler = Sampler {
            temperature: match rng.next_u64() % 6 {
                0 => 0.0,
                1..=3 => 1.0,
                _ => rng.uniform(-4.0, 3.0).exp2(),
            },
            top_k: u32::try_from(match rng.next_u64() % 8 {
                0..=2 => 0,
                3 => 1,
                4 => below(30, rng),
                5 => below(4000, rng),
                6 => vocab.saturating_sub(below(3, rng)),
                _ => usize::try_from(u32::MAX).unwrap(),
            })
            .unwrap(),
            top_p: match rng.next_u64() % 8 {
                0..=2 => 1.0,
                3 => 0.7,
                4 => 1e-20,
                5 => 1.0 - f32::EPSILON / 2.0,
                6 => rng.uniform(0.99, 1.0),
                _ => rng.uniform(0.01, 1.0),
            },
            presence_penalty: penalties[0],
            frequency_penalty: penalties[1],
            seed: rng.next_u64(),
        };
        Self { sampler, position: rng.next_u64(), logits, counts }
    }

    /// What the twin gives.
    fn twin(&self, masked: &[u32]) -> u32 {
        let mut counts = Counts::default();
        for (token, &count) in (0..).zip(&self.counts) {
            (0..count).for_each(|_| counts.add(token));
        }
        match self.sampler.sample_except(masked, &self.logits, &counts, self.position) {
            Ok(token) => token,
            Err(SamplerError::AllMasked { .. }) => ALL_MASKED,
            Err(SamplerError::NotFinite { .. }) => NOT_FINITE,
            Err(e) => panic!("{e}"),
        }
    }
}

impl Case {
    /// Rows side by side, and a mask of none, some, all but a few, or all.
    fn draw(n_rows: usize, vocab: usize, seed: u64) -> Self {
        let mut rng = SplitMix64::new(seed);
        let rows = (0..n_rows).map(|_| Row::draw(vocab, &mut rng)).collect();
        let share = [0.0, 0.0, 0.3, 0.95, 1.0][below(5, &mut rng)];
        let masked = (0..u32::try_from(vocab).unwrap()).filter(|_| rng.uniform(0.0, 1.0) < share).collect();
        Self { masked, rows }
    }

    fn twin(&self) -> Vec<u32> {
        self.rows.iter().map(|row| row.twin(&self.masked)).collect()
    }

    /// Where each row counts, the last first, and how many there are: the first is no row's. Of those that have counted
    /// nothing, every other has none.
    fn places(&self) -> (Vec<Option<u32>>, usize) {
        let mut n = 1;
        let mut place = |(index, row): (usize, &Row)| {
            let counted = index.is_multiple_of(2) || row.counts.iter().any(|&count| count > 0);
            n += u32::from(counted);
            counted.then_some(n - 1)
        };
        let mut places: Vec<_> = self.rows.iter().enumerate().rev().map(&mut place).collect();
        places.reverse();
        (places, n as usize)
    }

    /// The tokens. Asserts that they were counted where they are to be, and that nothing else changed.
    fn run(&self, device: &Device, kernel: &Pipeline) -> Vec<u32> {
        let vocab = self.rows[0].logits.len();
        let (places, counts) = self.places();
        let (params, groups) = lower(Dims { rows: self.rows.len(), vocab, counts }).unwrap();
        let sampler =
            |(row, place): (&Row, &Option<u32>)| SamplerRow::new(&row.sampler, row.position, *place);
        let samplers: Vec<_> = self.rows.iter().zip(&places).map(|of| sampler(of).unwrap()).collect();
        let mut before = vec![POISON; counts * vocab];
        let at = |place: u32| place as usize * vocab..(place as usize + 1) * vocab;
        for (row, place) in self.rows.iter().zip(&places) {
            place.iter().for_each(|&place| before[at(place)].copy_from_slice(&row.counts));
        }
        let bits = |row: &Row| row.logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let buffers = [
            bytemuck::cast_slice(&samplers).to_vec(),
            self.rows.iter().flat_map(bits).collect(),
            mask(&self.masked, vocab),
            before,
            vec![POISON; self.rows.len()],
        ];
        let mut after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        let (tokens, counts) = (after.pop().unwrap(), after.pop().unwrap());
        assert_eq!(after, buffers[..3], "the operands are untouched");
        let mut counted = buffers[3].clone();
        for (place, &token) in places.iter().zip(&tokens) {
            if let Some(count) = place.and_then(|place| counted[at(place)].get_mut(token as usize)) {
                *count = count.saturating_add(1);
            }
        }
        assert!(counts == counted, "the counts of {tokens:?}");
        tokens
    }
}

/// A token as it is without rounding, and how far rounding may take it.
///
/// With every rounding off by `u` at most, relatively, a division by 2.5 u (2.5 ulp), `exp x` by `(3 + 2 |x|) u`, and the
/// kernel's `ln` by 9 u:
///
/// - a penalised logit is off by `u` of the product, of the penalty and of itself; not at all if these are exact;
/// - `z`, a difference of two such over the temperature, by `3.5 u |z|` and their own over the temperature;
/// - the weight `exp z` by `(3 + 2 |z|) u` of itself, by what `z` is off, and by a unit of 2^-40;
/// - `g = -ln(-ln u)` by what the inner logarithm is off, relatively, and by the outer's own: `9 u (1 + |g|)`;
/// - `z + g` by these and `u |z + g|`.
///
/// A tenth more is for the products of errors. The twin rounds to nearest and keeps all of these bounds.
#[derive(Clone, Copy, Debug)]
struct Token {
    token: u32,
    logit: (f64, f64),
    weight: (f64, f64),
    value: (f64, f64),
}

/// Noise of the Gumbel distribution, `-ln(-ln u)`.
fn gumbel(bits: u32) -> f64 {
    -(-((f64::from(bits >> 9) + 0.5) / f64::from(1 << 23)).ln()).ln()
}

/// The tokens that are not masked.
fn exact(row: &Row, masked: &[u32]) -> Vec<Token> {
    let Sampler { temperature, presence_penalty, frequency_penalty, seed, .. } = row.sampler;
    let is_f32 = |x: f64| f64::from(f32::of(x)) == x;
    let mut hidden = vec![false; row.logits.len()];
    masked.iter().for_each(|&token| hidden[token as usize] = true);
    let mut all = Vec::new();
    for (token, (&logit, &count)) in (0..).zip(row.logits.iter().zip(&row.counts)) {
        if hidden[token as usize] || logit == f32::NEG_INFINITY {
            continue;
        }
        let counted = f64::from(u8::from(count > 0));
        let product = f64::from(frequency_penalty) * f64::from(count);
        let penalty = counted * (f64::from(presence_penalty) + product);
        let logit = f64::from(logit) - penalty;
        let rounds = count > 0 && [product, penalty, logit].iter().any(|&x| !is_f32(x));
        let off = if rounds { 1.1 * U * (product.abs() + penalty.abs() + logit.abs()) } else { 0.0 };
        all.push(Token { token, logit: (logit, off), weight: (0.0, 0.0), value: (0.0, 0.0) });
    }
    let top = all.iter().map(|t| t.logit).reduce(|a, b| if b.0 > a.0 { b } else { a });
    let (top, top_off) = top.unwrap_or_default();
    // Of greedy, all that counts is the order of the logits.
    let divisor = if temperature > 0.0 { f64::from(temperature) } else { 1.0 };
    let [seed, position] = [seed, row.position].map(words);
    for Token { token, logit: (logit, off), weight, value } in &mut all {
        let z = (*logit - top) / divisor;
        let z_off = 1.1 * (3.5 * U * z.abs() + (*off + top_off) / divisor);
        let exp = z.exp();
        *weight = (exp, 1.1 * exp * ((3.0 + 2.0 * z.abs()) * U + z_off.exp_m1()) + 0.5_f64.powi(40));
        let counter = [*token / 4, position[0], position[1], u32::from_be_bytes(*b"draw")];
        let g = gumbel(philox4x32(counter, seed)[*token as usize % 4]);
        *value = (z + g, z_off + 1.1 * U * (9.0 * (1.0 + g.abs()) + (z + g).abs()));
    }
    all
}

/// Tokens by how large their logits are at most, or at least, and the running sums of their weights, at least or at most.
struct Order(Vec<(f64, u32)>, Vec<f64>);

impl Order {
    fn new(tokens: &[Token], key: impl Fn(&Token) -> f64, weight: impl Fn(&Token) -> f64) -> Self {
        let mut sorted: Vec<_> = tokens.iter().map(|t| (key(t), t.token, weight(t))).collect();
        sorted.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut sums = vec![0.0];
        sums.extend(sorted.iter().scan(0.0, |sum, &(.., weight)| {
            *sum += weight;
            Some(*sum)
        }));
        Self(sorted.into_iter().map(|(key, token, _)| (key, token)).collect(), sums)
    }

    /// How many come before a token whose logit is `key`, and their weight.
    fn before(&self, key: f64, token: u32) -> (usize, f64) {
        let n = self.0.partition_point(|&(of, other)| of > key || (of == key && other < token));
        (n, self.1[n])
    }
}

/// The tokens that rounding can make the draw of a row.
///
/// A token may be left by top-k if fewer than k are certainly before it, and is if fewer than k may be. It may be left by
/// top-p if the weight that is certainly before it is below what the goal may be, and is if what may be before it is
/// below what the goal is at least. It may be drawn if it may be left, and none that is left is certainly ahead of it.
///
/// The kernel's goal is off by a unit of 2^-40 and, since it has 32 bits of p, by 2^-32 of the total.
fn possible(row: &Row, masked: &[u32]) -> Vec<u32> {
    let Sampler { temperature, top_k, top_p, .. } = row.sampler;
    let k = if temperature == 0.0 { 1 } else { top_k as usize };
    let tokens = exact(row, masked);
    let certain = Order::new(&tokens, |t| t.logit.0 - t.logit.1, |t| t.weight.0 - t.weight.1);
    let likely = Order::new(&tokens, |t| t.logit.0 + t.logit.1, |t| t.weight.0 + t.weight.1);
    let mut totals = [0.0; 2];
    let ranked: Vec<_> = tokens
        .iter()
        .map(|t| {
            let least = certain.before(t.logit.0 + t.logit.1, t.token);
            let mut most = likely.before(t.logit.0 - t.logit.1, t.token);
            if t.logit.1 > 0.0 {
                most = (most.0 - 1, most.1 - t.weight.0 - t.weight.1); // itself
            }
            let (is_left, may_be) = (k == 0 || most.0 < k, k == 0 || least.0 < k);
            totals[0] += f64::from(u8::from(is_left)) * (t.weight.0 - t.weight.1);
            totals[1] += f64::from(u8::from(may_be)) * (t.weight.0 + t.weight.1);
            (t, least.1, most.1, is_left, may_be)
        })
        .collect();
    let p = f64::from(top_p);
    let goals = [p * totals[0] - totals[0] * 0.5_f64.powi(32) - 0.5_f64.powi(40), p * totals[1]];
    let left = |(t, _, most, is_left, _): &(&Token, f64, f64, bool, bool)| {
        (*is_left && (p == 1.0 || *most < goals[0])).then_some(t.value.0 - t.value.1)
    };
    let ahead = ranked.iter().filter_map(left).fold(f64::NEG_INFINITY, f64::max);
    let drawn = |&(t, least, _, _, may_be): &(&Token, f64, f64, bool, bool)| {
        let may_be = may_be && (p == 1.0 || least == 0.0 || least < goals[1]);
        (may_be && (t.value.0 + t.value.1 >= ahead || k == 1)).then_some(t.token)
    };
    ranked.iter().filter_map(drawn).collect()
}

/// Vocabularies of less than a word of the mask, around whole numbers of words and blocks, and any.
fn vocabs() -> impl Strategy<Value = usize> {
    prop_oneof![1..=20usize, 31..=33usize, 255..=257usize, 1023..=1025usize, 1..=3000usize]
}

fn config() -> ProptestConfig {
    ProptestConfig { cases: 100, ..ProptestConfig::with_source_file(file!()) }
}

/// The fewest, some, the default and as many as a large device has, where it has them.
const LANES: [u16; 4] = [2, 64, 256, 1024];

fn variants(lanes: u16) -> Vec<(&'static Device, Pipeline)> {
    match device_for_tests() {
        Some(device) if device.capabilities().invocations >= lanes.into() => {
            variants_for_tests(VARIANTS, &[("LANES", lanes.into())])
        }
        _ => Vec::new(),
    }
}

/// Compares every row. Adds to `open` those that rounding may decide.
fn compare(case: &Case, got: &[u32], open: &Cell<u32>) -> Result<(), TestCaseError> {
    for ((row, got), want) in case.rows.iter().zip(got).zip(case.twin()) {
        let vocab = row.logits.len();
        let about = format!("{got}, not {want}: {:?} of {vocab} at {}", row.sampler, row.position);
        if want < NOT_FINITE {
            let possible = possible(row, &case.masked);
            prop_assert!(possible.contains(&want), "the twin is out of its bounds: {}", about);
            prop_assert!(possible.contains(got), "{}", about);
            open.set(open.get() + u32::from(possible.len() > 1));
        } else {
            prop_assert_eq!(*got, want, "{}", about);
        }
    }
    Ok(())
}

#[test]
fn agrees_with_its_twin() {
    for lanes in LANES {
        let variants = variants(lanes);
        let (rows, open) = (Cell::new(0), Cell::new(0));
        proptest!(config(), |(n_rows in 1..=6usize, vocab in vocabs(), seed: u64)| {
            let case = Case::draw(n_rows, vocab, seed);
            for (device, kernel) in &variants {
                compare(&case, &case.run(device, kernel), &open)
                    .map_err(|e| TestCaseError::fail(format!("{lanes} lanes: {e}")))?;
                rows.set(rows.get() + u32::try_from(n_rows).unwrap());
            }
        });
        // Of 40,000 rows it was one in 240.
        assert!(open.get() <= rows.get() / 20, "rounding may decide {} of {}", open.get(), rows.get());
    }
}

/// So many draws of a few tokens that each is drawn which may be, and one that should have been cut off would be.
#[test]
fn agrees_with_its_twin_at_many_positions() {
    let variants = variants_for_tests(VARIANTS, &[]);
    let (rows, open) = (Cell::new(0), Cell::new(0));
    proptest!(config(), |(vocab in 1..=9usize, from in 0..u64::MAX / 2, seed: u64)| {
        let row = Row::draw(vocab, &mut SplitMix64::new(seed));
        let rows_at = (from..from + 400).map(|position| Row { position, ..row.clone() });
        let case = Case { masked: vec![], rows: rows_at.collect() };
        for (device, kernel) in &variants {
            compare(&case, &case.run(device, kernel), &open)?;
            rows.set(rows.get() + 400);
        }
    });
    assert!(open.get() <= rows.get() / 20, "rounding may decide {} of {}", open.get(), rows.get());
}

/// The vocabularies of large models, whole and not whole blocks.
#[test]
fn agrees_with_its_twin_where_tokens_are_many() {
    let open = Cell::new(0);
    for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
        for (seed, vocab) in [65_536, 65_573].into_iter().cycle().take(12).enumerate() {
            let case = Case::draw(3, vocab, seed as u64);
            compare(&case, &case.run(device, kernel), &open).unwrap();
        }
        // As an engine asks, of logits as a model has them.
        let mut rng = SplitMix64::new(1);
        let logits: Vec<f32> = (0..65_536).map(|_| 3.0 * rng.normal()).collect();
        let row = Row::new(Sampler::default(), &logits);
        let rows = (0..6).map(|position| Row { position, ..row.clone() }).collect();
        let case = Case { masked: vec![0, 65_535], rows };
        compare(&case, &case.run(device, kernel), &open).unwrap();
    }
    assert!(open.get() <= 6, "rounding may decide {} of 42", open.get());
}

/// The numerics contract: the same call gives the same bits, and so does a row beside any others.
#[test]
fn a_row_has_its_token_whatever_is_beside_it() {
    let variants = variants_for_tests(VARIANTS, &[]);
    let config = ProptestConfig { cases: 30, ..config() };
    proptest!(config, |(n_rows in 2..=6usize, vocab in vocabs(), seed: u64)| {
        let case = Case::draw(n_rows, vocab, seed);
        for (device, kernel) in &variants {
            let all = case.run(device, kernel);
            prop_assert_eq!(&all, &case.run(device, kernel), "again");
            for (row, token) in case.rows.iter().zip(all) {
                let alone = Case { masked: case.masked.clone(), rows: vec![row.clone()] };
                prop_assert_eq!(alone.run(device, kernel), [token], "alone");
            }
        }
    });
}

/// Rows that have no token say why; what is masked by name is no reason.
#[test]
fn errors_are_values() {
    let inf = f32::INFINITY;
    let faults = [0x7FC0_0000, 0x7F80_0001, 0xFFC0_0000, 0xFF80_0001, u32::MAX].map(f32::from_bits);
    let samplers = [ALL, Sampler::greedy(), Sampler::default(), Sampler { top_k: 1, ..ALL }];
    let check = |masked: &[u32], row: Row, want: u32| {
        for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
            let rows = samplers.map(|sampler| {
                let Sampler { presence_penalty, frequency_penalty, .. } = row.sampler;
                Row { sampler: Sampler { presence_penalty, frequency_penalty, ..sampler }, ..row.clone() }
            });
            let case = Case { masked: masked.to_vec(), rows: rows.to_vec() };
            assert_eq!(case.twin(), [want; 4], "the twin of {row:?}");
            assert_eq!(case.run(device, kernel), [want; 4], "{row:?}");
        }
    };
    for fault in faults.into_iter().chain([inf]) {
        let row = Row::new(ALL, &[-inf, fault, 1.0]);
        check(&[], row.clone(), NOT_FINITE);
        check(&[2], row.clone(), NOT_FINITE);
        check(&[1], row.clone(), 2);
        check(&[1, 2], row, ALL_MASKED);
    }
    check(&[], Row::new(ALL, &[-inf; 300]), ALL_MASKED);
    check(&[0], Row::new(ALL, &[0.0]), ALL_MASKED);

    // Penalties that overflow: of the logits, or on their way.
    let penalised = |presence_penalty, frequency_penalty, logits: &[f32]| {
        let mut row = Row::new(Sampler { presence_penalty, frequency_penalty, ..ALL }, logits);
        row.counts[0] = 3;
        row
    };
    check(&[], penalised(0.0, f32::MIN, &[0.0, 1.0]), NOT_FINITE);
    check(&[], penalised(f32::MIN, 0.0, &[f32::MAX, 1.0]), NOT_FINITE);
    check(&[0], penalised(0.0, f32::MIN, &[0.0, 1.0]), 1);
    check(&[], penalised(0.0, f32::MIN, &[-inf, 1.0]), 1);
    check(&[], penalised(0.0, f32::MAX, &[9.0, -1e30]), 1);
    check(&[], penalised(f32::MAX, 0.0, &[f32::MIN, -inf]), ALL_MASKED);
}

/// Wherever two are equal, the lower token goes first: no rounding decides here.
#[test]
fn of_equals_the_lowest() {
    let settings = [
        Sampler { top_k: 3, ..ALL },
        Sampler { top_k: 129, ..ALL },
        Sampler { top_p: 0.5, ..ALL },
        Sampler { top_p: 1e-20, ..ALL },
        Sampler { top_k: 200, top_p: 0.5, ..ALL },
        Sampler { top_k: 1, ..ALL },
        Sampler::greedy(),
        ALL,
    ];
    let check = |device: &Device, kernel: &Pipeline, rows: Vec<Row>| {
        let case = Case { masked: vec![], rows };
        assert_eq!(case.run(device, kernel), case.twin(), "{:?}", case.rows[0].logits);
    };
    for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
        for zeros in [&[0.0; 300][..], &[-0.0, 0.0], &[0.0, -0.0, -1.0], &[-5.0, -5.0, -5.0, -6.0]] {
            for sampler in settings {
                let row = Row::new(sampler, zeros);
                check(device, kernel, (0..20).map(|position| Row { position, ..row.clone() }).collect());
            }
        }
        // What top-k cut off of equals stays so where top-p needs all of the others.
        let both = Row::new(Sampler { top_k: 2, top_p: 0.999, ..ALL }, &[1.0, 0.0, 0.0, 0.0]);
        check(device, kernel, (0..20).map(|position| Row { position, ..both.clone() }).collect());
        // At this position two of so many tokens have the same noise, which is also the largest.
        check(device, kernel, vec![Row { position: 1411, ..Row::new(ALL, &[0.0; 16_384]) }]);
        // The least and the greatest temperature, over the widest logits.
        let extreme =
            [f32::MIN_POSITIVE, f32::MAX].map(|temperature| Sampler { temperature, top_k: 1, ..ALL });
        check(device, kernel, extreme.map(|sampler| Row::new(sampler, &[f32::MIN, f32::MAX])).to_vec());
    }
}

#[test]
fn counts_stay_at_their_largest() {
    let row = Row { counts: vec![u32::MAX, 7], ..Row::new(Sampler::greedy(), &[1.0, 0.0]) };
    for (device, kernel) in &variants_for_tests(VARIANTS, &[]) {
        let case = Case { masked: vec![], rows: vec![row.clone()] };
        assert_eq!(case.run(device, kernel), [0], "and the count is checked on the way");
    }
}

/// The logarithm keeps the bound that the kernel states, the noise is that of the twin bit for bit, and no token's
/// exceeds what the draw takes to be its bound.
#[test]
fn the_noise_is_that_of_the_twin() {
    const WORDS: usize = 7;
    let source = format!(
        "{}
         @compute @workgroup_size(64)
         fn probe(@builtin(global_invocation_id) id: vec3<u32>) {{
             let at = 7u * id.x;
             let words = noise(0u, id.x * 0x01234567u);
             for (var i = 0u; i < 4u; i++) {{
                 tokens[at + i] = words[i];
             }}
             tokens[at + 4u] = bitcast<u32>(ln(logits[id.x]));
             tokens[at + 5u] = bitcast<u32>(gumbel(mask[id.x]));
             tokens[at + 6u] = bitcast<u32>(min(gumbel_bound(mask[id.x]), GUMBEL_BOUND));
         }}",
        VARIANTS[0].source
    );
    let probe = Kernel { name: "probe", source: source.leak(), ..VARIANTS[0] };
    let mut rng = SplitMix64::new(3);
    let (seed, position) = (rng.next_u64(), rng.next_u64());
    let n = 1 << 14;
    // Both ends, both sides of every power of two of 1 - u, and any.
    let mut bits: Vec<u32> = vec![0, u32::MAX, 1 << 31];
    bits.extend((9..32).flat_map(|of| [u32::MAX << of, (u32::MAX << of) - 512, 1 << of]));
    bits.resize_with(n, || words(rng.next_u64())[0]);
    let x: Vec<f32> = (0..n)
        .map(|i| match i % 3 {
            0 => f32::of((f64::from(bits[i] >> 9) + 0.5) / f64::from(1 << 23)),
            1 => 1.0 - rng.uniform(0.0, 1.0) * rng.uniform(-24.0, -1.0).exp2().max(0.5_f32.powi(24)),
            _ => rng.uniform(-24.0, 4.0).exp2(),
        })
        .collect();
    for (device, kernel) in &variants_for_tests(&[probe], &[]) {
        let row = SamplerRow::new(&Sampler { seed, ..ALL }, position, None).unwrap();
        let x_bits = x.iter().map(|x| x.to_bits()).collect();
        let out = vec![POISON; WORDS * n];
        let buffers = [bytemuck::cast_slice(&[row]).to_vec(), x_bits, bits.clone(), vec![0], out];
        let params = [u32::try_from(n).unwrap()];
        let groups = [u32::try_from(n / 64).unwrap(), 1, 1];
        let after = device.run(kernel, bytemuck::bytes_of(&params), &buffers, groups).unwrap();
        for (i, got) in after[4].chunks_exact(WORDS).enumerate() {
            let index = u32::try_from(i).unwrap().wrapping_mul(0x0123_4567);
            let [low, high] = words(position);
            let want = philox4x32([index, low, high, u32::from_be_bytes(*b"draw")], words(seed));
            assert_eq!(got[..4], want, "words {index}");
            let within =
                |got: u32, want: f64, limit: f64| (f64::from(f32::from_bits(got)) - want).abs() <= limit;
            let ln = f64::from(x[i]).ln();
            assert!(within(got[4], ln, 9.0 * U * ln.abs()), "ln({}) = {}", x[i], f32::from_bits(got[4]));
            let g = gumbel(bits[i]);
            assert!(
                within(got[5], g, 9.9 * U * (1.0 + g.abs())),
                "gumbel({}) = {}",
                bits[i],
                f32::from_bits(got[5])
            );
            assert!(
                f32::from_bits(got[5]) + 0.000_9 < f32::from_bits(got[6]),
                "{} exceeds its bound",
                bits[i]
            );
        }
    }
}

/// What the WGSL and Rust both name, they name alike.
#[test]
fn constants_are_those_of_the_wgsl() {
    let module = naga::front::wgsl::parse_str(VARIANTS[0].source).unwrap();
    let constant = |name: &str| {
        let (_, of) = module.constants.iter().find(|(_, of)| of.name.as_deref() == Some(name)).unwrap();
        match module.global_expressions[of.init] {
            naga::Expression::Literal(naga::Literal::U32(value)) => value,
            ref other => panic!("{name}: {other:?}"),
        }
    };
    assert_eq!((constant("ALL_MASKED"), constant("NOT_FINITE")), (ALL_MASKED, NOT_FINITE), "errors");
    assert_eq!(constant("UNCOUNTED"), UNCOUNTED, "no counts");
    let fields = [
        ("TEMPERATURE", offset_of!(SamplerRow, temperature)),
        ("TOP_K", offset_of!(SamplerRow, top_k)),
        ("TOP_P", offset_of!(SamplerRow, top_p)),
        ("PRESENCE_PENALTY", offset_of!(SamplerRow, presence_penalty)),
        ("FREQUENCY_PENALTY", offset_of!(SamplerRow, frequency_penalty)),
        ("SEED", offset_of!(SamplerRow, seed)),
        ("POSITION", offset_of!(SamplerRow, position)),
        ("COUNTS", offset_of!(SamplerRow, counts)),
        ("SAMPLER", size_of::<SamplerRow>()),
    ];
    for (name, bytes) in fields {
        assert_eq!(4 * constant(name) as usize, bytes, "{name}");
    }
}

#[test]
fn a_row_of_samplers_is_its_sampler() {
    let sampler = Sampler { seed: 1 << 32 | 2, presence_penalty: 0.5, top_k: 9, ..Sampler::default() };
    let row = SamplerRow::new(&sampler, 3 << 32 | 4, Some(5)).unwrap();
    assert_eq!((row.temperature, row.top_k, row.top_p), (1.0, 9, 0.7), "settings");
    assert_eq!((row.presence_penalty, row.frequency_penalty), (0.5, 0.0), "penalties");
    assert_eq!((row.seed, row.position), ([2, 1], [4, 3]), "low words first");
    assert_eq!(row.counts, 5, "its counts");
    let tempered =
        |temperature| SamplerRow::new(&Sampler { temperature, ..ALL }, 0, None).map(|row| row.temperature);
    assert_eq!(tempered(0.0), Ok(0.0), "greedy");
    assert_eq!(tempered(1e-45), Ok(0.5_f32.powi(126)), "a divisor");
    assert_eq!(tempered(f32::MAX), Ok(2_f32.powi(126)), "a divisor");
    assert!(matches!(tempered(-1.0), Err(SamplerError::Setting { name: "temperature", .. })), "out of range");
}

#[test]
fn a_mask_has_a_bit_of_each_token() {
    assert_eq!(mask(&[], 0), [0; 0], "no tokens");
    assert_eq!(mask(&[], 33), [0; 2], "none masked");
    assert_eq!(mask(&[0, 31, 33, 64, u32::MAX], 64), [1 << 31 | 1, 2], "and none beyond");
}

#[test]
fn refuses_what_it_cannot_run() {
    let counted = |rows, vocab, counts| lower(Dims { rows, vocab, counts });
    let lowered = |rows, vocab| counted(rows, vocab, 1).map(|(params, groups)| (params.vocab, groups));
    assert_eq!(lowered(3, 65_536), Ok((65_536, [3, 1, 1])), "plain");
    assert_eq!(lowered(0, 7), Ok((7, [0, 1, 1])), "nothing to do");
    assert_eq!(lowered(1, 0), Err(Error::Empty), "no tokens");
    assert_eq!(lowered(65_536, 1), Err(Error::Rows { got: 65_536, max: MAX_GROUPS }), "rows");
    assert_eq!(lowered(65_535, 65_536), Ok((65_536, [65_535, 1, 1])), "2^32 - 2^16 logits");
    assert_eq!(lowered(65_535, 65_538), Err(Error::Vocab { rows: 65_535, vocab: 65_538 }), "beyond 2^32");
    let beyond = Error::Vocab { rows: 65_536, vocab: 65_536 };
    assert_eq!(counted(1, 65_536, 65_536).map(|_| ()), Err(beyond), "counts beyond 2^32");
    assert!(lowered(1, (1 << 24) - 1).is_ok(), "the largest");
    assert_eq!(lowered(1, 1 << 24), Err(Error::Vocab { rows: 1, vocab: 1 << 24 }), "one more");
    assert_eq!(lowered(1, usize::MAX), Err(Error::Vocab { rows: 1, vocab: usize::MAX }), "no overflow");
}
