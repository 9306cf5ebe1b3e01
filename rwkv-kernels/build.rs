//! Runs the gate over every kernel; any fault stops the build.

#[path = "build/gate.rs"]
mod gate;

use std::path::Path;
use std::{env, fs, process};

fn main() {
    let of_cargo = |name| env::var(name).expect("set by cargo");
    let krate = of_cargo("CARGO_MANIFEST_DIR");
    let kernels = Path::new(&krate).join("src/kernels");
    let ops = Path::new(&krate).with_file_name("rwkv-core").join("src/ops");
    println!("cargo::rerun-if-changed={}", kernels.display());
    println!("cargo::rerun-if-changed={}", ops.display());
    match gate::gate(&kernels, &ops) {
        Ok(code) => {
            let to = Path::new(&of_cargo("OUT_DIR")).join("kernels.rs");
            fs::write(to, code).expect("OUT_DIR is writable");
        }
        Err(faults) => {
            for line in faults.iter().flat_map(|fault| fault.lines()) {
                println!("cargo::error={line}");
            }
            process::exit(1);
        }
    }
}
