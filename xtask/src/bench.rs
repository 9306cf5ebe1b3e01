//! `cargo xtask bench` and `cargo xtask quality`: builds the benchmarks, optimised, and runs them. The program,
//! `target/release/rwkv-bench`, needs neither cargo nor the sources.

use std::process::Command;

use crate::{Outcome, cargo, root, spawn};

pub(crate) fn run(args: &[String]) -> Outcome {
    let mut run = cargo(&["run", "--release", "--package", "rwkv-bench", "--"]);
    // For the report: the program itself knows no repository.
    spawn(run.args(args).envs(commit().map(|commit| ("RWKV_COMMIT", commit))))
}

/// The commit that is checked out, if git tells, and whether files differ from it.
fn commit() -> Option<String> {
    let git =
        Command::new("git").args(["describe", "--always", "--dirty"]).current_dir(root()).output().ok()?;
    let said = String::from_utf8(git.stdout).ok()?;
    Some(said.trim().to_owned()).filter(|said| git.status.success() && !said.is_empty())
}
