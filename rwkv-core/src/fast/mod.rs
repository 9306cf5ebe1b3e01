//! The operations that take most of the time, for the CPU executor: vectorised, threaded, tested against [`ops`](crate::ops).
//!
//! Vectors come from the `pulp` library, which picks the instruction set at run time; threads from `rayon`.
//!
//! Invariant: every output is summed in one fixed order, whatever the instruction set, the number of threads and the
//! number of rows. So a row gives the same bits alone and in a batch.

use pulp::{Arch, NullaryFnOnce};

pub mod linear;
pub mod wkv7;

/// Runs loops with the widest vectors that the processor has. The closure, and what it calls, are `#[inline(always)]`.
///
/// [`Arch::dispatch`] itself takes closures as [`FnOnce`]; one that only borrows is called so through a shim that nothing
/// makes inline, and its loops are then compiled for any processor.
#[inline]
pub fn vectorised<T>(run: impl FnMut() -> T) -> T {
    struct Loops<F>(F);

    impl<T, F: FnMut() -> T> NullaryFnOnce for Loops<F> {
        type Output = T;

        #[inline(always)]
        fn call(mut self) -> T {
            (self.0)()
        }
    }

    Arch::new().dispatch(Loops(run))
}
