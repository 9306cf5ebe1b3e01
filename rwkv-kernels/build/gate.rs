//! The gate that every kernel passes at build time: parsed, validated, held to what its file name grants and
//! reflected into Rust, so that a kernel's bindings are written once, in its WGSL.
//!
//! A fault reads `path:line:column: what`, and all faults of all kernels are reported together.

mod shader;
mod source;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::{fs, io};

use shader::{Features, Reflection, Shader};
use source::Source;

/// Where the gate looks.
pub(crate) struct Folders {
    /// One folder per kernel.
    pub(crate) kernels: PathBuf,
    /// The WGSL that kernels share.
    pub(crate) helpers: PathBuf,
    /// The twins.
    pub(crate) ops: PathBuf,
}

/// Writes what the gate generates to `out`. With a fault, nothing is there afterwards, not even of an earlier build.
pub(crate) fn build(folders: &Folders, out: &Path) -> Result<(), Vec<String>> {
    let write = |code| fs::write(out, code).map_err(|e| vec![format!("{}: {e}", out.display())]);
    let outcome = gate(folders).and_then(write);
    if outcome.is_err() {
        // If there is none, so much the better; if it cannot be removed, cargo still fails.
        let _ = fs::remove_file(out);
    }
    outcome
}

/// Checks every kernel, with its helpers, against its twin.
///
/// Returns Rust code with one module per kernel, or every fault found.
pub(crate) fn gate(folders: &Folders) -> Result<String, Vec<String>> {
    let (mut code, mut faults, mut used) = (String::new(), Vec::new(), BTreeSet::new());
    for folder in ls(&folders.kernels, &mut faults).into_iter().filter(|path| path.is_dir()) {
        code.push_str(&kernel(&folder, folders, &mut used, &mut faults));
    }
    for path in ls(&folders.helpers, &mut faults) {
        if !used.contains(&stem(&path)) {
            faults.push(format!("{}:1:1: unchecked, no kernel uses it", path.display()));
        }
    }
    if faults.is_empty() { Ok(code) } else { Err(faults) }
}

/// The module of one kernel.
fn kernel(folder: &Path, of: &Folders, used: &mut BTreeSet<String>, faults: &mut Vec<String>) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // By what they are granted: the suffix and the file.
    let mut variants = BTreeMap::from([(Features::default(), (String::new(), file_name(&name, "")))]);
    for path in ls(folder, faults).iter().filter(|path| path.extension().is_some_and(|of| of == "wgsl")) {
        let stem = stem(path);
        if stem == name {
            continue;
        }
        let fault = match stem.strip_prefix(&format!("{name}_")).map(|suffix| (suffix, Features::of(suffix)))
        {
            None => format!("unchecked, the files of this folder are {name}.wgsl and {name}_<suffix>.wgsl"),
            Some((_, Err(word))) => format!("`{word}` is no capability: a suffix has f16, subgroup and coop"),
            Some((suffix, Ok(features))) => match variants.get(&features) {
                Some((_, other)) => format!("grants the same as {other}"),
                None => {
                    variants.insert(features, (suffix.to_owned(), file_name(&name, suffix)));
                    continue;
                }
            },
        };
        faults.push(format!("{}:1:1: {fault}", path.display()));
    }
    // What a helper has in variants, the kernels that use it have too, unless they bring a file of their own.
    for (own, (suffix, file)) in variants.clone() {
        let source =
            Source::join(&folder.join(&file), &of.helpers, own, &mut BTreeSet::new(), &mut Vec::new());
        for features in source.variants.into_iter().map(|more| own.with(more)).filter(|all| *all != own) {
            let words = features.without(own).suffix();
            let joint = if suffix.is_empty() { "" } else { "_" };
            variants.entry(features).or_insert((format!("{suffix}{joint}{words}"), file.clone()));
        }
    }

    let (mut portable, mut kernels, mut params) = (None, String::new(), String::new());
    // Variants share texts: a fault of one is reported once.
    let mut report = |found: Vec<String>| {
        found.into_iter().for_each(|fault| {
            if !faults.contains(&fault) {
                faults.push(fault);
            }
        });
    };
    for (features, (suffix, file)) in variants {
        let mut missing = Vec::new();
        let source = Source::join(&folder.join(file), &of.helpers, features, used, &mut missing);
        if !missing.is_empty() {
            report(missing);
            continue; // what is missing would show again, as names that are not declared
        }
        let mut shader = Shader { name: name.clone(), suffix, features, source, faults: Vec::new() };
        shader.check_twin(&of.ops);
        if let Some(reflection) = shader.reflect() {
            kernels += &kernel_literal(&shader, &reflection);
            match &portable {
                Some(portable) => shader.check_against(portable, &reflection),
                None if shader.suffix.is_empty() => {
                    params = params_struct(&reflection);
                    portable = Some(reflection);
                }
                None => {}
            }
        }
        report(shader.faults);
    }
    format!(
        "/// Reflected from the folder `{name}`.\n\
         pub(crate) mod {name} {{\n\
         /// The portable variant, then the others, each after those that need less.\n\
         pub const VARIANTS: &[crate::Kernel] = &[{kernels}];\n\
         {params}}}\n"
    )
}

/// One element of `VARIANTS`.
fn kernel_literal(shader: &Shader, of: &Reflection) -> String {
    let Shader { name, suffix, features, source, .. } = shader;
    let bindings: String = of
        .bindings
        .iter()
        .map(|binding| {
            let element = binding.element.map_or("None".to_owned(), |(scalar, lanes)| {
                format!("Some(crate::Element {{ scalar: crate::Scalar::{scalar}, lanes: {lanes} }})")
            });
            let (name, access) = (&binding.name, binding.access);
            format!(
                "crate::Binding {{ name: {name:?}, access: crate::Access::{access}, element: {element} }},"
            )
        })
        .collect();
    let overrides: String = of
        .overrides
        .iter()
        .map(|(name, default)| format!("crate::Override {{ name: {name:?}, default: {default:?} }},"))
        .collect();
    format!(
        "crate::Kernel {{\n\
         name: {name:?},\n\
         suffix: {suffix:?},\n\
         source: {:?},\n\
         workgroup_size: {:?},\n\
         workgroup_bytes: {},\n\
         bindings: &[{bindings}],\n\
         params_bytes: {},\n\
         overrides: &[{overrides}],\n\
         features: crate::Features {{ f16: {}, subgroup: {}, coop: {} }},\n\
         subgroup_size: {},\n\
         }},\n",
        source.text,
        of.workgroup_size,
        of.workgroup_bytes,
        of.params.as_ref().map_or(0, |params| 4 * params.fields.len()),
        features.f16,
        features.subgroup,
        features.coop,
        source.subgroup_size,
    )
}

/// The struct `Params`, if the kernel has a uniform.
fn params_struct(of: &Reflection) -> String {
    let Some(params) = &of.params else { return String::new() };
    let field = |(name, rust): &(String, &str)| {
        format!("/// `{name}`, as the WGSL declares it.\npub {name}: {rust},\n")
    };
    let fields: String = params.fields.iter().map(field).collect();
    let bytes = 4 * params.fields.len();
    format!(
        "/// The uniform block.\n\
         #[repr(C)]\n\
         #[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]\n\
         pub struct Params {{ {fields} }}\n\
         const _: () = assert!(size_of::<Params>() == {bytes}, \"layout\");\n"
    )
}

fn file_name(kernel: &str, suffix: &str) -> String {
    let joint = if suffix.is_empty() { "" } else { "_" };
    format!("{kernel}{joint}{suffix}.wgsl")
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// What `dir` holds, sorted, so that the generated code is the same on every machine.
fn ls(dir: &Path, faults: &mut Vec<String>) -> Vec<PathBuf> {
    let list = || fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    let mut paths = list().unwrap_or_else(|e| {
        faults.push(format!("{}: {e}", dir.display()));
        Vec::new()
    });
    paths.sort();
    paths
}
