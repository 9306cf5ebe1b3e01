//! Stop sequences in a stream of bytes.
//!
//! The sequence whose last byte comes first stops the stream; of several that end at the same byte, the
//! longest. What came before it is given out, it and what follows are not. So the outcome does not depend
//! on how the bytes were split into tokens.
//!
//! Invariant: what is held back is the longest end of the stream that begins a stop sequence. Any stop
//! sequence still to come starts in it or behind it, so that nothing is given out too early or too late.

use super::Error;

/// Looks for stop sequences in a stream of bytes, and holds back what may become one.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: Vec<Stop>,
    /// What is given out, and behind it what is held back.
    bytes: Vec<u8>,
    /// How much of `bytes` is given out.
    ready: usize,
    stopped: Option<usize>,
}

/// One stop sequence, matched as Knuth, Morris and Pratt do.
#[derive(Clone, Debug)]
struct Stop {
    bytes: Vec<u8>,
    /// For each prefix, by its length less one: its longest end that is also its beginning, itself aside.
    border: Vec<usize>,
    /// The longest end of the stream that is a prefix of this.
    matched: usize,
}

impl Stop {
    fn new(bytes: &[u8]) -> Self {
        let mut stop = Self { bytes: bytes.to_vec(), border: vec![0], matched: 0 };
        // a prefix's border is what the sequence, less its first byte, matches of itself
        for &byte in &bytes[1..] {
            stop.advance(byte);
            stop.border.push(stop.matched);
        }
        stop.matched = 0;
        stop
    }

    /// Takes the next byte; whether it completes the sequence. Not to be called once it has.
    fn advance(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.border[self.matched - 1];
        }
        self.matched += usize::from(self.bytes[self.matched] == byte);
        self.matched == self.bytes.len()
    }
}

impl StopMatcher {
    /// Begins a stream that ends at any of `stops`. Without any, everything is given out at once.
    ///
    /// # Errors
    ///
    /// If a stop sequence is empty.
    pub fn new<S: AsRef<[u8]>>(stops: impl IntoIterator<Item = S>) -> Result<Self, Error> {
        let stop = |(index, bytes): (usize, S)| match bytes.as_ref() {
            [] => Err(Error::EmptyStop { index }),
            bytes => Ok(Stop::new(bytes)),
        };
        let stops = stops.into_iter().enumerate().map(stop).collect::<Result<_, _>>()?;
        Ok(Self { stops, bytes: Vec::new(), ready: 0, stopped: None })
    }

    /// Puts in the bytes of a token, and gives out what is certainly before any stop sequence. Once
    /// [stopped](Self::stopped), nothing more.
    pub fn push(&mut self, bytes: &[u8]) -> &[u8] {
        self.bytes.drain(..self.ready);
        self.ready = 0;
        if self.stopped.is_some() {
            return &[];
        }
        for &byte in bytes {
            self.bytes.push(byte);
            let mut longest = 0;
            for (index, stop) in self.stops.iter_mut().enumerate() {
                if stop.advance(byte) && stop.bytes.len() > longest {
                    longest = stop.bytes.len();
                    self.stopped = Some(index);
                }
            }
            if self.stopped.is_some() {
                self.bytes.truncate(self.bytes.len() - longest);
                self.ready = self.bytes.len();
                return &self.bytes;
            }
        }
        let held = self.stops.iter().map(|stop| stop.matched).max().unwrap_or(0);
        self.ready = self.bytes.len() - held;
        &self.bytes[..self.ready]
    }

    /// The stop sequence that ended the stream, by its place among those given.
    #[must_use]
    pub const fn stopped(&self) -> Option<usize> {
        self.stopped
    }

    /// Ends the stream, and gives out what was held back: nothing if [stopped](Self::stopped). Otherwise a
    /// new stream begins.
    pub fn finish(&mut self) -> &[u8] {
        self.bytes.drain(..self.ready);
        self.ready = self.bytes.len();
        for stop in &mut self.stops {
            stop.matched = 0;
        }
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::Error;
    use super::StopMatcher;

    /// The definition: what is given out before the end, and which sequence stopped.
    fn naive(text: &[u8], stops: &[Vec<u8>]) -> (Vec<u8>, Option<usize>) {
        for end in 0..=text.len() {
            let ended = (0..stops.len()).filter(|&i| text[..end].ends_with(&stops[i]));
            if let Some(stop) = ended.min_by_key(|&i| (std::cmp::Reverse(stops[i].len()), i)) {
                return (text[..end - stops[stop].len()].to_vec(), Some(stop));
            }
        }
        (text.to_vec(), None)
    }

    /// The longest end of `text` that begins a stop sequence.
    fn held(text: &[u8], stops: &[Vec<u8>]) -> usize {
        let begins = |n: &usize| stops.iter().any(|stop| stop.starts_with(&text[text.len() - n..]));
        (0..=text.len()).rev().find(begins).unwrap_or(0)
    }

    #[test]
    fn a_stop_split_over_tokens() {
        let mut matcher = StopMatcher::new(["\n\nUser:", "END"]).unwrap();
        let mut push = |text: &str| String::from_utf8(matcher.push(text.as_bytes()).to_vec()).unwrap();
        assert_eq!(push("Hello.\n"), "Hello.", "a line feed may begin the stop");
        assert_eq!(push("\nUse"), "", "still may");
        assert_eq!(push("ful E"), "\n\nUseful ", "it was not, but E may be");
        assert_eq!(push("N\n\n"), "EN", "nor that");
        assert_eq!(push("User: hi"), "", "the stop and what follows are not given out");
        assert_eq!(push("more"), "", "nor anything more");
        assert_eq!(matcher.stopped(), Some(0), "which it was");
        assert_eq!(matcher.finish(), b"", "nothing is left");
        assert_eq!(matcher.stopped(), Some(0), "it stays stopped");
    }

    #[test]
    fn the_end_gives_out_what_was_held() {
        let mut matcher = StopMatcher::new(["abc"]).unwrap();
        assert_eq!(matcher.push(b"xab"), b"x", "ab may become abc");
        assert_eq!(matcher.finish(), b"ab", "it did not");
        assert_eq!(matcher.push(b"c"), b"c", "a new stream knows nothing of the last");
        assert_eq!(matcher.finish(), b"", "nothing is left");
        assert_eq!(matcher.stopped(), None, "no stop");
    }

    #[test]
    fn an_empty_stop_is_an_error() {
        let error = StopMatcher::new(["a", ""]).unwrap_err();
        assert!(matches!(error, Error::EmptyStop { index: 1 }), "{error}");
        let mut none = StopMatcher::new([""; 0]).unwrap();
        assert_eq!(none.push(b"anything"), b"anything", "no stops hold nothing back");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Over two or three letters, where sequences overlap themselves and each other.
        #[test]
        fn agrees_with_a_search_of_the_whole(
            tokens in prop::collection::vec(prop::collection::vec(b'a'..=b'c', 0..5), 0..12),
            stops in prop::collection::vec(prop::collection::vec(b'a'..=b'c', 1..7), 0..4),
        ) {
            let text = tokens.concat();
            let mut matcher = StopMatcher::new(&stops).unwrap();
            let (mut out, mut put) = (Vec::new(), 0);
            for token in &tokens {
                out.extend_from_slice(matcher.push(token));
                put += token.len();
                if matcher.stopped().is_none() {
                    let want = put - held(&text[..put], &stops);
                    prop_assert_eq!(out.len(), want, "as much as can be told after {} bytes", put);
                }
            }
            out.extend_from_slice(matcher.finish());
            prop_assert_eq!((out, matcher.stopped()), naive(&text, &stops), "the outcome");
        }
    }
}
