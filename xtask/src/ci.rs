//! `cargo xtask ci`: what a change must pass, the quickest check first, up to the first that fails.

use crate::{Outcome, cargo, spawn, test, tidy};

pub(crate) fn run() -> Outcome {
    step("format", || spawn(&mut cargo(&["fmt", "--all", "--check"])))?;
    step("tidy", tidy::run)?;
    step("clippy", || {
        spawn(&mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
    })?;
    // for engines that bring their own device
    step("kernels without a device", || {
        let args = ["clippy", "-p", "rwkv-kernels", "--no-default-features", "--", "-D", "warnings"];
        spawn(&mut cargo(&args))
    })?;
    // a directory, which the tests run, and each service, which they cannot
    step("stores", || {
        let args = ["clippy", "-p", "rwkv-state", "-p", "rwkv-model", "--all-targets", "--all-features"];
        spawn(cargo(&args).args(["--", "-D", "warnings"]))
    })?;
    step("doc", || {
        let args = ["doc", "--workspace", "--no-deps", "--features", "rwkv-model/object-store"];
        spawn(cargo(&args).env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    step("test", || test::run(&[]))?;
    // the kernels of heads and of prompts, which Mesa's driver has subgroups for if it is told so
    step("subgroups of 16", || {
        let args = ["--lib", "--test", "gpu", "--", "fours", "time_mix"].map(str::to_owned);
        test::run_with(&args, &[("LP_NATIVE_VECTOR_WIDTH", "512"), ("MESA_SHADER_CACHE_DISABLE", "true")])
    })?;
    // the README's first command, in the profile that it is meant for
    step("generate", || {
        spawn(&mut cargo(&["run", "--release", "--example", "generate", "--", "It was", "--tokens", "16"]))
    })
}

fn step(name: &str, run: impl FnOnce() -> Outcome) -> Outcome {
    println!("== {name}");
    run().map_err(|e| format!("{name}: {e}"))
}
