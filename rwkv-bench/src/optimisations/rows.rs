//! The optimisations: what was promised of each (the project's forecasts), what is compared with what, and what is to be
//! said of it.

use rwkv_core::model::SkipPart;
use rwkv_model::quality::Rest;
use rwkv_model::skip::{Contribution, LayerCost, Middle, Skipping};
use rwkv_model::{EngineOptions, Recipe, Resident, StateFormat, WeightFormat, Wkv};
use rwkv_state::format::SparseRule;

/// An optimisation.
pub(super) struct Row {
    pub(super) name: &'static str,
    pub(super) title: &'static str,
    /// Speed and quality.
    pub(super) promised: [&'static str; 2],
    /// The devices that have both ways, or why others have not.
    pub(super) on: On,
    /// The engine without it.
    pub(super) without: Way,
    /// The engine with it.
    pub(super) with: Way,
    /// How far its logits may be off from the reference's beyond rounding, as a mean square.
    pub(super) limit: f64,
    /// What is to be said where it is told apart from nothing, and where it is not.
    pub(super) said: &'static str,
}

/// Where a row is measured.
#[derive(Clone, Copy)]
pub(super) enum On {
    Both,
    Cpu(&'static str),
    Gpu(&'static str),
}

/// A way to run the engine.
#[derive(Clone, Copy)]
pub(super) enum Way {
    /// As it is by default.
    Plain,
    /// With other options.
    Options(fn(&mut EngineOptions)),
    /// With layers left out, of which one knows what each costs.
    Skip(fn(&[LayerCost]) -> Skipping),
    /// With states that rest on the way.
    Rest(Rest),
}

impl Row {
    /// Whether it is of states at rest: its load is another.
    pub(super) const fn at_rest(&self) -> bool {
        matches!(self.with, Way::Rest(_))
    }

    /// Whether only calls of one token run otherwise with it: what it costs is not told by a text that is a prompt.
    pub(super) fn is_of_single_tokens(&self) -> bool {
        [NORM, ZEROS].contains(&self.name)
    }

    /// Whether it needs to know what layers cost.
    pub(super) fn needs_costs(&self) -> bool {
        self.name == LEAST
    }
}

/// The row that leaves out the layers that are missed least.
const LEAST: &str = "skip-least";

/// The rows of what prompts do not do, on a GPU or at all.
const NORM: &str = "norm";
const ZEROS: &str = "ffn-sparsity";

/// Layers left out where prompts do too, so that the text, which is a prompt, tells what that costs.
fn skip(part: SkipPart, first_tokens: Option<u64>) -> Skipping {
    Skipping { part, prefill: true, ..Skipping::new(Middle { first_tokens }) }
}

const NO_PROMISE: [&str; 2] = ["", ""];

/// What halves and bytes round of a state moves the logits by, at most, as a mean square; other orders of sums do nothing.
const HALVES: f64 = 1e-5;
const BYTES: f64 = 1e-3;
/// Entries below 2 % of their row's largest are zero.
const SPARSE: f64 = 1e-3;
const EXACT: f64 = 0.0;

pub(super) fn all() -> Vec<Row> {
    vec![
        Row {
            name: "fused",
            title: "fused kernels against one per operation",
            promised: ["+15 %", "0"],
            on: On::Gpu("the CPU has one form of each operation"),
            without: Way::Options(|options| options.fused = false),
            with: Way::Plain,
            limit: EXACT,
            said: "The unfused form has 31 dispatches a layer and one sequence a pass: what fusion saves is mostly dispatches.",
        },
        Row {
            name: NORM,
            title: "group norm, bonus and gate in the heads' kernel, against a dispatch of their own",
            promised: NO_PROMISE,
            on: On::Gpu("the CPU has it apart in any case"),
            without: Way::Options(|options| options.fused_norm = false),
            with: Way::Plain,
            limit: EXACT,
            said: "One dispatch of six a layer at batch 1. Prompts have it apart in any case. Bits per byte of the beginning of the text, token by token.",
        },
        Row {
            name: "f16-state",
            title: "F16 state, written every 16 tokens",
            promised: ["+10 %", "-2 %"],
            on: On::Both,
            without: Way::Plain,
            with: Way::Options(|options| options.state = Resident::f16(16)),
            limit: HALVES,
            said: "At batch 1 the state is a small part of what a step reads; it pays in room, and in speed only where states outweigh weights.",
        },
        Row {
            name: "int8-state",
            title: "Int8 state, written every 16 tokens",
            promised: NO_PROMISE,
            on: On::Both,
            without: Way::Plain,
            with: Way::Options(|options| options.state = Resident::int8(16)),
            limit: BYTES,
            said: "As F16, with half the bytes and more arithmetic.",
        },
        Row {
            name: "lazy",
            title: "lazy state, written every 8 tokens",
            promised: ["+5 %", "0"],
            on: On::Both,
            without: Way::Plain,
            with: Way::Options(|options| options.state = Resident::lazy(8)),
            limit: EXACT,
            said: "A pending token costs sums over its vectors at every later one, which outweighs the writes that it saves; what it brings is undoing tokens and sharing states.",
        },
        Row {
            name: "int8-weights",
            title: "weights of the layers in blocks of 8 bits",
            promised: NO_PROMISE,
            on: On::Both,
            without: Way::Plain,
            with: Way::Options(|options| options.weights = Recipe::layers(WeightFormat::Int8)),
            limit: EXACT,
            said: "Checked against the reference of the same decoded weights; `weights` has what other recipes cost.",
        },
        Row {
            name: "int4-weights",
            title: "weights of the layers in blocks of 4 bits",
            promised: NO_PROMISE,
            on: On::Both,
            without: Way::Plain,
            with: Way::Options(|options| options.weights = Recipe::layers(WeightFormat::Int4)),
            limit: EXACT,
            said: "As in 8 bits, of about half as many bytes.",
        },
        chunked("chunked-16", "chunked prefill, 16 tokens", |options| options.wkv = Some(Wkv::Chunked(16))),
        chunked("chunked-32", "chunked prefill, 32 tokens", |options| options.wkv = Some(Wkv::Chunked(32))),
        chunked("chunked-64", "chunked prefill, 64 tokens", |options| options.wkv = Some(Wkv::Chunked(64))),
        Row {
            name: "skip-founding",
            title: "layer skipping, the founding rule: middle layers, first 10 tokens",
            promised: ["+30 %", "-5 %"],
            on: On::Both,
            without: Way::Plain,
            with: Way::Skip(|_| skip(SkipPart::Layer, Some(10))),
            limit: EXACT,
            said: "Ten tokens of a sequence are over before it generates: no later token is faster, and the prompt's first ones are worse.",
        },
        Row {
            name: "skip-middle",
            title: "layer skipping, middle layers at every token",
            promised: ["+30 %", "-5 %"],
            on: On::Both,
            without: Way::Plain,
            with: Way::Skip(|_| skip(SkipPart::Layer, None)),
            limit: EXACT,
            said: "The speed is had, of weights that are not read; the quality is not: a trained layer is no ornament.",
        },
        Row {
            name: "skip-ffn",
            title: "layer skipping, channel mixes of the middle layers at every token",
            promised: ["+30 %", "-5 %"],
            on: On::Both,
            without: Way::Plain,
            with: Way::Skip(|_| skip(SkipPart::ChannelMix, None)),
            limit: EXACT,
            said: "Two thirds of a layer's weights at a lower price, since the states see every token.",
        },
        Row {
            name: LEAST,
            title: "layer skipping, the eighth of the layers that is missed least, at every token",
            promised: ["+30 %", "-5 %"],
            on: On::Both,
            without: Way::Plain,
            with: Way::Skip(|costs| {
                let policy = Contribution { costs: costs.to_vec(), share: 0.125 };
                Skipping { prefill: true, ..Skipping::new(policy) }
            }),
            limit: EXACT,
            said: "The layers are ranked on the beginning of the text, each by what it costs alone.",
        },
        Row {
            name: "sparse-rest",
            title: "sparse state at rest, every 512 tokens (against F32 at rest)",
            promised: NO_PROMISE,
            on: On::Both,
            without: Way::Rest(Rest { format: StateFormat::F32, every: 512 }),
            with: Way::Rest(Rest { format: StateFormat::Sparse(SparseRule::default()), every: 512 }),
            limit: SPARSE,
            said: "Int8 at rest is smaller and nearer: `states` compares them.",
        },
        Row {
            name: ZEROS,
            title: "weights of channel-mix units that are zero are not read",
            promised: NO_PROMISE,
            on: On::Both,
            without: Way::Options(|options| options.skip_zeros = false),
            with: Way::Plain,
            limit: EXACT,
            said: "Exact: what is left out is multiplied by zero. It pays where weights take most of a step, as they do not of a small model on a GPU. There, passes over several rows read all of them either way. Bits per byte of the beginning of the text, token by token.",
        },
        Row {
            name: "f16-adapters",
            title: "adapters in F16 against F32",
            promised: ["", "0"],
            on: On::Cpu("adapters are stacked with the projections, which are halves"),
            without: Way::Options(|options| options.wide_adapters = true),
            with: Way::Plain,
            limit: EXACT,
            said: "As the file has them, if that is in halves. The same products of the same weights, read in half the bytes.",
        },
    ]
}

fn chunked(name: &'static str, title: &'static str, with: fn(&mut EngineOptions)) -> Row {
    Row {
        name,
        title,
        promised: ["+20 % prefill", "0"],
        on: On::Both,
        without: Way::Options(|options| options.wkv = Some(Wkv::Sequential)),
        with: Way::Options(with),
        limit: EXACT,
        said: "Chunks are more arithmetic in a shorter chain: of use where few heads leave a device waiting for the token before. Heads and sequences give a CPU enough to do, where chunks are plain loops beside the vectors of the form token by token.",
    }
}
