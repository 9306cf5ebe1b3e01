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
use rayon::prelude::*;
use rwkv_core::model::{Compute, Wkv, WkvSegment};
use rwkv_core::ops::wkv7::{Dims, Inputs, wkv7};
use rwkv_core::ops::wkv7_chunked::wkv7_chunked;
use rwkv_core::ops::wkv7_lazy::{Pending, materialize_delta, read_delta, step_delta};

use crate::base::{Base, Rows};
use crate::format::{NotFinite, Rounding, decay_dither, float16};
use crate::layout::{Part, StateLayout};
use crate::resident::{self, Resident, ResidentRounding, step};

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
    /// States cannot be held so.
    #[error(transparent)]
    Resident(#[from] resident::Error),
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

/// Bytes of memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Held by this state alone.
    pub own: usize,
    /// Of bases that others hold too.
    pub shared: usize,
}

impl Bytes {
    const fn of_base(bytes: usize, is_shared: bool) -> Self {
        if is_shared { Self { own: 0, shared: bytes } } else { Self { own: bytes, shared: 0 } }
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
/// use rwkv_core::ops::wkv7::Inputs;
/// use rwkv_state::Resident;
/// use rwkv_state::lazy::{Extents, LazyState};
///
/// let extents = Extents { n_heads: 1, head_size: 2 };
/// let mut state = LazyState::new(extents, &[0.0; 4], Resident::lazy(8))?;
/// let write = Inputs { r: &[1., 1.], lw: &[0., 0.], k: &[2., 3.], v: &[5., 7.], a: &[0., 0.], b: &[0., 0.] };
/// let mut y = [0.0; 2];
/// state.step(1, write, &mut y)?;
/// assert_eq!(y, [25.0, 35.0]);
///
/// let mut fork = state.clone();
/// assert!(fork.base().ptr_eq(state.base()));
/// fork.rollback(1)?;
/// assert_eq!(fork.materialize(), [0.0; 4]);
/// assert_eq!(state.materialize(), [10.0, 15.0, 14.0, 21.0]);
/// # Ok::<(), rwkv_state::lazy::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct LazyState {
    extents: Extents,
    resident: Resident,
    tokens: u64,
    form: Form,
}

/// How a state is held.
#[derive(Clone, Debug)]
pub enum Form {
    /// Written out, `[H, N, N]`; copied when it is first written to, if it is shared.
    Materialized(Base),
    /// As a base and what was done to it.
    Deferred {
        /// `[H, N, N]`.
        base: Base,
        /// The tokens since, of each head.
        pending: Vec<Pending<f32>>,
    },
}

impl LazyState {
    /// A state that starts from `base` `[H, N, N]`, rounded to the nearest that its format holds.
    ///
    /// # Errors
    ///
    /// If an extent is zero, the base has another length, or states cannot be held so.
    pub fn new(extents: Extents, base: &[f32], resident: Resident) -> Result<Self, Error> {
        resident.check()?;
        check_len("base", base.len(), extents.state_len()?)?;
        let base = Base::new(resident.format, extents.head_size, base);
        let form = if resident.capacity == 0 {
            Form::Materialized(base)
        } else {
            Form::Deferred { base, pending: vec![Pending::new(1, extents.head_size); extents.n_heads] }
        };
        Ok(Self { extents, resident, tokens: 0, form })
    }

    /// Its extents.
    #[must_use]
    pub const fn extents(&self) -> Extents {
        self.extents
    }

    /// What it is held in.
    #[must_use]
    pub const fn resident(&self) -> Resident {
        self.resident
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
    pub const fn base(&self) -> &Base {
        match &self.form {
            Form::Materialized(base) | Form::Deferred { base, .. } => base,
        }
    }

    const fn base_mut(&mut self) -> &mut Base {
        match &mut self.form {
            Form::Materialized(base) | Form::Deferred { base, .. } => base,
        }
    }

    /// Tokens since the last fold, which [`Self::rollback`] can undo.
    #[must_use]
    pub fn pending(&self) -> usize {
        match &self.form {
            Form::Materialized(_) => 0,
            Form::Deferred { pending, .. } => pending.first().map_or(0, Pending::len),
        }
    }

    /// Reads tokens: operands and `y` are `[T, H, N]`. Folds before each token that finds `C` pending.
    ///
    /// # Errors
    ///
    /// If a slice has another length.
    pub fn step(&mut self, tokens: usize, x: Inputs<'_, f32>, y: &mut [f32]) -> Result<(), Error> {
        self.extents.check(tokens, &x, y)?;
        let Extents { n_heads, head_size: n } = self.extents;
        let dithered;
        let x = if self.resident.rounding == ResidentRounding::DecayDither {
            dithered = dithered_decay(self.tokens, self.extents.width(), x.lw);
            Inputs { lw: &dithered, ..x }
        } else {
            x
        };
        let (base, mut none) = match &mut self.form {
            Form::Materialized(base) => (base, Vec::new()),
            Form::Deferred { base, pending } => (base, pending.iter_mut().map(Some).collect::<Vec<_>>()),
        };
        none.resize_with(n_heads, || None);
        let mut of_heads: Vec<Vec<&mut [f32]>> = Vec::new();
        of_heads.resize_with(n_heads, || Vec::with_capacity(tokens));
        for token in y.chunks_exact_mut(self.extents.width()) {
            token.chunks_exact_mut(n).zip(&mut of_heads).for_each(|(y, of)| of.push(y));
        }
        let (resident, before) = (self.resident, self.tokens);
        let parts: Vec<Option<Rows>> = (0..n_heads, none, of_heads)
            .into_par_iter()
            .map(|(h, pending, y)| {
                Head { n, h, n_heads, base: base.rows(), stored: None, pending, resident, before }.step(x, y)
            })
            .collect();
        // All heads fold at the same token.
        if let Some(folded) = Base::of_parts(n, parts.into_iter().flatten()) {
            *base = folded;
        }
        self.tokens += tokens as u64;
        Ok(())
    }

    /// Reads tokens that leave the matrices as they are, exactly, and can be undone as others: their operands are zero.
    pub fn pass_over(&mut self, tokens: usize) {
        if self.resident.capacity == 0 {
            self.tokens += tokens as u64;
            return;
        }
        let zero = vec![0.0; tokens * self.extents.width()];
        let (x, mut y) =
            (Inputs { r: &zero, lw: &zero, k: &zero, v: &zero, a: &zero, b: &zero }, zero.clone());
        let stepped = self.step(tokens, x, &mut y);
        debug_assert!(stepped.is_ok(), "operands of these extents");
    }

    /// Applies the state to a vector per head, `y = S x`, both `[H, N]`, without writing it out.
    ///
    /// # Errors
    ///
    /// If a slice has another length.
    pub fn read(&self, x: &[f32], y: &mut [f32]) -> Result<(), Error> {
        self.extents.check_read(x, y)?;
        let (n, base) = (self.extents.head_size, self.base().load());
        let none = Pending::new(1, n);
        let heads = base.chunks_exact(n * n).zip(x.chunks_exact(n)).zip(y.chunks_exact_mut(n));
        for (h, ((base, x), y)) in heads.enumerate() {
            let pending = if let Form::Deferred { pending, .. } = &self.form { &pending[h] } else { &none };
            pending.read(base, x, y);
        }
        Ok(())
    }

    /// The state in canonical order, `[H, N, N]`.
    #[must_use]
    pub fn materialize(&self) -> Vec<f32> {
        let mut state = Vec::new();
        self.append_to(&mut state);
        state
    }

    /// Appends the state in canonical order, `[H, N, N]`.
    pub(crate) fn append_to(&self, state: &mut Vec<f32>) {
        let base = self.base().load();
        match &self.form {
            Form::Materialized(_) => state.extend_from_slice(&base),
            Form::Deferred { pending, .. } => {
                let heads = base.chunks_exact(base.len() / pending.len()).zip(pending);
                heads.for_each(|(base, pending)| state.extend(pending.materialize(base)));
            }
        }
    }

    /// Makes the state the base, rounded. Does nothing if no token is pending.
    pub fn fold(&mut self) {
        if self.pending() > 0 {
            self.update(0, |_| ());
        }
    }

    /// Lets `run` move the state `[H, N, N]` on by `tokens` tokens, for executors that work on the state itself, as a
    /// prefill by chunks does. What it leaves is the new base, rounded.
    pub fn update<T>(&mut self, tokens: u64, run: impl FnOnce(&mut [f32]) -> T) -> T {
        let (n, rounding) = (self.extents.head_size, self.resident.rounding_at(self.tokens + tokens));
        self.tokens += tokens;
        if self.pending() == 0
            && let Rows::F32(state) = self.base_mut().rows_mut()
        {
            return run(state);
        }
        let mut state = self.materialize();
        if let Form::Deferred { pending, .. } = &mut self.form {
            pending.iter_mut().for_each(|of| of.truncate(0));
        }
        let result = run(&mut state);
        self.base_mut().rows_mut().store(n, &state, rounding, 0);
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
            pending.iter_mut().for_each(|of| of.truncate(left));
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
            Form::Deferred { pending, .. } => pending.iter().map(Pending::bytes).sum(),
        };
        Bytes::of_base(self.base().bytes(), self.base().is_shared()).and_own(pending)
    }

    fn fits(&self, other: &Self) -> Result<(), Error> {
        let (found, expected) = (other.extents, self.extents);
        if found == expected { Ok(()) } else { Err(Error::Checkpoint { found, expected }) }
    }
}

/// One head of a layer, and what it needs to read tokens.
struct Head<'a> {
    /// N.
    n: usize,
    /// Which of `n_heads`.
    h: usize,
    n_heads: usize,
    base: &'a Rows,
    /// Its rows of what becomes the base.
    stored: Option<Rows>,
    /// None where it is written at every token.
    pending: Option<&'a mut Pending<f32>>,
    resident: Resident,
    /// Tokens read before.
    before: u64,
}

impl Head<'_> {
    /// Reads the tokens of `x` `[T, H, N]`; `y` is the head's part of each token's output. Gives its rows of a new base, if
    /// anything was folded.
    fn step(mut self, x: Inputs<'_, f32>, y: Vec<&mut [f32]>) -> Option<Rows> {
        let Self { n, h, n_heads, .. } = self;
        let one = Dims { tokens: 1, heads: 1, head_size: n };
        let mut state = vec![0.0; n * n];
        self.base.load(n, h * n..(h + 1) * n, &mut state);
        for (t, y) in y.into_iter().enumerate() {
            let at = (t * n_heads + h) * n;
            let token = x.part(at..at + n);
            match self.pending.take() {
                None => {
                    wkv7(one, token, &mut state, y);
                    self.store(&mut state, t + 1);
                }
                Some(pending) => {
                    if pending.len() == self.resident.capacity {
                        pending.fold(&mut state);
                        self.store(&mut state, t);
                    }
                    pending.step(one, token, &state, y);
                    self.pending = Some(pending);
                }
            }
        }
        self.stored
    }

    /// Stores the state after so many tokens, and rounds it to what could be stored.
    fn store(&mut self, state: &mut [f32], tokens: usize) {
        let Self { n, h, base, .. } = *self;
        let rounding = self.resident.rounding_at(self.before + tokens as u64);
        let stored = self.stored.get_or_insert_with(|| base.part(n, h * n..(h + 1) * n));
        stored.store(n, state, rounding, h * n * n);
        stored.load(n, 0..n, state);
    }
}

/// Logarithms of decays `[T, H N]`, with the dither added to the decays.
fn dithered_decay(before: u64, width: usize, lw: &[f32]) -> Vec<f32> {
    let dithered = |(token, lw): (u64, &[f32])| {
        let channels = (0..).zip(lw.to_vec());
        channels
            .map(move |(channel, lw)| (lw.exp_m1() + decay_dither(step(token), channel)).ln_1p())
            .collect::<Vec<_>>()
    };
    (before..).zip(lw.chunks_exact(width)).flat_map(dithered).collect()
}

/// Moves states of one layer on, side by side.
pub(crate) fn update_all<M: Compute<f32>>(form: Wkv, segments: Vec<WkvSegment<'_, f32, LazyState>>) {
    let (mut plain, mut rest) = (Vec::new(), Vec::new());
    for WkvSegment { dims, inputs, state, y } in segments {
        if state.resident.is_plain() {
            state.tokens += dims.tokens as u64;
            if let Rows::F32(state) = state.base_mut().rows_mut() {
                plain.push(WkvSegment { dims, inputs, state: &mut state[..], y });
            }
        } else {
            rest.push(WkvSegment { dims, inputs, state, y });
        }
    }
    M::wkv7(form, &mut plain);
    rest.into_par_iter().for_each(|WkvSegment { dims, inputs, state, y }| {
        let stepped = match form {
            Wkv::Sequential => state.step(dims.tokens, inputs, y),
            // Chunks leave nothing pending.
            Wkv::Chunked(chunk) => {
                let tokens = dims.tokens as u64;
                state.update(tokens, |state| wkv7_chunked(dims, chunk, inputs, state, y));
                Ok(())
            }
        };
        debug_assert!(stepped.is_ok(), "the forward pass has operands of these extents");
    });
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
    /// If an extent is zero, `wkv` has another length, or states cannot be held so.
    pub fn new(layout: &StateLayout, wkv: &[f32], resident: Resident) -> Result<Self, Error> {
        let shape = layout.shape(Part::Wkv);
        let extents = Extents { n_heads: shape[1], head_size: shape[2] };
        let len = extents.state_len()?;
        check_len("wkv", wkv.len(), shape[0].saturating_mul(len))?;
        wkv.chunks_exact(len)
            .map(|base| LazyState::new(extents, base, resident))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// The layers.
    #[must_use]
    pub fn layers(&self) -> &[LazyState] {
        &self.0
    }

    /// What they are held in; the default if there is none.
    #[must_use]
    pub fn resident(&self) -> Resident {
        self.0.first().map(LazyState::resident).unwrap_or_default()
    }

    /// Tokens that are pending in every layer, which [`Self::rollback`] can undo.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.0.iter().map(LazyState::pending).min().unwrap_or(0)
    }

    /// The layers, to move them on.
    #[must_use]
    pub fn layers_mut(&mut self) -> &mut [LazyState] {
        &mut self.0
    }

    /// The state in canonical order, `[L, H, N, N]`.
    #[must_use]
    pub fn materialize(&self) -> Vec<f32> {
        let mut state = Vec::new();
        self.0.iter().for_each(|layer| layer.append_to(&mut state));
        state
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
        let pending = self.pending();
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
/// Many sequences that begin alike share its base for good, and each holds a delta. Where the update is purely additive (`a`
/// or `b` is zero) the delta does not depend on the base at all. A clone is a fork: it shares the base and copies the delta.
///
/// It is for engines whose update is additive. Sessions of RWKV-7 fork a [`LazyState`] instead, also from a prefix that lives
/// long, since this form is better in nothing there. Bytes of a head of 64, from the formulas above:
///
/// | | a fork holds | a token reads and writes |
/// |---|---|---|
/// | [`LazyState`], F32, `C = 8`, until its first fold | 1280 for each pending token | 16384 of the shared base, and the entries |
/// | the same, after it | 16384 and the entries | 26240 |
/// | [`LazyState`], F16, `C = 8` | 8192 and the entries | 16000 |
/// | this, delta in F32 | 16384 | 49152, of which 16384 are the shared base |
/// | this, delta in F16 | 8192 | 32768, of which 16384 are the shared base |
///
/// The delta is as large as a state, and is read and written at every token: even with the base read once for all forks,
/// which takes a kernel of its own, that is no less than halves with eight tokens pending move, each fork with a base of its
/// own. Nor is it less memory than halves. It is less exact: what the update removes of the base, the delta holds negated, so
/// that in the long run it is a state in halves which is rounded at every token, and not at folds. And what is shared fades:
/// after `T` tokens a channel of decay `w` has `w^T` of the base.
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
        Bytes::of_base(size_of_val::<[f32]>(&self.base), Arc::strong_count(&self.base) > 1)
            .and_own(size_of_val(&self.log_gamma[..]) + self.delta.bytes())
    }
}
