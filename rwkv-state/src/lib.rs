//! The state of an RWKV-7 sequence as data.
//!
//! A transformer's cache grows with its context; this state is small, of constant size, and all that a model knows of
//! what it has read. [`StateLayout`] names every part of it and where each lies in the canonical order, in which states
//! are exchanged: between executors, and out of the process.
//!
//! | module | what it holds |
//! |---|---|
//! | [`layout`] | the extents of a state and the place of each part of it |
//! | [`format`](mod@format) | how a state is stored: F32, F16 with row exponents, scaled Int8, sparse; each with its error bound |
//! | [`resident`] | what states are held in while sequences run, and a state held so |
//! | [`base`] | WKV matrices in such a format, shared by forks |
//! | [`lazy`] | a state of which the last steps are kept as factors: deferred writing, shared bases, exact rollback |
//! | [`snapshot`] | a file of a session's state, whose it is, and how far it has read |
//! | [`store`] | snapshots under keys: in memory within a bound, or (features) in a directory, S3, Google Cloud Storage, Azure |
//!
//! ```
//! # use rwkv_core::ModelConfig;
//! # use rwkv_core::config::Ranks;
//! use rwkv_state::store::{Error, MemoryStore, StateStore};
//! use rwkv_state::{EncodedState, Snapshot, StateFormat, StateLayout};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let ranks = Ranks { w: 1, a: 1, v: 1, g: 1 };
//! # let config = ModelConfig { n_layers: 2, width: 8, n_heads: 2, head_size: 4, hidden: 1, vocab: 1, ranks };
//! let layout = StateLayout::new(&config);
//! let snapshot = Snapshot {
//!     model: "76c1097331fac87e".to_owned(),
//!     tokenizer: None,
//!     position: 27,
//!     state: EncodedState::encode(&layout, &vec![0.5; layout.len()], StateFormat::F16)?,
//!     counts: [(3, 1)].into(),
//!     logits: None,
//! };
//! let store = MemoryStore::new(64 << 20); // or an `ObjectStore`: all take a `&dyn StateStore`
//! store.put("user-17", &snapshot)?;
//! assert_eq!(store.get("user-17")?, snapshot);
//! assert!(matches!(store.get("user-18"), Err(Error::Missing { .. })));
//! # Ok(())
//! # }
//! ```
//!
//! A new format is a file of [`format`](mod@format) with its bound and its property tests; a new part of a state is a
//! [`Part`], and the layout alone says where it lies.
//!
//! Invariant: this crate knows no device and no weights; it knows extents and numbers; [`snapshot`] and [`store`] alone
//! know files.
#![forbid(unsafe_code)]

pub mod base;
pub mod format;
pub mod layout;
pub mod lazy;
mod replace;
pub mod resident;
pub mod snapshot;
pub mod store;

pub use format::{EncodedState, StateFormat};
pub use layout::{Part, StateLayout, WrongLength};
pub use replace::replace;
pub use resident::{Resident, ResidentRounding, ResidentState};
pub use snapshot::Snapshot;
pub use store::StateStore;
