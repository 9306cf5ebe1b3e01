//! The WKV state of a sequence, written out seldom and shared among forks.
//!
//! Written out at every token, a head's state is read and written whole: `8 N^2` bytes. [`LazyState`] keeps it as a base
//! that is only read and five vectors per pending token ([`Pending`], which has the formulas): exact, undone by
//! dropping entries, and with a base that any number of forks share. Every `C` tokens the entries are folded into the
//! base, after which the next token begins a new list. Per token and head, averaged over the `C` tokens of a period, this
//! moves
//!
//! ```text
//! base + entry (C - 1) / 2 + entry + 2 base / C        base = 4 N^2 bytes, entry = 20 N bytes
//! ```
//!
//! of which `C = sqrt(4 base / entry)` makes the least, 7 for `N = 64`: a fifth less than without.
//!
//! [`LazyLayers`] is one [`LazyState`] per layer, the state of a session. [`Additive`] is the form for a long-lived
//! prefix: its base is never folded into and stays shared for good.
//!
//! Invariant: a call that returns an error leaves the state as it was.
//!
//! Invariant: a state's bits depend on its tokens and on where they were folded, not on how many calls they came in, nor
//! on who shares its base.

use std::borrow::Cow;
use std::sync::Arc;

use half::f16;
use rwkv_core::ops::wkv7::{Dims, Inputs, wkv7};
use rwkv_core::ops::wkv7_lazy::{Pending, materialize_delta, read_delta, step_delta};

use crate::format::{NotFinite, Rounding, float16};
use crate::layout::{Part, StateLayout};

/// What is wrong with a call.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// Extents that no state has.
    #[error("no state has {0}")]
    Extents(Extents),
    /// A slice of another length than the extents ask for.
    #[error("{what} of {found} elements, expected {expected}")]
    Length {
        /// The slice.
        what: &'static str,
        /// Its elements.
        found: usize,
        /// The elements expected.
        expected: usize,
    },
    /// A rollback beyond the last fold.
    #[error("cannot roll back {asked} tokens: {pending} are pending")]
    Rollback {
        /// Tokens to undo.
        asked: usize,
        /// Tokens that can be undone.
        pending: usize,
    },
    /// A checkpoint of a state of other extents.
    #[error("a checkpoint of {found}, expected {expected}")]
    Checkpoint {
        /// What it is of.
        found: Extents,
        /// What it should be of.
        expected: Extents,
    },
    /// A checkpoint of another number of layers.
    #[error("a checkpoint of {found} layers, expected {expected}")]
    Layers {
        /// Its layers.
        found: usize,
        /// The layers expected.
        expected: usize,
    },
    /// Layers that have not read the same tokens.
    #[error("layer {layer} has read {found} tokens, layer 0 {expected}")]
    OutOfStep {
        /// The first layer that differs.
        layer: usize,
        /// Tokens it has read.
        found: u64,
        /// Tokens the first layer has read.
        expected: u64,
    },
    /// A delta that cannot be stored in halves.
    #[error("delta: {0}")]
    NotFinite(NotFinite),
}

/// Extents of the state of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extents {
    /// Heads, `H`.
    pub n_heads: usize,
    /// Channels per head, `N`.
    pub head_size: usize,
}

impl std::fmt::Display for Extents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} heads of {}", self.n_heads, self.head_size)
    }
}

impl Extents {
    /// Elements of a state, `[H, N, N]`.
    fn state_len(self) -> Result<usize, Error> {
        let width = self.n_heads.checked_mul(self.head_size);
        let len = width.and_then(|width| width.checked_mul(self.head_size));
        len.filter(|&len| len > 0).ok_or(Error::Extents(self))
    }

    /// Elements of a vector per head, `[H, N]`.
    const fn width(self) -> usize {
        self.n_heads * self.head_size
    }

    const fn dims(self, tokens: usize) -> Dims {
        Dims { tokens, heads: self.n_heads, head_size: self.head_size }
    }

    /// Checks a base, and shares it.
    fn base(self, base: impl Into<Arc<[f32]>>) -> Result<Arc<[f32]>, Error> {
        let base = base.into();
        check_len("base", base.len(), self.state_len()?)?;
        Ok(base)
    }

    /// Checks the operands of `tokens` tokens.
    fn check(self, tokens: usize, x: &Inputs<'_, f32>, y: &[f32]) -> Result<(), Error> {
        let expected = tokens.saturating_mul(self.width());
        for (what, slice) in
            [("r", x.r), ("lw", x.lw), ("k", x.k), ("v", x.v), ("a", x.a), ("b", x.b), ("y", y)]
        {
            check_len(what, slice.len(), expected)?;
        }
        Ok(())
    }

    /// Checks a vector per head and room for another.
    fn check_read(self, x: &[f32], y: &[f32]) -> Result<(), Error> {
        check_len("x", x.len(), self.width())?;
        check_len("y", y.len(), self.width())
    }
}

const fn check_len(what: &'static str, found: usize, expected: usize) -> Result<(), Error> {
    if found == expected { Ok(()) } else { Err(Error::Length { what, found, expected }) }
}

/// Rounds what becomes a base, `[H, N, N]`, to what a storage format can hold. It is called with the head size `N`, which
/// is the length of a row, and the tokens read so far, for roundings that differ from fold to fold. A value that is not
/// finite must stay what it is.
pub type BaseRounding = fn(head_size: usize, tokens: u64, base: &mut [f32]);

/// When, and to what precision, pending tokens become part of the base.
#[derive(Clone, Copy, Debug)]
pub struct Folding {
    /// Tokens that may be pending, `C`; 0 for a state that is written out at every token.
    pub capacity: usize,
    /// How every base that is folded is rounded. The first base is the caller's, and is shared as it is.
    pub rounding: Option<BaseRounding>,
}

impl Default for Folding {
    /// Eight tokens, within one percent of the least traffic for heads of 64; no rounding.
    fn default() -> Self {
        Self { capacity: 8, rounding: None }
    }
}

/// Bytes of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Held by this state alone.
    pub own: usize,
    /// Of bases that others hold too.
    pub shared: usize,
}

impl Bytes {
    fn of_base(base: &Arc<[f32]>) -> Self {
        let bytes = size_of_val::<[f32]>(base);
        if Arc::strong_count(base) == 1 {
            Self { own: bytes, shared: 0 }
        } else {
            Self { own: 0, shared: bytes }
        }
    }

    const fn and_own(self, own: usize) -> Self {
        Self { own: self.own + own, ..self }
    }
}

/// The WKV state of one layer.
///
/// A clone is a fork: it shares the base and copies the pending entries, and owns a base of its own from its first fold.
///
/// ```
/// use std::sync::Arc;
/// use rwkv_core::ops::wkv7::Inputs;
/// use rwkv_state::lazy::{Extents, Folding, LazyState};
///
/// let extents = Extents { n_heads: 1, head_size: 2 };
/// let mut state = LazyState::new(extents, vec![0.0; 4], Folding::default())?;
/// let write = Inputs { r: &[1., 1.], lw: &[0., 0.], k: &[2., 3.], v: &[5., 7.], a: &[0., 0.], b: &[0., 0.] };
/// let mut y = [0.0; 2];
/// state.step(1, write, &mut y)?;
/// assert_eq!(y, [25.0, 35.0]);
///
/// let mut fork = state.clone();
/// assert!(Arc::ptr_eq(fork.base(), state.base()));
/// fork.rollback(1)?;
/// assert_eq!(fork.materialize(), [0.0; 4]);
/// assert_eq!(state.materialize(), [10.0, 15.0, 14.0, 21.0]);
/// # Ok::<(), rwkv_state::lazy::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LazyState {
    extents: Extents,
    folding: Folding,
    tokens: u64,
    form: Form,
}

/// How a state is held.
#[derive(Clone, Debug)]
pub enum Form {
    /// Written out, `[H, N, N]`; copied when it is first written to, if it is shared.
    Materialized(Arc<[f32]>),
    /// As a base and what was done to it.
    Deferred {
        /// `[H, N, N]`.
        base: Arc<[f32]>,
        /// The tokens since.
        pending: Pending<f32>,
    },
}

impl LazyState {
    /// A state that starts from `base` `[H, N, N]`, which is taken as it is; an `Arc` is shared.
    ///
    /// # Errors
    ///
    /// If an extent is zero or the base has another length.
    pub fn new(extents: Extents, base: impl Into<Arc<[f32]>>, folding: Folding) -> Result<Self, Error> {
        let base = extents.base(base)?;
        let form = if folding.capacity == 0 {
            Form::Materialized(base)
        } else {
            Form::Deferred { base, pending: Pending::new(extents.n_heads, extents.head_size) }
        };
        Ok(Self { extents, folding, tokens: 0, form })
    }

    /// Its extents.
    #[must_use]
    pub const fn extents(&self) -> Extents {
        self.extents
    }

    /// Tokens read since it was new, less those rolled back.
    #[must_use]
    pub const fn tokens(&self) -> u64 {
        self.tokens
    }

    /// How it is held, for executors that read it in place.
    #[must_use]
    pub const fn form(&self) -> &Form {
        &self.form
    }

    /// What it is based on, `[H, N, N]`: the state itself if no token is pending.
    #[must_use]
    pub const fn base(&self) -> &Arc<[f32]> {
        match &self.form {
            Form::Materialized(base) | Form::Deferred { base, .. } => base,
        }
    }

    /// Tokens since the last fold, which [`Self::rollback`] can undo.
    #[must_use]
    pub const fn pending(&self) -> usize {
        match &self.form {
            Form::Materialized(_) => 0,
            Form::Deferred { pending, .. } => pending.len(),
        }
    }

    /// Reads tokens: operands and `y` are `[T, H, N]`. Folds before each token that finds `C` pending.
    ///
    /// # Errors
    ///
    /// If a slice has another length.
    pub fn step(&mut self, tokens: usize, x: Inputs<'_, f32>, y: &mut [f32]) -> Result<(), Error> {
        self.extents.check(tokens, &x, y)?;
        let (one, width) = (self.extents.dims(1), self.extents.width());
        for (t, y) in y.chunks_exact_mut(width).enumerate() {
            let token = x.part(t * width..(t + 1) * width);
            if self.pending() == self.folding.capacity {
                self.fold();
            }
            self.tokens += 1;
            match &mut self.form {
                Form::Materialized(state) => {
                    let state = Arc::make_mut(state);
                    wkv7(one, token, state, y);
                    round(self.folding, self.extents, self.tokens, state);
                }
                Form::Deferred { base, pending } => pending.step(one, token, base, y),
            }
        }
        Ok(())
    }

    /// Applies the state to a vector per head, `y = S x`, both `[H, N]`, without writing it out.
    ///
    /// # Errors
    ///
    /// If a slice has another length.
    pub fn read(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        self.extents.check_read(x, y)?;
        let none = Pending::new(self.extents.n_heads, self.extents.head_size);
        let pending = if let Form::Deferred { pending, .. } = &self.form { pending } else { &none };
        pending.read(self.base(), x, y);
        Ok(())
    }

    /// The state in canonical order, `[H, N, N]`.
    #[must_use]
    pub fn materialize(&self) -> Vec<f32> {
        match &self.form {
            Form::Materialized(state) => state.to_vec(),
            Form::Deferred { base, pending } => pending.materialize(base),
        }
    }

    /// Makes the state the base, rounded. Does nothing if no token is pending.
    pub fn fold(&mut self) {
        if let Form::Deferred { base, pending } = &mut self.form
            && !pending.is_empty()
        {
            let base = Arc::make_mut(base);
            pending.fold(base);
            round(self.folding, self.extents, self.tokens, base);
        }
    }

    /// Lets `run` move the state `[H, N, N]` on by `tokens` tokens, for executors that work on the state itself, as a
    /// prefill by chunks does. What it leaves is the new base, rounded.
    pub fn update<T>(&mut self, tokens: u64, run: impl FnOnce(&mut [f32]) -> T) -> T {
        let base = match &mut self.form {
            Form::Materialized(state) => Arc::make_mut(state),
            Form::Deferred { base, pending } => {
                let base = Arc::make_mut(base);
                pending.fold(base);
                base
            }
        };
        let result = run(base);
        self.tokens += tokens;
        round(self.folding, self.extents, self.tokens, base);
        result
    }

    /// Undoes the last `tokens` tokens, exactly and without recomputing, if they are pending. For longer ways back there
    /// are checkpoints.
    ///
    /// # Errors
    ///
    /// If fewer tokens are pending.
    pub fn rollback(&mut self, tokens: usize) -> Result<(), Error> {
        let pending = self.pending();
        let left = pending.checked_sub(tokens).ok_or(Error::Rollback { asked: tokens, pending })?;
        if let Form::Deferred { pending, .. } = &mut self.form {
            pending.truncate(left);
        }
        self.tokens -= tokens as u64;
        Ok(())
    }

    /// Remembers where it stands: shares the base, copies the pending entries.
    #[must_use]
    pub fn checkpoint(&self) -> Checkpoint<Self> {
        Checkpoint(self.clone())
    }

    /// Becomes what it, or a state of the same extents, was when the checkpoint was taken, in every respect.
    ///
    /// # Errors
    ///
    /// If the checkpoint is of other extents.
    pub fn restore(&mut self, checkpoint: &Checkpoint<Self>) -> Result<(), Error> {
        self.fits(&checkpoint.0)?;
        self.clone_from(&checkpoint.0);
        Ok(())
    }

    /// What it holds.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        let pending = match &self.form {
            Form::Materialized(_) => 0,
            Form::Deferred { pending, .. } => pending.bytes(),
        };
        Bytes::of_base(self.base()).and_own(pending)
    }

    fn fits(&self, other: &Self) -> Result<(), Error> {
        let (found, expected) = (other.extents, self.extents);
        if found == expected { Ok(()) } else { Err(Error::Checkpoint { found, expected }) }
    }
}

fn round(folding: Folding, extents: Extents, tokens: u64, base: &mut [f32]) {
    if let Some(rounding) = folding.rounding {
        rounding(extents.head_size, tokens, base);
    }
}

/// A moment of a [`LazyState`] or of [`LazyLayers`], to return to.
#[derive(Clone, Debug)]
pub struct Checkpoint<S>(S);

impl Checkpoint<LazyState> {
    /// What it holds.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.0.bytes()
    }
}

impl Checkpoint<LazyLayers> {
    /// What it holds.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.0.bytes()
    }
}

/// The WKV state of all layers of one sequence, each held lazily. A clone is a fork, layer by layer.
///
/// A pass moves the layers on one after another, through [`Self::layers_mut`]. They fold each for itself, so that an
/// executor may spread the folds over the tokens; between passes all have read the same tokens.
#[derive(Clone, Debug)]
pub struct LazyLayers(Vec<LazyState>);

impl LazyLayers {
    /// Layers that start from `wkv` `[L, H, N, N]`.
    ///
    /// # Errors
    ///
    /// If an extent is zero or `wkv` has another length.
    pub fn new(layout: &StateLayout, wkv: &[f32], folding: Folding) -> Result<Self, Error> {
        let shape = layout.shape(Part::Wkv);
        let extents = Extents { n_heads: shape[1], head_size: shape[2] };
        let len = extents.state_len()?;
        check_len("wkv", wkv.len(), shape[0].saturating_mul(len))?;
        wkv.chunks_exact(len)
            .map(|base| LazyState::new(extents, base, folding))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The layers.
    #[must_use]
    pub fn layers(&self) -> &[LazyState] {
        &self.0
    }

    /// The layers, to move them on.
    #[must_use]
    pub fn layers_mut(&mut self) -> &mut [LazyState] {
        &mut self.0
    }

    /// The state in canonical order, `[L, H, N, N]`.
    #[must_use]
    pub fn materialize(&self) -> Vec<f32> {
        self.0.iter().flat_map(LazyState::materialize).collect()
    }

    /// Folds every layer.
    pub fn fold(&mut self) {
        self.0.iter_mut().for_each(LazyState::fold);
    }

    /// Undoes the last `tokens` tokens in every layer.
    ///
    /// # Errors
    ///
    /// If fewer tokens are pending in a layer, or the layers have not read the same tokens. None is changed then.
    pub fn rollback(&mut self, tokens: usize) -> Result<(), Error> {
        let expected = self.0.first().map_or(0, LazyState::tokens);
        for (layer, state) in self.0.iter().enumerate() {
            if state.tokens() != expected {
                return Err(Error::OutOfStep { layer, found: state.tokens(), expected });
            }
        }
        let pending = self.0.iter().map(LazyState::pending).min().unwrap_or(0);
        if tokens > pending {
            return Err(Error::Rollback { asked: tokens, pending });
        }
        self.0.iter_mut().try_for_each(|layer| layer.rollback(tokens))
    }

    /// Remembers where every layer stands.
    #[must_use]
    pub fn checkpoint(&self) -> Checkpoint<Self> {
        Checkpoint(self.clone())
    }

    /// Becomes what the layers were when the checkpoint was taken, as [`LazyState::restore`] does.
    ///
    /// # Errors
    ///
    /// If the checkpoint is of other layers. None is changed then.
    pub fn restore(&mut self, checkpoint: &Checkpoint<Self>) -> Result<(), Error> {
        let (found, expected) = (checkpoint.0.0.len(), self.0.len());
        if found != expected {
            return Err(Error::Layers { found, expected });
        }
        self.0.iter().zip(&checkpoint.0.0).try_for_each(|(layer, other)| layer.fits(other))?;
        self.clone_from(&checkpoint.0);
        Ok(())
    }

    /// What they hold.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        self.0.iter().map(LazyState::bytes).fold(Bytes::default(), |sum, layer| Bytes {
            own: sum.own + layer.own,
            shared: sum.shared + layer.shared,
        })
    }
}

/// What a delta is stored in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeltaFormat {
    /// Single precision.
    #[default]
    F32,
    /// Half precision, with an exponent per row.
    ///
    /// Every token rounds the delta, by a [dither](Rounding::Dither) that keeps slow decays from freezing: each entry by
    /// less than `2^-10` of itself, or `2^-30` of the largest of its row if that is more. What the delta becomes is the
    /// state, so that in the long run this is as exact as a whole state in halves, no better.
    F16,
}

/// What the tokens since the base added to the state, `[H, N, N]`.
#[derive(Clone, Debug)]
pub enum Delta {
    /// Single precision.
    F32(Vec<f32>),
    /// Half precision.
    F16 {
        /// `[H, N, N]`.
        values: Vec<f16>,
        /// Of the rows, `[H, N]`: an entry is its value times two to this power.
        exponents: Vec<i8>,
    },
}

impl Delta {
    fn widen(&self, head_size: usize) -> Cow<'_, [f32]> {
        match self {
            Self::F32(delta) => Cow::Borrowed(delta),
            Self::F16 { values, exponents } => Cow::Owned(widen(head_size, values, exponents)),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(delta) => size_of_val(&delta[..]),
            Self::F16 { values, exponents } => size_of_val(&values[..]) + size_of_val(&exponents[..]),
        }
    }
}

/// Rows of halves as single precision, `[H, N, N]`.
fn widen(head_size: usize, values: &[f16], exponents: &[i8]) -> Vec<f32> {
    let mut wide = vec![0.0; values.len()];
    let rows = wide.chunks_exact_mut(head_size).zip(values.chunks_exact(head_size));
    for ((wide, values), &exponent) in rows.zip(exponents) {
        float16::decode(values, exponent, wide);
    }
    wide
}

/// The WKV state of one layer as a base that never changes, its decay, and what was added since:
/// `S = base * diag(gamma) + delta` ([`step_delta`] has the formulas).
///
/// For a long prefix that many sequences begin with: they share its state for good, and each holds a delta. It takes as
/// much traffic as a state that is written out. Where the update is purely additive (`a` or `b` is zero) the delta does
/// not depend on the base at all. A clone is a fork: it shares the base and copies the delta.
#[derive(Clone, Debug)]
pub struct Additive {
    extents: Extents,
    base: Arc<[f32]>,
    tokens: u64,
    log_gamma: Vec<f32>,
    delta: Delta,
}

impl Additive {
    /// A state that starts from `base` `[H, N, N]`; an `Arc` is shared.
    ///
    /// # Errors
    ///
    /// If an extent is zero or the base has another length.
    pub fn new(extents: Extents, base: impl Into<Arc<[f32]>>, format: DeltaFormat) -> Result<Self, Error> {
        let base = extents.base(base)?;
        let (len, width) = (base.len(), extents.width());
        let delta = match format {
            DeltaFormat::F32 => Delta::F32(vec![0.0; len]),
            DeltaFormat::F16 => Delta::F16 { values: vec![f16::ZERO; len], exponents: vec![0; width] },
        };
        Ok(Self { extents, base, tokens: 0, log_gamma: vec![0.0; width], delta })
    }

    /// Its extents.
    #[must_use]
    pub const fn extents(&self) -> Extents {
        self.extents
    }

    /// What it is based on, `[H, N, N]`.
    #[must_use]
    pub const fn base(&self) -> &Arc<[f32]> {
        &self.base
    }

    /// Natural logarithm of what is left of the base, per key channel, `[H, N]`.
    #[must_use]
    pub fn log_gamma(&self) -> &[f32] {
        &self.log_gamma
    }

    /// What was added, for executors that read it in place.
    #[must_use]
    pub const fn delta(&self) -> &Delta {
        &self.delta
    }

    /// Reads tokens: operands and `y` are `[T, H, N]`.
    ///
    /// # Errors
    ///
    /// If a slice has another length, or a delta that is stored in halves would not be finite; `y` is unspecified then.
    pub fn step(&mut self, tokens: usize, x: Inputs<'_, f32>, y: &mut [f32]) -> Result<(), Error> {
        self.extents.check(tokens, &x, y)?;
        let (n, width) = (self.extents.head_size, self.extents.width());
        match &mut self.delta {
            Delta::F32(delta) => {
                step_delta(self.extents.dims(tokens), x, &self.base, &mut self.log_gamma, delta, y);
            }
            Delta::F16 { values, exponents } => {
                let mut wide = widen(n, values, exponents);
                let (mut log_gamma, mut values, mut exponents) =
                    (self.log_gamma.clone(), values.clone(), exponents.clone());
                for (step, (t, y)) in (self.tokens..).zip(y.chunks_exact_mut(width).enumerate()) {
                    let token = x.part(t * width..(t + 1) * width);
                    step_delta(self.extents.dims(1), token, &self.base, &mut log_gamma, &mut wide, y);
                    #[expect(clippy::cast_possible_truncation, reason = "the dither counts modulo 2^32")]
                    let rounding = Rounding::Dither { step: step as u32 };
                    let rows = values.chunks_exact_mut(n).zip(&mut exponents).zip(wide.chunks_exact_mut(n));
                    for (first, ((row, exponent), wide)) in (0..).step_by(n).zip(rows) {
                        *exponent =
                            float16::encode(wide, None, rounding, first, row).map_err(Error::NotFinite)?;
                        float16::decode(row, *exponent, wide);
                    }
                }
                self.log_gamma = log_gamma;
                self.delta = Delta::F16 { values, exponents };
            }
        }
        self.tokens += tokens as u64;
        Ok(())
    }

    /// Applies the state to a vector per head, `y = S x`, both `[H, N]`.
    ///
    /// # Errors
    ///
    /// If a slice has another length.
    pub fn read(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        self.extents.check_read(x, y)?;
        read_delta(&self.base, &self.log_gamma, &self.delta.widen(self.extents.head_size), x, y);
        Ok(())
    }

    /// The state in canonical order, `[H, N, N]`.
    #[must_use]
    pub fn materialize(&self) -> Vec<f32> {
        materialize_delta(&self.base, &self.log_gamma, &self.delta.widen(self.extents.head_size))
    }

    /// What it holds.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        Bytes::of_base(&self.base).and_own(size_of_val(&self.log_gamma[..]) + self.delta.bytes())
    }
}
