//! Text from a stream: whole characters at a time, as a terminal or a network peer wants it.
//!
//! Invariant: all that is given out, joined, is [`String::from_utf8_lossy`] of all that was put in,
//! however it was split.

use std::str;

use super::{Error, Tokenizer};

/// Turns a stream of tokens into text. A character split over several tokens is held back until whole.
#[derive(Clone, Debug)]
pub struct Decoder<'t> {
    tokenizer: &'t Tokenizer,
    utf8: LossyUtf8,
}

impl<'t> Decoder<'t> {
    /// Begins a stream.
    #[must_use]
    pub fn new(tokenizer: &'t Tokenizer) -> Self {
        Self { tokenizer, utf8: LossyUtf8::default() }
    }

    /// Puts in a token, and gives out the text that it completes.
    ///
    /// # Errors
    ///
    /// If the token is not in the vocabulary; the stream is then as before.
    pub fn push(&mut self, token: u32) -> Result<&str, Error> {
        Ok(self.utf8.push(self.tokenizer.token_bytes(token)?))
    }

    /// Ends the stream, and gives out what was held back: U+FFFD for a character that was cut short. Then a
    /// new stream begins.
    pub fn finish(&mut self) -> &str {
        self.utf8.finish()
    }
}

/// Turns a stream of bytes into text: what [`String::from_utf8_lossy`] does, piece by piece.
#[derive(Clone, Debug, Default)]
pub struct LossyUtf8 {
    /// The beginning of a character, or nothing.
    held: Vec<u8>,
    /// What was given out last.
    text: String,
}

impl LossyUtf8 {
    /// Puts in bytes, and gives out the text that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> &str {
        self.text.clear();
        self.held.extend_from_slice(bytes);
        let mut done = 0;
        for chunk in self.held.utf8_chunks() {
            self.text.push_str(chunk.valid());
            done += chunk.valid().len();
            let invalid = chunk.invalid();
            // no error length: nothing wrong yet, only too short
            let begun = str::from_utf8(invalid).is_err_and(|fault| fault.error_len().is_none());
            if begun && done + invalid.len() == self.held.len() {
                break;
            }
            if !invalid.is_empty() {
                self.text.push(char::REPLACEMENT_CHARACTER);
                done += invalid.len();
            }
        }
        self.held.drain(..done);
        &self.text
    }

    /// Ends the stream, and gives out what was held back: U+FFFD for a character that was cut short. Then a
    /// new stream begins.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        if !self.held.is_empty() {
            self.held.clear();
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        &self.text
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{Error, Tokenizer};
    use super::{Decoder, LossyUtf8};

    #[test]
    fn a_character_comes_whole_or_not_at_all() {
        let mut decoder = Decoder::new(&Tokenizer::Bytes);
        let text: Vec<String> =
            "a\u{20ac}b".bytes().map(|b| decoder.push(b.into()).unwrap().into()).collect();
        assert_eq!(text, ["a", "", "", "\u{20ac}", "b"], "the euro sign has three bytes");
        assert_eq!(decoder.finish(), "", "nothing is left");
    }

    #[test]
    fn a_character_cut_short_becomes_one_mark() {
        let mut utf8 = LossyUtf8::default();
        assert_eq!(utf8.push(b"\xf0\x9f\x98"), "", "may become a face");
        assert_eq!(utf8.clone().finish(), "\u{fffd}", "at the end it did not");
        assert_eq!(utf8.push(b"a"), "\u{fffd}a", "nor before a letter");
        assert_eq!(utf8.push(b"\xff"), "\u{fffd}", "what begins nothing is not held");
        assert_eq!(utf8.push(b"\xc3"), "", "held");
        assert_eq!(utf8.finish(), "\u{fffd}", "the end");
        assert_eq!(utf8.push(b"\xa9"), "\u{fffd}", "a new stream knows nothing of the last");
    }

    #[test]
    fn an_unknown_token_leaves_the_stream_alone() {
        let mut decoder = Decoder::new(&Tokenizer::Bytes);
        assert_eq!(decoder.push(0xc3).unwrap(), "", "held");
        let error = decoder.push(256).unwrap_err();
        assert!(matches!(error, Error::UnknownToken { token: 256, vocab_len: 256 }), "{error}");
        assert_eq!(decoder.push(0xa9).unwrap(), "\u{e9}", "what was held is still there");
    }

    /// Bytes that are mostly at the edges of what UTF-8 allows, and whole characters.
    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        let edges =
            vec![0, b'a', 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xc2, 0xdf, 0xe0, 0xe2, 0xed]
                .into_iter()
                .chain([0xef, 0xf0, 0xf1, 0xf4, 0xf5, 0xff]);
        let edge = prop::sample::select(edges.collect::<Vec<u8>>()).prop_map(|byte| vec![byte]);
        let character = any::<char>().prop_map(|c| c.to_string().into_bytes());
        prop::collection::vec(prop_oneof![3 => edge, 1 => character], 0..40).prop_map(|parts| parts.concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn agrees_with_the_whole_however_split(
            bytes in bytes(),
            sizes in prop::collection::vec(0usize..6, 1..20),
        ) {
            let (mut utf8, mut text, mut rest) = (LossyUtf8::default(), String::new(), &bytes[..]);
            for &size in sizes.iter().cycle().take(400) {
                let (piece, tail) = rest.split_at(size.min(rest.len()));
                text.push_str(utf8.push(piece));
                rest = tail;
            }
            text.push_str(utf8.push(rest));
            text.push_str(utf8.finish());
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes), "{:x?}", bytes);
        }
    }
}
