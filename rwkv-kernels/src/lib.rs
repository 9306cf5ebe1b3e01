//! The GPU kernels of RWKV-7: WGSL sources, validated and reflected when the crate is built.
//!
//! | part | what it holds |
//! |---|---|
//! | [`kernels`] | one folder per kernel: its WGSL, its bindings, its lowering |
//! | [`Binding`], [`Access`] | what a kernel expects in group 0, as reflected from its WGSL |
//! | `gpu` | a device, pipelines and checked dispatches (feature `gpu`, on by default) |
//!
//! A kernel is data: a source, a list of bindings, and `lower(dims)`, which turns the extents of one call
//! into the uniform block and the workgroup count. What runs it is the caller's choice; `gpu` is one.
//!
//! ```
//! use rwkv_core::ops::wkv7::Dims;
//! use rwkv_kernels::kernels::wkv7;
//!
//! let (params, groups) = wkv7::lower(Dims { tokens: 3, heads: 12, head_size: 64 })?;
//! assert_eq!((params.tokens, groups), (3, [12, 1, 1]));
//! assert!(wkv7::SOURCE.contains("fn wkv7("));
//! assert_eq!(wkv7::BINDINGS[0].name, "params");
//! # Ok::<(), wkv7::Error>(())
//! ```
//!
//! # What it never does
//!
//! - A kernel never owns a device, a buffer or a queue, and never asks what it runs on.
//! - A kernel never defines an operation: its twin, the module of the same name in [`rwkv_core::ops`], does.
//!   When the two disagree, the kernel is wrong.
//! - No broken shader gets past the build: `build.rs` parses and validates each one, holds it to the default
//!   limits of WebGPU, and fails with its path, line and column.
//! - No binding is written twice: layouts are built from `BINDINGS`, uniform blocks are `Params`, and both are
//!   reflected from the WGSL.
//!
//! # Adding a kernel `foo`
//!
//! 1. Define the operation in `rwkv-core/src/ops/foo.rs`.
//! 2. Make the folder `src/kernels/foo/` with `foo.wgsl`, whose first line names the twin, whose entry point is
//!    `foo`, and whose uniform, if any, is of a struct `Params` of `u32` and `f32` fields.
//! 3. In its `mod.rs`, re-export `crate::reflected::foo` and write
//!    `lower(dims) -> Result<(Params, [u32; 3]), Error>`; add the module to `kernels/mod.rs`.
//! 4. In its `tests.rs`, draw operands from the operation's domain, poison the outputs with NaN, and compare with
//!    the twin within a limit that an error analysis gives. Break the kernel once and see the test fail.

#[cfg(feature = "gpu")]
pub mod gpu;
pub mod kernels;

/// How a kernel uses a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A uniform block.
    Uniform,
    /// A storage buffer that is only read.
    Read,
    /// A storage buffer that is read and written.
    ReadWrite,
}

/// One binding of group 0; its number is its place in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Binding {
    /// The variable's name in the WGSL.
    pub name: &'static str,
    /// How it is used.
    pub access: Access,
}

mod reflected {
    //! What `build.rs` reflected.
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}
