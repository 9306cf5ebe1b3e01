//! The gate that every kernel passes at build time: parsed, validated, held to the WebGPU default limits
//! and reflected into Rust, so that a kernel's bindings are written once, in its WGSL.
//!
//! A fault reads `path:line:column: what`, and all faults of all kernels are reported together.

use std::fmt::Display;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::{fs, io};

use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{
    AddressSpace, ArraySize, EntryPoint, GlobalVariable, Handle, Module, Scalar, Span, StorageAccess, Type,
    TypeInner,
};

// The default limits of WebGPU (its specification, section "Limits"): what every adapter grants.
const MAX_INVOCATIONS: u32 = 256;
const MAX_WORKGROUP_SIZE: [u32; 3] = [256, 256, 64];
const MAX_WORKGROUP_BYTES: u32 = 16 * 1024;
const MAX_STORAGE_BUFFERS: usize = 8;

/// Checks every kernel folder of `kernels` against its twin in `ops`.
///
/// Returns Rust code with one module per kernel, or every fault found.
pub(crate) fn gate(kernels: &Path, ops: &Path) -> Result<String, Vec<String>> {
    let (mut code, mut faults) = (String::new(), Vec::new());
    for folder in ls(kernels, &mut faults).into_iter().filter(|path| path.is_dir()) {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let path = folder.join(format!("{name}.wgsl"));
        for file in ls(&folder, &mut faults) {
            if file.extension().is_some_and(|of| of == "wgsl") && file != path {
                faults.push(format!("{}:1:1: unchecked, only {name}.wgsl of its folder is", file.display()));
            }
        }
        match fs::read_to_string(&path) {
            Ok(text) => {
                let mut shader = Shader { name, path: path.display().to_string(), text, faults };
                shader.check_twin(ops);
                code.push_str(&shader.reflect());
                faults = shader.faults;
            }
            Err(e) => faults.push(format!("{}: {e}", path.display())),
        }
    }
    if faults.is_empty() { Ok(code) } else { Err(faults) }
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

/// One kernel's WGSL and the faults found so far.
struct Shader {
    name: String,
    path: String,
    text: String,
    faults: Vec<String>,
}

impl Shader {
    /// Records a fault at a byte of the text.
    fn fault(&mut self, at: usize, what: impl Display) {
        let before = &self.text[..at];
        let line = before.matches('\n').count() + 1;
        let column = at - before.rfind('\n').map_or(0, |newline| newline + 1) + 1;
        self.faults.push(format!("{}:{line}:{column}: {what}", self.path));
    }

    /// Records a fault of naga's, with the source it points at.
    fn naga_fault(&mut self, at: Option<naga::SourceLocation>, detail: &str) {
        self.fault(at.map_or(0, |at| at.offset as usize), detail.trim_end());
    }

    /// Where `word` stands in `range` outside line comments; the start of `range` if it does not.
    fn find(&self, word: &str, range: Range<usize>) -> usize {
        let text = &self.text[range.clone()];
        let in_word = |c: char| c.is_alphanumeric() || c == '_';
        let stands = |at: usize| {
            let (before, after) = (&text[..at], &text[at + word.len()..]);
            let line = before.rsplit('\n').next().unwrap_or(before);
            !before.ends_with(in_word) && !after.starts_with(in_word) && !line.contains("//")
        };
        let found = text.match_indices(word).map(|(at, _)| at).find(|&at| stands(at));
        range.start + found.unwrap_or(0)
    }

    fn find_anywhere(&self, word: &str) -> usize {
        self.find(word, 0..self.text.len())
    }

    /// A kernel means what its twin says: the twin exists, and the first line leads there.
    fn check_twin(&mut self, ops: &Path) {
        let file = format!("{}.rs", self.name);
        if !ops.join(&file).is_file() {
            self.fault(0, format!("the twin {} does not exist", ops.join(&file).display()));
        }
        let named = format!("rwkv-core/src/ops/{file}");
        if !self.text.lines().next().is_some_and(|line| line.starts_with("//") && line.contains(&named)) {
            self.fault(0, format!("the first line must name the twin, {named}"));
        }
    }

    /// Checks the WGSL and returns its Rust module, of use only if no fault was recorded.
    fn reflect(&mut self) -> String {
        let module = match naga::front::wgsl::parse_str(&self.text) {
            Ok(module) => module,
            Err(e) => {
                let detail = e.emit_to_string_with_path(&self.text, &self.path);
                self.naga_fault(e.location(&self.text), &detail);
                return String::new();
            }
        };
        let validated = Validator::new(ValidationFlags::all(), Capabilities::empty()).validate(&module);
        if let Err(e) = validated {
            let detail = e.emit_to_string_with_path(&self.text, &self.path);
            self.naga_fault(e.location(&self.text), &detail);
        }

        let size = self.workgroup_size(&module);
        let bindings = self.bindings(&module);
        let params = self.params(&module);
        self.workgroup_memory(&module);
        let (name, path) = (&self.name, &self.path);
        format!(
            "/// Reflected from `{name}.wgsl`.\n\
             pub(crate) mod {name} {{\n\
             /// The WGSL text.\n\
             pub const SOURCE: &str = include_str!({path:?});\n\
             /// Invocations of one workgroup, by dimension.\n\
             pub const WORKGROUP_SIZE: [u32; 3] = {size:?};\n\
             /// Bindings of group 0, in order.\n\
             pub const BINDINGS: &[crate::Binding] = &[{bindings}];\n\
             {params}}}\n"
        )
    }

    /// The workgroup size of the one entry point.
    fn workgroup_size(&mut self, module: &Module) -> [u32; 3] {
        let [EntryPoint { name, workgroup_size: size, workgroup_size_overrides, .. }] =
            module.entry_points.as_slice()
        else {
            let n = module.entry_points.len();
            // With several, the second is the one too many.
            let at = module.entry_points.get(1).map_or(0, |entry| self.find_anywhere(&entry.name));
            self.fault(at, format!("{n} entry points, a kernel has exactly one"));
            return [0; 3];
        };
        let at = self.find_anywhere(name);
        if *name != self.name {
            self.fault(at, format!("entry point `{name}` must be named `{}`", self.name));
        }
        if workgroup_size_overrides.is_some() {
            self.fault(at, "the workgroup size must be constant, or it cannot be checked here");
        }
        if size.iter().zip(MAX_WORKGROUP_SIZE).any(|(&n, max)| n > max)
            || size.iter().map(|&n| u64::from(n)).product::<u64>() > u64::from(MAX_INVOCATIONS)
        {
            self.fault(
                at,
                format!(
                    "workgroup size {size:?} exceeds {MAX_WORKGROUP_SIZE:?} or {MAX_INVOCATIONS} invocations"
                ),
            );
        }
        *size
    }

    /// The elements of `BINDINGS`: dense from 0 in group 0, and not too many.
    fn bindings(&mut self, module: &Module) -> String {
        let (mut found, mut n_storage) = (Vec::new(), 0);
        for (handle, var) in module.global_variables.iter() {
            let at = start(module.global_variables.get_span(handle));
            let name = name_of(var);
            let access = match var.space {
                AddressSpace::Uniform => "Uniform",
                AddressSpace::Storage { access } if access.contains(StorageAccess::STORE) => "ReadWrite",
                AddressSpace::Storage { .. } => "Read",
                AddressSpace::Private | AddressSpace::WorkGroup => continue,
                _ => {
                    self.fault(at, format!("`{name}` is neither a uniform nor a storage buffer"));
                    continue;
                }
            };
            if access != "Uniform" {
                n_storage += 1;
                if n_storage > MAX_STORAGE_BUFFERS {
                    self.fault(
                        at,
                        format!("`{name}` is storage buffer {n_storage}, the limit is {MAX_STORAGE_BUFFERS}"),
                    );
                }
            }
            // One without a binding is a fault that the validator has found already.
            if let Some(slot) = var.binding {
                found.push((slot.group, slot.binding, name, access, at));
            }
        }
        found.sort_unstable();
        let mut elements = String::new();
        for (i, (group, binding, name, access, at)) in found.into_iter().enumerate() {
            if group != 0 || binding as usize != i {
                self.fault(at, format!("`{name}` must be @group(0) @binding({i})"));
            }
            elements += &format!("crate::Binding {{ name: {name:?}, access: crate::Access::{access} }},");
        }
        elements
    }

    /// The struct `Params`, the type of the one uniform, field by field; nothing if there is no uniform.
    fn params(&mut self, module: &Module) -> String {
        let mut uniforms =
            module.global_variables.iter().filter(|(_, var)| var.space == AddressSpace::Uniform);
        let Some((_, var)) = uniforms.next() else { return String::new() };
        for (handle, var) in uniforms {
            let at = start(module.global_variables.get_span(handle));
            self.fault(at, format!("`{}` is a second uniform, a kernel has one", name_of(var)));
        }
        let at = module.types.get_span(var.ty).to_range().unwrap_or(0..self.text.len());
        let (members, span) = match &module.types[var.ty] {
            Type { name: Some(name), inner: TypeInner::Struct { members, span } } if name == "Params" => {
                (members, *span)
            }
            _ => {
                let at = self.find_anywhere(name_of(var));
                self.fault(at, format!("uniform `{}` must be of a struct `Params`", name_of(var)));
                return String::new();
            }
        };
        let (mut fields, mut end) = (String::new(), 0);
        for member in members {
            let field = member.name.as_deref().unwrap_or_default();
            let field_at = self.find(field, at.clone());
            let rust = match module.types[member.ty].inner {
                TypeInner::Scalar(Scalar::U32) => "u32",
                TypeInner::Scalar(Scalar::F32) => "f32",
                _ => {
                    self.fault(field_at, format!("`Params.{field}` is neither u32 nor f32"));
                    return String::new();
                }
            };
            if member.offset != end {
                self.fault(
                    field_at,
                    format!("`Params.{field}` is at byte {}, not {end}: padded", member.offset),
                );
                return String::new();
            }
            end += 4;
            fields += &format!("/// `{field}`, as the WGSL declares it.\npub {field}: {rust},\n");
        }
        if span != end {
            self.fault(at.start, format!("`Params` is {span} bytes, its fields are {end}: padded"));
        }
        format!(
            "/// The uniform block.\n\
             #[repr(C)]\n\
             #[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]\n\
             pub struct Params {{ {fields} }}\n\
             const _: () = assert!(size_of::<Params>() == {span}, \"layout\");\n"
        )
    }

    /// Holds the workgroup's memory to the limit, counted as WebGPU does: each variable fills 16-byte units.
    fn workgroup_memory(&mut self, module: &Module) {
        let (mut total, mut last) = (0u32, 0);
        for (handle, var) in module.global_variables.iter() {
            if var.space != AddressSpace::WorkGroup {
                continue;
            }
            last = start(module.global_variables.get_span(handle));
            match bytes_of(module, var.ty) {
                Some(bytes) => total = total.saturating_add(bytes.saturating_add(15) / 16 * 16),
                None => self.fault(last, format!("the size of `{}` must be constant", name_of(var))),
            }
        }
        if total > MAX_WORKGROUP_BYTES {
            self.fault(
                last,
                format!("{total} bytes of workgroup memory, the limit is {MAX_WORKGROUP_BYTES}"),
            );
        }
    }
}

/// Bytes of a type, where the WGSL alone decides them.
fn bytes_of(module: &Module, ty: Handle<Type>) -> Option<u32> {
    let inner = &module.types[ty].inner;
    match inner {
        TypeInner::Array { size: ArraySize::Pending(_), .. } => None,
        _ => Some(inner.try_size(module.to_ctx()).unwrap_or(u32::MAX)),
    }
}

fn name_of(var: &GlobalVariable) -> &str {
    var.name.as_deref().unwrap_or_default()
}

fn start(span: Span) -> usize {
    span.to_range().map_or(0, |range| range.start)
}
