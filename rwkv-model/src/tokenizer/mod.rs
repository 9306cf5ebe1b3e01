//! Text to tokens and back. Bytes go in and bytes come out: any byte string can be encoded, and what is
//! decoded need not be UTF-8.
//!
//! | type | what it does |
//! |---|---|
//! | [`Tokenizer`] | bytes to tokens and back, by one of the vocabularies |
//! | [`World`] | the RWKV World vocabulary, read from its published file |
//! | [`Decoder`] | a stream of tokens to text, whole characters at a time |
//! | [`LossyUtf8`] | the same for a stream of bytes |
//! | [`StopMatcher`] | holds back what may become a stop sequence |
//!
//! Invariant: encoding cannot fail, and decoding what was encoded gives the same bytes.

mod decoder;
mod stop;
mod world;

use std::io;
use std::path::PathBuf;
use std::slice;

pub use decoder::{Decoder, LossyUtf8};
pub use stop::StopMatcher;
pub use world::World;

/// Why a vocabulary, a token or a stop sequence was refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The vocabulary file could not be read.
    #[error("{}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The vocabulary file is larger than any vocabulary.
    #[error("the vocabulary has more than {limit} bytes")]
    TooLarge {
        /// The largest size that is read.
        limit: usize,
    },
    /// The vocabulary file is not UTF-8.
    #[error("line {line} is not UTF-8")]
    NotUtf8 {
        /// Where, from 1.
        line: usize,
    },
    /// A line is not `ID LITERAL LENGTH`.
    #[error("line {line} is not a number, a literal and a number with one space between them")]
    Fields {
        /// Where, from 1.
        line: usize,
    },
    /// A token id is 0, which is the end of text, or beyond what is accepted.
    #[error("line {line}: token id {id} is not in 1..{limit}")]
    Id {
        /// Where, from 1.
        line: usize,
        /// The id.
        id: u64,
        /// The first id that is too large.
        limit: usize,
    },
    /// A token id appears twice.
    #[error("line {line}: token id {id} appears a second time")]
    DuplicateId {
        /// Where the second is, from 1.
        line: usize,
        /// The id.
        id: u32,
    },
    /// A literal is malformed.
    #[error("line {line}: malformed literal: {reason}")]
    Literal {
        /// Where, from 1.
        line: usize,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A literal does not have the stated length.
    #[error("line {line}: the literal has {got} bytes, the line states {stated}")]
    Length {
        /// Where, from 1.
        line: usize,
        /// The stated length in bytes.
        stated: usize,
        /// The literal's length in bytes.
        got: usize,
    },
    /// A token has no bytes.
    #[error("line {line}: the token is empty")]
    EmptyToken {
        /// Where, from 1.
        line: usize,
    },
    /// Two tokens have the same bytes.
    #[error("line {line}: token {id} has the bytes of token {first}")]
    DuplicateToken {
        /// Where the second is, from 1.
        line: usize,
        /// The second token.
        id: u32,
        /// The first.
        first: u32,
    },
    /// A byte has no token of its own, so that not every text could be encoded.
    #[error("byte {byte:#04x} has no token of its own")]
    MissingByte {
        /// The lowest such byte.
        byte: u8,
    },
    /// A token is not in the vocabulary.
    #[error("token {token} is not in the vocabulary of {vocab_len}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// The length of the vocabulary: all tokens are below it, but not all below it are tokens.
        vocab_len: usize,
    },
    /// A stop sequence has no bytes, so that it would stop everything.
    #[error("stop sequence {index} is empty")]
    EmptyStop {
        /// Which of those given, from 0.
        index: usize,
    },
}

/// What turns bytes into tokens and back.
#[derive(Clone, Debug)]
pub enum Tokenizer {
    /// A token is a byte: a vocabulary of 256, without an end of text.
    Bytes,
    /// The RWKV World vocabulary.
    World(World),
}

/// Every byte in its place, so that a byte token can lend its one byte.
static BYTES: [u8; 256] = {
    let mut bytes = [0; 256];
    let mut byte = u8::MAX;
    while byte > 0 {
        bytes[byte as usize] = byte;
        byte -= 1;
    }
    bytes
};

impl Tokenizer {
    /// The tokens of a text, or of any bytes.
    #[must_use]
    pub fn encode(&self, bytes: impl AsRef<[u8]>) -> Vec<u32> {
        let bytes = bytes.as_ref();
        match self {
            Self::Bytes => bytes.iter().copied().map(u32::from).collect(),
            Self::World(world) => world.encode(bytes),
        }
    }

    /// The bytes of one token: none for the end of text.
    ///
    /// # Errors
    ///
    /// If the token is not in the vocabulary.
    pub fn token_bytes(&self, token: u32) -> Result<&[u8], Error> {
        let bytes = match self {
            Self::Bytes => {
                usize::try_from(token).ok().and_then(|token| BYTES.get(token)).map(slice::from_ref)
            }
            Self::World(world) => world.token_bytes(token),
        };
        bytes.ok_or(Error::UnknownToken { token, vocab_len: self.vocab_len() })
    }

    /// The bytes of tokens, joined. Text is had from them by [`String::from_utf8_lossy`], or, as the
    /// tokens come, by a [`Decoder`].
    ///
    /// # Errors
    ///
    /// If a token is not in the vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        for &token in tokens {
            bytes.extend_from_slice(self.token_bytes(token)?);
        }
        Ok(bytes)
    }

    /// One more than the largest token. A model's vocabulary may be longer, padded to a round number.
    #[must_use]
    pub fn vocab_len(&self) -> usize {
        match self {
            Self::Bytes => BYTES.len(),
            Self::World(world) => world.vocab_len(),
        }
    }

    /// The token that ends a text, if the vocabulary has one.
    #[must_use]
    pub const fn end_of_text(&self) -> Option<u32> {
        match self {
            Self::Bytes => None,
            Self::World(_) => Some(World::END_OF_TEXT),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Error, Tokenizer};

    #[test]
    fn bytes_are_their_own_tokens() {
        let all: Vec<u8> = (0..=255).collect();
        let tokens = Tokenizer::Bytes.encode(&all);
        assert_eq!(tokens, (0..256).collect::<Vec<u32>>(), "a token is the byte's value");
        assert_eq!(Tokenizer::Bytes.decode(&tokens).unwrap(), all, "and back");
        assert_eq!(Tokenizer::Bytes.encode("é"), [0xc3, 0xa9], "text is its UTF-8");
        assert_eq!((Tokenizer::Bytes.vocab_len(), Tokenizer::Bytes.end_of_text()), (256, None), "extents");
    }

    #[test]
    fn a_token_beyond_the_bytes_is_an_error() {
        for token in [256, u32::MAX] {
            let error = Tokenizer::Bytes.decode(&[7, token]).unwrap_err();
            let facts = matches!(error, Error::UnknownToken { token: t, vocab_len: 256 } if t == token);
            assert!(facts, "{token}: {error}");
        }
    }
}
