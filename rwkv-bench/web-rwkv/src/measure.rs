//! Verify, then time: each case's logits are checked before its clock starts.

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde::Serialize;

use crate::peer::{CHUNK_STEP, Peer, Precision, Slots};

/// The device is kept busy for so long right before a case is timed: it lowers its clock within moments of idling, and
/// what is timed then is that.
const WARM: Duration = Duration::from_millis(500);

/// Tokens by which decoding is verified, and from which it goes on.
const PROMPT: usize = 32;

/// One case.
#[derive(Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) case: &'static str,
    pub(crate) batch: usize,
    /// Of each sequence, in a window.
    pub(crate) tokens: usize,
    /// The most tokens of all sequences in a pass.
    pub(crate) chunk: usize,
    pub(crate) tokens_per_second: f64,
    /// Of a step when decoding, of the whole prompt when prefilling.
    pub(crate) median_ms: f64,
    /// The slowest window less the fastest, over the median.
    pub(crate) spread: f64,
    pub(crate) windows: usize,
    /// How far the logits are from those of chunks of 32, before anything is timed.
    pub(crate) nmse: f64,
}

/// How far logits may be from those of chunks of 32, in squared error over squares. Another order of summing moves them by
/// 4e-5 in F16 and 2e-11 in F32 (24 layers of random weights), a chunk that web-rwkv gets wrong by 7e-3 to 1e-1 (256 and
/// 512 tokens, the bundled model).
fn tolerance(precision: Precision) -> f64 {
    match precision {
        Precision::F16 => 1e-3,
        Precision::F32 => 1e-8,
    }
}

/// Squared error of `got` in units of `want`'s squares; NaN if either is not finite.
pub(crate) fn nmse(got: &[f32], want: &[f32]) -> f64 {
    let sum = |f: &dyn Fn(f64, f64) -> f64| {
        got.iter().zip(want).map(|(&a, &b)| f(f64::from(a), f64::from(b))).sum::<f64>()
    };
    sum(&|a, b| (a - b).powi(2)) / sum(&|_, b| b.powi(2))
}

fn verify(case: &str, got: &[Vec<f32>], want: &[f32], precision: Precision) -> anyhow::Result<f64> {
    let mut worst = 0.0;
    for (slot, got) in got.iter().enumerate() {
        ensure!(got.len() == want.len(), "{case}: {} logits in slot {slot}, not {}", got.len(), want.len());
        let wild = got.iter().chain(want).filter(|x| !x.is_finite()).count();
        ensure!(wild == 0, "{case}: {wild} logits are not finite (--precision f32 does not overflow)");
        let error = nmse(got, want);
        ensure!(
            error <= tolerance(precision),
            "{case}: the logits of slot {slot} differ from those in chunks of {CHUNK_STEP} by {error:.1e}"
        );
        worst = f64::max(worst, error);
    }
    Ok(worst)
}

/// A prompt of plain arithmetic: what it says does not matter to the time.
fn prompt(tokens: usize, vocab: usize) -> Vec<u32> {
    (0..tokens).map(|i| u32::try_from(i * 7919 % 65521 % vocab).unwrap_or_default()).collect()
}

/// The token of the highest logit, the first of equals: at the speed of memory, so that the host costs the peer nothing.
fn greedy(logits: &[f32]) -> u32 {
    let (lanes, rest) = logits.as_chunks::<16>();
    let mut best = [f32::NEG_INFINITY; 16];
    for lane in lanes {
        for (best, x) in best.iter_mut().zip(lane) {
            *best = best.max(*x);
        }
    }
    let best = best.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let token = logits.iter().position(|&x| x == best).unwrap_or_default();
    u32::try_from(token).unwrap_or_default()
}

/// Sorted, with the figures that are reported of it.
struct Windows(Vec<f64>);

impl Windows {
    fn new(mut seconds: Vec<f64>) -> Self {
        seconds.sort_by(f64::total_cmp);
        Self(seconds)
    }

    fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }

    fn spread(&self) -> f64 {
        (self.0[self.0.len() - 1] - self.0[0]) / self.median()
    }
}

/// Greedy decoding of `batch` sequences, `steps` tokens a window. Each token comes to the host as logits and goes back
/// as an id, for web-rwkv has no other way.
pub(crate) async fn decode(
    peer: &Peer,
    precision: Precision,
    batch: usize,
    steps: usize,
    windows: usize,
) -> anyhow::Result<Figure> {
    let prompt = prompt(PROMPT, peer.dims.vocab);
    let want = peer.slots(1, precision).await?.feed(&[&prompt], CHUNK_STEP, false).await?.remove(0);

    let slots = peer.slots(batch, precision).await?;
    let chunk = batch.next_multiple_of(CHUNK_STEP);
    let mut logits = Vec::new();
    for token in &prompt {
        logits = slots.feed(&vec![std::slice::from_ref(token); batch], chunk, false).await?;
    }
    let case = format!("decode, batch {batch}");
    let nmse = verify(&case, &logits, &want, precision)?;

    let mut next: Vec<u32> = logits.iter().map(|logits| greedy(logits)).collect();
    let step = async |next: &mut Vec<u32>| {
        let tokens = next.clone();
        let tokens: Vec<_> = tokens.iter().map(std::slice::from_ref).collect();
        slots.run(&tokens, chunk, false, |slot, logits| next[slot] = greedy(logits)).await
    };
    let start = Instant::now();
    while start.elapsed() < WARM {
        step(&mut next).await?;
    }
    let mut seconds = Vec::new();
    for _ in 0..windows {
        let start = Instant::now();
        for _ in 0..steps {
            step(&mut next).await?;
        }
        seconds.push(start.elapsed().as_secs_f64() / steps as f64);
    }
    let tokens: Vec<_> = next.iter().map(std::slice::from_ref).collect();
    let logits = slots.feed(&tokens, chunk, false).await?;
    let wild = logits.iter().flatten().filter(|x| !x.is_finite()).count();
    ensure!(wild == 0, "{case}: {wild} logits are not finite after it was timed");

    let seconds = Windows::new(seconds);
    Ok(Figure {
        case: "decode",
        batch,
        tokens: steps,
        chunk,
        tokens_per_second: batch as f64 / seconds.median(),
        median_ms: 1e3 * seconds.median(),
        spread: seconds.spread(),
        windows,
        nmse,
    })
}

/// A prompt of `tokens` from an empty state to its last logits on the host, by the fastest of `chunks`.
pub(crate) async fn prefill(
    peer: &Peer,
    precision: Precision,
    tokens: usize,
    chunks: &[usize],
    windows: usize,
) -> anyhow::Result<Figure> {
    let prompt = prompt(tokens, peer.dims.vocab);
    let slots = peer.slots(1, precision).await?;
    // What a chunk leaves in the state shows after it, so that one more token is compared as well.
    let verified = async |chunk: usize| {
        let mut logits = run(&slots, &prompt, chunk).await?.1;
        logits.extend(slots.feed(&[&prompt[..1]], CHUNK_STEP, false).await?.remove(0));
        anyhow::Ok(logits)
    };
    let want = verified(CHUNK_STEP).await?;

    // chunks longer than the prompt are all the same
    let longest = tokens.next_multiple_of(CHUNK_STEP);
    let mut chunks: Vec<_> = chunks.iter().map(|&chunk| chunk.min(longest)).collect();
    chunks.sort_unstable();
    chunks.dedup();
    let mut trials = Vec::new();
    for chunk in chunks {
        let case = format!("prefill {tokens} in chunks of {chunk}");
        let logits = verified(chunk).await?;
        let nmse = verify(&case, &[logits], &want, precision)?;
        let (seconds, _) = run(&slots, &prompt, chunk).await?;
        trials.push((seconds, chunk, nmse));
    }
    let best = trials.into_iter().min_by(|(a, ..), (b, ..)| a.total_cmp(b));
    let Some((_, chunk, nmse)) = best else { anyhow::bail!("no chunk to try") };

    let start = Instant::now();
    while start.elapsed() < WARM {
        run(&slots, &prompt, chunk).await?;
    }
    let mut seconds = Vec::new();
    for _ in 0..windows {
        seconds.push(run(&slots, &prompt, chunk).await?.0);
    }
    let seconds = Windows::new(seconds);
    Ok(Figure {
        case: "prefill",
        batch: 1,
        tokens,
        chunk,
        tokens_per_second: tokens as f64 / seconds.median(),
        median_ms: 1e3 * seconds.median(),
        spread: seconds.spread(),
        windows,
        nmse,
    })
}

/// One prompt from an empty state: its seconds, the emptying not counted, and its last logits.
async fn run(slots: &Slots, prompt: &[u32], chunk: usize) -> anyhow::Result<(f64, Vec<f32>)> {
    slots.reset()?;
    let start = Instant::now();
    let logits = slots.feed(&[prompt], chunk, false).await?.remove(0);
    Ok((start.elapsed().as_secs_f64(), logits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_highest() {
        for len in [1, 15, 16, 17, 40] {
            for best in 0..len {
                let mut logits = vec![-3.0; len];
                logits[best..].fill(-1.0);
                assert_eq!(greedy(&logits) as usize, best, "{len} logits");
            }
        }
    }

    #[test]
    fn nothing_that_is_not_finite_passes() {
        let want = [1.0, -2.0];
        for got in [[f32::NAN, -2.0], [1.0, f32::INFINITY]] {
            assert!(verify("", &[got.to_vec()], &want, Precision::F16).is_err(), "{got:?}");
            assert!(verify("", &[want.to_vec()], &got, Precision::F16).is_err(), "{got:?} wanted");
        }
        assert!(verify("", &[vec![1.0, -2.2]], &want, Precision::F16).is_err(), "8e-3");
        assert!(verify("", &[vec![1.0]], &want, Precision::F16).is_err(), "too few");
        assert!(verify("", &[want.to_vec()], &want, Precision::F32).is_ok(), "equal");
    }
}
