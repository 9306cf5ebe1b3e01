//! How well a model predicts a text: the yardstick of every approximation.

use crate::engine::{Engine, Error};

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
