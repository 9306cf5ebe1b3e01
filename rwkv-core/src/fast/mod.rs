//! The operations that take most of the time, for the CPU executor: vectorised, threaded, tested against [`ops`](crate::ops).
//!
//! Vectors come from the `pulp` library, which picks the instruction set at run time; threads from `rayon`.
//!
//! Invariant: every output is summed in one fixed order, whatever the instruction set, the number of threads and the
//! number of rows. So a row gives the same bits alone and in a batch.

pub mod linear;
pub mod wkv7;
