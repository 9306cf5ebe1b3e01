//! `cargo xtask tidy`: the rules of the house that no lint knows. All faults are listed.
//!
//! - A kernel folder holds its WGSL, its binding and its tests, and has a twin in `rwkv-core`.
//! - Every Rust file opens by saying what it is.
//! - Nothing is left for later: no unfinished code, no test switched off.

use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::{Outcome, root};

pub(crate) fn run() -> Outcome {
    let faults = faults(root()).map_err(|e| e.to_string())?;
    for fault in &faults {
        println!("{fault}");
    }
    match faults.len() {
        0 => Ok(()),
        n => Err(format!("{n} faults")),
    }
}

/// Every fault of the workspace at `root`, as `path:line: what` or `path: what`.
fn faults(root: &Path) -> io::Result<Vec<String>> {
    let mut faults = Vec::new();
    for folder in ls(&root.join("rwkv-kernels/src/kernels"))?.into_iter().filter(|path| path.is_dir()) {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let own = [format!("{name}.wgsl"), "mod.rs".to_owned(), "tests.rs".to_owned()];
        for file in own.iter().map(|file| folder.join(file)).chain([twin(root, &name)]) {
            if !file.is_file() {
                faults.push(format!("{}: missing, kernel `{name}` needs it", shown(&file, root)));
            }
        }
    }
    for file in rust_files(root)? {
        let text = fs::read_to_string(&file)?;
        faults.extend(text_faults(&text).into_iter().map(|fault| format!("{}:{fault}", shown(&file, root))));
    }
    Ok(faults)
}

/// Where the twin of a kernel is: of its name, or of what that begins with, as the build's gate has it.
fn twin(root: &Path, kernel: &str) -> PathBuf {
    let op = |stem: &str| root.join("rwkv-core/src/ops").join(format!("{stem}.rs"));
    let stems = kernel.match_indices('_').map(|(at, _)| &kernel[..at]);
    stems.rev().map(op).find(|file| file.is_file() && !op(kernel).is_file()).unwrap_or_else(|| op(kernel))
}

/// Faults of one Rust file, as `line: what`.
fn text_faults(text: &str) -> Vec<String> {
    // Spelt so that this file does not hold them.
    let banned = [concat!("to", "do!"), concat!("un", "implemented!"), concat!("#[", "ignore")];
    let mut faults = Vec::new();
    if !text.starts_with("//!") {
        faults.push("1: does not open with `//!`".to_owned());
    }
    for (line, text) in (1..).zip(text.lines()) {
        let found = banned.iter().filter(|word| text.contains(**word));
        faults.extend(found.map(|word| format!("{line}: `{word}`")));
    }
    faults
}

/// Rust files of the workspace, without hidden folders and build outputs.
fn rust_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in ls(folder)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && !name.starts_with('.') && name != "target" {
            files.extend(rust_files(&path)?);
        } else if name.ends_with(".rs") {
            files.push(path);
        }
    }
    Ok(files)
}

fn ls(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn shown(path: &Path, root: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{faults, root, text_faults};

    #[test]
    fn the_workspace_is_tidy() {
        assert_eq!(faults(root()).unwrap(), Vec::<String>::new(), "see above");
    }

    #[test]
    fn texts() {
        assert_eq!(text_faults("//! What it is.\nfn f() {}\n"), [""; 0], "tidy");
        let bad = format!("fn f() {{\n    {}do!()\n}}\n#[{} = \"slow\"]\n", "to", "ignore");
        let (later, off) = (format!("2: `{}do!`", "to"), format!("4: `#[{}`", "ignore"));
        assert_eq!(text_faults(&bad), ["1: does not open with `//!`".to_owned(), later, off], "three faults");
    }

    #[test]
    fn all_faults_of_a_tree_are_listed() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let folder = root.join("rwkv-kernels/src/kernels/foo");
        fs::create_dir_all(&folder).unwrap();
        fs::create_dir_all(root.join("target")).unwrap();
        for file in ["rwkv-kernels/src/kernels/foo/mod.rs", "target/built.rs"] {
            fs::write(root.join(file), "").unwrap();
        }
        let want = [
            "rwkv-kernels/src/kernels/foo/foo.wgsl: missing, kernel `foo` needs it",
            "rwkv-kernels/src/kernels/foo/tests.rs: missing, kernel `foo` needs it",
            "rwkv-core/src/ops/foo.rs: missing, kernel `foo` needs it",
            "rwkv-kernels/src/kernels/foo/mod.rs:1: does not open with `//!`",
        ];
        assert_eq!(faults(root).unwrap(), want, "in order");
    }
}
