//! `cargo xtask bench`: the benchmarks, optimised.

use crate::{Outcome, cargo, spawn};

pub(crate) fn run(args: &[String]) -> Outcome {
    spawn(cargo(&["run", "--release", "--package", "rwkv-bench", "--"]).args(args))
}
