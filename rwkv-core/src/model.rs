//! The v7 forward pass over [`ops`](crate::ops): packed segments, each from its own state.
//!
//! [`Model`] is generic in what it computes with: over [`Matrix`] it is the reference, in `f32` or `f64`; over
//! [`Packed`](crate::fast::linear::Packed) it is the CPU executor. There is one forward pass.
//!
//! Invariant: a segment's result does not depend on the other segments of the call, nor on how many calls its tokens
//! are spread over, bit for bit, as long as [`Wkv`] is sequential.

use rayon::prelude::*;

use crate::ops::activation::Activation;
use crate::ops::add::add;
use crate::ops::head::head;
use crate::ops::layer_norm::{LN_EPS, layer_norm};
use crate::ops::linear::{Job, Linear, Matrix};
use crate::ops::{decay, embedding, kappa, learning_rate, readout, token_shift, value_residual};
use crate::ops::{wkv7, wkv7_chunked};
use crate::real::Elements;
use crate::{ModelConfig, Real, Weight};

/// Rows below which an elementwise pass is not split between threads: it would be done before they meet.
const ROWS_PER_TASK: usize = 4;

/// How the state update runs over the tokens of a segment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wkv {
    /// One token after another.
    #[default]
    Sequential,
    /// By chunks of so many tokens (at least one).
    Chunked(usize),
}

/// What a model computes with: matrices, and the state update that goes with them.
pub trait Compute<R: Real>: Linear<R> + Sized {
    /// Runs the state update of every segment.
    fn wkv7(form: Wkv, segments: &mut [WkvSegment<'_, R>]);
}

/// One segment's share of the state update.
#[derive(Debug)]
pub struct WkvSegment<'a, R, S: ?Sized = [R]> {
    /// Extents.
    pub dims: wkv7::Dims,
    /// Operands, each `[T, H, N]`.
    pub inputs: wkv7::Inputs<'a, R>,
    /// State, `[H, N, N]`, or what holds it.
    pub state: &'a mut S,
    /// Output, `[T, H, N]`.
    pub y: &'a mut [R],
}

/// Where a sequence stands, as a forward pass moves it on: [`State`], or another form of it that its holder keeps.
pub trait Memory<R: Real, M: Compute<R>>: Send + Sized {
    /// Checks that it is of a model of these extents.
    ///
    /// # Panics
    ///
    /// If it is not.
    fn check(&self, config: &ModelConfig);

    /// Called before the layers, with the tokens to come.
    fn begin(&mut self, _tokens: usize) {}

    /// Remembers the rows `[T, D]` that a layer's shift sees, and tells the one `[D]` before them.
    fn shift(&mut self, part: Shift, layer: usize, width: usize, rows: &[R]) -> Vec<R>;

    /// Keeps the row that a layer's shift sees, over tokens that leave the layer out.
    fn keep_shift(&mut self, part: Shift, layer: usize, width: usize);

    /// Runs the state update of a layer, of every segment.
    fn wkv7(form: Wkv, layer: usize, segments: Vec<WkvSegment<'_, R, Self>>);

    /// Keeps a layer's matrices, over so many tokens that leave the layer out.
    fn keep_wkv(&mut self, layer: usize, tokens: usize);

    /// Called after the layers.
    fn end(&mut self) {}
}

/// Of which mix a token shift is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shift {
    /// The time mix's: rows are ln1's output.
    Att,
    /// The channel mix's: rows are ln2's output.
    Ffn,
}

impl<R: Real, W: Weight> Compute<R> for Matrix<W> {
    fn wkv7(form: Wkv, segments: &mut [WkvSegment<'_, R>]) {
        for s in segments {
            match form {
                Wkv::Sequential => wkv7::wkv7(s.dims, s.inputs, s.state, s.y),
                Wkv::Chunked(chunk) => wkv7_chunked::wkv7_chunked(s.dims, chunk, s.inputs, s.state, s.y),
            }
        }
    }
}

/// Gain and bias of a norm, each `[D]`.
#[derive(Clone, Debug)]
pub struct Norm<R> {
    /// Gain.
    pub gain: Vec<R>,
    /// Bias.
    pub bias: Vec<R>,
}

impl<R: Real> Norm<R> {
    /// Layer norm of each row of `x` `[T, D]` into `y` `[T, D]`.
    fn apply(&self, x: &[R], y: &mut [R]) {
        let width = self.gain.len();
        y.par_chunks_exact_mut(width)
            .zip(x.par_chunks_exact(width))
            .with_min_len(ROWS_PER_TASK)
            .for_each(|(y, x)| layer_norm(x, &self.gain, &self.bias, LN_EPS, y));
    }
}

/// A low-rank adapter.
#[derive(Clone, Debug)]
pub struct Adapter<R, M> {
    /// `[rank, D]`.
    pub down: M,
    /// `[D, rank]`.
    pub up: M,
    /// `[D]`, or empty.
    pub bias: Vec<R>,
}

/// The time mix of a layer.
#[derive(Clone, Debug)]
pub struct TimeMix<R, M> {
    /// Token-shift mixes in the order r, w, k, v, a, g; `[6, D]`.
    pub mixes: Vec<R>,
    /// Receptance projection, `[D, D]`.
    pub receptance: M,
    /// Key projection, `[D, D]`.
    pub key: M,
    /// Value projection, `[D, D]`.
    pub value: M,
    /// Output projection, `[D, D]`.
    pub output: M,
    /// Decay adapter.
    pub w: Adapter<R, M>,
    /// In-context learning rate adapter.
    pub a: Adapter<R, M>,
    /// Value residual adapter; none in layer 0.
    pub v: Option<Adapter<R, M>>,
    /// Gate adapter; its bias is empty.
    pub g: Adapter<R, M>,
    /// Scale of the removal key, `[H, N]`.
    pub k_k: Vec<R>,
    /// Key modulation by the learning rate, `[H, N]`.
    pub k_a: Vec<R>,
    /// Bonus weight, `[H, N]`.
    pub r_k: Vec<R>,
    /// Group norm.
    pub norm: Norm<R>,
}

/// The channel mix of a layer.
#[derive(Clone, Debug)]
pub struct ChannelMix<R, M> {
    /// Token-shift mix, `[D]`.
    pub mix: Vec<R>,
    /// Key projection, `[F, D]`.
    pub key: M,
    /// Value projection, `[D, F]`.
    pub value: M,
}

/// A layer.
#[derive(Clone, Debug)]
pub struct Block<R, M> {
    /// Norm before the time mix.
    pub ln1: Norm<R>,
    /// Time mix.
    pub time_mix: TimeMix<R, M>,
    /// Norm before the channel mix.
    pub ln2: Norm<R>,
    /// Channel mix.
    pub channel_mix: ChannelMix<R, M>,
}

/// A model.
#[derive(Clone, Debug)]
pub struct Model<R, M> {
    /// Extents.
    pub config: ModelConfig,
    /// Embedding table, `[V, D]`, as stored.
    pub embedding: Elements,
    /// Norm of the embedding.
    pub ln0: Norm<R>,
    /// Layers.
    pub blocks: Vec<Block<R, M>>,
    /// Norm before the head.
    pub ln_out: Norm<R>,
    /// Head, `[V, D]`.
    pub head: M,
}

impl<R, M> Model<R, M> {
    /// Its matrices: those of the layers with their adapters, and the head.
    pub fn matrices(&self) -> impl Iterator<Item = &M> {
        let of_block = |block| {
            let Block { time_mix, channel_mix, .. }: &Block<R, M> = block;
            let TimeMix { receptance, key, value, output, w, a, v, g, .. } = time_mix;
            let adapters = [Some(w), Some(a), v.as_ref(), Some(g)].into_iter().flatten();
            [receptance, key, value, output, &channel_mix.key, &channel_mix.value]
                .into_iter()
                .chain(adapters.flat_map(|of| [&of.down, &of.up]))
        };
        self.blocks.iter().flat_map(of_block).chain([&self.head])
    }

    /// The factors of its adapters.
    pub fn adapter_factors(&mut self) -> impl Iterator<Item = &mut M> {
        self.blocks.iter_mut().flat_map(|Block { time_mix: TimeMix { w, a, v, g, .. }, .. }| {
            let adapters = [Some(w), Some(a), v.as_mut(), Some(g)].into_iter().flatten();
            adapters.flat_map(|of| [&mut of.down, &mut of.up])
        })
    }
}

/// What a sequence leaves behind: all that later tokens can see of it.
#[derive(Clone, Debug, PartialEq)]
pub struct State<R> {
    /// ln1's output at the last token, `[L, D]`.
    pub att_shift: Vec<R>,
    /// WKV matrices, `[L, H, N, N]`: value row, key column.
    pub wkv: Vec<R>,
    /// ln2's output at the last token, `[L, D]`.
    pub ffn_shift: Vec<R>,
}

impl<R: Real> State<R> {
    /// The state before the first token.
    #[must_use]
    pub fn new(config: &ModelConfig) -> Self {
        let shift = vec![R::zero(); config.n_layers * config.width];
        let wkv = vec![R::zero(); config.n_layers * config.wkv_len()];
        Self { att_shift: shift.clone(), wkv, ffn_shift: shift }
    }
}

impl<R: Real, M: Compute<R>> Memory<R, M> for State<R> {
    fn check(&self, config: &ModelConfig) {
        assert_eq!(self.wkv.len(), config.n_layers * config.wkv_len(), "wkv is not [L, H, N, N]");
        for shift in [&self.att_shift, &self.ffn_shift] {
            assert_eq!(shift.len(), config.n_layers * config.width, "shift is not [L, D]");
        }
    }

    fn shift(&mut self, part: Shift, layer: usize, width: usize, rows: &[R]) -> Vec<R> {
        let shifts = match part {
            Shift::Att => &mut self.att_shift,
            Shift::Ffn => &mut self.ffn_shift,
        };
        let kept = &mut shifts[layer * width..][..width];
        let before = kept.to_vec();
        kept.copy_from_slice(&rows[rows.len() - width..]);
        before
    }

    fn keep_shift(&mut self, _: Shift, _: usize, _: usize) {}

    fn keep_wkv(&mut self, _: usize, _: usize) {}

    fn wkv7(form: Wkv, layer: usize, segments: Vec<WkvSegment<'_, R, Self>>) {
        let mut segments: Vec<_> = segments
            .into_iter()
            .map(|WkvSegment { dims, inputs, state, y }| {
                let len = dims.state_len();
                WkvSegment { dims, inputs, state: &mut state.wkv[layer * len..][..len], y }
            })
            .collect();
        M::wkv7(form, &mut segments);
    }
}

/// For which of a segment's tokens the head is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Logits {
    /// None.
    None,
    /// The last one.
    #[default]
    Last,
    /// All of them.
    All,
}

impl Logits {
    /// How many rows of logits `tokens` tokens give.
    #[must_use]
    pub const fn rows(self, tokens: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Last => 1,
            Self::All => tokens,
        }
    }
}

/// Consecutive tokens of one sequence.
#[derive(Debug)]
pub struct Segment<'a, S> {
    /// The tokens, at least one.
    pub tokens: &'a [u32],
    /// Where the sequence stands: a [`Memory`]; moved on by the call.
    pub state: &'a mut S,
    /// Which logits are wanted.
    pub logits: Logits,
}

/// Layers that all tokens of a pass leave out: the residual stream passes through them unchanged, and the layer's WKV
/// matrices stay what they were. What that costs is to be measured; nothing follows from the model's definition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skip<'a> {
    /// Of each layer, whether it is left out; those beyond the end are not. Never layer 0, whose values later layers mix in.
    pub layers: &'a [bool],
    /// What of them.
    pub part: SkipPart,
    /// What becomes of the rows that their shifts remember.
    pub shifts: SkipShifts,
}

/// What of a layer is left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SkipPart {
    /// The channel mix, two thirds of the layer's weights.
    #[default]
    ChannelMix,
    /// Both mixes.
    Layer,
}

/// What the shifts of a mix remember of a token that leaves it out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SkipShifts {
    /// The norm of what passes through.
    #[default]
    Refreshed,
    /// Nothing: the next token's shift sees the last token that did not leave it out.
    Frozen,
}

impl Skip<'_> {
    /// Whether a layer's time mix is left out.
    #[must_use]
    pub fn time_mix(&self, layer: usize) -> bool {
        self.part == SkipPart::Layer && self.channel_mix(layer)
    }

    /// Whether a layer's channel mix is left out.
    #[must_use]
    pub fn channel_mix(&self, layer: usize) -> bool {
        self.layers.get(layer).copied().unwrap_or(false)
    }
}

/// How a forward pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options<'a> {
    /// Form of the state update.
    pub wkv: Wkv,
    /// Whether the channel mix may skip the weights of hidden units that are zero.
    pub skip_zeros: bool,
    /// What is left out.
    pub skip: Skip<'a>,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self { wkv: Wkv::Sequential, skip_zeros: true, skip: Skip::default() }
    }
}

/// Sees the values inside a forward pass.
pub trait Observer<R> {
    /// Called with each named value, `[T, ..]`, and the layer it belongs to.
    fn see(&mut self, layer: usize, name: &'static str, values: &[R]);
}

/// Sees nothing.
impl<R> Observer<R> for () {
    fn see(&mut self, _: usize, _: &'static str, _: &[R]) {}
}

impl<R: Real, M: Compute<R>> Model<R, M> {
    /// Runs the segments side by side and returns the logits asked for, `[rows, V]`, in segment order.
    ///
    /// # Panics
    ///
    /// If a segment is empty, a token is outside the vocabulary, a state or one of the model's own vectors and matrices has
    /// other extents than [`Self::config`] says, or layer 0 is to be left out.
    #[must_use]
    pub fn forward<S: Memory<R, M>>(&self, segments: &mut [Segment<'_, S>], options: Options<'_>) -> Vec<R> {
        self.forward_observed(segments, options, &mut ())
    }

    /// As [`Self::forward`], shown to an observer.
    ///
    /// # Panics
    ///
    /// As [`Self::forward`].
    #[must_use]
    pub fn forward_observed<S: Memory<R, M>>(
        &self,
        segments: &mut [Segment<'_, S>],
        options: Options<'_>,
        observer: &mut (impl Observer<R> + ?Sized),
    ) -> Vec<R> {
        let config = &self.config;
        for s in &*segments {
            assert!(!s.tokens.is_empty(), "an empty segment");
            s.state.check(config);
        }
        let tokens: Vec<u32> = segments.iter().flat_map(|s| s.tokens).copied().collect();
        if tokens.is_empty() {
            return Vec::new();
        }
        assert_eq!(self.blocks.len(), config.n_layers, "blocks are not [L]");
        assert!(!options.skip.time_mix(0), "later layers need the values of layer 0");
        let mut rows = Rows::new(config, tokens.len());
        segments.iter_mut().for_each(|s| s.state.begin(s.tokens.len()));
        self.embed(&tokens, &mut rows.x);
        observer.see(0, "x_embed_ln0", &rows.x);

        for (layer, block) in self.blocks.iter().enumerate() {
            let mut see = |name, values: &[R]| observer.see(layer, name, values);
            if options.skip.time_mix(layer) {
                rows.pass_by::<M, S>(&block.ln1, Shift::Att, layer, options.skip, segments);
                segments.iter_mut().for_each(|s| s.state.keep_wkv(layer, s.tokens.len()));
            } else {
                block.ln1.apply(&rows.x, &mut rows.normed);
                see("ln1", &rows.normed);
                let before = rows_before(segments, Shift::Att, layer, config.width, &rows.normed);
                shift_rows(&before, &block.time_mix.mixes, &rows.normed, &mut rows.mixed);
                block.time_mix.operands(config, layer, &mut rows);
                for (name, values) in [("r", &rows.r), ("lw", &rows.w), ("k", &rows.k), ("v", &rows.v)] {
                    see(name, values);
                }
                for (name, values) in [("neg_kappa", &rows.a), ("kappa_eta", &rows.b), ("gate", &rows.g)] {
                    see(name, values);
                }
                rows.update_state::<M, S>(config, options.wkv, layer, segments);
                see("wkv_y", &rows.y);
                block.time_mix.finish(config, &mut rows);
                see("att_out", &rows.normed);
                add_rows(config, &rows.normed, &mut rows.x);
                see("x_after_att", &rows.x);
            }

            if options.skip.channel_mix(layer) {
                rows.pass_by::<M, S>(&block.ln2, Shift::Ffn, layer, options.skip, segments);
                continue;
            }
            block.ln2.apply(&rows.x, &mut rows.normed);
            see("ln2", &rows.normed);
            let before = rows_before(segments, Shift::Ffn, layer, config.width, &rows.normed);
            shift_rows(&before, &block.channel_mix.mix, &rows.normed, &mut rows.y);
            block.channel_mix.key.apply(&rows.y, &mut rows.hidden);
            rows.hidden
                .par_chunks_mut(config.hidden)
                .with_min_len(ROWS_PER_TASK)
                .for_each(|row| Activation::SquaredRelu.apply(row));
            see("ffn_hidden", &rows.hidden);
            let value = &block.channel_mix.value;
            if options.skip_zeros {
                value.apply_sparse(&rows.hidden, &mut rows.normed);
            } else {
                value.apply(&rows.hidden, &mut rows.normed);
            }
            add_rows(config, &rows.normed, &mut rows.x);
            see("x_after_ffn", &rows.x);
        }
        segments.iter_mut().for_each(|s| s.state.end());
        self.logits(segments, &rows.x)
    }

    fn embed(&self, tokens: &[u32], x: &mut [R]) {
        let (gain, bias) = (&self.ln0.gain, &self.ln0.bias);
        match &self.embedding {
            Elements::F32(table) => embedding::embedding(tokens, table, gain, bias, x),
            Elements::F16(table) => embedding::embedding(tokens, table, gain, bias, x),
            Elements::BF16(table) => embedding::embedding(tokens, table, gain, bias, x),
        }
    }

    fn logits<S>(&self, segments: &[Segment<'_, S>], x: &[R]) -> Vec<R> {
        let width = self.config.width;
        let (mut wanted, mut end) = (Vec::new(), 0);
        for s in segments {
            end += s.tokens.len();
            wanted.extend_from_slice(&x[(end - s.logits.rows(s.tokens.len())) * width..end * width]);
        }
        let mut logits = vec![R::zero(); wanted.len() / width * self.config.vocab];
        head(&self.head, &self.ln_out.gain, &self.ln_out.bias, &wanted, &mut logits);
        logits
    }
}

/// The values of all rows of a pass, `[T, D]` where nothing else is said. Allocated once, used by every layer.
struct Rows<R> {
    /// Residual stream.
    x: Vec<R>,
    /// Output of the last norm or of the last mix.
    normed: Vec<R>,
    /// Token-shifted, `[6, T, D]`.
    mixed: Vec<R>,
    r: Vec<R>,
    /// `wl`, then `lw`.
    w: Vec<R>,
    /// `k0`, then `k`.
    k: Vec<R>,
    v: Vec<R>,
    /// Layer 0's `v`.
    v_first: Vec<R>,
    /// `al`, then `eta`, then the removal direction.
    a: Vec<R>,
    /// kappa, then the replacement direction.
    b: Vec<R>,
    g: Vec<R>,
    /// Output of the value residual adapter, of the state update, then the shifted rows of the channel mix.
    y: Vec<R>,
    /// Hidden units, `[T, F]`.
    hidden: Vec<R>,
}

impl<R: Real> Rows<R> {
    fn new(config: &ModelConfig, tokens: usize) -> Self {
        let rows = |width: usize| vec![R::zero(); tokens * width];
        let d = config.width;
        Self {
            x: rows(d),
            normed: rows(d),
            mixed: rows(6 * d),
            r: rows(d),
            w: rows(d),
            k: rows(d),
            v: rows(d),
            v_first: rows(d),
            a: rows(d),
            b: rows(d),
            g: rows(d),
            y: rows(d),
            hidden: rows(config.hidden),
        }
    }

    /// What is left of a mix that is left out: what its shift remembers.
    fn pass_by<M: Compute<R>, S: Memory<R, M>>(
        &mut self,
        norm: &Norm<R>,
        part: Shift,
        layer: usize,
        skip: Skip<'_>,
        segments: &mut [Segment<'_, S>],
    ) {
        let width = norm.gain.len();
        match skip.shifts {
            SkipShifts::Refreshed => {
                norm.apply(&self.x, &mut self.normed);
                let mut rest = self.normed.as_slice();
                for Segment { tokens, state, .. } in segments {
                    let (own, others) = rest.split_at(tokens.len() * width);
                    state.shift(part, layer, width, own);
                    rest = others;
                }
            }
            SkipShifts::Frozen => segments.iter_mut().for_each(|s| s.state.keep_shift(part, layer, width)),
        }
    }

    fn update_state<M: Compute<R>, S: Memory<R, M>>(
        &mut self,
        config: &ModelConfig,
        form: Wkv,
        layer: usize,
        segments: &mut [Segment<'_, S>],
    ) {
        let (mut y, mut start) = (self.y.as_mut_slice(), 0);
        let mut updates = Vec::new();
        for Segment { tokens, state, .. } in segments {
            let (mine, rest) = y.split_at_mut(tokens.len() * config.width);
            let at = start..start + mine.len();
            (y, start) = (rest, at.end);
            let dims =
                wkv7::Dims { tokens: tokens.len(), heads: config.n_heads, head_size: config.head_size };
            let inputs = wkv7::Inputs {
                r: &self.r[at.clone()],
                lw: &self.w[at.clone()],
                k: &self.k[at.clone()],
                v: &self.v[at.clone()],
                a: &self.a[at.clone()],
                b: &self.b[at],
            };
            updates.push(WkvSegment { dims, inputs, state: &mut **state, y: mine });
        }
        S::wkv7(form, layer, updates);
    }
}

impl<R: Real, M: Compute<R>> TimeMix<R, M> {
    /// From the shifted rows to the operands of the state update, and the gate.
    fn operands(&self, config: &ModelConfig, layer: usize, rows: &mut Rows<R>) {
        let len = rows.x.len();
        let mixed = |m: usize| &rows.mixed[m * len..][..len];
        let [xr, xw, xk, xv, xa, xg] = [0, 1, 2, 3, 4, 5].map(mixed);

        let low = |adapter: &Adapter<R, M>| vec![R::zero(); len / config.width * adapter.down.outputs()];
        let (mut lw, mut la, mut lg) = (low(&self.w), low(&self.a), low(&self.g));
        let mut lv = self.v.as_ref().map(low).unwrap_or_default();
        let mut jobs = vec![
            Job { layer: &self.receptance, x: xr, y: &mut rows.r },
            Job { layer: &self.key, x: xk, y: &mut rows.k },
            Job { layer: &self.value, x: xv, y: &mut rows.v },
            Job { layer: &self.w.down, x: xw, y: &mut lw },
            Job { layer: &self.a.down, x: xa, y: &mut la },
            Job { layer: &self.g.down, x: xg, y: &mut lg },
        ];
        if let Some(v) = &self.v {
            jobs.push(Job { layer: &v.down, x: xv, y: &mut lv });
        }
        M::apply_all(&mut jobs);

        let activate = |activation: Activation, low: &mut [R], adapter: &Adapter<R, M>| {
            let rows = low.par_chunks_mut(adapter.down.outputs()).with_min_len(ROWS_PER_TASK);
            rows.for_each(|row| activation.apply(row));
        };
        activate(Activation::Tanh, &mut lw, &self.w);
        activate(Activation::Sigmoid, &mut lg, &self.g);
        let mut jobs = vec![
            Job { layer: &self.w.up, x: &lw, y: &mut rows.w },
            Job { layer: &self.a.up, x: &la, y: &mut rows.a },
            Job { layer: &self.g.up, x: &lg, y: &mut rows.g },
        ];
        if let Some(v) = &self.v {
            jobs.push(Job { layer: &v.up, x: &lv, y: &mut rows.y });
        }
        M::apply_all(&mut jobs);

        let Rows { w, k, v, v_first, a, b, y, .. } = rows;
        if layer == 0 {
            v_first.copy_from_slice(v);
        }
        let d = config.width;
        let keys = (w.par_chunks_mut(d), k.par_chunks_mut(d), a.par_chunks_mut(d), b.par_chunks_mut(d));
        let values = (v.par_chunks_mut(d), v_first.par_chunks(d), y.par_chunks_mut(d));
        keys.into_par_iter().zip(values.into_par_iter()).with_min_len(ROWS_PER_TASK).for_each(
            |((w, k, a, b), (v, v_first, vl))| {
                add(&self.w.bias, w);
                decay::log_decay(w);
                add(&self.a.bias, a);
                learning_rate::learning_rate(a);
                if let Some(adapter) = &self.v {
                    add(&adapter.bias, vl);
                    value_residual::value_residual(v_first, vl, v);
                }
                kappa::kappa(config.head_size, k, &self.k_k, b);
                learning_rate::modulate_key(a, &self.k_a, k);
                learning_rate::directions(a, b);
            },
        );
    }

    /// From the state update's output to the mix's output, in `rows.normed`.
    fn finish(&self, config: &ModelConfig, rows: &mut Rows<R>) {
        let d = config.width;
        let operands =
            (rows.y.par_chunks(d), rows.r.par_chunks(d), rows.k.par_chunks(d), rows.v.par_chunks(d));
        let out = (rows.normed.par_chunks_mut(d), rows.g.par_chunks_mut(d));
        operands.into_par_iter().zip(out.into_par_iter()).with_min_len(ROWS_PER_TASK).for_each(
            |((y, r, k, v), (out, gate))| {
                let (gain, bias, r_k) = (&self.norm.gain, &self.norm.bias, &self.r_k);
                let x = readout::Inputs { y, r, k, v, gate, gain, bias, r_k };
                readout::readout(config.head_size, x, out);
            },
        );
        // y is done with: the gated readout takes its place, so that the projection can write to `normed`
        std::mem::swap(&mut rows.y, &mut rows.normed);
        self.output.apply(&rows.y, &mut rows.normed);
    }
}

/// For each row of `x` `[T, D]`, packed by segments, the one before it in its sequence; the segments remember theirs.
fn rows_before<R: Real, M: Compute<R>, S: Memory<R, M>>(
    segments: &mut [Segment<'_, S>],
    part: Shift,
    layer: usize,
    width: usize,
    x: &[R],
) -> Vec<R> {
    let (mut before, mut rest) = (Vec::with_capacity(x.len()), x);
    for Segment { tokens, state, .. } in segments {
        let (own, others) = rest.split_at(tokens.len() * width);
        before.extend(state.shift(part, layer, width, own));
        before.extend_from_slice(&own[..own.len() - width]);
        rest = others;
    }
    before
}

/// Token shift: `x` `[T, D]`, and the rows before, by each of `mixes` `[M, D]` into `out` `[M, T, D]`.
fn shift_rows<R: Real>(before: &[R], mixes: &[R], x: &[R], out: &mut [R]) {
    let width = mixes.len() / (out.len() / x.len());
    for (mix, out) in mixes.chunks_exact(width).zip(out.chunks_exact_mut(x.len())) {
        out.par_chunks_exact_mut(width)
            .zip(x.par_chunks_exact(width))
            .zip(before.par_chunks_exact(width))
            .with_min_len(ROWS_PER_TASK)
            .for_each(|((out, x), before)| token_shift::lerp(x, before, mix, out));
    }
}

/// Adds `x` to `y`, both `[T, D]`.
fn add_rows<R: Real>(config: &ModelConfig, x: &[R], y: &mut [R]) {
    let rows = x.par_chunks(config.width).zip(y.par_chunks_mut(config.width)).with_min_len(ROWS_PER_TASK);
    rows.for_each(|(x, y)| add(x, y));
}
