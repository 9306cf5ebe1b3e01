//! How much of a passage a state still knows, so many tokens later.
//!
//! A passage is read, then other text, then the passage again: the gain is how much better it is predicted the second
//! time, in bits per byte. A part of that is not memory of the passage: the second time there is text before it. The row
//! [`UNREAD`] tells how much, of sessions that read the other text alone.

use rwkv_model::{Engine, Session, StateFormat, quality};

/// Of sessions that did not read the passage before.
pub(crate) const UNREAD: &str = "f32-unread";

/// Tokens of a passage.
pub(crate) const PASSAGE: usize = 256;

/// Tokens of a session in a pass over the text between.
const CHUNK: usize = 32;

/// Bits per byte that a passage gains, over passages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gain {
    pub(crate) mean: f64,
    /// Standard error of the mean.
    pub(crate) error: f64,
}

/// What is repeated, and where.
pub(crate) struct Passages<'a> {
    pub(crate) tokens: &'a [u32],
    pub(crate) count: usize,
    /// Tokens between, ascending.
    pub(crate) distances: &'a [usize],
}

impl Passages<'_> {
    /// Whether the text is long enough for passages so far from themselves.
    pub(crate) const fn fits(tokens: &[u32], distance: usize) -> bool {
        distance.saturating_add(PASSAGE) <= tokens.len() / 2
    }

    /// A passage, and the text between: that half of the text on, from the end to the beginning if need be. Passages are
    /// spread over the text evenly.
    fn passage(&self, index: usize) -> (Vec<u32>, Vec<u32>) {
        let start = index * (self.tokens.len() - PASSAGE) / self.count.max(1);
        let passage = &self.tokens[start..start + PASSAGE];
        let longest = self.distances.last().copied().unwrap_or(0);
        let between = self.tokens.iter().cycle().skip(start + self.tokens.len() / 2).take(longest);
        (passage.to_vec(), between.copied().collect())
    }

    /// For each way and distance, the gain; a way is a format in which the state rests once, before the passage comes
    /// again. If the passage is not `read`, sessions read the text between alone. `n` sessions run side by side.
    pub(crate) fn gains(
        &self,
        engine: &Engine,
        ways: &[Option<StateFormat>],
        read: bool,
        n: usize,
    ) -> anyhow::Result<Vec<Vec<Gain>>> {
        let mut gains = vec![vec![Vec::new(); self.distances.len()]; ways.len()];
        let all: Vec<(Vec<u32>, Vec<u32>)> = (0..self.count).map(|index| self.passage(index)).collect();
        for group in all.chunks(n.max(1)) {
            let passages = group.iter().map(|(passage, _)| &passage[..]);
            let mut sessions: Vec<Session> = group.iter().map(|_| engine.session()).collect();
            let first = engine.score(&mut sessions.iter_mut().zip(passages.clone()).collect::<Vec<_>>())?;
            if !read {
                sessions = group.iter().map(|_| engine.session()).collect();
            }
            let mut at = 0;
            for (index, &distance) in self.distances.iter().enumerate() {
                while at < distance {
                    let end = (at + CHUNK).min(distance);
                    let parts = group.iter().map(|(_, between)| &between[at..end]);
                    engine.step(&mut sessions.iter_mut().zip(parts).collect::<Vec<_>>())?;
                    at = end;
                }
                for (way, gains) in ways.iter().zip(&mut gains) {
                    let mut forks: Vec<Session> = sessions.iter().map(Session::fork).collect();
                    if let Some(format) = *way {
                        forks.iter_mut().try_for_each(|fork| quality::put_to_rest(fork, format))?;
                    }
                    let second =
                        engine.score(&mut forks.iter_mut().zip(passages.clone()).collect::<Vec<_>>())?;
                    // Of the first token, there is no first prediction.
                    let bits = |scores: &[f64]| -scores.iter().sum::<f64>() / std::f64::consts::LN_2;
                    for ((first, second), passage) in first.iter().zip(&second).zip(passages.clone()) {
                        let tail = &second[second.len() - first.len()..];
                        let bytes = engine.tokenizer()?.decode(&passage[1..])?.len();
                        gains[index].push((bits(first) - bits(tail)) / bytes as f64);
                    }
                }
            }
        }
        Ok(gains.iter().map(|of| of.iter().map(|gains| Gain::of(gains)).collect()).collect())
    }
}

impl Gain {
    fn of(gains: &[f64]) -> Self {
        let n = gains.len() as f64;
        let mean = gains.iter().sum::<f64>() / n;
        let squares: f64 = gains.iter().map(|gain| (gain - mean).powi(2)).sum();
        Self { mean, error: (squares / n / (n - 1.0).max(1.0)).sqrt() }
    }
}
