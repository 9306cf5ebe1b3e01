//! RWKV-7 models: checkpoints, an engine, sessions, sampling.
//!
//! ```no_run
//! use rwkv_model::{Engine, Sampler};
//!
//! # fn main() -> Result<(), rwkv_model::Error> {
//! let engine = Engine::open("model.safetensors")?; // the content tells the format
//! let mut session = engine.session();
//! session.prefill(&engine.tokenizer()?.encode("The Eiffel Tower"))?;
//! let mut branch = session.fork(); // goes its own way from here
//! for token in session.generate(Sampler::default()).take(100) {
//!     println!("{}", token?);
//! }
//! branch.step(42)?;
//! engine.step(&mut [(&mut session, &[1, 2, 3]), (&mut branch, &[4])])?; // side by side
//! # Ok(())
//! # }
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`checkpoint`] | files of several formats and dialects, every tensor checked, to a model |
//! | [`engine`] | [`Engine`]: a model, ready to run any number of sessions |
//! | [`gpu`] | the GPU executor: what can go wrong there, and what it measures |
//! | [`session`] | [`Session`]: one sequence and what it remembers |
//! | [`text`] | a session's tokens as text, up to a stop sequence |
//! | [`sample`] | [`Sampler`]: from logits to the next token |
//! | [`store`] | where sessions are kept to move between machines: [`Session::save_to`], [`Engine::load_from`] |
//! | [`scheduler`] | many requests side by side, packed into passes |
//! | [`tokenizer`] | text to tokens and back |
//! | [`recipe`] | which matrices are quantised, and how |
//! | [`quality`] | how well a model predicts a text |
//! | [`skip`] | layers that are left out at some tokens |
//!
//! A new container goes into [`checkpoint::directory`], a new dialect of names into `checkpoint/names.rs`, a new vocabulary
//! into [`tokenizer`]. What this crate never does: train, serve, or run another architecture than RWKV-7.
//!
//! Invariant: the same call on the same device gives the same bits. On the CPU, and on a GPU with
//! [`EngineOptions::batch_invariant`], a session's results do not depend on the sessions beside it, on how its tokens were
//! split over calls, nor on the number of threads; on a GPU without, they agree but for rounding. Where layers are left out
//! at decoded tokens alone, [`skip`] says which those are, and chunks ([`EngineOptions::wkv`]) sum in their own order.
//!
//! Invariant: what a caller or a file gets wrong is a typed error, and leaves every session as it was.

pub mod checkpoint;
pub mod engine;
pub mod gpu;
pub mod quality;
pub mod recipe;
pub mod scheduler;
pub mod session;
pub mod skip;
pub mod text;
pub mod tokenizer;

pub use checkpoint::Checkpoint;
pub use engine::{Engine, EngineOptions, Error};
pub use recipe::{Recipe, WeightFormat};
pub use session::{Session, Snapshot};
pub use text::{FinishReason, TextOptions};
pub use tokenizer::Tokenizer;

pub use rwkv_core::ModelConfig;
pub use rwkv_core::model::{SkipPart, SkipShifts, Wkv};
pub use rwkv_core::ops::sample::{self, Sampler};
pub use rwkv_state::store::{self, StateStore};
pub use rwkv_state::{Resident, ResidentRounding, StateFormat, StateLayout};

/// The code in the README compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
