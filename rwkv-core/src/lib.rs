//! The CPU reference: the definition of every RWKV-7 operation, and the CPU executor that is tested against it.
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`] | every extent of a model, named once |
//! | [`real`] | what operations compute in, and what weights are stored in |
//! | [`ops`] | one file per operation: the formula, then plain loops, in `f32` or `f64` |
//! | [`fast`] | those that take most of the time, vectorised and threaded, tested against [`ops`] |
//! | [`model`] | the v7 forward pass over them: packed segments, sequential or by chunks, from any state |
//! | [`quant`] | weights of matrices in blocks of a byte or half a byte each |
//! | [`compare`] | how two float buffers are compared |
//! | [`rng`] | counter-based randomness: `SplitMix64` for drawing tests, Philox for sampling |
//!
//! Invariant: no operation here knows a file, a device or a clock. When a GPU kernel and this crate
//! disagree, this crate is the definition.
//!
//! A new operation is a file of [`ops`], with tests of its laws; where it is slow, a file of the same name in [`fast`],
//! with a test that the two agree.
//!
//! Invariant: a result does not depend on the number of threads, and a row's result does not depend on
//! the other rows of the call.
#![forbid(unsafe_code)]

pub mod compare;
pub mod config;
pub mod fast;
pub mod model;
pub mod ops;
pub mod quant;
pub mod real;
pub mod rng;

pub use config::ModelConfig;
pub use real::{ElementType, Elements, Real, Weight};
