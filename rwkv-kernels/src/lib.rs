//! The GPU kernels of RWKV-7: WGSL sources, validated and reflected when the crate is built.
//!
//! | part | what it holds |
//! |---|---|
//! | [`kernels`] | one folder per kernel: its WGSL in variants, its uniform block, its lowering |
//! | [`Kernel`] | one variant as data: source, bindings, overrides, what it needs |
//! | [`choose`], [`Capabilities`] | the best variant that a device can run |
//! | `pipeline` | a kernel on the caller's device, in the caller's pass (feature `gpu`, on by default) |
//! | `gpu` | a device of its own, chosen among the adapters there are, and checked dispatches for tests (feature `gpu`) |
//!
//! A kernel is data: [`Kernel`]s, and `lower(dims)`, which turns the extents of one call into the uniform block and
//! the workgroup count. What runs it is the caller's choice:
//!
#![cfg_attr(feature = "gpu", doc = "```")]
#![cfg_attr(not(feature = "gpu"), doc = "```ignore")]
//! use rwkv_kernels::kernels::time_mix::{self, Dims};
//! use rwkv_kernels::pipeline::Pipeline;
//! use rwkv_kernels::{Capabilities, choose};
//! use wgpu::util::DeviceExt as _;
//!
//! /// One step of a program that has its own device: all that the heads of a layer do, in one dispatch.
//! ///
//! /// `buffers` are the program's, in the order of `kernel.bindings` after the parameters: segments, inputs, weights,
//! /// up, vectors, state, v_first, out.
//! fn heads(device: &wgpu::Device, queue: &wgpu::Queue, buffers: &[wgpu::Buffer; 8], dims: Dims)
//!     -> Result<(), Box<dyn std::error::Error>> {
//!     // Once per device: the best variant that it can run, with its overrides at their defaults.
//!     let capabilities = Capabilities::new(device.features(), &device.limits(), &device.adapter_info());
//!     let kernel = choose(time_mix::VARIANTS, &capabilities).ok_or("less than WebGPU")?;
//!     let pipeline = Pipeline::new(device, kernel, &[])?;
//!
//!     // Once per shape and set of buffers.
//!     let [lanes, ..] = kernel.workgroup_size;
//!     let (params, groups) = time_mix::lower(dims, Some(lanes))?;
//!     let params = device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
//!         label: None,
//!         contents: bytemuck::bytes_of(&params),
//!         usage: wgpu::BufferUsages::UNIFORM,
//!     });
//!     let all = [&params].into_iter().chain(buffers);
//!     let group = pipeline.bind(device, all.map(wgpu::Buffer::as_entire_buffer_binding))?;
//!
//!     // Per token: into the pass that the program records anyway.
//!     let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
//!     {
//!         let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
//!         pipeline.encode(&mut pass, &group, groups);
//!     }
//!     queue.submit([encoder.finish()]);
//!     Ok(())
//! }
//! ```
//!
//! `examples/foreign.rs` is such a program, whole.
//!
//! # What it never does
//!
//! - A kernel never owns a device, a buffer or a queue, and never asks what it runs on.
//! - A kernel never defines an operation: its twin does, the module of the same name in [`rwkv_core::ops`], or of what that
//!   begins with where an operation has several kernels (`wkv7_scan` is of `wkv7`). When the two disagree, the kernel is
//!   wrong.
//! - No broken shader gets past the build: `build.rs` parses and validates each one, holds it to the default
//!   limits of WebGPU and to the capabilities that its file name grants, and fails with its path, line and column.
//! - No binding is written twice: layouts are built from [`Kernel::bindings`], uniform blocks are `Params`, and both
//!   are reflected from the WGSL.
//!
//! # Adding a kernel `foo`
//!
//! 1. Define the operation in `rwkv-core/src/ops/foo.rs`.
//! 2. Make the folder `src/kernels/foo/` with `foo.wgsl`, whose first line names the twin, whose entry point is
//!    `foo`, and whose uniform, if any, is of a struct `Params` of `u32` and `f32` fields. It runs on every adapter.
//! 3. In its `mod.rs`, re-export `crate::reflected::foo` and write
//!    `lower(dims) -> Result<(Params, [u32; 3]), Error>`; add the module to `kernels/mod.rs`.
//! 4. In its `tests.rs`, draw operands from the operation's domain, poison the outputs with NaN, and compare every
//!    variant with the twin within a limit that an error analysis gives. Break the kernel once and see the test fail.
//!
//! A variant is a file `foo_<suffix>.wgsl` beside it, with the same entry point, bindings and `Params`. The words of
//! the suffix, joined by `_`, grant what WGSL then may use, and raise the limits of a workgroup to 1024 invocations
//! and 48 KiB:
//!
//! | word | grants | the file opens, after its comment, with |
//! |---|---|---|
//! | `f16` | the type `f16` | `enable f16;` |
//! | `subgroup` | subgroup operations | |
//! | `coop` | cooperative matrices, and `f16` | `enable wgpu_cooperative_matrix;` |
//!
//! Shared WGSL is in `src/wgsl/`. Lines `//use <helper>` directly after a file's first line join it to the kernel;
//! a helper may use others, and declares no binding and no entry point. An `override` has a default, at which the
//! gate checks the kernel.
//!
//! A helper has variants as a kernel has: `reduce_subgroup.wgsl` declares what `reduce.wgsl` declares. A kernel that
//! uses `reduce` then has a variant `subgroup` too, of the same text, without a file of its own. A line `//subgroups of N` beside those
//! lines says that it takes subgroups of N invocations at least: no other device is given that variant.

#[cfg(feature = "gpu")]
pub mod gpu;
pub mod kernels;
#[cfg(feature = "gpu")]
pub mod pipeline;

/// One variant of a kernel, as reflected from its WGSL.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kernel {
    /// The folder and the entry point. The twin has this name, or one that it begins with.
    pub name: &'static str,
    /// What the file name adds to it, such as `subgroup`; empty for the portable variant.
    pub suffix: &'static str,
    /// The WGSL, helpers included.
    pub source: &'static str,
    /// Invocations of one workgroup, by dimension, with every override at its default.
    pub workgroup_size: [u32; 3],
    /// Workgroup memory, with every override at its default.
    pub workgroup_bytes: u32,
    /// Bindings of group 0, in order. All variants of a kernel have the same, but for [`Binding::element`].
    pub bindings: &'static [Binding],
    /// Size of the uniform block `Params`; 0 if there is none.
    pub params_bytes: usize,
    /// What a pipeline may set.
    pub overrides: &'static [Override],
    /// What the WGSL uses beyond the defaults of WebGPU.
    pub features: Features,
    /// Invocations of a subgroup, at least, that it takes for granted; 0 if it needs no more than the four that WebGPU promises.
    pub subgroup_size: u32,
}

/// One binding of group 0; its number is its place in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Binding {
    /// The variable's name in the WGSL.
    pub name: &'static str,
    /// How it is used.
    pub access: Access,
    /// What the storage buffer is an array of; `None` for the uniform, which is a `Params`.
    pub element: Option<Element>,
}

/// How a kernel uses a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A uniform block.
    Uniform,
    /// A storage buffer that is only read.
    Read,
    /// A storage buffer that is read and written.
    ReadWrite,
}

/// An element of a storage buffer: a scalar or a vector. The buffer holds a whole number of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Element {
    /// The type of the numbers.
    pub scalar: Scalar,
    /// How many: 1, 2 or 4.
    pub lanes: u8,
}

/// The type of a number in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scalar {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// Unsigned.
    U32,
    /// Signed.
    I32,
}

/// A constant of the WGSL that a pipeline may set.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Override {
    /// Its name in the WGSL.
    pub name: &'static str,
    /// Its value if it is not set; of a `bool`, 0 or 1.
    pub default: f64,
}

/// What WGSL can use only where the device grants it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features {
    /// The type `f16`.
    pub f16: bool,
    /// Subgroup operations.
    pub subgroup: bool,
    /// Cooperative matrices: of 16 by 16 by 16, halves that are summed in single precision, in subgroups of 32 and no others.
    pub coop: bool,
}

/// What a device grants, or a kernel needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Capabilities {
    /// Features.
    pub features: Features,
    /// Invocations of one workgroup along each dimension, at most.
    pub workgroup_size: [u32; 3],
    /// Invocations of one workgroup in all, at most.
    pub invocations: u32,
    /// Workgroup memory, at most.
    pub workgroup_bytes: u32,
    /// Invocations of a subgroup, at least.
    pub subgroup_size: u32,
}

impl Element {
    /// Bytes in the buffer.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        let scalar = match self.scalar {
            Scalar::F16 => 2,
            Scalar::F32 | Scalar::U32 | Scalar::I32 => 4,
        };
        scalar * self.lanes as u64
    }
}

impl Kernel {
    /// Name and suffix, as its file is called.
    #[must_use]
    pub fn label(&self) -> String {
        let joint = if self.suffix.is_empty() { "" } else { "_" };
        [self.name, joint, self.suffix].concat()
    }

    /// What it needs, with every override at its default.
    #[must_use]
    pub const fn needs(&self) -> Capabilities {
        let [x, y, z] = self.workgroup_size;
        Capabilities {
            features: self.features,
            workgroup_size: self.workgroup_size,
            invocations: x * y * z,
            workgroup_bytes: self.workgroup_bytes,
            subgroup_size: self.subgroup_size,
        }
    }
}

impl Capabilities {
    /// What every WebGPU device grants.
    pub const WEBGPU: Self = Self {
        features: Features { f16: false, subgroup: false, coop: false },
        workgroup_size: [256, 256, 64],
        invocations: 256,
        workgroup_bytes: 16 << 10,
        subgroup_size: 0,
    };

    /// Whether a device that grants this can run what needs that.
    #[must_use]
    pub fn cover(&self, needs: &Self) -> bool {
        let (own, of) = (self.features, needs.features);
        (own.f16 || !of.f16)
            && (own.subgroup || !of.subgroup)
            && (own.coop || !of.coop)
            && self.workgroup_size.iter().zip(needs.workgroup_size).all(|(&own, of)| own >= of)
            && self.invocations >= needs.invocations
            && self.workgroup_bytes >= needs.workgroup_bytes
            && self.subgroup_size >= needs.subgroup_size
    }
}

/// The best of the variants that the device can run: the last, in the order of `VARIANTS`.
///
/// `None` only if the portable one is not among them, or the device has less than WebGPU's default limits. A caller
/// whose buffers hold a certain type filters the variants by [`Binding::element`] first.
pub fn choose<'a>(
    variants: impl IntoIterator<Item = &'a Kernel>,
    device: &Capabilities,
) -> Option<&'a Kernel> {
    variants.into_iter().filter(|kernel| device.cover(&kernel.needs())).last()
}

mod reflected {
    //! What `build.rs` reflected.
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}

#[cfg(test)]
mod tests {
    use super::{Capabilities, Features, Override, choose};
    use crate::kernels::layer_norm::VARIANTS;
    use crate::kernels::{mix_in, wkv7_fours};

    #[test]
    fn the_best_variant_that_fits_is_chosen() {
        let suffix = |device| choose(VARIANTS, &device).map(|kernel| kernel.suffix);
        let webgpu = Capabilities::WEBGPU;
        let with = Features { subgroup: true, ..webgpu.features };
        let all = Features { f16: true, subgroup: true, coop: true };
        assert_eq!(suffix(webgpu), Some(""), "portable");
        assert_eq!(suffix(Capabilities { features: with, ..webgpu }), Some("subgroup"), "what it needs");
        assert_eq!(suffix(Capabilities { features: all, ..webgpu }), Some("subgroup"), "more than it needs");
        assert_eq!(suffix(Capabilities { invocations: 255, ..webgpu }), None, "less than WebGPU");
        assert_eq!(suffix(Capabilities { workgroup_bytes: 1023, ..webgpu }), None, "256 partials");
        assert_eq!(suffix(Capabilities { workgroup_size: [255, 1, 1], ..webgpu }), None, "one dimension");
    }

    #[test]
    fn subgroups_must_be_large_enough() {
        let of = |variants, subgroup_size| {
            let features = Features { subgroup: true, ..Capabilities::WEBGPU.features };
            let device = Capabilities { features, subgroup_size, ..Capabilities::WEBGPU };
            choose(variants, &device).map(|kernel| (kernel.suffix, kernel.subgroup_size))
        };
        assert_eq!(of(mix_in::VARIANTS, 7), Some(("", 0)), "too few");
        assert_eq!(of(mix_in::VARIANTS, 8), Some(("subgroup", 8)), "as many as a helper takes");
        assert_eq!(of(wkv7_fours::VARIANTS, 8), Some(("", 0)), "another takes more");
        assert_eq!(of(wkv7_fours::VARIANTS, 16), Some(("subgroup", 16)), "as many as that takes");
        assert_eq!(of(VARIANTS, 0), Some(("subgroup", 0)), "of what WebGPU promises");
    }

    #[test]
    fn what_is_reflected_is_what_the_wgsl_says() {
        let portable = &VARIANTS[0];
        assert_eq!((portable.name, portable.suffix), ("layer_norm", ""), "the portable variant is first");
        assert_eq!((portable.workgroup_size, portable.workgroup_bytes), ([256, 1, 1], 1024), "from `LANES`");
        let overrides = [("LANES", 256.0), ("HALVES", 0.0)].map(|(name, default)| Override { name, default });
        assert_eq!(portable.overrides, overrides, "its own, and a helper's");
        let names: Vec<_> = portable.bindings.iter().map(|b| b.name).collect();
        assert_eq!(names, ["params", "x", "rows", "gain", "bias", "y"], "in order");
        assert_eq!(portable.params_bytes, size_of::<crate::kernels::layer_norm::Params>(), "one struct");
    }
}
