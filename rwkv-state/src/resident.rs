//! What a sequence's state is held in while the sequence runs.
//!
//! [`Resident`] is the choice, made once for an engine. [`ResidentState`] is a state held so, as the CPU executor moves
//! it on: the WKV matrices of every layer as [`LazyState`](crate::lazy::LazyState)s, and the rows that the token shifts
//! remember, of the last token and of those before it that can be undone.
//!
//! | choice | bytes of a head of 64 | the WKV matrices are rounded |
//! |---|---|---|
//! | [`Resident::default`] | 16384 | never |
//! | [`Resident::lazy`] | 16384 and 1280 for each pending token | never; they are written every `C` tokens |
//! | [`Resident::f16`] | 8256 and 1280 for each pending token | to halves, every `C` tokens |
//! | [`Resident::f16_dithered`] | 8256 | to halves, at every token, by a dither that keeps slow decays from freezing |
//! | [`Resident::int8`] | 4672 and 1280 for each pending token | to bytes, every `C` tokens |
//!
//! The shifts are single precision in all of them: they are replaced at every token. An executor that reads many tokens in
//! a pass may leave out all roundings but the last, as [`LazyState::update`](crate::lazy::LazyState::update) does; which
//! tokens are pending afterwards, [`Resident::advance`] says for all.

use std::ops::Range;

use rwkv_core::ModelConfig;
use rwkv_core::model::{Compute, Memory, Shift, Wkv, WkvSegment};

use crate::format::{Rounding, StateFormat};
use crate::layout::{Part, StateLayout, WrongLength};
use crate::lazy::{self, Bytes, LazyLayers};

/// Tokens that may be pending, at most.
pub const MAX_CAPACITY: usize = 32;

/// Tokens that may be pending, at least, where bases are bytes: rounded more often, they lose what slow decays and small
/// writes change.
pub const INT8_CAPACITY: usize = 16;

/// What states are held in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Resident {
    /// Format of the WKV matrices as they are written: not sparse.
    pub format: StateFormat,
    /// Tokens that may be pending, `C`, before they are folded into what is written; 0 for a state that is written at
    /// every token.
    pub capacity: usize,
    /// How what is written is rounded.
    pub rounding: ResidentRounding,
}

/// How states are rounded that are written again and again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ResidentRounding {
    /// To the nearest.
    #[default]
    Nearest,
    /// [`Rounding::Stochastic`]; of the tokens read, each count has a seed of its own.
    Stochastic {
        /// The seed of the first.
        seed: u64,
    },
    /// [`Rounding::Dither`], by the count of tokens read.
    Dither,
    /// To the nearest, after [`decay_dither`](crate::format::decay_dither) was added to the decay: for halves that are
    /// written at every token.
    DecayDither,
}

/// Why states cannot be held so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A format for states at rest alone.
    #[error("{0:?} is for states at rest, resident are f32, f16 and int8")]
    Format(StateFormat),
    /// Bytes that are rounded too often.
    #[error("int8 states with {got} tokens pending, at least {INT8_CAPACITY} are needed")]
    Int8 {
        /// As many as asked for.
        got: usize,
    },
    /// More than there is room for.
    #[error("{got} tokens pending, at most {MAX_CAPACITY}")]
    Capacity {
        /// As many as asked for.
        got: usize,
    },
    /// A dither of what is not rounded at every token to halves.
    #[error(
        "the dither of decays is for f16 states that are written at every token, not {format:?} every {capacity}"
    )]
    DecayDither {
        /// The format asked for.
        format: StateFormat,
        /// Tokens that may be pending.
        capacity: usize,
    },
}

impl Resident {
    /// Single precision, written every `capacity` tokens.
    #[must_use]
    pub const fn lazy(capacity: usize) -> Self {
        Self { format: StateFormat::F32, capacity, rounding: ResidentRounding::Nearest }
    }

    /// Halves, written every `capacity` tokens.
    #[must_use]
    pub const fn f16(capacity: usize) -> Self {
        Self { format: StateFormat::F16, capacity, rounding: ResidentRounding::Nearest }
    }

    /// Halves, written at every token with a dither.
    #[must_use]
    pub const fn f16_dithered() -> Self {
        Self { format: StateFormat::F16, capacity: 0, rounding: ResidentRounding::Dither }
    }

    /// Bytes, written every `capacity` tokens.
    #[must_use]
    pub const fn int8(capacity: usize) -> Self {
        Self { format: StateFormat::Int8Scaled, capacity, rounding: ResidentRounding::Nearest }
    }

    /// Checks that states can be held so.
    ///
    /// # Errors
    ///
    /// If they cannot.
    pub const fn check(self) -> Result<(), Error> {
        let Self { format, capacity, rounding } = self;
        match (format, rounding) {
            (StateFormat::Sparse(_), _) => Err(Error::Format(format)),
            _ if capacity > MAX_CAPACITY => Err(Error::Capacity { got: capacity }),
            (StateFormat::Int8Scaled, _) if capacity < INT8_CAPACITY => Err(Error::Int8 { got: capacity }),
            (StateFormat::F16, ResidentRounding::DecayDither) if capacity == 0 => Ok(()),
            (_, ResidentRounding::DecayDither) => Err(Error::DecayDither { format, capacity }),
            _ => Ok(()),
        }
    }

    /// Whether states are exact and written at every token.
    #[must_use]
    pub const fn is_plain(self) -> bool {
        matches!(self.format, StateFormat::F32) && self.capacity == 0
    }

    /// What reading `tokens` more does to a state of which `pending` are.
    #[must_use]
    pub const fn advance(self, pending: usize, tokens: usize) -> Advance {
        let room = self.capacity.saturating_sub(pending);
        if tokens <= room {
            return Advance { folds: false, pending: pending + tokens };
        }
        // A full list is folded before the token that finds it so.
        let rest = match self.capacity {
            0 => 0,
            capacity => (tokens - room - 1) % capacity + 1,
        };
        Advance { folds: true, pending: rest }
    }

    /// How a state is rounded that has read so many tokens.
    pub(crate) const fn rounding_at(self, tokens: u64) -> Rounding {
        match self.rounding {
            ResidentRounding::Nearest | ResidentRounding::DecayDither => Rounding::Nearest,
            ResidentRounding::Stochastic { seed } => Rounding::Stochastic { seed: seed.wrapping_add(tokens) },
            ResidentRounding::Dither => Rounding::Dither { step: step(tokens) },
        }
    }
}

/// The count of tokens, as dithers take it.
#[must_use]
#[expect(clippy::cast_possible_truncation, reason = "a dither counts modulo 2^32")]
pub const fn step(tokens: u64) -> u32 {
    tokens as u32
}

/// What reading tokens does to a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advance {
    /// Whether what is written changes.
    pub folds: bool,
    /// Tokens that are pending afterwards: the last ones.
    pub pending: usize,
}

/// A state as it is held while its sequence runs. A clone is a fork: it shares what is written and copies what is
/// pending.
#[derive(Clone, Debug)]
pub struct ResidentState {
    layout: StateLayout,
    wkv: LazyLayers,
    /// What the shifts remember, `[2, L, D]`, after each token that can be undone to; the last is where it stands.
    shifts: Vec<Vec<f32>>,
    /// The same of the last tokens of a pass that is under way.
    next: Vec<Vec<f32>>,
    /// What that pass does.
    advance: Advance,
}

impl ResidentState {
    /// The state before the first token.
    ///
    /// # Errors
    ///
    /// If states cannot be held so.
    pub fn new(layout: &StateLayout, resident: Resident) -> Result<Self, lazy::Error> {
        Self::of(
            layout,
            resident,
            vec![0.0; layout.part_len(Part::AttShift) * 2],
            &vec![0.0; layout.part_len(Part::Wkv)],
        )
    }

    /// A state in canonical order; nothing is pending.
    ///
    /// # Errors
    ///
    /// If it has another length.
    ///
    /// # Panics
    ///
    /// If states cannot be held so, which [`Resident::check`] tells.
    pub fn from_canonical(
        layout: &StateLayout,
        resident: Resident,
        state: &[f32],
    ) -> Result<Self, WrongLength> {
        layout.check_len(state)?;
        let shifts = [Part::AttShift, Part::FfnShift].map(|part| &state[layout.range(part)]).concat();
        let made = Self::of(layout, resident, shifts, &state[layout.range(Part::Wkv)]);
        #[expect(
            clippy::expect_used,
            reason = "lengths were checked, and what is left is the caller's to check"
        )]
        Ok(made.expect("a way to hold states that was checked"))
    }

    fn of(
        layout: &StateLayout,
        resident: Resident,
        shifts: Vec<f32>,
        wkv: &[f32],
    ) -> Result<Self, lazy::Error> {
        let wkv = LazyLayers::new(layout, wkv, resident)?;
        let advance = Advance { folds: false, pending: 0 };
        Ok(Self { layout: *layout, wkv, shifts: vec![shifts], next: Vec::new(), advance })
    }

    /// It in canonical order, in the memory of `state`; what is in it is lost.
    pub fn to_canonical_in(&self, state: &mut Vec<f32>) {
        let (att, ffn) = self.now().split_at(self.layout.part_len(Part::AttShift));
        state.clear();
        state.reserve(self.layout.len());
        state.extend_from_slice(att);
        self.wkv.layers().iter().for_each(|layer| layer.append_to(state));
        state.extend_from_slice(ffn);
    }

    /// What it is held in.
    #[must_use]
    pub fn resident(&self) -> Resident {
        self.wkv.resident()
    }

    /// Tokens that are pending, which [`Self::rollback`] can undo.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.wkv.pending()
    }

    /// Writes out what is pending. It cannot be undone afterwards.
    pub fn fold(&mut self) {
        self.wkv.fold();
        self.shifts.drain(..self.shifts.len() - 1);
    }

    /// Undoes the last `tokens` tokens, exactly and without recomputing.
    ///
    /// # Errors
    ///
    /// If fewer tokens are pending.
    pub fn rollback(&mut self, tokens: usize) -> Result<(), lazy::Error> {
        self.wkv.rollback(tokens)?;
        self.shifts.truncate(self.shifts.len() - tokens);
        Ok(())
    }

    /// What it holds.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        let shifts: usize = self.shifts.iter().map(|of| size_of_val(&of[..])).sum();
        let Bytes { own, shared } = self.wkv.bytes();
        Bytes { own: own + shifts, shared }
    }

    /// What the shifts remember now, `[2, L, D]`.
    fn now(&self) -> &[f32] {
        self.shifts.last().map_or(&[], Vec::as_slice)
    }

    /// Where among them the row of a layer is.
    fn shift_range(&self, part: Shift, layer: usize, width: usize) -> Range<usize> {
        let place = match part {
            Shift::Att => layer,
            Shift::Ffn => layer + self.now().len() / width / 2,
        };
        place * width..(place + 1) * width
    }
}

impl<M: Compute<f32>> Memory<f32, M> for ResidentState {
    fn check(&self, config: &ModelConfig) {
        assert_eq!(self.layout, StateLayout::new(config), "a state of another layout");
    }

    fn begin(&mut self, tokens: usize) {
        self.advance = self.wkv.resident().advance(self.pending(), tokens);
        // After a fold, the token before the first that is pending is one to which one can go back.
        let last = self.advance.pending + usize::from(self.advance.folds);
        self.next = vec![vec![0.0; self.now().len()]; last.min(tokens)];
    }

    fn shift(&mut self, part: Shift, layer: usize, width: usize, rows: &[f32]) -> Vec<f32> {
        let own = self.shift_range(part, layer, width);
        let before = self.now()[own.clone()].to_vec();
        for (next, row) in self.next.iter_mut().rev().zip(rows.chunks_exact(width).rev()) {
            next[own.clone()].copy_from_slice(row);
        }
        before
    }

    fn keep_shift(&mut self, part: Shift, layer: usize, width: usize) {
        let own = self.shift_range(part, layer, width);
        let kept = self.now()[own.clone()].to_vec();
        self.next.iter_mut().for_each(|next| next[own.clone()].copy_from_slice(&kept));
    }

    fn keep_wkv(&mut self, layer: usize, tokens: usize) {
        self.wkv.layers_mut()[layer].pass_over(tokens);
    }

    fn wkv7(form: Wkv, layer: usize, segments: Vec<WkvSegment<'_, f32, Self>>) {
        let of_layer = segments
            .into_iter()
            .map(|WkvSegment { dims, inputs, state, y }| WkvSegment {
                dims,
                inputs,
                state: &mut state.wkv.layers_mut()[layer],
                y,
            })
            .collect();
        lazy::update_all::<M>(form, of_layer);
    }

    fn end(&mut self) {
        if self.advance.folds {
            // The token before the first that is pending may have been read before this pass.
            let kept = (self.advance.pending + 1).saturating_sub(self.next.len());
            self.shifts.drain(..self.shifts.len() - kept);
        }
        self.shifts.append(&mut self.next);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Advance, Error, Resident, ResidentRounding};
    use crate::format::{SparseRule, StateFormat};

    proptest! {
        /// Token by token is all at once, and no list is longer than it may be.
        #[test]
        fn advances_add_up(capacity in 0usize..9, pending in 0usize..9, tokens in 0usize..40) {
            let (resident, pending) = (Resident::lazy(capacity), pending.min(capacity));
            let mut one_by_one = Advance { folds: false, pending };
            for _ in 0..tokens {
                let Advance { folds, pending } = resident.advance(one_by_one.pending, 1);
                one_by_one = Advance { folds: folds || one_by_one.folds, pending };
                prop_assert!(pending <= capacity, "{} of {}", pending, capacity);
                prop_assert!(pending > 0 || capacity == 0, "a token that was read is pending");
            }
            prop_assert_eq!(resident.advance(pending, tokens), one_by_one, "{} tokens", tokens);
        }
    }

    #[test]
    fn what_cannot_be_held_is_told() {
        for good in [
            Resident::default(),
            Resident::lazy(32),
            Resident::f16(8),
            Resident::f16_dithered(),
            Resident::int8(16),
        ] {
            assert_eq!(good.check(), Ok(()), "{good:?}");
        }
        let sparse = StateFormat::Sparse(SparseRule::default());
        let dithered = ResidentRounding::DecayDither;
        for (bad, why) in [
            (Resident { format: sparse, ..Resident::lazy(8) }, Error::Format(sparse)),
            (Resident::int8(15), Error::Int8 { got: 15 }),
            (Resident::f16(33), Error::Capacity { got: 33 }),
            (
                Resident { rounding: dithered, ..Resident::f16(8) },
                Error::DecayDither { format: StateFormat::F16, capacity: 8 },
            ),
        ] {
            assert_eq!(bad.check(), Err(why), "{bad:?}");
        }
        assert_eq!(
            Error::Int8 { got: 3 }.to_string(),
            "int8 states with 3 tokens pending, at least 16 are needed",
            "facts"
        );
    }
}
