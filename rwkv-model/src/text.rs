//! A session's tokens as text, up to a stop sequence.

use crate::engine::Error;
use crate::sample::Sampler;
use crate::session::{Session, Stream};
use crate::tokenizer::{LossyUtf8, StopMatcher};

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
    tokens_left: usize,
    stop: StopMatcher,
    characters: LossyUtf8,
    finished: Option<FinishReason>,
    drained: bool,
    tokens: usize,
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
        if !self.sequence.shown.is_some() {
            return Err(Error::NoLogits);
        }
        options.sampler.validate()?;
        Ok(Text {
            stream: Stream::new(options.sampler, self.engine().mute().to_vec()),
            session: self,
            tokens_left: options.max_tokens,
            stop: StopMatcher::new(options.stop)?,
            characters: LossyUtf8::default(),
            finished: None,
            drained: false,
            tokens: 0,
        })
    }
}

impl Text<'_> {
    /// Why the text ended, once it has.
    #[must_use]
    pub const fn finish_reason(&self) -> Option<FinishReason> {
        self.finished
    }

    /// Tokens generated so far.
    #[must_use]
    pub const fn tokens(&self) -> usize {
        self.tokens
    }

    /// One token on; what it adds to the text may be nothing.
    fn advance(&mut self) -> Result<String, Error> {
        if self.tokens_left == 0 {
            self.finished = Some(FinishReason::Length);
            return Ok(String::new());
        }
        let token = self.stream.choose(self.session, self.tokens_left)?;
        let tokenizer = self.session.engine().tokenizer()?;
        if tokenizer.end_of_text() == Some(token) {
            self.finished = Some(FinishReason::EndOfText);
            return Ok(String::new());
        }
        let piece = self.characters.push(self.stop.push(tokenizer.token_bytes(token)?)).to_owned();
        self.finished = self.stop.stopped().map(FinishReason::Stop);
        self.stream.accept(self.session, token)?;
        (self.tokens_left, self.tokens) = (self.tokens_left - 1, self.tokens + 1);
        Ok(piece)
    }

    /// What was held back, once.
    fn drain(&mut self) -> Option<String> {
        if std::mem::replace(&mut self.drained, true) {
            return None;
        }
        let mut piece = self.characters.push(self.stop.finish()).to_owned();
        piece.push_str(self.characters.finish());
        (!piece.is_empty()).then_some(piece)
    }
}

impl Iterator for Text<'_> {
    type Item = Result<String, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.finished.is_none() {
            match self.advance() {
                Ok(piece) if piece.is_empty() => {}
                Ok(piece) => return Some(Ok(piece)),
                Err(error) => {
                    (self.finished, self.drained) = (Some(FinishReason::Error), true);
                    return Some(Err(error));
                }
            }
        }
        self.drain().map(Ok)
    }
}
