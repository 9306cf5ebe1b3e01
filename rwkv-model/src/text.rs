//! A session's tokens as text, up to a stop sequence.

use crate::engine::Error;
use crate::sample::Sampler;
use crate::session::{Session, Stream};
use crate::tokenizer::{LossyUtf8, StopMatcher, Tokenizer};

/// How text is generated.
#[derive(Clone, Debug)]
pub struct TextOptions {
    /// How tokens are chosen.
    pub sampler: Sampler,
    /// At most so many tokens.
    pub max_tokens: usize,
    /// Text ends before any of these.
    pub stop: Vec<String>,
}

impl Default for TextOptions {
    fn default() -> Self {
        Self { sampler: Sampler::default(), max_tokens: 256, stop: Vec::new() }
    }
}

/// Why text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// As many tokens as were wanted.
    Length,
    /// A stop sequence, by its index among those given.
    Stop(usize),
    /// The model ended the text.
    EndOfText,
    /// An error, which was given out.
    Error,
}

/// Text as it is generated: pieces that join to the whole. A character that is split over tokens comes in one piece, and
/// what may become a stop sequence is held back until it is known.
///
/// ```no_run
/// # use rwkv_model::{Engine, Error, TextOptions};
/// # fn main() -> Result<(), Error> {
/// # let mut session = Engine::open("model.safetensors")?.session();
/// let mut text = session.text(TextOptions { stop: vec!["\n".to_owned()], ..TextOptions::default() })?;
/// for piece in &mut text {
///     print!("{}", piece?);
/// }
/// println!("({:?} after {} tokens)", text.finish_reason(), text.tokens());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Text<'a> {
    session: &'a mut Session,
    stream: Stream,
    writer: Writer,
    drained: bool,
}

impl Session {
    /// Generates text. The session reads every token generated, those of the stop sequence too, but no end of text.
    /// Tokens that the model has and the tokenizer has not are never chosen.
    ///
    /// # Errors
    ///
    /// If the engine has no tokenizer, the session has read nothing, a setting of the sampler is out of its range, or a
    /// stop sequence is empty.
    pub fn text(&mut self, options: TextOptions) -> Result<Text<'_>, Error> {
        self.engine().tokenizer()?;
        if !self.has_logits() {
            return Err(Error::NoLogits);
        }
        options.sampler.validate()?;
        Ok(Text {
            stream: Stream::new(options.sampler, self.engine().mute().to_vec()),
            session: self,
            writer: Writer::new(options.max_tokens, options.stop)?,
            drained: false,
        })
    }
}

impl Text<'_> {
    /// Why the text ended, once it has.
    #[must_use]
    pub const fn finish_reason(&self) -> Option<FinishReason> {
        self.writer.finished
    }

    /// Tokens generated so far.
    #[must_use]
    pub const fn tokens(&self) -> usize {
        self.writer.tokens
    }

    /// One token on; what it adds to the text may be nothing.
    fn advance(&mut self) -> Result<String, Error> {
        let token = self.stream.choose(self.session, self.writer.tokens_left)?;
        let piece = self.writer.push(Some(self.session.engine().tokenizer()?), token)?;
        if self.writer.finished != Some(FinishReason::EndOfText) {
            self.stream.accept(self.session, token)?;
        }
        Ok(piece)
    }
}

impl Iterator for Text<'_> {
    type Item = Result<String, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.writer.finished.is_none() {
            match self.advance() {
                Ok(piece) if piece.is_empty() => {}
                Ok(piece) => return Some(Ok(piece)),
                Err(error) => {
                    (self.writer.finished, self.drained) = (Some(FinishReason::Error), true);
                    return Some(Err(error));
                }
            }
        }
        if std::mem::replace(&mut self.drained, true) {
            return None;
        }
        Some(self.writer.finish()).filter(|piece| !piece.is_empty()).map(Ok)
    }
}

/// What tokens come to as text, and where it ends.
#[derive(Debug)]
pub(crate) struct Writer {
    tokens_left: usize,
    /// Those of the text, an end of text not among them.
    pub(crate) tokens: usize,
    stop: StopMatcher,
    characters: LossyUtf8,
    pub(crate) finished: Option<FinishReason>,
}

impl Writer {
    /// Of `max_tokens` at most, which end before any of `stop`.
    pub(crate) fn new(max_tokens: usize, stop: Vec<String>) -> Result<Self, Error> {
        Ok(Self {
            tokens_left: max_tokens,
            tokens: 0,
            stop: StopMatcher::new(stop)?,
            characters: LossyUtf8::default(),
            finished: (max_tokens == 0).then_some(FinishReason::Length),
        })
    }

    /// Takes the next token, and gives what it certainly adds to the text: nothing, without a tokenizer.
    pub(crate) fn push(&mut self, tokenizer: Option<&Tokenizer>, token: u32) -> Result<String, Error> {
        if tokenizer.and_then(Tokenizer::end_of_text) == Some(token) {
            self.finished = Some(FinishReason::EndOfText);
            return Ok(String::new());
        }
        let bytes = tokenizer.map_or(Ok(&[][..]), |tokenizer| tokenizer.token_bytes(token))?;
        let piece = self.characters.push(self.stop.push(bytes)).to_owned();
        (self.tokens_left, self.tokens) = (self.tokens_left - 1, self.tokens + 1);
        let through = (self.tokens_left == 0).then_some(FinishReason::Length);
        self.finished = self.stop.stopped().map(FinishReason::Stop).or(through);
        Ok(piece)
    }

    /// What was held back, once the text has ended.
    pub(crate) fn finish(&mut self) -> String {
        let mut piece = self.characters.push(self.stop.finish()).to_owned();
        piece.push_str(self.characters.finish());
        piece
    }
}
