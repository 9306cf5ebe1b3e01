//! `cargo xtask profile`: the time of every dispatch, as a table and as a Chrome trace.

use crate::{Outcome, cargo, spawn};

pub(crate) fn run(args: &[String]) -> Outcome {
    spawn(cargo(&["run", "--release", "--package", "rwkv-bench", "--", "profile"]).args(args))
}
