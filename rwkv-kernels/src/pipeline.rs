//! A kernel on a device that the caller owns: compiled, bound to the caller's buffers, encoded into the caller's pass.
//!
//! Nothing here opens a device, makes a buffer or submits. Whatever the device objects to is an [`Error`], not the
//! panic or the callback that wgpu would make of it.

use std::num::NonZeroU64;

use crate::{Access, Binding, Capabilities, Features, Kernel};

/// Why a kernel cannot be compiled or bound.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The device lacks what the kernel needs.
    #[error("{name} needs {needs:?}, the device has {has:?}")]
    Capabilities {
        /// The kernel and its suffix.
        name: String,
        /// What it needs.
        needs: Capabilities,
        /// What the device grants.
        has: Capabilities,
    },
    /// The kernel has no such override.
    #[error("{kernel} has no override `{name}`")]
    Override {
        /// The kernel.
        kernel: &'static str,
        /// The override asked for.
        name: String,
    },
    /// There is not one buffer per binding.
    #[error("{kernel}: {got} buffers for {want} bindings")]
    Buffers {
        /// The kernel.
        kernel: &'static str,
        /// Buffers passed.
        got: usize,
        /// Bindings.
        want: usize,
    },
    /// The device refused a shader, a pipeline, a bind group or what else was asked of it.
    #[error("refused")]
    Refused(#[from] wgpu::Error),
}

/// A compiled kernel. It belongs to the device that made it.
#[derive(Clone, Debug)]
pub struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    kernel: Kernel,
}

impl Pipeline {
    /// Compiles a kernel for the layout that its bindings describe, with `overrides` set by name.
    ///
    /// The gate has checked the kernel with its overrides at their defaults. wgpu checks the workgroup size that
    /// others give, but not the workgroup memory: that is the caller's to keep within the device's limit.
    ///
    /// # Errors
    ///
    /// If the device lacks what the kernel needs or refuses it, or there is no such override.
    pub fn new(device: &wgpu::Device, kernel: &Kernel, overrides: &[(&str, f64)]) -> Result<Self, Error> {
        Self::compile(device, kernel, overrides, None, true, |of| device.create_shader_module(of))
    }

    /// As [`Self::new`], without the checks of indices that the driver would compile into the kernel and without
    /// clearing workgroup memory first: the kernels of this crate write it before they read it. What `cache` has of it
    /// is not compiled again.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    ///
    /// # Safety
    ///
    /// The kernel is one of this crate's, and at every dispatch its buffers hold what its parameters, lowered from
    /// the extents, and the indices in its other buffers (records, rows, tiles) say that they hold.
    #[expect(unsafe_code, reason = "wgpu cannot check what the caller must promise")]
    pub unsafe fn new_unchecked(
        device: &wgpu::Device,
        kernel: &Kernel,
        overrides: &[(&str, f64)],
        cache: Option<&wgpu::PipelineCache>,
    ) -> Result<Self, Error> {
        Self::compile(device, kernel, overrides, cache, false, |of| {
            // SAFETY: the caller promises that no index is out of bounds; no kernel loops without end, and none
            // traces rays.
            unsafe { device.create_shader_module_trusted(of, wgpu::ShaderRuntimeChecks::unchecked()) }
        })
    }

    fn compile(
        device: &wgpu::Device,
        kernel: &Kernel,
        overrides: &[(&str, f64)],
        cache: Option<&wgpu::PipelineCache>,
        clear: bool,
        module: impl FnOnce(wgpu::ShaderModuleDescriptor<'_>) -> wgpu::ShaderModule,
    ) -> Result<Self, Error> {
        let has = Capabilities::new(device.features(), &device.limits(), &device.adapter_info());
        let mut needs = kernel.needs();
        if !overrides.is_empty() {
            // Known at the defaults alone: left to the device.
            (needs.workgroup_size, needs.invocations, needs.workgroup_bytes) = ([1; 3], 1, 0);
        }
        let name = kernel.label();
        if !has.cover(&needs) {
            return Err(Error::Capabilities { name, needs, has });
        }
        let known = |name: &str| kernel.overrides.iter().any(|of| of.name == name);
        if let Some((name, _)) = overrides.iter().find(|(name, _)| !known(name)) {
            return Err(Error::Override { kernel: kernel.name, name: (*name).to_owned() });
        }
        checked(device, || {
            let label = Some(name.as_str());
            let source = wgpu::ShaderSource::Wgsl(kernel.source.into());
            let module = module(wgpu::ShaderModuleDescriptor { label, source });
            let entries: Vec<_> =
                (0..).zip(kernel.bindings).map(|(at, b)| layout_entry(at, b, kernel)).collect();
            let layout = device
                .create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
            let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label,
                bind_group_layouts: &[Some(&layout)],
                immediate_size: 0,
            });
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label,
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: Some(kernel.name),
                compilation_options: wgpu::PipelineCompilationOptions {
                    constants: overrides,
                    zero_initialize_workgroup_memory: clear,
                },
                cache,
            });
            Self { pipeline, layout, kernel: *kernel }
        })
    }

    /// The kernel that this is.
    #[must_use]
    pub const fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// Binds the caller's buffers, one for each of [`Kernel::bindings`], in their order.
    ///
    /// # Errors
    ///
    /// If there are more or fewer, or the device refuses them: for their usage, size or offset.
    pub fn bind<'a>(
        &self,
        device: &wgpu::Device,
        buffers: impl IntoIterator<Item = wgpu::BufferBinding<'a>>,
    ) -> Result<wgpu::BindGroup, Error> {
        let entries: Vec<_> = (0..)
            .zip(buffers)
            .map(|(binding, buffer)| wgpu::BindGroupEntry {
                binding,
                resource: wgpu::BindingResource::Buffer(buffer),
            })
            .collect();
        let (got, want) = (entries.len(), self.kernel.bindings.len());
        if got != want {
            return Err(Error::Buffers { kernel: self.kernel.name, got, want });
        }
        checked(device, || {
            device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(self.kernel.name),
                layout: &self.layout,
                entries: &entries,
            })
        })
    }

    /// Records one dispatch, of the workgroups that the kernel's `lower` counted.
    pub fn encode(&self, pass: &mut wgpu::ComputePass<'_>, group: &wgpu::BindGroup, groups: [u32; 3]) {
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, group, &[]);
        pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
    }
}

impl From<Features> for wgpu::Features {
    fn from(of: Features) -> Self {
        let mut features = Self::empty();
        features.set(Self::SHADER_F16, of.f16);
        features.set(Self::SUBGROUP, of.subgroup);
        features.set(Self::EXPERIMENTAL_COOPERATIVE_MATRIX, of.coop);
        features
    }
}

impl Capabilities {
    /// What a device or an adapter with these features and limits grants.
    #[must_use]
    pub const fn new(features: wgpu::Features, limits: &wgpu::Limits, info: &wgpu::AdapterInfo) -> Self {
        Self {
            features: Features {
                f16: features.contains(wgpu::Features::SHADER_F16),
                subgroup: features.contains(wgpu::Features::SUBGROUP),
                coop: features.contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
            },
            workgroup_size: [
                limits.max_compute_workgroup_size_x,
                limits.max_compute_workgroup_size_y,
                limits.max_compute_workgroup_size_z,
            ],
            invocations: limits.max_compute_invocations_per_workgroup,
            workgroup_bytes: limits.max_compute_workgroup_storage_size,
            subgroup_size: info.subgroup_min_size,
        }
    }

    /// `limits`, for a device that is yet to be requested, with those of a workgroup raised to these.
    #[must_use]
    pub fn raise(&self, mut limits: wgpu::Limits) -> wgpu::Limits {
        let [x, y, z] = self.workgroup_size;
        for (limit, of) in [
            (&mut limits.max_compute_workgroup_size_x, x),
            (&mut limits.max_compute_workgroup_size_y, y),
            (&mut limits.max_compute_workgroup_size_z, z),
            (&mut limits.max_compute_invocations_per_workgroup, self.invocations),
            (&mut limits.max_compute_workgroup_storage_size, self.workgroup_bytes),
        ] {
            *limit = of.max(*limit);
        }
        limits
    }
}

/// Does `what` and reports the device's objections as an error: of validation, or for want of memory.
///
/// # Errors
///
/// The first objection.
pub fn checked<T, E: From<wgpu::Error>>(device: &wgpu::Device, what: impl FnOnce() -> T) -> Result<T, E> {
    let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let done = what();
    // Inner scope first.
    let objections = [pollster::block_on(validation.pop()), pollster::block_on(memory.pop())];
    match objections.into_iter().flatten().next() {
        Some(objection) => Err(objection.into()),
        None => Ok(done),
    }
}

fn layout_entry(binding: u32, of: &Binding, kernel: &Kernel) -> wgpu::BindGroupLayoutEntry {
    let ty = match of.access {
        Access::Uniform => wgpu::BufferBindingType::Uniform,
        Access::Read => wgpu::BufferBindingType::Storage { read_only: true },
        Access::ReadWrite => wgpu::BufferBindingType::Storage { read_only: false },
    };
    // Known here, the size is checked when a buffer is bound and not at every dispatch.
    let bytes = of.element.map_or(kernel.params_bytes as u64, |element| element.bytes());
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty,
            has_dynamic_offset: false,
            min_binding_size: NonZeroU64::new(bytes),
        },
        count: None,
    }
}
