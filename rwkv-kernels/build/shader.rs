//! One variant of a kernel: parsed, validated under the capabilities its file name grants, held to its limits
//! and reflected.

use std::error::Error;
use std::fmt::Display;
use std::ops::Range;
use std::path::Path;

use naga::back::pipeline_constants::process_overrides;
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{
    AddressSpace, ArraySize, EntryPoint, Expression, GlobalVariable, Literal, Module, Scalar, Span,
    StorageAccess, Type, TypeInner, VectorSize,
};

use super::source::Source;

/// The words of a suffix: what the rest of a variant's file name can grant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Features {
    // In this order, so that a variant sorts after those that need less.
    pub(super) coop: bool,
    pub(super) subgroup: bool,
    pub(super) f16: bool,
}

impl Features {
    /// What the words of `suffix` grant, or the word that is none.
    pub(super) fn of(suffix: &str) -> Result<Self, &str> {
        let mut features = Self::default();
        for word in suffix.split('_').filter(|_| !suffix.is_empty()) {
            match word {
                "f16" => features.f16 = true,
                "subgroup" => features.subgroup = true,
                // Their elements are halves.
                "coop" => (features.coop, features.f16) = (true, true),
                _ => return Err(word),
            }
        }
        Ok(features)
    }

    /// The words that grant this, as [`Self::of`] reads them.
    pub(super) fn suffix(self) -> String {
        let words = [(self.coop, "coop"), (self.subgroup, "subgroup"), (self.f16 && !self.coop, "f16")];
        words.into_iter().filter_map(|(granted, word)| granted.then_some(word)).collect::<Vec<_>>().join("_")
    }

    /// What both grant.
    pub(super) fn with(self, more: Self) -> Self {
        let (coop, subgroup) = (self.coop || more.coop, self.subgroup || more.subgroup);
        Self { coop, subgroup, f16: self.f16 || more.f16 }
    }

    /// What `less` does not grant of it.
    pub(super) fn without(self, less: Self) -> Self {
        let (coop, subgroup) = (self.coop && !less.coop, self.subgroup && !less.subgroup);
        Self { coop, subgroup, f16: self.f16 && !less.f16 }
    }

    fn capabilities(self) -> Capabilities {
        // Packing halves into words is WebGPU without features.
        let mut granted = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
        granted.set(Capabilities::SHADER_FLOAT16, self.f16);
        granted.set(Capabilities::SUBGROUP, self.subgroup);
        granted.set(Capabilities::COOPERATIVE_MATRIX, self.coop);
        granted
    }

    fn limits(self) -> &'static Limits {
        if self == Self::default() { &WEBGPU } else { &RAISED }
    }
}

/// What a workgroup may use.
struct Limits {
    invocations: u32,
    size: [u32; 3],
    bytes: u32,
}

/// The default limits of WebGPU (its specification, section "Limits"): what every adapter grants.
const WEBGPU: Limits = Limits { invocations: 256, size: [256, 256, 64], bytes: 16 << 10 };

/// What desktop GPUs that have any of the features grant besides. The device is asked for what a kernel uses.
const RAISED: Limits = Limits { invocations: 1024, size: [1024, 1024, 64], bytes: 48 << 10 };

/// Storage buffers of a kernel, by default in WebGPU. Variants share their bindings, so that no suffix raises it.
const MAX_STORAGE_BUFFERS: usize = 8;

/// One variant and the faults found so far.
pub(super) struct Shader {
    /// Of the kernel.
    pub(super) name: String,
    pub(super) suffix: String,
    pub(super) features: Features,
    pub(super) source: Source,
    pub(super) faults: Vec<String>,
}

/// What the WGSL says of itself. Of use only if no fault was recorded.
pub(super) struct Reflection {
    pub(super) workgroup_size: [u32; 3],
    pub(super) workgroup_bytes: u32,
    pub(super) bindings: Vec<Binding>,
    pub(super) params: Option<Params>,
    /// Names and defaults.
    pub(super) overrides: Vec<(String, f64)>,
}

pub(super) struct Binding {
    pub(super) name: String,
    /// A variant of `rwkv_kernels::Access`.
    pub(super) access: &'static str,
    /// A variant of `rwkv_kernels::Scalar` and how many of them an element has; `None` for the uniform.
    pub(super) element: Option<(&'static str, u8)>,
    at: usize,
}

pub(super) struct Params {
    /// Names and types of Rust, each of four bytes.
    pub(super) fields: Vec<(String, &'static str)>,
    at: usize,
}

impl Shader {
    /// Records a fault at a byte of the joined text.
    pub(super) fn fault(&mut self, at: usize, what: impl Display) {
        self.faults.push(self.source.fault(at, &what.to_string()));
    }

    /// Records a fault of naga's: at the first label, with the source under all of them.
    fn naga_fault(
        &mut self,
        what: &dyn Error,
        labels: impl Iterator<Item = (Span, String)>,
        notes: &[String],
    ) {
        let labels: Vec<_> = labels.filter_map(|(span, label)| Some((span.to_range()?, label))).collect();
        let mut detail = what.to_string();
        for (span, label) in &labels {
            let (place, excerpt) = (self.source.place(span.start), self.source.excerpt(span.clone()));
            detail += &format!("\n  {place}: {label}\n{excerpt}");
        }
        let mut cause = what.source();
        while let Some(why) = cause {
            detail += &format!("\n  because: {why}");
            cause = why.source();
        }
        for note in notes {
            detail += &format!("\n  note: {note}");
        }
        self.fault(labels.first().map_or(0, |(span, _)| span.start), detail);
    }

    /// A kernel means what its twin says: the twin exists, and the first line leads there. It has the kernel's name, or what
    /// that begins with, `foo` for `foo_bar`: an operation can have several kernels.
    pub(super) fn check_twin(&mut self, ops: &Path) {
        let stems = self.name.match_indices('_').map(|(at, _)| &self.name[..at]);
        let twin = stems.chain([&*self.name]).rfind(|stem| ops.join(format!("{stem}.rs")).is_file());
        let file = format!("{}.rs", twin.unwrap_or(&self.name));
        if !ops.join(&file).is_file() {
            self.fault(0, format!("the twin {} does not exist", ops.join(&file).display()));
        }
        let named = format!("rwkv-core/src/ops/{file}");
        let first = self.source.text.lines().next().unwrap_or_default();
        if !(first.starts_with("//") && first.contains(&named)) {
            self.fault(0, format!("the first line must name the twin, {named}"));
        }
    }

    /// Checks the WGSL and says what it is, unless it cannot be parsed.
    pub(super) fn reflect(&mut self) -> Option<Reflection> {
        let module = match naga::front::wgsl::parse_str(&self.source.text) {
            Ok(module) => module,
            Err(e) => {
                let labels: Vec<_> = e.labels().map(|(span, label)| (span, label.to_owned())).collect();
                let notes: Vec<_> = e.notes().map(str::to_owned).collect();
                self.naga_fault(&e, labels.into_iter(), &notes);
                return None;
            }
        };
        let validated =
            Validator::new(ValidationFlags::all(), self.features.capabilities()).validate(&module);
        let info = validated.map_err(|e| {
            // The function comes first and what is wrong in it later: the shortest is the place.
            let mut labels: Vec<_> = e.spans().cloned().collect();
            labels.sort_by_key(|(span, _)| span.to_range().map_or(usize::MAX, |range| range.len()));
            self.naga_fault(e.as_inner(), labels.into_iter(), &[]);
        });
        let info = info.ok();
        self.check_coop();

        // The bindings and `Params` before overrides are resolved, since that drops what the kernel does not use.
        let bindings = self.bindings(&module);
        let params = self.params(&module);
        let names = self.overrides(&module);
        let resolved = info.filter(|_| names.is_some()).and_then(|info| self.resolved(&module, &info));
        let module = resolved.as_ref().unwrap_or(&module);
        Some(Reflection {
            workgroup_size: self.workgroup_size(module),
            workgroup_bytes: self.workgroup_memory(module),
            bindings,
            params,
            overrides: names.unwrap_or_default().into_iter().map(|name| self.default(module, name)).collect(),
        })
    }

    /// Cooperative matrices go with their word. naga leaves one that is loaded and stored but never declared to
    /// whoever enables them, so the directive is what counts.
    fn check_coop(&mut self) {
        const ENABLED: &str = "wgpu_cooperative_matrix";
        match self.source.find_anywhere(ENABLED) {
            0 => {}
            _ if self.features.coop => {}
            at => self.fault(at, format!("`{ENABLED}` is for a variant with the word `coop`")),
        }
    }

    /// The names of the overrides, if each has a default and goes by its name.
    fn overrides(&mut self, module: &Module) -> Option<Vec<String>> {
        let n_faults = self.faults.len();
        let mut names = Vec::new();
        for (handle, constant) in module.overrides.iter() {
            // One without a name is an expression of others, the length of an array for instance.
            let Some(name) = &constant.name else { continue };
            let at = start(module.overrides.get_span(handle));
            if constant.init.is_none() {
                self.fault(at, format!("override `{name}` needs a default, it cannot be checked without"));
            }
            if constant.id.is_some() {
                self.fault(at, format!("override `{name}` has an @id, but is set by its name"));
            }
            names.push(name.clone());
        }
        (self.faults.len() == n_faults).then_some(names)
    }

    /// The module with every override at its default: before, whatever has the size of one counts as nothing.
    fn resolved(&mut self, module: &Module, info: &ModuleInfo) -> Option<Module> {
        let resolved = process_overrides(module, info, None, &Default::default());
        resolved.map_err(|e| self.naga_fault(&e, [].into_iter(), &[])).ok().map(|(of, _)| of.into_owned())
    }

    /// An override with its default, which in the resolved module is a constant's value.
    fn default(&mut self, resolved: &Module, name: String) -> (String, f64) {
        let constant = resolved.constants.iter().find(|(_, of)| of.name.as_ref() == Some(&name));
        let value = constant.and_then(|(_, of)| match resolved.global_expressions[of.init] {
            Expression::Literal(Literal::U32(value)) => Some(value.into()),
            Expression::Literal(Literal::I32(value)) => Some(value.into()),
            Expression::Literal(Literal::F32(value)) => Some(value.into()),
            Expression::Literal(Literal::F16(value)) => Some(value.into()),
            Expression::Literal(Literal::Bool(value)) => Some(u8::from(value).into()),
            _ => None,
        });
        if value.is_none() && self.faults.is_empty() {
            let at = self.source.find_anywhere(&name);
            self.fault(at, format!("override `{name}` is not used"));
        }
        (name, value.unwrap_or_default())
    }

    /// The workgroup size of the one entry point.
    fn workgroup_size(&mut self, module: &Module) -> [u32; 3] {
        let [EntryPoint { name, workgroup_size: size, .. }] = module.entry_points.as_slice() else {
            let n = module.entry_points.len();
            // With several, the second is the one too many.
            let at = module.entry_points.get(1).map_or(0, |entry| self.source.find_anywhere(&entry.name));
            self.fault(at, format!("{n} entry points, a kernel has exactly one"));
            return [0; 3];
        };
        let at = self.source.find_anywhere(name);
        if *name != self.name {
            self.fault(at, format!("entry point `{name}` must be named `{}`", self.name));
        }
        if self.source.in_helper(at) {
            self.fault(at, format!("the entry point `{name}` is in a helper"));
        }
        let limits = self.features.limits();
        if size.iter().zip(limits.size).any(|(&n, max)| n > max)
            || size.iter().map(|&n| u64::from(n)).product::<u64>() > u64::from(limits.invocations)
        {
            let (max, invocations) = (limits.size, limits.invocations);
            self.fault(at, format!("workgroup size {size:?} exceeds {max:?} or {invocations} invocations"));
        }
        *size
    }

    /// The bindings: dense from 0 in group 0, and not too many.
    fn bindings(&mut self, module: &Module) -> Vec<Binding> {
        let (mut found, mut n_storage) = (Vec::new(), 0);
        for (handle, var) in module.global_variables.iter() {
            let at = start(module.global_variables.get_span(handle));
            let name = name_of(var).to_owned();
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
            if self.source.in_helper(at) {
                self.fault(at, format!("`{name}` is a binding, which the kernel declares, not a helper"));
            }
            let element = element_of(module, var).filter(|_| access != "Uniform");
            if access != "Uniform" {
                n_storage += 1;
                if n_storage > MAX_STORAGE_BUFFERS {
                    let what =
                        format!("`{name}` is storage buffer {n_storage}, the limit is {MAX_STORAGE_BUFFERS}");
                    self.fault(at, what);
                }
                if element.is_none() {
                    let what =
                        "must be an array, without a length, of f32, f16, u32, i32 or a vec2 or vec4 of one";
                    self.fault(at, format!("`{name}` {what}"));
                }
            }
            // One without a binding is a fault that the validator has found already.
            if let Some(slot) = var.binding {
                found.push((slot.group, slot.binding, Binding { name, access, element, at }));
            }
        }
        found.sort_by_key(|&(group, binding, _)| (group, binding));
        for (i, (group, binding, Binding { name, at, .. })) in found.iter().enumerate() {
            if *group != 0 || *binding as usize != i {
                self.fault(*at, format!("`{name}` must be @group(0) @binding({i})"));
            }
        }
        found.into_iter().map(|(.., binding)| binding).collect()
    }

    /// The struct `Params`, the type of the one uniform; nothing if there is no uniform.
    fn params(&mut self, module: &Module) -> Option<Params> {
        let mut uniforms =
            module.global_variables.iter().filter(|(_, var)| var.space == AddressSpace::Uniform);
        let (_, var) = uniforms.next()?;
        for (handle, var) in uniforms {
            let at = start(module.global_variables.get_span(handle));
            self.fault(at, format!("`{}` is a second uniform, a kernel has one", name_of(var)));
        }
        let range = module.types.get_span(var.ty).to_range().unwrap_or(0..self.source.text.len());
        let (members, span) = match &module.types[var.ty] {
            Type { name: Some(name), inner: TypeInner::Struct { members, span } } if name == "Params" => {
                (members, *span)
            }
            _ => {
                let at = self.source.find_anywhere(name_of(var));
                self.fault(at, format!("uniform `{}` must be of a struct `Params`", name_of(var)));
                return None;
            }
        };
        let (mut fields, mut end) = (Vec::new(), 0);
        for member in members {
            let field = member.name.as_deref().unwrap_or_default();
            let at = self.source.find(field, range.clone());
            let rust = match module.types[member.ty].inner {
                TypeInner::Scalar(Scalar::U32) => "u32",
                TypeInner::Scalar(Scalar::F32) => "f32",
                _ => {
                    self.fault(at, format!("`Params.{field}` is neither u32 nor f32"));
                    return None;
                }
            };
            if member.offset != end {
                let what = format!("`Params.{field}` is at byte {}, not {end}: padded", member.offset);
                self.fault(at, what);
                return None;
            }
            end += 4;
            fields.push((field.to_owned(), rust));
        }
        if span != end {
            self.fault(range.start, format!("`Params` is {span} bytes, its fields are {end}: padded"));
        }
        Some(Params { fields, at: range.start })
    }

    /// Bytes of the workgroup's memory, counted as WebGPU does: each variable fills 16-byte units.
    fn workgroup_memory(&mut self, module: &Module) -> u32 {
        let (mut total, mut last) = (0u32, 0);
        for (handle, var) in module.global_variables.iter() {
            if var.space == AddressSpace::WorkGroup {
                last = start(module.global_variables.get_span(handle));
                let bytes = module.types[var.ty].inner.try_size(module.to_ctx()).unwrap_or(u32::MAX);
                total = total.saturating_add(bytes.saturating_add(15) / 16 * 16);
            }
        }
        let max = self.features.limits().bytes;
        if total > max {
            self.fault(last, format!("{total} bytes of workgroup memory, the limit is {max}"));
        }
        total
    }

    /// A variant takes what the portable one takes: the same uniform, the same buffers.
    pub(super) fn check_against(&mut self, portable: &Reflection, own: &Reflection) {
        let fields = |params: &Option<Params>| params.as_ref().map(|params| params.fields.clone());
        if fields(&portable.params) != fields(&own.params) {
            let at = own.params.as_ref().map_or(0, |params| params.at);
            self.fault(at, format!("`Params` is not that of {}.wgsl", self.name));
        }
        let shown = |binding: &Binding| format!("`{}`, {}", binding.name, binding.access);
        for (i, binding) in own.bindings.iter().enumerate() {
            let (got, want) = (shown(binding), portable.bindings.get(i).map(shown));
            if want.as_ref() != Some(&got) {
                let want = want.unwrap_or_else(|| "none".to_owned());
                self.fault(binding.at, format!("binding {i} is {got}; in {}.wgsl it is {want}", self.name));
            }
        }
        let (n, of) = (own.bindings.len(), portable.bindings.len());
        if n < of {
            self.fault(0, format!("{n} bindings; {}.wgsl has {of}", self.name));
        }
    }
}

/// What a storage buffer is an array of, if it is one of plain numbers.
fn element_of(module: &Module, var: &GlobalVariable) -> Option<(&'static str, u8)> {
    let TypeInner::Array { base, size: ArraySize::Dynamic, .. } = module.types[var.ty].inner else {
        return None;
    };
    let (scalar, n) = match module.types[base].inner {
        TypeInner::Scalar(scalar) | TypeInner::Atomic(scalar) => (scalar, 1),
        TypeInner::Vector { size: VectorSize::Bi, scalar } => (scalar, 2),
        TypeInner::Vector { size: VectorSize::Quad, scalar } => (scalar, 4),
        _ => return None,
    };
    let scalar = match scalar {
        Scalar::F32 => "F32",
        Scalar::F16 => "F16",
        Scalar::U32 => "U32",
        Scalar::I32 => "I32",
        _ => return None,
    };
    Some((scalar, n))
}

fn name_of(var: &GlobalVariable) -> &str {
    var.name.as_deref().unwrap_or_default()
}

fn start(span: Span) -> usize {
    span.to_range().map_or(0, |range: Range<usize>| range.start)
}
