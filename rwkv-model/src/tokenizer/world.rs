//! The RWKV World vocabulary: greedy longest match over byte strings.
//!
//! The published file (`rwkv_vocab_v20230424.txt`) has one token a line, `ID LITERAL LENGTH`: a decimal
//! number, a Python literal as `repr` writes it, and the length of its bytes.
//!
//! ```text
//! 261 '\n\n' 2          str: its bytes are its UTF-8; escapes \\ \' \" \n \r \t \xNN \uNNNN \UNNNNNNNN
//! 2412 b'\x82\xac' 2    bytes: \xNN is one byte; no \u, no \U, ASCII alone
//! ```
//!
//! Token 0 ends a text. It has no line and no bytes. Ids may have gaps.
//!
//! Invariant: every single byte is a token, so that every byte string has tokens.
//!
//! Invariant: what a file makes this module allocate is bounded by the file's size and [`ID_LIMIT`].

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::str::{self, Chars};

use super::Error;

/// The first id that is refused, 16 times the published vocabulary: ids index a table.
const ID_LIMIT: usize = 1 << 20;

/// The largest file that is read, 14 times the published one; offsets within it fit a `u32`.
const FILE_LIMIT: usize = 1 << 24;

/// A vocabulary in the format of RWKV World.
#[derive(Clone)]
pub struct World {
    trie: Trie,
    /// The bytes of all tokens, joined.
    bytes: Vec<u8>,
    /// Where in `bytes` each token is, by id; empty where there is no token.
    spans: Vec<Range<u32>>,
}

impl World {
    /// The token that ends a text.
    pub const END_OF_TEXT: u32 = 0;

    /// Reads a vocabulary file.
    ///
    /// # Errors
    ///
    /// If the file cannot be read, is not UTF-8, or is refused by [`parse`](Self::parse).
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        let path = path.as_ref();
        let mut file = Vec::new();
        File::open(path)
            .and_then(|f| f.take(FILE_LIMIT as u64 + 1).read_to_end(&mut file))
            .map_err(|error| Error::Read { path: path.into(), error })?;
        if file.len() > FILE_LIMIT {
            return Err(Error::TooLarge { limit: FILE_LIMIT });
        }
        let text = str::from_utf8(&file).map_err(|fault| Error::NotUtf8 {
            line: 1 + file[..fault.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count(),
        })?;
        Self::parse(text)
    }

    /// Reads the text of a vocabulary file.
    ///
    /// # Errors
    ///
    /// If a line is malformed or states a wrong length; if an id is 0, too large or there twice; if a
    /// token is empty or there twice; if a byte has no token of its own; if the text is too large.
    pub fn parse(text: &str) -> Result<Self, Error> {
        if text.len() > FILE_LIMIT {
            return Err(Error::TooLarge { limit: FILE_LIMIT });
        }
        let (mut bytes, mut spans) = (Vec::new(), Vec::<Range<u32>>::new());
        let mut ids = BTreeMap::new();
        for (line, text) in (1..).zip(text.lines()) {
            let (id, token) = entry(line, text)?;
            let place = id as usize;
            if place >= spans.len() {
                spans.resize(place + 1, 0..0);
            } else if !spans[place].is_empty() {
                return Err(Error::DuplicateId { line, id });
            }
            let start = offset(bytes.len());
            bytes.extend_from_slice(&token);
            spans[place] = start..offset(bytes.len());
            if let Some(first) = ids.insert(token, id) {
                return Err(Error::DuplicateToken { line, id, first });
            }
        }
        if let Some(byte) = (0..=u8::MAX).find(|byte| !ids.contains_key(&[*byte][..])) {
            return Err(Error::MissingByte { byte });
        }
        Ok(Self { trie: Trie::new(&ids.into_iter().collect::<Vec<_>>()), bytes, spans })
    }

    /// See [`Tokenizer::encode`](super::Tokenizer::encode).
    pub(super) fn encode(&self, mut bytes: &[u8]) -> Vec<u32> {
        let mut tokens = Vec::new();
        while let [first, rest @ ..] = bytes {
            let (token, tail) = self.trie.longest(*first, rest);
            tokens.push(token);
            bytes = tail;
        }
        tokens
    }

    /// The bytes of a token, if there is such a token.
    pub(super) fn token_bytes(&self, token: u32) -> Option<&[u8]> {
        let span = self.spans.get(usize::try_from(token).ok()?)?;
        let there = token == Self::END_OF_TEXT || !span.is_empty();
        there.then(|| &self.bytes[span.start as usize..span.end as usize])
    }

    /// One more than the largest token.
    pub(super) const fn vocab_len(&self) -> usize {
        self.spans.len()
    }
}

impl fmt::Debug for World {
    /// Without the vocabulary, which is a book.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").field("vocab_len", &self.vocab_len()).finish_non_exhaustive()
    }
}

/// A trie in one piece: nodes in breadth-first order, so that the children of a node lie side by side.
///
/// Node 0 is the root. All bytes are tokens, so that nodes 1 to 256 are its children in the order of bytes.
#[derive(Clone)]
struct Trie {
    /// The children of node `n` are the nodes `first[n]..first[n + 1]`.
    first: Vec<u32>,
    /// The byte that leads to a node; ascending among the children of one node.
    label: Vec<u8>,
    /// The token that ends at a node; [`World::END_OF_TEXT`], which has no bytes, for none.
    token: Vec<u32>,
}

impl Trie {
    /// From tokens in ascending order of their bytes, all different, none empty, every byte among them.
    fn new(tokens: &[(Vec<u8>, u32)]) -> Self {
        let mut trie = Self { first: Vec::new(), label: vec![0], token: vec![World::END_OF_TEXT] };
        // a node is the tokens that begin with the bytes on the way to it, less the one that ends there
        let mut level = vec![tokens];
        for depth in 0.. {
            let mut below = Vec::new();
            for node in level {
                trie.first.push(offset(trie.label.len()));
                for mut child in node.chunk_by(|(a, _), (b, _)| a[depth] == b[depth]) {
                    let (bytes, id) = &child[0];
                    trie.label.push(bytes[depth]);
                    let ends = bytes.len() == depth + 1;
                    trie.token.push(if ends { *id } else { World::END_OF_TEXT });
                    if ends {
                        child = &child[1..];
                    }
                    below.push(child);
                }
            }
            if below.is_empty() {
                break;
            }
            level = below;
        }
        trie.first.push(offset(trie.label.len()));
        trie
    }

    /// The longest token that `first` and then `rest` begin with, and what remains behind it.
    fn longest<'a>(&self, first: u8, mut rest: &'a [u8]) -> (u32, &'a [u8]) {
        let mut node = 1 + usize::from(first);
        let mut found = (self.token[node], rest);
        while let [byte, tail @ ..] = rest {
            let start = self.first[node] as usize;
            let children = &self.label[start..self.first[node + 1] as usize];
            let Ok(child) = children.binary_search(byte) else { break };
            (node, rest) = (start + child, tail);
            if self.token[node] != World::END_OF_TEXT {
                found = (self.token[node], rest);
            }
        }
        found
    }
}

#[expect(clippy::cast_possible_truncation, reason = "no more than FILE_LIMIT, checked before")]
const fn offset(len: usize) -> u32 {
    len as u32
}

/// Reads one line: the token's id and bytes.
fn entry(line: usize, text: &str) -> Result<(u32, Vec<u8>), Error> {
    let fields = || {
        let (id, rest) = text.split_once(' ')?;
        let (literal, length) = rest.rsplit_once(' ')?;
        Some((id.parse::<u64>().ok()?, literal, length.parse::<usize>().ok()?))
    };
    let (id, text, stated) = fields().ok_or(Error::Fields { line })?;
    let id = u32::try_from(id)
        .ok()
        .filter(|&id| id != World::END_OF_TEXT && (id as usize) < ID_LIMIT)
        .ok_or(Error::Id { line, id, limit: ID_LIMIT })?;
    let token = literal(text).map_err(|reason| Error::Literal { line, reason })?;
    if token.is_empty() {
        return Err(Error::EmptyToken { line });
    }
    if token.len() != stated {
        return Err(Error::Length { line, stated, got: token.len() });
    }
    Ok((id, token))
}

/// The bytes of a Python literal as `repr` writes one.
fn literal(text: &str) -> Result<Vec<u8>, &'static str> {
    let (raw, quoted) = text.strip_prefix('b').map_or((false, text), |quoted| (true, quoted));
    let quote = if quoted.starts_with('"') { '"' } else { '\'' };
    let body = quoted.strip_prefix(quote).and_then(|body| body.strip_suffix(quote)).ok_or("not in quotes")?;
    let mut bytes = Vec::with_capacity(body.len());
    let mut chars = body.chars();
    while let Some(c) = chars.next() {
        let c = match c {
            '\\' => escape(&mut chars, raw)?,
            c if c == quote => return Err("a quote inside is not escaped"),
            c if raw && !c.is_ascii() => return Err("bytes are not ASCII"),
            c => c,
        };
        if raw {
            bytes.push(u8::try_from(c).map_err(|_| "not a byte")?);
        } else {
            bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        }
    }
    Ok(bytes)
}

/// What an escape stands for, behind its backslash.
fn escape(chars: &mut Chars<'_>, raw: bool) -> Result<char, &'static str> {
    let digits = match chars.next().ok_or("the closing quote is escaped")? {
        c @ ('\\' | '\'' | '"') => return Ok(c),
        'n' => return Ok('\n'),
        'r' => return Ok('\r'),
        't' => return Ok('\t'),
        'x' => 2,
        'u' if !raw => 4,
        'U' if !raw => 8,
        _ => return Err("unknown escape"),
    };
    let mut value = 0;
    for _ in 0..digits {
        let digit = chars.next().and_then(|c| c.to_digit(16)).ok_or("too few hexadecimal digits")?;
        value = value << 4 | digit;
    }
    char::from_u32(value).ok_or("not a character")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fmt::Write;

    use proptest::prelude::*;

    use super::super::{Error, Tokenizer};
    use super::{FILE_LIMIT, ID_LIMIT, World};

    /// All single bytes, as ids 1 to 256, each written as Python writes it.
    fn single_bytes() -> String {
        let mut text = String::new();
        for byte in 0..=u8::MAX {
            let literal = match byte {
                b'\n' => r"'\n'".into(),
                b'\r' => r"'\r'".into(),
                b'\t' => r"'\t'".into(),
                b'\\' => r"'\\'".into(),
                b'\'' => r#""'""#.into(),
                0x20..0x7f => format!("'{}'", char::from(byte)),
                0..0x80 => format!(r"'\x{byte:02x}'"),
                _ => format!(r"b'\x{byte:02x}'"),
            };
            writeln!(text, "{} {literal} 1", u32::from(byte) + 1).unwrap();
        }
        text
    }

    /// The single bytes, and `lines` behind them, from line 257 on.
    fn with(lines: &str) -> Result<World, Error> {
        World::parse(&(single_bytes() + lines))
    }

    /// A token of every form that a literal takes.
    const FORMS: &str = r#"257 '  ' 2
258 ' the' 4
259 ' the \'"end"' 11
260 "don't" 5
261 '\n\n' 2
262 '\t\r\\' 3
263 'é' 2
264 '\xe9\xe9' 4
265 '\u20ac' 3
266 '\U0001f600' 4
267 '日本' 6
270 b'\xe8\xb3' 2
271 b"it's \x41\xff" 7
272 b'\'"\\\n' 4
300 ' t' 2
"#;

    #[test]
    fn every_form_of_literal() {
        let world = with(FORMS).unwrap();
        let want: [(u32, &[u8]); 15] = [
            (257, b"  "),
            (258, b" the"),
            (259, b" the '\"end\""),
            (260, b"don't"),
            (261, b"\n\n"),
            (262, b"\t\r\\"),
            (263, "é".as_bytes()),
            (264, "éé".as_bytes()),
            (265, "€".as_bytes()),
            (266, "😀".as_bytes()),
            (267, "日本".as_bytes()),
            (270, b"\xe8\xb3"),
            (271, b"it's A\xff"),
            (272, b"'\"\\\n"),
            (300, b" t"),
        ];
        for (id, bytes) in want {
            assert_eq!(world.token_bytes(id), Some(bytes), "bytes of {id}");
            assert_eq!(world.encode(bytes), [id], "token of {bytes:?}");
        }
        for byte in 0..=u8::MAX {
            assert_eq!(world.encode(&[byte]), [u32::from(byte) + 1], "a byte alone");
        }
    }

    #[test]
    fn the_longest_token_is_taken() {
        let tokenizer = Tokenizer::World(with(FORMS).unwrap());
        let e = u32::from(b'e') + 1;
        let t = u32::from(b't') + 1;
        assert_eq!(tokenizer.encode(" the"), [258], "not ' t'");
        assert_eq!(tokenizer.encode(" tee"), [300, e, e], "the longest that fits");
        assert_eq!(tokenizer.encode(" th"), [300, u32::from(b'h') + 1], "the text ends within ' the'");
        assert_eq!(tokenizer.encode(" the 't"), [258, 33, 40, t], "back from within token 259");
        assert_eq!(tokenizer.encode("   "), [257, 33], "from the left");
        assert_eq!(tokenizer.encode([0xe8, 0xb3, 0xe8]), [270, 0xe9], "bytes that are not UTF-8");
        assert_eq!(tokenizer.encode(""), [0; 0], "nothing");
    }

    #[test]
    fn decode_knows_its_vocabulary() {
        let tokenizer = Tokenizer::World(with(FORMS).unwrap());
        assert_eq!((tokenizer.vocab_len(), tokenizer.end_of_text()), (301, Some(0)), "extents");
        assert_eq!(tokenizer.decode(&[258, 0, 265]).unwrap(), " the€".as_bytes(), "the end has no bytes");
        for gap in [268, 299, 301, u32::MAX] {
            let error = tokenizer.decode(&[1, gap]).unwrap_err();
            let facts = matches!(error, Error::UnknownToken { token, vocab_len: 301 } if token == gap);
            assert!(facts, "{gap}: {error}");
        }
    }

    #[test]
    fn malformed_lines_are_refused() {
        let fields = ["", "257", "257 'ab'", "x 'ab' 2", "-1 'ab' 2", "257 'ab' two", "257 'ab' 2 "];
        for line in fields.into_iter().chain(["99999999999999999999 'ab' 2"]) {
            let error = with(&format!("{line}\n")).unwrap_err();
            assert!(matches!(error, Error::Fields { line: 257 }), "{line}: {error}");
        }
        let literals = [
            ("", "not in quotes"),
            ("ab", "not in quotes"),
            ("'", "not in quotes"),
            ("'ab\"", "not in quotes"),
            ("b", "not in quotes"),
            ("u'ab'", "not in quotes"),
            ("'a'b'", "a quote inside is not escaped"),
            (r"'ab\'", "the closing quote is escaped"),
            (r"'\q'", "unknown escape"),
            (r"b'\u20ac'", "unknown escape"),
            (r"b'\U0001f600'", "unknown escape"),
            (r"'\x4'", "too few hexadecimal digits"),
            (r"'\u20ag'", "too few hexadecimal digits"),
            (r"'\ud800'", "not a character"),
            (r"'\U00110000'", "not a character"),
            (r"'\Uffffffff'", "not a character"),
            ("b'é'", "bytes are not ASCII"),
        ];
        for (text, want) in literals {
            let error = with(&format!("257 {text} 2\n")).unwrap_err();
            let facts = matches!(error, Error::Literal { line: 257, reason } if reason == want);
            assert!(facts, "{text}: {error}");
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let fault = |lines: &str| with(lines).unwrap_err();
        assert!(matches!(fault("257 'é' 1"), Error::Length { line: 257, stated: 1, got: 2 }), "bytes count");
        assert!(matches!(fault("257 '' 0"), Error::EmptyToken { line: 257 }), "empty");
        assert!(matches!(fault("257 'ab' 2\n257 'cd' 2"), Error::DuplicateId { line: 258, id: 257 }), "id");
        let twice = fault("257 'é' 2\n258 'x' 1");
        assert!(matches!(twice, Error::DuplicateToken { line: 258, id: 258, first: 121 }), "{twice}");
        let twice = fault("257 'é' 2\n259 b'\\xc3\\xa9' 2");
        assert!(matches!(twice, Error::DuplicateToken { line: 258, id: 259, first: 257 }), "{twice}");
        for id in [0, ID_LIMIT as u64, 4_000_000_000, u64::MAX] {
            let error = fault(&format!("{id} 'ab' 2"));
            let facts = matches!(error, Error::Id { line: 257, id: i, limit: ID_LIMIT } if i == id);
            assert!(facts, "{id}: {error}");
        }
        assert!(with(&format!("{} 'ab' 2", ID_LIMIT - 1)).is_ok(), "the largest id");
    }

    #[test]
    fn every_byte_needs_a_token() {
        for byte in [0, b'a', 0x80, 0xff] {
            let id = u32::from(byte) + 1;
            let text: String =
                single_bytes().split_inclusive('\n').filter(|l| !l.starts_with(&format!("{id} "))).collect();
            let error = World::parse(&text).unwrap_err();
            assert!(matches!(error, Error::MissingByte { byte: b } if b == byte), "{byte}: {error}");
        }
        assert!(matches!(World::parse("").unwrap_err(), Error::MissingByte { byte: 0 }), "an empty file");
    }

    #[test]
    fn files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vocabulary.txt");
        let open = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            World::open(&path)
        };
        let text = single_bytes() + FORMS;
        assert_eq!(open(text.as_bytes()).unwrap().vocab_len(), 301, "line feeds");
        assert_eq!(open(text.replace('\n', "\r\n").as_bytes()).unwrap().vocab_len(), 301, "carriage returns");
        let mut bytes = text.clone().into_bytes();
        bytes.extend_from_slice(b"301 '\xff' 1\n");
        assert!(matches!(open(&bytes).unwrap_err(), Error::NotUtf8 { line: 272 }), "not UTF-8");
        let large = " ".repeat(FILE_LIMIT + 1);
        assert!(
            matches!(open(large.as_bytes()).unwrap_err(), Error::TooLarge { limit: FILE_LIMIT }),
            "large"
        );
        assert!(matches!(World::parse(&large).unwrap_err(), Error::TooLarge { .. }), "large text");
        let missing = World::open(folder.path().join("missing")).unwrap_err();
        assert!(matches!(missing, Error::Read { .. }), "{missing}");
    }

    /// The definition: at each place, the longest prefix that is a token.
    fn naive(ids: &HashMap<Vec<u8>, u32>, mut bytes: &[u8]) -> Vec<u32> {
        let mut tokens = Vec::new();
        while !bytes.is_empty() {
            let len = (1..=bytes.len()).rev().find(|&len| ids.contains_key(&bytes[..len])).unwrap();
            tokens.push(ids[&bytes[..len]]);
            bytes = &bytes[len..];
        }
        tokens
    }

    proptest! {
        /// Random vocabularies over few bytes, so that tokens share prefixes and texts run into them.
        #[test]
        fn agrees_with_the_definition(
            tokens in prop::collection::btree_set(prop::collection::vec(0xfcu8..=0xff, 2..8), 0..60),
            texts in prop::collection::vec(prop::collection::vec(0xfcu8..=0xff, 0..60), 20),
            other in any::<Vec<u8>>(),
        ) {
            let mut text = single_bytes();
            let mut ids: HashMap<_, _> = (0..=255).map(|byte| (vec![byte], u32::from(byte) + 1)).collect();
            for (id, token) in (1000..).zip(tokens) {
                let escapes: String = token.iter().map(|byte| format!("\\x{byte:x}")).collect();
                writeln!(text, "{id} b'{escapes}' {}", token.len()).unwrap();
                ids.insert(token, id);
            }
            let tokenizer = Tokenizer::World(World::parse(&text).unwrap());
            for bytes in texts.into_iter().chain([other]) {
                let tokens = tokenizer.encode(&bytes);
                prop_assert_eq!(&tokens, &naive(&ids, &bytes), "{:x?}", bytes);
                prop_assert_eq!(tokenizer.decode(&tokens).unwrap(), bytes, "round trip");
            }
        }

        /// No file panics, whatever its lines.
        #[test]
        fn any_line_is_read_or_refused(
            line in r#"[0-9]{0,12} ?b?['"]?(\\[xuU'"\\n]?|[0-9a-fé'" ]){0,12}['"]? ?[0-9]{0,3}"#,
        ) {
            if let Ok(world) = with(&line) {
                let tokenizer = Tokenizer::World(world);
                let bytes = tokenizer.decode(&tokenizer.encode(&line)).unwrap();
                prop_assert_eq!(bytes, line.as_bytes(), "round trip");
            }
        }
    }
}
