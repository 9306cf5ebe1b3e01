//! The CPU reference: the definition of every RWKV-7 operation.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | every extent of a model, named once |
//! | [`ops`] | one file per operation: the formula, then plain loops, in `f32` or `f64` |
//! | [`fast`] | the same operations for the CPU executor, vectorised and threaded, tested against [`ops`] |
//! | [`model`] | the v7 forward pass over them: packed segments, sequential or by chunks, from any state |
//! | [`compare`] | how two float buffers are compared |
//! | [`rng`] | counter-based randomness: `SplitMix64` for drawing tests, Philox for sampling |
//!
//! Invariant: no operation here knows a file, a device or a clock. When a GPU kernel and this crate
//! disagree, this crate is the definition.
//!
//! Invariant: a result does not depend on the number of threads, and a row's result does not depend on
//! the other rows of the call.
#![forbid(unsafe_code)]

pub mod compare;
pub mod config;
pub mod fast;
pub mod model;
pub mod ops;
pub mod real;
pub mod rng;

pub use config::ModelConfig;
pub use real::{Elements, Real, Weight};
