//! Choosing the next token.
//!
//! From logits `l`, `[V]`, in this order, all in `f32` but the sums of top-p, which are in `f64`:
//!
//! ```text
//! penalties     l_i -= presence_penalty * [c_i > 0] + frequency_penalty * c_i    c_i: count of i so far
//! temperature   z_i  = (l_i - max l) / T                                         T = 0: the largest l, done
//! top-k         the k largest
//! top-p         of these, the fewest largest with sum exp(z) >= p * sum over all of these
//! draw          of these, the largest z_i + g_i,   g_i = -ln(-ln u_i)            the Gumbel-max trick
//! ```
//!
//! Wherever two are equal, the lower token goes first. A token is masked by name, whatever its logit, or by a logit
//! of negative infinity, whatever the penalties: it takes no part, and is never chosen.
//!
//! Invariant: there is no generator. `u_i` is a pure function of `(seed, position, i)`, so that forks and
//! rollbacks replay exactly, and a token's noise does not depend on which others are left.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::rng::philox4x32;

/// Why no token could be chosen.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// A setting is out of its range.
    #[error("{name} is {value}, it must be {range}")]
    Setting {
        /// The field of [`Sampler`].
        name: &'static str,
        /// What it is.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// The logit of a token that is not masked is NaN or positive infinity, before the penalties or after them.
    #[error("the logit of token {token} is {logit}")]
    NotFinite {
        /// The first such token.
        token: u32,
        /// Its logit after the penalties.
        logit: f32,
    },
    /// No token is left to choose: all are masked, or there is none.
    #[error("all {vocab} tokens are masked")]
    AllMasked {
        /// How many logits there are.
        vocab: usize,
    },
}

/// How to choose a token: a plain value, the same for every step of a sequence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// What logits are divided by, 0 or more: below 1 sharpens, above 1 flattens. 0 takes the largest.
    pub temperature: f32,
    /// Keep this many of the most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest of the most probable tokens that together reach this share, in `(0, 1]`; 1 keeps all.
    pub top_p: f32,
    /// Taken off the logit of each token that was generated before.
    pub presence_penalty: f32,
    /// Taken off the logit of a token for each time that it was generated before.
    pub frequency_penalty: f32,
    /// The same seed gives the same draws.
    pub seed: u64,
}

impl Default for Sampler {
    /// For prose: the model's own odds, less the improbable three tenths. One token from that tail, which a
    /// model estimates worst, derails a text for good. No penalties: stories repeat names and small words.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 0.7,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
        }
    }
}

/// How often each token was generated so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts(BTreeMap<u32, u32>);

impl Counts {
    /// Of no token.
    #[must_use]
    pub const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// Counts one more of `token`.
    pub fn add(&mut self, token: u32) {
        let count = self.0.entry(token).or_default();
        *count = count.saturating_add(1);
    }

    /// Counts one less of `token`.
    pub fn remove(&mut self, token: u32) {
        if let Some(count) = self.0.get_mut(&token) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(&token);
            }
        }
    }

    /// The tokens that were counted, and how often.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> {
        self.0.iter().map(|(&token, &count)| (token, count))
    }

    /// How often `token` was counted.
    #[must_use]
    pub fn get(&self, token: u32) -> u32 {
        self.0.get(&token).copied().unwrap_or(0)
    }
}

/// Tokens with how often each was generated; of a token that is there twice, the last count.
impl FromIterator<(u32, u32)> for Counts {
    fn from_iter<I: IntoIterator<Item = (u32, u32)>>(counts: I) -> Self {
        Self(counts.into_iter().filter(|(_, count)| *count > 0).collect())
    }
}

/// A token that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Candidate {
    logit: f32,
    token: u32,
}

impl Candidate {
    /// The more probable first, the lower token first among equals. Logits are not NaN.
    fn order(&self, other: &Self) -> Ordering {
        let logits = other.logit.partial_cmp(&self.logit).unwrap_or(Ordering::Equal);
        logits.then(self.token.cmp(&other.token))
    }

    /// The more probable of two.
    fn better(self, other: Self) -> Self {
        if other.order(&self).is_lt() { other } else { self }
    }
}

impl Sampler {
    /// Always takes the most probable token.
    #[must_use]
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_p: 1.0, ..Self::default() }
    }

    /// Checks that every setting is in its range.
    ///
    /// # Errors
    ///
    /// If one is not, or is not a number.
    pub fn validate(&self) -> Result<(), Error> {
        let finite = "finite";
        let settings = [
            (
                "temperature",
                self.temperature,
                (0.0..f32::INFINITY).contains(&self.temperature),
                "finite and 0 or more",
            ),
            ("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "in (0, 1]"),
            ("presence_penalty", self.presence_penalty, self.presence_penalty.is_finite(), finite),
            ("frequency_penalty", self.frequency_penalty, self.frequency_penalty.is_finite(), finite),
        ];
        match settings.into_iter().find(|(_, _, sound, _)| !sound) {
            Some((name, value, _, range)) => Err(Error::Setting { name, value, range }),
            None => Ok(()),
        }
    }

    /// Chooses the token at `position` of a sequence, from `logits` `[V]`. Counts of tokens outside of
    /// `logits` play no part.
    ///
    /// # Errors
    ///
    /// If a setting is out of its range, a logit is NaN or positive infinity, or all are negative infinity.
    pub fn sample(&self, logits: &[f32], counts: &Counts, position: u64) -> Result<u32, Error> {
        self.sample_except(&[], logits, counts, position)
    }

    /// As [`Self::sample`], but none of the `masked` tokens. Those outside of `logits` play no part.
    ///
    /// # Errors
    ///
    /// If a setting is out of its range, or of the tokens that are not masked, a logit is NaN or positive infinity, or
    /// all are negative infinity.
    pub fn sample_except(
        &self,
        masked: &[u32],
        logits: &[f32],
        counts: &Counts,
        position: u64,
    ) -> Result<u32, Error> {
        self.validate()?;
        let (best, mut candidates) = self.penalised(masked, logits, counts)?;
        if self.temperature > 0.0 {
            self.cut(best, &mut candidates);
            Ok(self.draw(best, &candidates, position))
        } else {
            Ok(best.token)
        }
    }

    /// Whether it matters which tokens were generated before.
    #[must_use]
    pub fn penalises(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// The tokens that are not masked, in ascending order, with penalised logits; and the best of them.
    fn penalised(
        &self,
        masked: &[u32],
        logits: &[f32],
        counts: &Counts,
    ) -> Result<(Candidate, Vec<Candidate>), Error> {
        let mut candidates: Vec<Candidate> =
            (0..=u32::MAX).zip(logits).map(|(token, &logit)| Candidate { logit, token }).collect();
        for &token in masked {
            if let Some(candidate) = candidates.get_mut(token as usize) {
                candidate.logit = f32::NEG_INFINITY;
            }
        }
        for (&token, &count) in &counts.0 {
            // Less a penalty that overflows, a mask would be no number.
            if let Some(candidate) =
                candidates.get_mut(token as usize).filter(|c| c.logit > f32::NEG_INFINITY)
            {
                candidate.logit -= self.presence_penalty + self.frequency_penalty * count as f32;
            }
        }
        if let Some(&Candidate { logit, token }) =
            candidates.iter().find(|c| c.logit.is_nan() || c.logit == f32::INFINITY)
        {
            return Err(Error::NotFinite { token, logit });
        }
        candidates.retain(|c| c.logit > f32::NEG_INFINITY);
        let best = candidates.iter().copied().reduce(Candidate::better);
        Ok((best.ok_or(Error::AllMasked { vocab: logits.len() })?, candidates))
    }

    /// The logit after the temperature, less that of the `best`: no more than 0, and never NaN.
    fn tempered(&self, best: Candidate, candidate: &Candidate) -> f32 {
        (candidate.logit - best.logit) / self.temperature
    }

    /// Leaves those of the candidates that top-k and top-p leave, in their order.
    ///
    /// Both cut the order of candidates at one of them, which is found by selection, without a full sort.
    fn cut(&self, best: Candidate, candidates: &mut Vec<Candidate>) {
        let top_k = self.top_k as usize;
        if top_k > 0 && top_k < candidates.len() {
            let last = *candidates.clone().select_nth_unstable_by(top_k - 1, Candidate::order).1;
            candidates.retain(|c| c.order(&last).is_le());
        }
        if self.top_p < 1.0 {
            let weight = |c: &Candidate| self.tempered(best, c).exp();
            let total: f64 = candidates.iter().map(|c| f64::from(weight(c))).sum();
            let goal = f64::from(self.top_p) * total;
            // weights below this floor make up less than half of what may be left out, so that the goal is reached
            // without them, whatever the rounding
            let floor = 0.5 * (1.0 - self.top_p) / candidates.len() as f32;
            let mut likely: Vec<Candidate> =
                candidates.iter().copied().filter(|c| weight(c) >= floor).collect();
            let last =
                reach(&mut likely, goal, weight).or_else(|| reach(&mut candidates.clone(), goal, weight));
            candidates.retain(|c| last.is_none_or(|last| c.order(&last).is_le()));
        }
    }

    /// Draws one of the candidates, `best` among them, with the odds `exp(tempered)`.
    fn draw(&self, best: Candidate, candidates: &[Candidate], position: u64) -> u32 {
        let (mut winner, mut most) = (best.token, f32::NEG_INFINITY);
        let (mut block, mut words) = (None, [0; 4]);
        for candidate in candidates {
            let (index, lane) = (candidate.token / 4, candidate.token % 4);
            if block != Some(index) {
                (block, words) = (Some(index), noise(self.seed, position, index));
            }
            let value = self.tempered(best, candidate) + gumbel(words[lane as usize]);
            if value > most {
                (winner, most) = (candidate.token, value);
            }
        }
        winner
    }
}

/// The candidate, from the most probable on, with which the sum of weights reaches `goal`; none if rounding
/// keeps all of them below it. Leaves the candidates in any order.
fn reach(candidates: &mut [Candidate], goal: f64, weight: impl Fn(&Candidate) -> f32) -> Option<Candidate> {
    let (mut rest, mut sum, mut size) = (candidates, 0.0, 256);
    while !rest.is_empty() {
        // a few are enough, as a rule; where they are not, four times as many
        size = rest.len().min(size);
        if size < rest.len() {
            rest.select_nth_unstable_by(size - 1, Candidate::order);
        }
        let (front, back) = rest.split_at_mut(size);
        front.sort_unstable_by(Candidate::order);
        for candidate in front {
            sum += f64::from(weight(candidate));
            if sum >= goal {
                return Some(*candidate);
            }
        }
        (rest, size) = (back, size * 4);
    }
    None
}

/// Four random words, for tokens `4 * index` and the three that follow.
fn noise(seed: u64, position: u64, index: u32) -> [u32; 4] {
    /// Sets these words apart from any other use of the same seed.
    const DOMAIN: u32 = u32::from_be_bytes(*b"draw");
    let [position, key] = [position, seed].map(|x| [low(x), low(x >> 32)]);
    philox4x32([index, position[0], position[1], DOMAIN], key)
}

#[expect(clippy::cast_possible_truncation, reason = "one half at a time")]
const fn low(x: u64) -> u32 {
    x as u32
}

/// Noise of the Gumbel distribution, `-ln(-ln u)`.
fn gumbel(bits: u32) -> f32 {
    -(-open_unit(bits).ln()).ln()
}

/// Uniform in the open interval `(0, 1)`, in the middle of one of `2^23` cells. The value needs 24 bits, all
/// that an `f32` has: with one bit more, the last would round to 1.
fn open_unit(bits: u32) -> f32 {
    ((bits >> 9) as f32 + 0.5) / (1 << 23) as f32
}

#[cfg(test)]
mod tests {
    use super::{Candidate, Counts, Error, Sampler, gumbel, noise, open_unit};
    use crate::rng::SplitMix64;
    use proptest::prelude::*;

    const ALL: Sampler = Sampler {
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        seed: 0,
    };

    fn choose(sampler: Sampler, logits: &[f32], position: u64) -> u32 {
        sampler.sample(logits, &Counts::default(), position).unwrap()
    }

    /// Pearson's statistic of `seen` against odds, and the limit that it passes with a probability below
    /// 1e-9 if the odds are true: P(X >= d + 2 sqrt(d x) + 2 x) <= exp(-x) for X of the chi-squared
    /// distribution with d degrees of freedom (Laurent and Massart, 2000, lemma 1).
    fn chi_squared(seen: &[u32], odds: &[f64]) -> (f64, f64) {
        let scale = seen.iter().copied().map(f64::from).sum::<f64>() / odds.iter().sum::<f64>();
        let term = |(&seen, &odds): (&u32, &f64)| (f64::from(seen) - odds * scale).powi(2) / (odds * scale);
        let (d, x) = (seen.len() as f64 - 1.0, 1e9_f64.ln());
        (seen.iter().zip(odds).map(term).sum(), d + 2.0 * (d * x).sqrt() + 2.0 * x)
    }

    fn normals(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = SplitMix64::new(seed);
        (0..n).map(|_| rng.normal()).collect()
    }

    #[test]
    fn frequencies_follow_softmax() {
        let logits = normals(16, 1);
        for (case, temperature) in [(1, 1.0), (2, 0.7), (3, 2.0)] {
            let sampler = Sampler { temperature, seed: case << 40, ..ALL };
            let odds: Vec<f64> = logits.iter().map(|&l| f64::from(l / temperature).exp()).collect();
            let mut seen = [0; 16];
            for position in 0..200_000 {
                seen[choose(sampler, &logits, position) as usize] += 1;
            }
            let (statistic, limit) = chi_squared(&seen, &odds);
            assert!(statistic < limit, "temperature {temperature}: {statistic} >= {limit}, {seen:?}");
        }
    }

    #[test]
    fn frequencies_follow_what_top_k_and_top_p_leave() {
        let odds = [1.0_f32, 8.0, 2.0, 4.0, 0.5, 0.25];
        let logits = odds.map(f32::ln);
        // of 15.75: the first three reach 14/15.75 = 0.889; of the top three alone, two reach 12/14 = 0.857
        let cases = [
            (0, 0.85, vec![1, 2, 3]),
            (0, 0.9, vec![0, 1, 2, 3]),
            (3, 0.85, vec![1, 3]),
            (2, 1.0, vec![1, 3]),
        ];
        for (top_k, top_p, kept) in cases {
            let mut seen = [0; 6];
            for position in 0..50_000 {
                seen[choose(Sampler { top_k, top_p, ..ALL }, &logits, position) as usize] += 1;
            }
            let drawn: Vec<usize> = (0..6).filter(|&i| seen[i] > 0).collect();
            assert_eq!(drawn, kept, "top_k {top_k}, top_p {top_p}");
            let of_kept =
                (kept.iter().map(|&i| seen[i]).collect::<Vec<_>>(), kept.iter().map(|&i| f64::from(odds[i])));
            let (statistic, limit) = chi_squared(&of_kept.0, &of_kept.1.collect::<Vec<_>>());
            assert!(statistic < limit, "top_k {top_k}, top_p {top_p}: {statistic} >= {limit}, {seen:?}");
        }
    }

    /// Draws at neighbouring positions, and from neighbouring seeds, tell nothing of each other.
    #[test]
    fn draws_are_independent() {
        let by_position: Vec<u32> = (0..100_001).map(|position| choose(ALL, &[0.0; 8], position)).collect();
        let by_seed: Vec<u32> =
            (0..100_001).map(|seed| choose(Sampler { seed, ..ALL }, &[0.0; 8], 5)).collect();
        for (name, draws) in [("position", by_position), ("seed", by_seed)] {
            let mut seen = [0; 64];
            for pair in draws.windows(2) {
                seen[(pair[0] * 8 + pair[1]) as usize] += 1;
            }
            let (statistic, limit) = chi_squared(&seen, &[1.0; 64]);
            assert!(statistic < limit, "{name}: {statistic} >= {limit}");
        }
    }

    #[test]
    fn the_noise_is_named_by_seed_position_and_token() {
        let base = noise(1, 2, 3);
        let others = [
            noise(1 | 1 << 32, 2, 3),
            noise(2, 2, 3),
            noise(1, 2 | 1 << 32, 3),
            noise(1, 3, 3),
            noise(1, 2, 4),
        ];
        for (case, other) in others.into_iter().enumerate() {
            assert_ne!(base, other, "case {case}");
        }
        let logits = normals(100, 2);
        let run = |seed| (0..50).map(|p| choose(Sampler { seed, ..ALL }, &logits, p)).collect::<Vec<_>>();
        assert_eq!(run(7), run(7), "the same again");
        assert_ne!(run(7), run(8), "another seed");
    }

    #[test]
    fn uniforms_stay_within_the_open_interval() {
        let (first, last) = (open_unit(0), open_unit(u32::MAX));
        assert!(first > 0.0 && last < 1.0, "{first} {last}");
        assert_eq!((first, 1.0 - last), (0.5_f32.powi(24), 0.5_f32.powi(24)), "the middle of the end cells");
        let middle = open_unit(1 << 31);
        assert_eq!(middle.to_bits(), (0.5 + 0.5_f32.powi(24)).to_bits(), "{middle} is exact");
        assert!(gumbel(0).is_finite() && gumbel(u32::MAX).is_finite(), "the noise has no infinities");
        assert!(gumbel(0) < gumbel(1 << 31) && gumbel(1 << 31) < gumbel(u32::MAX), "and grows with u");
    }

    #[test]
    fn greedy_takes_the_largest_and_of_equals_the_lowest() {
        let masked = f32::NEG_INFINITY;
        for (logits, want) in [
            (&[1.0, 3.0, 2.0][..], 1),
            (&[1.0, 3.0, 3.0], 1),
            (&[-0.0, 0.0], 0),
            (&[masked, -1e38, masked], 1),
            (&[f32::MIN, f32::MAX], 1),
        ] {
            let samplers = [
                ("greedy", Sampler::greedy()),
                ("top_k", Sampler { top_k: 1, ..ALL }),
                ("top_p", Sampler { top_p: f32::MIN_POSITIVE, ..ALL }),
                ("hot", Sampler { top_k: 1, temperature: f32::MAX, ..ALL }),
                ("cold", Sampler { top_p: 0.01, temperature: f32::MIN_POSITIVE, ..ALL }),
            ];
            for (name, sampler) in samplers {
                for position in [0, 1, u64::MAX] {
                    assert_eq!(choose(sampler, logits, position), want, "{name} {logits:?} at {position}");
                }
            }
        }
    }

    #[test]
    fn ties_at_the_boundary_go_to_the_lowest() {
        for position in 0..200 {
            assert!(choose(Sampler { top_k: 3, ..ALL }, &[0.0; 9], position) < 3, "top_k");
            assert!(choose(Sampler { top_p: 0.5, ..ALL }, &[0.0; 8], position) < 4, "top_p");
        }
    }

    /// At this position, two of 16,384 tokens have the same noise, which is also the largest.
    #[test]
    fn ties_of_the_draw_go_to_the_lowest() {
        let position = 1411;
        let cells: Vec<u32> = (0..4096).flat_map(|i| noise(0, position, i)).map(|bits| bits >> 9).collect();
        let most = *cells.iter().max().unwrap();
        let tied: Vec<usize> = (0..cells.len()).filter(|&i| cells[i] == most).collect();
        assert_eq!(tied.len(), 2, "a tie: {tied:?}");
        assert_eq!(choose(ALL, &[0.0; 16_384], position) as usize, tied[0], "of {tied:?}");
    }

    #[test]
    fn a_masked_token_is_never_drawn() {
        let mut logits = [f32::NEG_INFINITY; 9];
        (logits[2], logits[7]) = (0.0, -3.0);
        for position in 0..1000 {
            for sampler in
                [ALL, Sampler { top_k: 5, ..ALL }, Sampler { top_p: 0.999, temperature: 9.0, ..ALL }]
            {
                let token = choose(sampler, &logits, position);
                assert!(token == 2 || token == 7, "{token} by {sampler:?}");
            }
        }
    }

    /// By name it is masked whatever its logit, and by its logit whatever the penalties.
    #[test]
    fn a_mask_hides_all_of_a_token() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let mut counts = Counts::default();
        (0..3).for_each(|_| counts.add(0));
        for sampler in [ALL, Sampler::greedy(), Sampler { frequency_penalty: f32::MIN, ..ALL }] {
            let sample = |masked: &[u32], logits: &[f32]| sampler.sample_except(masked, logits, &counts, 1);
            for hidden in [nan, inf, 9.0, -inf] {
                assert_eq!(sample(&[0, 9, u32::MAX], &[hidden, 0.0]), Ok(1), "{hidden} by {sampler:?}");
            }
            assert_eq!(sample(&[], &[-inf, 0.0]), Ok(1), "{sampler:?}");
            assert_eq!(sample(&[1, 0], &[0.0, 0.0]), Err(Error::AllMasked { vocab: 2 }), "all");
            let error = sample(&[1], &[-1.0, 0.0, nan]).unwrap_err();
            assert!(matches!(error, Error::NotFinite { .. }), "one that is not masked: {error}");
        }
    }

    /// A mask of names is one of logits.
    #[test]
    fn masked_tokens_leave_the_others_their_draws() {
        let logits = normals(40, 3);
        let masked: Vec<u32> = (0..40).filter(|token| token % 3 == 1).collect();
        let mut by_logit = logits.clone();
        masked.iter().for_each(|&token| by_logit[token as usize] = f32::NEG_INFINITY);
        let counts = Counts::default();
        for position in 0..200 {
            for sampler in [ALL, Sampler { top_k: 7, ..ALL }, Sampler::default()] {
                let by_name = sampler.sample_except(&masked, &logits, &counts, position);
                assert_eq!(
                    by_name,
                    sampler.sample(&by_logit, &counts, position),
                    "{sampler:?} at {position}"
                );
            }
        }
    }

    #[test]
    fn penalties_are_taken_off() {
        let mut counts = Counts::default();
        for token in [0, 1, 1, 1, 99] {
            counts.add(token);
        }
        assert_eq!((counts.get(0), counts.get(1), counts.get(2)), (1, 3, 0), "counts");
        assert_eq!(counts.iter().chain([(7, 0)]).collect::<Counts>(), counts, "taken and given");
        let penalised = |presence_penalty, frequency_penalty| {
            let sampler = Sampler { presence_penalty, frequency_penalty, ..Sampler::greedy() };
            let (best, candidates) = sampler.penalised(&[], &[4.0, 4.5, 2.0], &counts).unwrap();
            assert_eq!(
                sampler.sample(&[4.0, 4.5, 2.0], &counts, 0),
                Ok(best.token),
                "greedy after penalties"
            );
            (best.token, candidates.iter().map(|c| c.logit).collect::<Vec<_>>())
        };
        let penalises = |presence_penalty, frequency_penalty| {
            Sampler { presence_penalty, frequency_penalty, ..Sampler::greedy() }.penalises()
        };
        let any = [(0.0, 0.0), (1.0, 0.0), (0.0, 0.5), (-1.0, 0.0)].map(|(p, f)| penalises(p, f));
        assert_eq!(any, [false, true, true, true], "by either, and by negative ones");
        assert_eq!(penalised(0.0, 0.0), (1, vec![4.0, 4.5, 2.0]), "none");
        assert_eq!(penalised(1.0, 0.0), (1, vec![3.0, 3.5, 2.0]), "once each");
        assert_eq!(penalised(0.0, 0.5), (0, vec![3.5, 3.0, 2.0]), "for each time");
        assert_eq!(penalised(1.0, 1.0), (0, vec![2.0, 0.5, 2.0]), "both; of equals the lowest");
        assert_eq!(penalised(-1.0, 0.0), (1, vec![5.0, 5.5, 2.0]), "negative ones encourage");
    }

    #[test]
    fn settings_out_of_range_are_errors() {
        assert_eq!(Sampler::default().validate(), Ok(()), "the default");
        assert_eq!(Sampler::greedy().validate(), Ok(()), "greedy");
        type Case<'a> = (&'a str, fn(f32) -> Sampler, &'a [f32]);
        let cases: [Case<'_>; 4] = [
            ("temperature", |temperature| Sampler { temperature, ..ALL }, &[-0.1, f32::INFINITY]),
            ("top_p", |top_p| Sampler { top_p, ..ALL }, &[0.0, -0.1, 1.1, f32::INFINITY]),
            ("presence_penalty", |presence_penalty| Sampler { presence_penalty, ..ALL }, &[f32::INFINITY]),
            (
                "frequency_penalty",
                |frequency_penalty| Sampler { frequency_penalty, ..ALL },
                &[f32::NEG_INFINITY],
            ),
        ];
        for (field, sampler, values) in cases {
            for &value in values.iter().chain(&[f32::NAN]) {
                let error = sampler(value).sample(&[0.0], &Counts::default(), 0).unwrap_err();
                assert!(
                    matches!(error, Error::Setting { name, .. } if name == field),
                    "{field} {value}: {error}"
                );
            }
        }
    }

    #[test]
    fn logits_that_are_no_logits_are_errors() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        for sampler in [ALL, Sampler::greedy(), Sampler::default(), Sampler { top_k: 1, ..ALL }] {
            let error = |logits: &[f32]| sampler.sample(logits, &Counts::default(), 0).unwrap_err();
            assert!(matches!(error(&[0.0, nan, 1.0]), Error::NotFinite { token: 1, .. }), "NaN");
            assert!(matches!(error(&[0.0, 1.0, inf]), Error::NotFinite { token: 2, .. }), "infinity");
            assert_eq!(error(&[-inf, -inf]), Error::AllMasked { vocab: 2 }, "all masked");
            assert_eq!(error(&[]), Error::AllMasked { vocab: 0 }, "none");
        }
        let mut counts = Counts::default();
        (0..3).for_each(|_| counts.add(0));
        let sampler = Sampler { frequency_penalty: f32::MIN, ..ALL };
        let error = sampler.sample(&[0.0, 0.0], &counts, 0).unwrap_err();
        assert_eq!(error, Error::NotFinite { token: 0, logit: inf }, "a penalty that overflows");
        let sampler = Sampler { frequency_penalty: f32::MAX, ..ALL };
        assert_eq!(sampler.sample(&[0.0, 0.0], &counts, 0), Ok(1), "one that masks");
    }

    /// What top-k and top-p leave, by the definition: sort all, walk from the front.
    fn naive(sampler: Sampler, best: Candidate, candidates: &[Candidate]) -> Vec<u32> {
        let weight = |c: &Candidate| ((c.logit - best.logit) / sampler.temperature).exp();
        let mut sorted = candidates.to_vec();
        sorted.sort_by(|a, b| b.logit.partial_cmp(&a.logit).unwrap().then(a.token.cmp(&b.token)));
        if sampler.top_k > 0 {
            sorted.truncate(sampler.top_k as usize);
        }
        if sampler.top_p < 1.0 {
            let mut kept = sorted.clone();
            kept.sort_by_key(|c| c.token);
            let goal = f64::from(sampler.top_p) * kept.iter().map(|c| f64::from(weight(c))).sum::<f64>();
            let mut sum = 0.0;
            let before = |c: &&Candidate| {
                let short = sum < goal;
                sum += f64::from(weight(c));
                short
            };
            let count = sorted.iter().take_while(before).count();
            sorted.truncate(count);
        }
        let mut tokens: Vec<u32> = sorted.iter().map(|c| c.token).collect();
        tokens.sort_unstable();
        tokens
    }

    proptest! {
        /// Logits on a coarse grid, so that many are equal.
        #[test]
        fn candidates_are_those_of_the_definition(
            vocab in prop_oneof![1usize..20, 1usize..3000],
            draw in any::<u64>(),
            grid in prop_oneof![Just(2.0f32), Just(1e-3)],
            temperature in 0.05f32..5.0,
            top_k in prop_oneof![Just(0u32), 1u32..30, 1u32..4000],
            top_p in prop_oneof![Just(1.0f32), 0.001f32..1.0, 0.99f32..1.0],
            penalty in 0.0f32..2.0,
            position in any::<u64>(),
        ) {
            let mut rng = SplitMix64::new(draw);
            let logits: Vec<f32> = (0..vocab).map(|_| match rng.uniform(0.0, 1.0) {
                u if u < 0.1 => f32::NEG_INFINITY,
                _ => (3.0 * rng.normal() / grid).round() * grid,
            }).collect();
            let mut counts = Counts::default();
            (0..20).for_each(|_| counts.add((rng.next_u64() % 40) as u32));
            let sampler = Sampler {
                temperature,
                top_k,
                top_p,
                presence_penalty: penalty,
                frequency_penalty: penalty / 2.0,
                seed: draw,
            };
            let Ok((best, all)) = sampler.penalised(&[], &logits, &counts) else {
                prop_assert!(logits.iter().all(|l| *l == f32::NEG_INFINITY), "only if all are masked");
                return Ok(());
            };
            let mut candidates = all.clone();
            sampler.cut(best, &mut candidates);
            let kept: Vec<u32> = candidates.iter().map(|c| c.token).collect();
            prop_assert_eq!(&kept, &naive(sampler, best, &all), "the candidates");

            let token = sampler.sample(&logits, &counts, position).unwrap();
            prop_assert!(kept.contains(&token), "{} is a candidate", token);
            prop_assert_eq!(sampler.sample(&logits, &counts, position).unwrap(), token, "the same again");
            let free = Sampler { top_k: 0, top_p: 1.0, ..sampler };
            let free = free.sample(&logits, &counts, position).unwrap();
            prop_assert!(token == free || !kept.contains(&free), "its noise does not depend on the others");
        }
    }
}
