//! A reader of the pickles that torch writes: it builds values and never runs anything.
//!
//! A pickle is a program for a stack machine, and Python's machine lets it call any function. This one
//! knows the names of three: `OrderedDict` with no arguments is an empty dict, and a tensor or a parameter
//! being rebuilt is kept as its arguments. Any other call is an error that names the function.
//!
//! Values lie in an arena and refer to each other by index, so that a deeply nested value, a shared one or
//! one that holds itself costs no more than the opcodes that made it, and nothing here recurses, not even
//! dropping it. Invariants: the parts of a tuple, and the arguments of a call, lie before it in the arena;
//! time and memory are bounded by the pickle's length and by `MAX_STEPS`.

use std::collections::BTreeMap;

/// The most opcodes that are run, and so also the most values, stack places, marks and remembered values.
/// RWKV-7 checkpoints take about 35 for each of at most some thousands of tensors.
const MAX_STEPS: usize = 1 << 20;

/// Why a pickle could not be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("pickle, byte {at}: {fault}")]
pub struct Error {
    /// Where the opcode begins.
    pub at: usize,
    /// What is wrong with it.
    pub fault: Fault,
}

/// What is wrong with an opcode.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The pickle ends in or before it.
    #[error("the pickle is cut short")]
    CutShort,
    /// Bytes follow the end.
    #[error("{bytes} bytes follow the end")]
    Trailing {
        /// How many.
        bytes: usize,
    },
    /// It belongs to no state dict.
    #[error("opcode {opcode:#04x} is not read")]
    Opcode {
        /// The opcode.
        opcode: u8,
    },
    /// A version of the language that is not known.
    #[error("protocol {got} is not read, only 2 to 5")]
    Protocol {
        /// The version.
        got: u8,
    },
    /// It needs a value, or a mark, that the stack does not have.
    #[error("the stack is too short")]
    Stack,
    /// It needs a value of another kind.
    #[error("a value is not {want}")]
    Kind {
        /// The kind.
        want: &'static str,
    },
    /// It recalls what was never remembered.
    #[error("memo {index} is not set")]
    Memo {
        /// The number asked for.
        index: u64,
    },
    /// A string is not UTF-8.
    #[error("a string is not UTF-8")]
    Utf8,
    /// It calls what is not known to be harmless.
    #[error("the pickle calls {module}.{name}, which no plain state dict needs; nothing was run")]
    Call {
        /// The module of the function or class.
        module: String,
        /// Its name.
        name: String,
    },
    /// There are more opcodes than are run.
    #[error("the pickle goes on after {MAX_STEPS} opcodes")]
    TooLong,
}

/// The index of a value.
pub(super) type Id = usize;

/// What a pickle is made of. References are to the arena.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Value<'a> {
    /// What no tensor needs: none, a bool, a float, bytes, a list, an integer beyond 64 bits.
    Other,
    Int(i64),
    Str(&'a str),
    Tuple(Vec<Id>),
    List,
    /// In the order set; a key may come twice.
    Dict(Vec<(Id, Id)>),
    /// A function or class, by name alone.
    Global {
        module: &'a str,
        name: &'a str,
    },
    /// Something outside the pickle: for torch, a storage.
    Persistent(Id),
    /// `_rebuild_tensor(storage, offset, size, stride)`, or `_v2` with more: the arguments' tuple.
    Tensor(Id),
    /// `_rebuild_parameter(tensor, requires_grad, hooks)`: the arguments' tuple.
    Parameter(Id),
}

/// The values of a pickle.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    root: Id,
}

impl<'a> Pickle<'a> {
    /// Reads a whole pickle.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, Error> {
        let mut machine = Machine { rest: bytes, ..Machine::default() };
        for _ in 0..MAX_STEPS {
            let at = bytes.len() - machine.rest.len();
            if let Some(root) = machine.step().map_err(|fault| Error { at, fault })? {
                return Ok(Self { values: machine.values, root });
            }
        }
        Err(Error { at: bytes.len() - machine.rest.len(), fault: Fault::TooLong })
    }

    /// The value that the pickle stands for.
    pub(super) fn root(&self) -> &Value<'a> {
        &self.values[self.root]
    }

    /// A value that another refers to.
    pub(super) fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id]
    }

    /// The parts of a tuple; `None` if the value is none.
    pub(super) fn tuple(&self, id: Id) -> Option<&[Id]> {
        if let Value::Tuple(parts) = self.get(id) { Some(parts) } else { None }
    }
}

#[derive(Default)]
struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    /// Heights of the stack. What lies below the last is out of reach until the mark is taken.
    marks: Vec<usize>,
    memo: BTreeMap<u64, Id>,
}

impl<'a> Machine<'a> {
    /// Runs one opcode; the root if it was the last.
    fn step(&mut self) -> Result<Option<Id>, Fault> {
        let [opcode] = self.array()?;
        match opcode {
            // protocol, frame: no effect on a reader that has all bytes at hand
            0x80 => match self.array()? {
                [2..=5] => {}
                [got] => return Err(Fault::Protocol { got }),
            },
            0x95 => drop(self.array::<8>()?),
            b'.' => {
                let bytes = self.rest.len();
                return if bytes == 0 { self.pop().map(Some) } else { Err(Fault::Trailing { bytes }) };
            }

            b'N' | 0x88 | 0x89 => self.push(Value::Other),
            b'G' => {
                self.array::<8>()?;
                self.push(Value::Other);
            }
            b'K' => {
                let [value] = self.array()?;
                self.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(value.into()));
            }
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(value.into()));
            }
            // integers of any length
            0x8a | 0x8b => {
                let bytes = if opcode == 0x8a { self.counted::<1>()? } else { self.counted::<4>()? };
                self.push(signed(bytes).map_or(Value::Other, Value::Int));
            }
            // text, then the byte strings of Python 2
            0x8c | b'U' => self.text::<1>()?,
            b'X' | b'T' => self.text::<4>()?,
            0x8d => self.text::<8>()?,
            // bytes
            b'C' => self.bytes::<1>()?,
            b'B' => self.bytes::<4>()?,
            0x8e | 0x96 => self.bytes::<8>()?,

            b')' => self.push(Value::Tuple(Vec::new())),
            b'}' => self.push(Value::Dict(Vec::new())),
            b']' => self.push(Value::List),
            b'(' => self.marks.push(self.stack.len()),
            b't' => {
                let parts = self.marked()?;
                self.push(Value::Tuple(parts));
            }
            0x85..=0x87 => {
                let mut parts = (0x85..=opcode).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
                parts.reverse();
                self.push(Value::Tuple(parts));
            }
            b'a' | b'e' => {
                if opcode == b'a' {
                    self.pop()?;
                } else {
                    self.marked()?;
                }
                let list = self.top()?;
                if self.values[list] != Value::List {
                    return Err(Fault::Kind { want: "a list" });
                }
            }
            b's' | b'u' => {
                let pairs = if opcode == b'u' { self.marked()? } else { self.pair()?.to_vec() };
                let (pairs, []) = pairs.as_chunks() else {
                    return Err(Fault::Stack);
                };
                self.dict()?.extend(pairs.iter().map(|&[key, value]| (key, value)));
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.push(Value::Global { module, name });
            }
            0x93 => {
                let [module, name] = self.pair()?;
                let (&Value::Str(module), &Value::Str(name)) = (&self.values[module], &self.values[name])
                else {
                    return Err(Fault::Kind { want: "a string" });
                };
                self.push(Value::Global { module, name });
            }
            // a function called, an object made
            b'R' | 0x81 => {
                let [callee, arguments] = self.pair()?;
                let value = self.call(callee, arguments)?;
                self.push(value);
            }
            // attributes, as the `_metadata` of a state dict, are not kept
            b'b' => {
                self.pop()?;
                self.dict()?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Value::Persistent(id));
            }

            b'q' => {
                let [index] = self.array()?;
                self.remember(index.into())?;
            }
            b'r' => {
                let index = u32::from_le_bytes(self.array()?);
                self.remember(index.into())?;
            }
            0x94 => self.remember(self.memo.len() as u64)?,
            b'h' => {
                let [index] = self.array()?;
                self.recall(index.into())?;
            }
            b'j' => {
                let index = u32::from_le_bytes(self.array()?);
                self.recall(index.into())?;
            }
            b'0' => {
                self.pop()?;
            }
            b'1' => {
                self.marked()?;
            }
            b'2' => self.stack.push(self.top()?),
            _ => return Err(Fault::Opcode { opcode }),
        }
        Ok(None)
    }

    /// The calls that are understood.
    fn call(&self, callee: Id, arguments: Id) -> Result<Value<'a>, Fault> {
        let Value::Global { module, name } = self.values[callee] else {
            return Err(Fault::Kind { want: "a global" });
        };
        let Value::Tuple(parts) = &self.values[arguments] else {
            return Err(Fault::Kind { want: "a tuple" });
        };
        match (module, name) {
            ("collections", "OrderedDict") if parts.is_empty() => Ok(Value::Dict(Vec::new())),
            ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2") => Ok(Value::Tensor(arguments)),
            ("torch._utils", "_rebuild_parameter") => Ok(Value::Parameter(arguments)),
            _ => Err(Fault::Call { module: module.to_owned(), name: name.to_owned() }),
        }
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Fault> {
        self.rest.split_off(..len).ok_or(Fault::CutShort)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let (array, rest) = self.rest.split_first_chunk().ok_or(Fault::CutShort)?;
        self.rest = rest;
        Ok(*array)
    }

    /// Bytes after their number, itself of `N` bytes.
    fn counted<const N: usize>(&mut self) -> Result<&'a [u8], Fault> {
        let len = self.array::<N>()?.iter().rev().fold(0, |len, &byte| len << 8 | u64::from(byte));
        self.take(usize::try_from(len).map_err(|_| Fault::CutShort)?)
    }

    fn text<const N: usize>(&mut self) -> Result<(), Fault> {
        let text = utf8(self.counted::<N>()?)?;
        self.push(Value::Str(text));
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Result<(), Fault> {
        self.counted::<N>()?;
        self.push(Value::Other);
        Ok(())
    }

    fn line(&mut self) -> Result<&'a str, Fault> {
        let len = self.rest.iter().position(|&byte| byte == b'\n').ok_or(Fault::CutShort)?;
        let line = self.take(len)?;
        self.take(1)?;
        utf8(line)
    }

    fn push(&mut self, value: Value<'a>) {
        self.stack.push(self.values.len());
        self.values.push(value);
    }

    fn top(&self) -> Result<Id, Fault> {
        let reach = &self.stack[self.marks.last().copied().unwrap_or(0)..];
        reach.last().copied().ok_or(Fault::Stack)
    }

    fn pop(&mut self) -> Result<Id, Fault> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    /// The top two, in the order in which they were pushed.
    fn pair(&mut self) -> Result<[Id; 2], Fault> {
        let (second, first) = (self.pop()?, self.pop()?);
        Ok([first, second])
    }

    /// All since the last mark, which is taken with them.
    fn marked(&mut self) -> Result<Vec<Id>, Fault> {
        let mark = self.marks.pop().ok_or(Fault::Stack)?;
        Ok(self.stack.split_off(mark))
    }

    /// The dict on top.
    fn dict(&mut self) -> Result<&mut Vec<(Id, Id)>, Fault> {
        let top = self.top()?;
        if let Value::Dict(pairs) = &mut self.values[top] {
            Ok(pairs)
        } else {
            Err(Fault::Kind { want: "a dict" })
        }
    }

    fn remember(&mut self, index: u64) -> Result<(), Fault> {
        self.memo.insert(index, self.top()?);
        Ok(())
    }

    fn recall(&mut self, index: u64) -> Result<(), Fault> {
        self.stack.push(*self.memo.get(&index).ok_or(Fault::Memo { index })?);
        Ok(())
    }
}

fn utf8(bytes: &[u8]) -> Result<&str, Fault> {
    std::str::from_utf8(bytes).map_err(|_| Fault::Utf8)
}

/// A little-endian integer in two's complement; `None` if it needs more than 64 bits.
fn signed(bytes: &[u8]) -> Option<i64> {
    let negative = bytes.last().is_some_and(|&byte| byte >= 0x80);
    let mut wide = [if negative { 0xFF } else { 0 }; 8];
    wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
    Some(i64::from_le_bytes(wide))
}

#[cfg(test)]
mod tests {
    use super::{Error, Fault, MAX_STEPS, Pickle, Value};

    fn fault(bytes: &[u8]) -> Fault {
        Pickle::read(bytes).expect_err(&format!("{}", bytes.escape_ascii())).fault
    }

    /// A value and all it holds, written out (only for values without cycles).
    fn show(pickle: &Pickle<'_>, value: &Value<'_>) -> String {
        let show_id = |&id: &usize| show(pickle, pickle.get(id));
        match value {
            Value::Tuple(parts) => format!("({})", parts.iter().map(show_id).collect::<Vec<_>>().join(" ")),
            Value::Dict(items) => {
                let items = items.iter().map(|(k, v)| format!("{}:{}", show_id(k), show_id(v)));
                format!("{{{}}}", items.collect::<Vec<_>>().join(" "))
            }
            Value::Persistent(id) => format!("#{}", show_id(id)),
            Value::Tensor(id) => format!("tensor{}", show_id(id)),
            Value::Parameter(id) => format!("parameter{}", show_id(id)),
            Value::Global { module, name } => format!("{module}.{name}"),
            Value::Int(value) => value.to_string(),
            Value::Str(text) => format!("{text:?}"),
            Value::List => "[]".to_owned(),
            Value::Other => "_".to_owned(),
        }
    }

    #[test]
    fn every_opcode_of_a_state_dict() {
        let cases: [(&[u8], &str); 25] = [
            (b"\x80\x02N.", "_"),
            (b"\x80\x05\x95\x02\0\0\0\0\0\0\0N.", "_"),
            (b"(\x88\x89G\0\0\0\0\0\0\0\0t.", "(_ _ _)"),
            (b"(K\xffM\xfe\xffJ\xfe\xff\xff\xfft.", "(255 65534 -2)"),
            (b"(\x8a\0\x8a\x01\x80\x8a\x02\x80\0t.", "(0 -128 128)"),
            (b"\x8a\x08\0\0\0\0\0\0\0\x80.", "-9223372036854775808"),
            (b"(\x8a\x09\0\0\0\0\0\0\0\x80\0\x8b\x01\0\0\0\x05t.", "(_ 5)"),
            (b"(X\x02\0\0\0\xc3\xa9\x8c\x01bt.", "(\"\u{e9}\" \"b\")"),
            (b"(\x8d\x01\0\0\0\0\0\0\0cU\x01dT\x01\0\0\0et.", "(\"c\" \"d\" \"e\")"),
            (b"(C\x01\xffB\x01\0\0\0\xff\x8e\x01\0\0\0\0\0\0\0\xfft.", "(_ _ _)"),
            (b"K\x01K\x02K\x03\x87.", "(1 2 3)"),
            (b"K\x01K\x02\x86.", "(1 2)"),
            (b"K\x01\x85.", "(1)"),
            (b").", "()"),
            (b"](K\x01K\x02eK\x03a.", "[]"),
            (b"}U\x01aK\x01s(U\x01bK\x02U\x01cK\x03u.", "{\"a\":1 \"b\":2 \"c\":3}"),
            (b"cos\nsystem\n.", "os.system"),
            (b"U\x02osU\x06system\x93.", "os.system"),
            (b"ccollections\nOrderedDict\n)RU\x01aK\x01s}b.", "{\"a\":1}"),
            (b"ccollections\nOrderedDict\n)\x81.", "{}"),
            (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01QtR.", "tensor(#1)"),
            (b"ctorch._utils\n_rebuild_parameter\n)R.", "parameter()"),
            (b"(K\x07q\x05h\x05r\0\0\0\x01j\0\0\0\x01\x942t.", "(7 7 7 7)"),
            (b"K\x01K\x020(K\x03K\x041.", "1"),
            (b"K\x01q\x000}(K\x02h\x00u.", "{2:1}"),
        ];
        for (bytes, want) in cases {
            let pickle = Pickle::read(bytes).unwrap_or_else(|e| panic!("{}: {e}", bytes.escape_ascii()));
            assert_eq!(show(&pickle, pickle.root()), want, "{}", bytes.escape_ascii());
            for len in 0..bytes.len() {
                assert!(Pickle::read(&bytes[..len]).is_err(), "{} cut to {len}", bytes.escape_ascii());
            }
        }
    }

    #[test]
    fn faults_are_named() {
        assert_eq!(fault(b""), Fault::CutShort, "empty");
        assert_eq!(fault(b"N.N"), Fault::Trailing { bytes: 1 }, "after the end");
        assert_eq!(fault(b"."), Fault::Stack, "no value");
        assert_eq!(fault(b"N(0N."), Fault::Stack, "below the mark");
        assert_eq!(fault(b"N(0t."), Fault::Stack, "below the mark, then the mark");
        assert_eq!(fault(b"Nt."), Fault::Stack, "no mark");
        assert_eq!(fault(b"}(Nu."), Fault::Stack, "a key without a value");
        assert_eq!(fault(b"\x80\x06"), Fault::Protocol { got: 6 }, "protocol");
        assert_eq!(fault(b"i"), Fault::Opcode { opcode: b'i' }, "INST");
        assert_eq!(fault(b"h\x07"), Fault::Memo { index: 7 }, "memo");
        assert_eq!(fault(b"U\x01\xff"), Fault::Utf8, "text");
        assert_eq!(fault(b"NNNs."), Fault::Kind { want: "a dict" }, "SETITEM");
        assert_eq!(fault(b"NNa."), Fault::Kind { want: "a list" }, "APPEND");
        assert_eq!(fault(b"NNb."), Fault::Kind { want: "a dict" }, "BUILD");
        assert_eq!(fault(b"N)R."), Fault::Kind { want: "a global" }, "REDUCE");
        assert_eq!(fault(b"ca\nb\nNR."), Fault::Kind { want: "a tuple" }, "REDUCE");
        assert_eq!(fault(b"X\xff\xff\xff\xff."), Fault::CutShort, "a text of 4 GiB");
        assert_eq!(fault(b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff."), Fault::CutShort, "2^64 - 1");
        assert_eq!(fault(b"\x8b\xff\xff\xff\xff."), Fault::CutShort, "an integer of 4 GiB");
    }

    #[test]
    fn nothing_is_called() {
        for (module, name) in [
            ("os", "system"),
            ("builtins", "eval"),
            ("torch", "FloatStorage"),
            ("torch._utils", "_rebuild_qtensor"),
            ("os", "_rebuild_tensor"),
            ("os", "_rebuild_parameter"),
        ] {
            let want = Fault::Call { module: module.to_owned(), name: name.to_owned() };
            for call in [b'R', 0x81] {
                let head = format!("c{module}\n{name}\n");
                let pickle = [head.as_bytes(), b"U\x02ls\x85", &[call, b'.']].concat();
                assert_eq!(fault(&pickle), want, "{}", pickle.escape_ascii());
            }
        }
        let error = Pickle::read(b"cos\nsystem\nU\x02ls\x85R.").unwrap_err();
        let text =
            "pickle, byte 16: the pickle calls os.system, which no plain state dict needs; nothing was run";
        assert_eq!(error.to_string(), text, "the message names the function");
        assert!(matches!(fault(b"ccollections\nOrderedDict\n]\x85R."), Fault::Call { .. }), "with contents");
    }

    #[test]
    fn bombs_do_not_go_off() {
        // each level holds the one before twice: 2^100000 leaves, if copied
        let doubling = [&b"N"[..], &b"2\x86".repeat(100_000), b"."].concat();
        assert!(Pickle::read(&doubling).is_ok(), "doubling by DUP");
        let memo = [&b"Nq\0"[..], &b"h\0\x86q\0".repeat(100_000), b"."].concat();
        assert!(Pickle::read(&memo).is_ok(), "doubling by memo");
        let deep = [&b"N"[..], &b"\x85".repeat(1_000_000), b"."].concat();
        assert!(Pickle::read(&deep).is_ok(), "a million tuples, one in another, also dropped");
        let cycle = Pickle::read(b"}q\0(h\0h\0u.").unwrap();
        assert_eq!(*cycle.root(), Value::Dict(vec![(0, 0)]), "a dict that is its own key and value");
        let marks = b"(".repeat(MAX_STEPS + 1);
        assert_eq!(
            Pickle::read(&marks).unwrap_err(),
            Error { at: MAX_STEPS, fault: Fault::TooLong },
            "marks"
        );
    }
}
