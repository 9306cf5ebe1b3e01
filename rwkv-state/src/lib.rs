//! The state of an RWKV-7 sequence as data.
//!
//! A transformer's cache grows with its context; this state is small, of constant size, and all that a model knows of
//! what it has read. [`StateLayout`] names every part of it and where each lies in the canonical order, in which states
//! are exchanged: between executors, and out of the process.
//!
//! Invariant: this crate knows no device and no model; it knows extents.
#![forbid(unsafe_code)]

pub mod layout;

pub use layout::{Part, StateLayout};
