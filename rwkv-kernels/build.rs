//! Runs the gate over every kernel; any fault stops the build.

#[path = "build/gate.rs"]
mod gate;

use std::path::PathBuf;
use std::{env, process};

fn main() {
    let of_cargo = |name| PathBuf::from(env::var_os(name).expect("set by cargo"));
    let krate = of_cargo("CARGO_MANIFEST_DIR");
    let folders = gate::Folders {
        kernels: krate.join("src/kernels"),
        helpers: krate.join("src/wgsl"),
        ops: krate.with_file_name("rwkv-core").join("src/ops"),
    };
    for folder in [&folders.kernels, &folders.helpers, &folders.ops] {
        println!("cargo::rerun-if-changed={}", folder.display());
    }
    if let Err(faults) = gate::build(&folders, &of_cargo("OUT_DIR").join("kernels.rs")) {
        for line in faults.iter().flat_map(|fault| fault.lines()) {
            println!("cargo::error={line}");
        }
        process::exit(1);
    }
}
