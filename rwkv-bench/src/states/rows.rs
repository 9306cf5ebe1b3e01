//! The ways to hold a state whose price is measured.

use rwkv_core::ops::wkv7_lazy::ENTRY;
use rwkv_model::quality::Rest;
use rwkv_model::{ModelConfig, Resident, ResidentRounding, StateFormat, StateLayout};
use rwkv_state::base::head_words;
use rwkv_state::format::{SparseRule, bytes};

/// Windows longer than this are of few rows unless rows are named.
const LONG: usize = 8192;

/// A way to hold a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) name: String,
    /// While sequences run.
    pub(crate) state: Resident,
    /// On the way.
    pub(crate) rest: Option<Rest>,
}

/// What the others are compared with.
pub(crate) const PLAIN: &str = "f32";

/// All rows.
pub(crate) fn all() -> Vec<Row> {
    let row = |name: &str, state| Row { name: name.to_owned(), state, rest: None };
    let each = |name: &str, rounding| row(name, Resident { rounding, ..Resident::f16(0) });
    let mut rows = vec![
        row(PLAIN, Resident::default()),
        row("f32-c8", Resident::lazy(8)),
        row("f16-c8", Resident::f16(8)),
        row("f16-c16", Resident::f16(16)),
        row("f16-c32", Resident::f16(32)),
        each("f16-nearest", ResidentRounding::Nearest),
        each("f16-stochastic", ResidentRounding::Stochastic { seed: 0 }),
        each("f16-dither", ResidentRounding::Dither),
        each("f16-decay-dither", ResidentRounding::DecayDither),
        row("int8-c16", Resident::int8(16)),
        row("int8-c32", Resident::int8(32)),
    ];
    for (name, format) in at_rest() {
        for every in [1, 64, 512] {
            let rest = Some(Rest { format, every });
            rows.push(Row { name: format!("{name}-{every}"), state: Resident::default(), rest });
        }
    }
    rows
}

/// The formats at rest.
pub(crate) fn at_rest() -> [(&'static str, StateFormat); 4] {
    [
        ("rest-f16", StateFormat::F16),
        ("rest-int8", StateFormat::Int8Scaled),
        ("rest-sparse", StateFormat::Sparse(SparseRule::default())),
        ("rest-top16", StateFormat::Sparse(SparseRule::TopK { k: 16 })),
    ]
}

/// Whether a name is among those asked for: it, or what it begins with up to a hyphen.
pub(crate) fn named(name: &str, among: &[String]) -> bool {
    among
        .iter()
        .any(|of| name.strip_prefix(of.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('-')))
}

impl Row {
    /// Whether it is measured in windows of this length.
    pub(crate) fn wanted(&self, window: usize, names: &[String]) -> bool {
        if !names.is_empty() {
            return named(&self.name, names);
        }
        window <= LONG || [PLAIN, "f16-c16", "int8-c16", "int8-c32"].contains(&self.name.as_str())
    }
}

/// Bytes of a state: at rest; or while it runs, written and, at most, pending.
pub(crate) fn held_bytes(config: &ModelConfig, state: Resident, rest: Option<Rest>) -> (usize, usize) {
    if let Some(Rest { format, .. }) = rest {
        return (bytes(&StateLayout::new(config), format), 0);
    }
    let ModelConfig { n_layers, n_heads, head_size, width, .. } = *config;
    let (heads, shifts) = (n_layers * n_heads, 2 * n_layers * width);
    let written = heads * head_words(state.format, head_size) + shifts;
    let token = heads * ENTRY * head_size + shifts;
    (4 * written, 4 * token * state.capacity)
}
