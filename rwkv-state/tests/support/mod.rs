//! What the tests share: layouts, random states, and snapshots of them.
#![allow(
    clippy::allow_attributes,
    dead_code,
    reason = "each test binary uses its part, and none may use all"
)]

use rwkv_core::ModelConfig;
use rwkv_core::config::Ranks;
use rwkv_core::rng::SplitMix64;
use rwkv_state::format::SparseRule;
use rwkv_state::snapshot::MAX_POSITION;
use rwkv_state::{EncodedState, Snapshot, StateFormat, StateLayout};

pub(crate) const FORMATS: [StateFormat; 4] = [
    StateFormat::F32,
    StateFormat::F16,
    StateFormat::Int8Scaled,
    // The default rule, which is what a loaded state has.
    StateFormat::Sparse(SparseRule::Threshold { per_mille: 20 }),
];

pub(crate) fn layout(n_layers: usize, n_heads: usize, head_size: usize) -> StateLayout {
    let ranks = Ranks { w: 1, a: 1, v: 1, g: 1 };
    let width = n_heads * head_size;
    StateLayout::new(&ModelConfig { n_layers, width, n_heads, head_size, hidden: 1, vocab: 1, ranks })
}

pub(crate) fn draw(layout: &StateLayout, seed: u64) -> Vec<f32> {
    let mut rng = SplitMix64::new(seed);
    (0..layout.len()).map(|_| rng.normal()).collect()
}

pub(crate) fn snapshot(layout: &StateLayout, format: StateFormat, seed: u64) -> Snapshot {
    Snapshot {
        model: "0123456789abcdef".to_owned(),
        tokenizer: Some("words \"and\" \u{e9}".to_owned()),
        position: MAX_POSITION,
        state: EncodedState::encode(layout, &draw(layout, seed), format).unwrap(),
        counts: [(0, 1), (7, u32::MAX), (u32::MAX, 2)].into(),
        logits: Some(vec![0.25, -0.0, f32::MIN, f32::INFINITY]),
    }
}

/// Bytes of the header with its length.
pub(crate) fn header_len(file: &[u8]) -> usize {
    8 + usize::try_from(u64::from_le_bytes(file[..8].try_into().unwrap())).unwrap()
}

/// The file with other bytes for a header, which does not change what lies behind it.
pub(crate) fn with_header(file: &[u8], header: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, &file[header_len(file)..]].concat()
}
