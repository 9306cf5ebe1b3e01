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
//!
//! A new format is a file of [`format`](mod@format) with its bound and its property tests; a new part of a state is a
//! [`Part`], and the layout alone says where it lies.
//!
//! Invariant: this crate knows no device and no weights; it knows extents and numbers, and [`snapshot`] alone knows files.
#![forbid(unsafe_code)]

pub mod base;
pub mod format;
pub mod layout;
pub mod lazy;
pub mod resident;
pub mod snapshot;

pub use format::{EncodedState, StateFormat};
pub use layout::{Part, StateLayout, WrongLength};
pub use resident::{Resident, ResidentRounding, ResidentState};
pub use snapshot::Snapshot;
