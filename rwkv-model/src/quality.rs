//! How well a model predicts a text: the yardstick of every approximation.

use rayon::prelude::*;
use rwkv_core::ops::softmax::log_probability;
use rwkv_state::{EncodedState, StateFormat};

use crate::engine::{Engine, Error};
use crate::sample;
use crate::session::{Session, Shown};

/// How well tokens were predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Less the natural logarithms of the tokens' probabilities, summed.
    pub nats: f64,
    /// Tokens predicted.
    pub tokens: usize,
    /// Bytes that they stand for.
    pub bytes: usize,
}

impl Score {
    /// Bits per byte: what the text would take, compressed by this model. Comparable between tokenizers.
    #[must_use]
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes as f64
    }

    /// Perplexity: among how many equally probable tokens the model chose, as it were.
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        (self.nats / self.tokens as f64).exp()
    }
}

impl std::iter::Sum for Score {
    fn sum<I: Iterator<Item = Self>>(scores: I) -> Self {
        scores.fold(Self::default(), |sum, of| Self {
            nats: sum.nats + of.nats,
            tokens: sum.tokens + of.tokens,
            bytes: sum.bytes + of.bytes,
        })
    }
}

/// Scores a text in windows, each from an empty state. Every token of a window is predicted from those before it in the
/// window; windows overlap by one token, so that every token of the text but the first is predicted once. `progress` sees
/// the score after each window.
///
/// # Errors
///
/// If the engine has no tokenizer. A window of no tokens is taken for one of one.
pub fn windows(
    engine: &Engine,
    text: &[u8],
    window: usize,
    mut progress: impl FnMut(&Score),
) -> Result<Score, Error> {
    let tokenizer = engine.tokenizer()?;
    let (tokens, window, mut score) = (tokenizer.encode(text), window.max(1), Score::default());
    for start in (0..tokens.len().saturating_sub(1)).step_by(window) {
        let end = start.saturating_add(window).saturating_add(1).min(tokens.len());
        let scores = engine.session().score(&tokens[start..end])?;
        score.nats -= scores.iter().sum::<f64>();
        score.tokens += scores.len();
        score.bytes += tokenizer.decode(&tokens[start + 1..end])?.len();
        progress(&score);
    }
    Ok(score)
}

/// How windows are scored side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SideBySide {
    /// Tokens predicted in a window.
    pub window: usize,
    /// Windows at a time, on the CPU shared out among its threads. More need more memory; the results are the same.
    pub sessions: usize,
    /// Whether their states are put to rest on the way.
    pub rest: Option<Rest>,
}

/// States that are put to rest again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rest {
    /// In what.
    pub format: StateFormat,
    /// After how many tokens each time.
    pub every: usize,
}

/// As [`windows`], many windows at a time: the score of each, which is the same but for rounding where the device says so.
/// `progress` sees how many are done.
///
/// # Errors
///
/// As those of [`windows`], or if a state that is put to rest is not finite. No windows at a time are taken for one, and so
/// are no tokens between rests.
pub fn side_by_side(
    engine: &Engine,
    text: &[u8],
    options: SideBySide,
    mut progress: impl FnMut(usize),
) -> Result<Vec<Score>, Error> {
    let SideBySide { window, sessions: n, rest } = options;
    let tokenizer = engine.tokenizer()?;
    let (tokens, window) = (tokenizer.encode(text), window.max(1));
    let windows: Vec<&[u32]> = (0..tokens.len().saturating_sub(1))
        .step_by(window)
        .map(|start| &tokens[start..start.saturating_add(window).saturating_add(1).min(tokens.len())])
        .collect();
    let mut scores = Vec::with_capacity(windows.len());
    for windows in windows.chunks(n.max(1)) {
        for (tokens, predicted) in windows.iter().zip(score(engine, windows, rest)?) {
            scores.push(Score {
                nats: -predicted.iter().sum::<f64>(),
                tokens: predicted.len(),
                bytes: tokenizer.decode(&tokens[1..])?.len(),
            });
        }
        progress(scores.len());
    }
    Ok(scores)
}

/// The natural logarithms of the tokens' probabilities, of sequences side by side, each from an empty state; of the first
/// token there is none.
///
/// Each thread of a CPU has sequences of its own, which never wait for those of others: the parts of a pass of few tokens
/// are too small to be shared.
fn score(engine: &Engine, sequences: &[&[u32]], rest: Option<Rest>) -> Result<Vec<Vec<f64>>, Error> {
    let scores = engine.on_threads(|passes| {
        let (each, threads) =
            (sequences.len().div_ceil(passes).max(1), rayon::current_num_threads() / passes);
        let parts = sequences.par_chunks(each).map(|own| score_together(engine, own, rest, threads));
        parts.collect::<Result<Vec<_>, _>>()
    });
    Ok(scores?.concat())
}

/// The same of sequences that share passes, and so many threads that put states to rest.
fn score_together(
    engine: &Engine,
    sequences: &[&[u32]],
    rest: Option<Rest>,
    threads: usize,
) -> Result<Vec<Vec<f64>>, Error> {
    let mut sessions: Vec<Session> = sequences.iter().map(|_| engine.session()).collect();
    let mut scores = vec![Vec::new(); sequences.len()];
    let every = rest.map_or(usize::MAX, |rest| rest.every.max(1));
    let mut beds: Vec<Bed> = (0..threads).map(|_| Bed::default()).collect();
    let mut start = 0;
    loop {
        let mut parts = Vec::with_capacity(sequences.len());
        for ((session, scores), tokens) in sessions.iter_mut().zip(&mut scores).zip(sequences) {
            if start < tokens.len() {
                parts.push((session, scores, &tokens[start..start.saturating_add(every).min(tokens.len())]));
            }
        }
        if parts.is_empty() {
            return Ok(scores);
        }
        if let Some(Rest { format, .. }) = rest.filter(|_| start > 0) {
            let each = parts.len().div_ceil(beds.len());
            parts.par_chunks_mut(each).zip(&mut beds).try_for_each(|(parts, bed)| {
                parts.iter_mut().try_for_each(|(session, ..)| bed.rest(session, format))
            })?;
        }
        let mut batch: Vec<_> =
            parts.iter_mut().map(|(session, _, tokens)| (&mut **session, *tokens)).collect();
        let found = engine.score(&mut batch)?;
        parts.iter_mut().zip(found).for_each(|((_, scores, _), found)| scores.extend(found));
        start = start.saturating_add(every);
    }
}

/// How the last word of a text was predicted from all before it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LastWord {
    /// Whether each of its tokens was the most probable.
    pub right: bool,
    /// Less the natural logarithm of its probability.
    pub nats: f64,
}

/// Predicts the last word of a text, with the space before it, from what comes before that; none where there is no such
/// space, or nothing on one side of it. The common form of LAMBADA.
///
/// # Errors
///
/// If the engine has no tokenizer, or the GPU failed.
pub fn last_word(engine: &Engine, text: &str) -> Result<Option<LastWord>, Error> {
    let tokenizer = engine.tokenizer()?;
    let Some(at) = text.trim_end().rfind(' ').filter(|&at| at > 0) else { return Ok(None) };
    let (context, word) = text.trim_end().split_at(at);
    let [context, word] = [context, word].map(|text| tokenizer.encode(text.as_bytes()));
    let mut session = engine.session();
    session.prefill(&context)?;
    let mut rows = session.logits()?.to_vec();
    if word.len() > 1 {
        rows.extend(session.logits_of(&word[..word.len() - 1])?);
    }
    let mut found = LastWord { right: true, nats: 0.0 };
    for (row, &token) in rows.chunks_exact(engine.config().vocab).zip(&word) {
        found.right &= sample::Sampler::greedy().sample(row, &sample::Counts::new(), 0)? == token;
        found.nats -= log_probability(row, token);
    }
    Ok(Some(found))
}

/// Puts a session's state to rest in a format and takes it up again, as [`Session::save`] and [`Engine::load_session`] do by
/// way of a file.
///
/// # Errors
///
/// If a value of the state is not finite, or the GPU failed; the session is as it was.
pub fn put_to_rest(session: &mut Session, format: StateFormat) -> Result<(), Error> {
    Bed::default().rest(session, format)
}

/// Memory in which states are put to rest, one after another.
#[derive(Debug, Default)]
struct Bed {
    state: Vec<f32>,
    encoded: Vec<u8>,
}

impl Bed {
    /// See [`put_to_rest`].
    fn rest(&mut self, session: &mut Session, format: StateFormat) -> Result<(), Error> {
        let logits = session.last_logits()?.map_or_else(Shown::default, Shown::of);
        session.state_in(&mut self.state)?;
        let layout = session.engine().state_layout();
        let encoded =
            EncodedState::encode_in(std::mem::take(&mut self.encoded), &layout, &self.state, format)?;
        encoded.decode_in(&mut self.state);
        self.encoded = encoded.into_bytes();
        let (position, counts) = (session.position(), session.sequence.counts.clone());
        session.start_from(&self.state)?;
        let sequence = &mut session.sequence;
        (sequence.shown, sequence.position, sequence.counts) = (logits, position, counts);
        Ok(())
    }
}
