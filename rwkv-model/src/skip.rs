//! Layers that are left out at some tokens: what contributes little is not computed, at a price in quality.
//!
//! A [`SkipPolicy`] says where, a [`Skipping`] what of a layer and what its shifts remember then. Layer 0, whose values
//! later layers mix in, and the last are never left out, whatever a policy says. A sequence that is given one token by a
//! call decodes; one that is given more is prompted, and leaves out layers only where [`Skipping::prefill`] says so: what
//! a prompt does not write into the state is not there later.
//!
//! | policy | leaves out |
//! |---|---|
//! | [`Middle`] | the middle half of the layers, at the first tokens of a sequence or at all |
//! | [`Listed`] | the layers named |
//! | [`Contribution`] | a share of the layers, those whose absence costs least: [`contributions`] measures it |
//!
//! Sequences that leave out different layers never share a pass, so that each one's result is what it would be alone and
//! a layer's weights are not read where nobody needs them. Between such passes the weights of the others are read again.

use std::fmt::Debug;
use std::sync::Arc;

use rwkv_core::model::{Skip, SkipPart, SkipShifts};

use crate::engine::{Engine, Error};
use crate::quality::{self, Score, SideBySide};

/// Says which layers are left out at which tokens.
pub trait SkipPolicy: Debug + Send + Sync {
    /// Whether `layer` of `layers` is left out at the token of index `token` in its sequence. The same question always has
    /// the same answer.
    fn skips(&self, layer: usize, layers: usize, token: u64) -> bool;
}

/// The middle half of the layers: `8 < layer < 24` of 32, scaled to the model's depth `L`: `L / 4 < layer < 3 L / 4`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Middle {
    /// At the first so many tokens of a sequence (the rule that the project was founded on has 10); at all of them if none.
    pub first_tokens: Option<u64>,
}

impl SkipPolicy for Middle {
    fn skips(&self, layer: usize, layers: usize, token: u64) -> bool {
        let scaled = layer.saturating_mul(4);
        self.first_tokens.is_none_or(|first| token < first)
            && layers < scaled
            && scaled < layers.saturating_mul(3)
    }
}

/// The layers of a list, at every token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed(pub Vec<usize>);

impl SkipPolicy for Listed {
    fn skips(&self, layer: usize, _: usize, _: u64) -> bool {
        self.0.contains(&layer)
    }
}

/// A share of the layers, at every token: those whose absence costs least.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contribution {
    /// What each costs: see [`contributions`].
    pub costs: Vec<LayerCost>,
    /// Of all layers, in `[0, 1]`.
    pub share: f64,
}

impl SkipPolicy for Contribution {
    fn skips(&self, layer: usize, layers: usize, _: u64) -> bool {
        let Some(own) = self.costs.iter().find(|of| of.layer == layer) else { return false };
        let before = |of: &&LayerCost| {
            of.bits_per_byte.total_cmp(&own.bits_per_byte).then(of.layer.cmp(&layer)).is_lt()
        };
        let cheaper = self.costs.iter().filter(before).count();
        (cheaper as f64) < (self.share * layers as f64).round()
    }
}

/// What is left out, where, and how.
#[derive(Clone, Debug)]
pub struct Skipping {
    /// Which layers, at which tokens.
    pub policy: Arc<dyn SkipPolicy>,
    /// What of them.
    pub part: SkipPart,
    /// What the shifts remember of a token that leaves their mix out.
    pub shifts: SkipShifts,
    /// Whether prompts leave them out too.
    pub prefill: bool,
}

impl Skipping {
    /// Layers left out whole at decoded tokens, their shifts refreshed.
    pub fn new(policy: impl SkipPolicy + 'static) -> Self {
        let (part, shifts) = (SkipPart::Layer, SkipShifts::Refreshed);
        Self { policy: Arc::new(policy), part, shifts, prefill: false }
    }

    /// Of each of so many layers, whether it is left out at a token.
    #[must_use]
    pub fn layers(&self, layers: usize, token: u64) -> Vec<bool> {
        let inner = |layer: usize| layer > 0 && layer + 1 < layers;
        (0..layers).map(|layer| inner(layer) && self.policy.skips(layer, layers, token)).collect()
    }
}

/// The layers that a pass leaves out; none if empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Mask(Vec<bool>);

impl Mask {
    /// Of a sequence that has read `position` tokens, the mask of the next and how many of the next `tokens` share it.
    pub(crate) fn next(
        skipping: Option<&Skipping>,
        layers: usize,
        position: u64,
        decodes: bool,
        tokens: usize,
    ) -> (Self, usize) {
        let Some(skipping) = skipping.filter(|of| decodes || of.prefill) else {
            return (Self::default(), tokens);
        };
        let at = |token: u64| {
            let mask = skipping.layers(layers, token);
            Self(if mask.contains(&true) { mask } else { Vec::new() })
        };
        let (first, end) = (at(position), position.saturating_add(tokens as u64));
        let run = (position..end).take_while(|&token| token == position || at(token) == first).count();
        (first, run)
    }

    /// As a pass takes it.
    pub(crate) fn skip(&self, skipping: Option<&Skipping>) -> Skip<'_> {
        skipping.map_or_else(Skip::default, |of| Skip { layers: &self.0, part: of.part, shifts: of.shifts })
    }
}

/// What the absence of a layer costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerCost {
    /// Which.
    pub layer: usize,
    /// Bits per byte more than with all layers.
    pub bits_per_byte: f64,
}

/// Measures on a text what the absence of each layer costs, of those that can be left out: layer by layer, at every token,
/// in windows of so many tokens. `progress` sees how many layers are done.
///
/// # Errors
///
/// As those of [`quality::windows`], or if the engine cannot leave layers out: see [`Engine::skipping`].
pub fn contributions(
    engine: &Engine,
    text: &[u8],
    part: SkipPart,
    windows: SideBySide,
    mut progress: impl FnMut(usize),
) -> Result<Vec<LayerCost>, Error> {
    let bits = |skipping: Option<Skipping>| {
        let scores = quality::side_by_side(&engine.skipping(skipping)?, text, windows, |_| {})?;
        Ok::<_, Error>(scores.into_iter().sum::<Score>().bits_per_byte())
    };
    let whole = bits(None)?;
    let inner = 1..engine.config().n_layers.saturating_sub(1);
    let mut costs = Vec::with_capacity(inner.len());
    for (done, layer) in (1..).zip(inner) {
        let without = Skipping { part, prefill: true, ..Skipping::new(Listed(vec![layer])) };
        costs.push(LayerCost { layer, bits_per_byte: bits(Some(without))? - whole });
        progress(done);
    }
    Ok(costs)
}

#[cfg(test)]
mod tests {
    use super::{Contribution, LayerCost, Listed, Mask, Middle, SkipPolicy, Skipping};

    fn of(policy: &dyn SkipPolicy, layers: usize, token: u64) -> Vec<usize> {
        (0..layers).filter(|&layer| policy.skips(layer, layers, token)).collect()
    }

    #[test]
    fn the_founding_rule() {
        let rule = Middle { first_tokens: Some(10) };
        assert_eq!(of(&rule, 32, 9), (9..24).collect::<Vec<_>>(), "8 < layer < 24");
        assert_eq!(of(&rule, 32, 10), [0; 0], "from the tenth on");
        assert_eq!(of(&Middle::default(), 12, 1 << 40), [4, 5, 6, 7, 8], "at every token, of 12");
        let few: Vec<_> = (0..4).map(|layers| of(&rule, layers, 0)).collect();
        assert_eq!(
            few,
            [vec![], vec![], vec![1], vec![1, 2]],
            "few layers; the last is never left out all the same"
        );
    }

    #[test]
    fn the_cheapest_layers_first() {
        let cost = |(layer, bits_per_byte)| LayerCost { layer, bits_per_byte };
        let costs: Vec<_> = [(1, 0.3), (2, 0.1), (3, 0.1), (4, -0.2)].map(cost).into();
        let rule = |share| of(&Contribution { costs: costs.clone(), share }, 6, 0);
        let want = [
            (0.0, vec![]),
            (0.2, vec![4]),
            (0.34, vec![2, 4]),
            (0.5, vec![2, 3, 4]),
            (1.0, vec![1, 2, 3, 4]),
        ];
        for (share, want) in want {
            assert_eq!(rule(share), want, "{share}");
        }
    }

    #[test]
    fn first_and_last_stay_and_runs_end_where_masks_change() {
        let all = Skipping::new(Listed((0..9).collect()));
        assert_eq!(all.layers(4, 0), [false, true, true, false], "whatever a policy says");
        let rule = Skipping { prefill: true, ..Skipping::new(Middle { first_tokens: Some(10) }) };
        let (early, run) = Mask::next(Some(&rule), 8, 3, false, 100);
        assert_eq!((early.0.iter().filter(|of| **of).count(), run), (3, 7), "tokens 3 to 9");
        assert_eq!(Mask::next(Some(&rule), 8, 10, false, 100), (Mask::default(), 100), "the rest");
        let decoding = Skipping { prefill: false, ..rule };
        assert_eq!(Mask::next(Some(&decoding), 8, 0, false, 100), (Mask::default(), 100), "a prompt");
        assert_eq!(Mask::next(Some(&decoding), 8, 0, true, 1), (early, 1), "a token");
        assert_eq!(Mask::next(None, 8, 0, true, 1), (Mask::default(), 1), "no policy");
    }
}
