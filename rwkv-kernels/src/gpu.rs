//! A device of its own, chosen among the adapters there are, and checked dispatches for tests and first steps. A
//! program that has a device takes [`crate::pipeline`].

mod cache;

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use wgpu::util::DeviceExt as _;

use crate::pipeline::{self, Pipeline, checked};
use crate::{Access, Capabilities, Features, Kernel};

/// What lies on each side of a storage buffer of [`Device::run`]: 256 bytes, the alignment of a binding's offset. Read
/// as `f32` or as `f16` it is NaN, so that reading it shows in the result as writing it shows here.
const GUARD: &[u8] = [[0xC1, 0xFF]; 128].as_flattened();

/// Why there is no device, or why it did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no adapter, or none of that name or number.
    #[error("no adapter{}; there are {found:?}", wanted.as_ref().map(|of| format!(" `{of}`")).unwrap_or_default())]
    Adapter {
        /// What was asked for, if anything.
        wanted: Option<String>,
        /// The names of those there are.
        found: Vec<String>,
    },
    /// The adapter gave no device with what it said it has.
    #[error("no device")]
    Device(#[from] wgpu::RequestDeviceError),
    /// The kernel could not be compiled or bound.
    #[error("no pipeline")]
    Pipeline(#[from] pipeline::Error),
    /// The device refused a buffer or a dispatch.
    #[error("refused")]
    Refused(#[from] wgpu::Error),
    /// The device did not finish.
    #[error("not finished")]
    Poll(#[from] wgpu::PollError),
    /// A finished buffer could not be read.
    #[error("not readable")]
    Map(#[from] wgpu::MapRangeError),
    /// The compiled kernels could not be kept.
    #[error("{}: {error}", path.display())]
    Cache {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// There is not one buffer per storage binding.
    #[error("{got} buffers for {want} storage bindings")]
    Buffers {
        /// Buffers passed.
        got: usize,
        /// Storage bindings of the kernel.
        want: usize,
    },
    /// The kernel wrote past the end of a buffer.
    #[error("wrote past the end of `{0}`")]
    Guard(&'static str),
}

/// The environment variable that names an adapter where the program does not.
pub const ADAPTER: &str = "RWKV_ADAPTER";

/// Which adapter, and what it is asked for beyond WebGPU.
#[derive(Clone, Debug)]
pub struct Request {
    /// A part of the adapter's name, whatever the case, or its number among [`adapters`]. By default what
    /// [`ADAPTER`] says, and without it the fastest there is.
    pub adapter: Option<String>,
    /// Features to ask for, as far as it has them: of cooperative matrices, those that kernels are written for. They are
    /// experimental in wgpu, and a shader that has them is beyond its checks: with them, a device is for this crate's
    /// kernels, or for others that keep within their arrays themselves.
    pub features: Features,
    /// Whether to ask for timestamps between dispatches, if it has them.
    pub timestamps: bool,
    /// Where compiled kernels are kept for the next time, if it can: see [`Device::save_cache`].
    pub cache: Option<PathBuf>,
}

impl Default for Request {
    /// All that kernels use.
    fn default() -> Self {
        let features = Features { f16: true, subgroup: true, coop: true };
        Self { adapter: None, features, timestamps: false, cache: None }
    }
}

/// The adapters that a device can be opened on, each with its name and kind, in the order of their numbers: from the
/// fastest kind on, so that number 0 is the default.
#[must_use]
pub fn adapters() -> Vec<wgpu::AdapterInfo> {
    found().iter().map(wgpu::Adapter::get_info).collect()
}

/// The adapters, the fastest kind first. One device may be there by several APIs.
fn found() -> Vec<wgpu::Adapter> {
    let mut found = pollster::block_on(wgpu::Instance::default().enumerate_adapters(wgpu::Backends::PRIMARY));
    let rank = |adapter: &wgpu::Adapter| match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    };
    found.sort_by_key(rank);
    found
}

/// A device with WebGPU's default limits, but for those of a workgroup and of the sizes of buffers, which are the
/// adapter's, and its queue.
#[derive(Debug)]
pub struct Device {
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: wgpu::AdapterInfo,
    fault: Arc<OnceLock<String>>,
    cache: Option<(cache::CacheFile, wgpu::PipelineCache)>,
}

impl Device {
    /// Opens the default adapter with the features that kernels use.
    ///
    /// # Errors
    ///
    /// As [`Self::open_with`].
    pub fn open() -> Result<Self, Error> {
        Self::open_with(&Request::default())
    }

    /// Opens an adapter.
    ///
    /// # Errors
    ///
    /// If there is no such adapter, or it gives no device with WebGPU's default limits.
    pub fn open_with(request: &Request) -> Result<Self, Error> {
        let wanted = request.adapter.clone().or_else(|| std::env::var(ADAPTER).ok());
        let found = found();
        let name = |adapter: &wgpu::Adapter| adapter.get_info().name;
        let chosen = match &wanted {
            None => found.first(),
            Some(of) => match of.parse::<usize>() {
                Ok(number) => found.get(number),
                Err(_) => found.iter().find(|a| name(a).to_lowercase().contains(&of.to_lowercase())),
            },
        };
        let Some(adapter) = chosen else {
            return Err(Error::Adapter { wanted, found: found.iter().map(name).collect() });
        };
        let grants = Capabilities::new(adapter.features(), &adapter.limits(), &adapter.get_info());
        let coop = request.features.coop && has_coop(adapter);
        let mut features = Features { coop, ..request.features }.into();
        if request.timestamps {
            features |= wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES;
        }
        let cache = request.cache.as_ref().and_then(|path| cache::CacheFile::new(path, &adapter.get_info()));
        let cache = cache.filter(|_| adapter.features().contains(wgpu::Features::PIPELINE_CACHE));
        if cache.is_some() {
            features |= wgpu::Features::PIPELINE_CACHE;
        }
        let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor {
            experimental_features: if coop { experimental() } else { wgpu::ExperimentalFeatures::disabled() },
            required_features: adapter.features() & features,
            required_limits: wgpu::Limits {
                max_storage_buffer_binding_size: adapter.limits().max_storage_buffer_binding_size,
                max_buffer_size: adapter.limits().max_buffer_size,
                ..grants.raise(wgpu::Limits::default())
            },
            ..Default::default()
        }))?;
        let fault = Arc::new(OnceLock::new());
        let note = |fault: &Arc<OnceLock<String>>, what: String| {
            let _ = fault.set(what); // the first is the cause
        };
        let of_error = Arc::clone(&fault);
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| note(&of_error, error.to_string())));
        let of_loss = Arc::clone(&fault);
        device.set_device_lost_callback(move |reason, what| {
            note(&of_loss, format!("lost ({reason:?}): {what}"));
        });
        let cache = cache.map(|file| {
            let cache = file.load(&device);
            (file, cache)
        });
        Ok(Self { device, queue, info: adapter.get_info(), fault, cache })
    }

    /// The adapter's name and the API it is reached by.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{} ({})", self.info.name, self.info.backend)
    }

    /// The adapter.
    #[must_use]
    pub const fn info(&self) -> &wgpu::AdapterInfo {
        &self.info
    }

    /// Whether it is a GPU, and not a driver that runs on the CPU.
    #[must_use]
    pub fn is_gpu(&self) -> bool {
        self.info.device_type != wgpu::DeviceType::Cpu
    }

    /// The device.
    #[must_use]
    pub const fn device(&self) -> &wgpu::Device {
        &self.device
    }

    /// Its queue.
    #[must_use]
    pub const fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    /// Compiled kernels of earlier times, for [`Pipeline::new_unchecked`], if [`Request::cache`] was given and the device
    /// can.
    #[must_use]
    pub fn cache(&self) -> Option<&wgpu::PipelineCache> {
        self.cache.as_ref().map(|(_, cache)| cache)
    }

    /// Keeps what was compiled for the next time, if [`Request::cache`] was given and the device can. A file there is
    /// replaced as a whole or not at all.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn save_cache(&self) -> Result<(), Error> {
        match &self.cache {
            Some((file, cache)) => {
                file.save(cache).map_err(|error| Error::Cache { path: file.path().into(), error })
            }
            None => Ok(()),
        }
    }

    /// What went wrong outside of any call that could report it: the device was lost, or refused what it was given.
    /// Nothing that it computed since can be relied upon.
    #[must_use]
    pub fn fault(&self) -> Option<&str> {
        self.fault.get().map(String::as_str)
    }

    /// What it grants, for [`crate::choose`].
    #[must_use]
    pub fn capabilities(&self) -> Capabilities {
        Capabilities::new(self.device.features(), &self.device.limits(), &self.info)
    }

    /// Compiles a kernel, with `overrides` set by name.
    ///
    /// # Errors
    ///
    /// As [`Pipeline::new`].
    pub fn pipeline(&self, kernel: &Kernel, overrides: &[(&str, f64)]) -> Result<Pipeline, Error> {
        Ok(Pipeline::new(&self.device, kernel, overrides)?)
    }

    /// Runs one dispatch on fresh buffers and returns all of them as it left them. For tests, not for speed.
    ///
    /// `params` fills the uniform, `buffers` the storage bindings in order. Each buffer lies between 256 guard bytes
    /// that the binding includes at its end, so that a kernel which runs over by up to so much is found out; what
    /// it does further out, the device drops or clamps.
    ///
    /// # Errors
    ///
    /// If the device refuses the call or fails in it, or the kernel wrote past the end of a buffer.
    pub fn run<T: bytemuck::Pod>(
        &self,
        pipeline: &Pipeline,
        params: &[u8],
        buffers: &[Vec<T>],
        groups: [u32; 3],
    ) -> Result<Vec<Vec<T>>, Error> {
        let device = &self.device;
        let bindings = pipeline.kernel().bindings;
        let storage: Vec<_> = bindings.iter().filter(|b| b.access != Access::Uniform).collect();
        if storage.len() != buffers.len() {
            return Err(Error::Buffers { got: buffers.len(), want: storage.len() });
        }
        let made = checked::<_, Error>(device, || {
            let uniform = device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
                label: None,
                contents: params,
                usage: wgpu::BufferUsages::UNIFORM,
            });
            let guarded: Vec<_> =
                buffers.iter().map(|data| guarded(device, bytemuck::cast_slice(data))).collect();
            (uniform, guarded)
        });
        let (uniform, guarded) = made?;
        let mut rest = guarded.iter();
        let bound = bindings.iter().filter_map(|b| {
            let (buffer, offset) = match b.access {
                Access::Uniform => (&uniform, 0),
                Access::Read | Access::ReadWrite => (rest.next()?, GUARD.len() as u64),
            };
            Some(wgpu::BufferBinding { buffer, offset, size: None })
        });
        let group = pipeline.bind(device, bound)?;
        let readable = checked::<_, Error>(device, || {
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                pipeline.encode(&mut pass, &group, groups);
            }
            let readable: Vec<_> = guarded.iter().map(|from| copied(device, &mut encoder, from)).collect();
            self.queue.submit([encoder.finish()]);
            for buffer in &readable {
                // A failure shows when the range is asked for below.
                buffer.slice(..).map_async(wgpu::MapMode::Read, |_| ());
            }
            readable
        })?;
        device.poll(wgpu::PollType::wait_indefinitely())?;
        let with_bindings = storage.iter().zip(&readable).zip(buffers);
        with_bindings.map(|((b, buffer), data)| unguarded(b.name, buffer, data.len())).collect()
    }
}

/// Whether the adapter has the cooperative matrices that kernels are written for: 16 by 16, halves that are summed in
/// `f32`, of subgroups of 32, since the kernels divide their workgroups by that.
fn has_coop(adapter: &wgpu::Adapter) -> bool {
    let of = adapter.get_info();
    let (half, single) = (wgpu::CooperativeScalarType::F16, wgpu::CooperativeScalarType::F32);
    let suits = |of: &wgpu::CooperativeMatrixProperties| {
        (of.m_size, of.n_size, of.k_size) == (16, 16, 16) && (of.ab_type, of.cr_type) == (half, single)
    };
    adapter.features().contains(wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16)
        && (of.subgroup_min_size, of.subgroup_max_size) == (SUBGROUP, SUBGROUP)
        && adapter.cooperative_matrix_properties().iter().any(suits)
}

/// Invocations of a subgroup that multiplies matrices.
const SUBGROUP: u32 = 32;

/// Leave to ask for cooperative matrices.
#[expect(unsafe_code, reason = "wgpu does not check what is loaded and stored as a matrix")]
fn experimental() -> wgpu::ExperimentalFeatures {
    // SAFETY: what the feature lacks is checks: that a matrix lies within the array that it is loaded from or stored to,
    // and that all of a subgroup take part. The kernels of this crate load from workgroup memory alone, at places that
    // follow from a tile which `lower` has admitted, and in control flow that is the same for the whole workgroup, which
    // is whole subgroups, of the size that `has_coop` asks for. Of other kernels, `Request::features` warns.
    unsafe { wgpu::ExperimentalFeatures::enabled() }
}

/// A storage buffer of guard bytes, `data`, guard bytes.
fn guarded(device: &wgpu::Device, data: &[u8]) -> wgpu::Buffer {
    device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
        label: None,
        contents: &[GUARD, data, GUARD].concat(),
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
    })
}

/// A buffer the host can read, into which `encoder` copies `from`.
fn copied(device: &wgpu::Device, encoder: &mut wgpu::CommandEncoder, from: &wgpu::Buffer) -> wgpu::Buffer {
    let to = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: from.size(),
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    encoder.copy_buffer_to_buffer(from, 0, &to, 0, from.size());
    to
}

/// The `len` elements between intact guard bytes.
fn unguarded<T: bytemuck::Pod>(name: &'static str, of: &wgpu::Buffer, len: usize) -> Result<Vec<T>, Error> {
    let bytes = of.slice(..).get_mapped_range()?;
    let (before, rest) = bytes.split_at(GUARD.len());
    let (data, after) = rest.split_at(len * size_of::<T>());
    // A buffer's length is rounded up to a word.
    if before != GUARD || !after.starts_with(GUARD) {
        return Err(Error::Guard(name));
    }
    Ok(bytemuck::pod_collect_to_vec(data))
}

/// The device that tests share, or `None`, with a word on standard error, where there is none.
///
/// # Panics
///
/// Without a device if the environment has `RWKV_GPU=required`: CI must not skip in silence.
pub fn device_for_tests() -> Option<&'static Device> {
    static DEVICE: OnceLock<Result<Device, Error>> = OnceLock::new();
    match DEVICE.get_or_init(Device::open) {
        Ok(device) => Some(device),
        Err(e) => {
            let required = std::env::var_os("RWKV_GPU").is_some_and(|value| value == "required");
            assert!(!required, "RWKV_GPU=required, but: {e:?}");
            // Not by `eprintln`, which the test harness keeps to itself when a test passes.
            let test = std::thread::current();
            let test = test.name().unwrap_or("a test");
            let told = writeln!(std::io::stderr(), "{test}: SKIPPED, {e} (RWKV_GPU=required forbids this)");
            told.ok().and(None)
        }
    }
}

/// Each of the variants that the device of the tests has, compiled; those it lacks are named on standard error.
///
/// # Panics
///
/// As [`device_for_tests`], and if the device refuses a variant that it should run.
pub fn variants_for_tests(
    variants: &[Kernel],
    overrides: &[(&str, f64)],
) -> Vec<(&'static Device, Pipeline)> {
    let Some(device) = device_for_tests() else { return Vec::new() };
    let mut compiled = Vec::new();
    for kernel in variants {
        if !device.capabilities().cover(&kernel.needs()) {
            // A lost line is no reason to fail.
            let _ =
                writeln!(std::io::stderr(), "{}: SKIPPED, {} cannot run it", kernel.label(), device.name());
            continue;
        }
        match device.pipeline(kernel, overrides) {
            Ok(pipeline) => compiled.push((device, pipeline)),
            Err(e) => panic!("{}: {e:?}", kernel.label()),
        }
    }
    compiled
}

#[cfg(test)]
mod tests {
    use super::{Error, device_for_tests};
    use crate::pipeline::{self, Pipeline};
    use crate::{Access, Binding, Element, Features, Kernel, Scalar};

    const OUT: &[Binding] = &[Binding {
        name: "out",
        access: Access::ReadWrite,
        element: Some(Element { scalar: Scalar::F32, lanes: 1 }),
    }];

    /// A kernel `main` that writes `index[i]` of eight words.
    fn writes(index: &str) -> Kernel {
        let source = format!(
            "@group(0) @binding(0) var<storage, read_write> out: array<f32>;\n\
             @compute @workgroup_size(8)\n\
             fn main(@builtin(local_invocation_index) i: u32) {{ out[{index}] = f32(i); }}"
        );
        Kernel {
            name: "main",
            suffix: "",
            source: source.leak(),
            workgroup_size: [8, 1, 1],
            workgroup_bytes: 0,
            bindings: OUT,
            params_bytes: 0,
            overrides: &[],
            features: Features::default(),
            subgroup_size: 0,
        }
    }

    #[test]
    fn guards_catch_what_runs_over() {
        let Some(device) = device_for_tests() else { return };
        let run = |index| {
            let kernel = device.pipeline(&writes(index), &[]).unwrap();
            device.run(&kernel, &[], &[vec![f32::NAN; 8]], [1, 1, 1])
        };
        assert_eq!(run("i").unwrap(), [[0., 1., 2., 3., 4., 5., 6., 7.]], "in bounds");
        assert!(matches!(run("i + 1u"), Err(Error::Guard("out"))), "one past the end");
    }

    #[test]
    fn objections_are_errors() {
        let Some(device) = device_for_tests() else { return };
        let refused =
            |made: Result<Pipeline, Error>| matches!(made, Err(Error::Pipeline(pipeline::Error::Refused(_))));
        let good = writes("i");
        assert!(refused(device.pipeline(&writes("1.5"), &[])), "type");
        assert!(refused(device.pipeline(&Kernel { bindings: &[], ..good }, &[])), "layout lacks `out`");
        assert!(refused(device.pipeline(&Kernel { name: "other", ..good }, &[])), "entry point");
        assert!(
            matches!(
                device.pipeline(&good, &[("TILE", 8.0)]),
                Err(Error::Pipeline(pipeline::Error::Override { name, .. })) if name == "TILE"
            ),
            "override"
        );
        let greedy = Kernel { workgroup_bytes: 1 << 30, ..good };
        assert!(
            matches!(
                device.pipeline(&greedy, &[]),
                Err(Error::Pipeline(pipeline::Error::Capabilities { .. }))
            ),
            "no workgroup has so much memory"
        );
        let kernel = device.pipeline(&good, &[]).unwrap();
        let run = |buffers: &[Vec<f32>], groups| device.run(&kernel, &[], buffers, groups);
        assert!(matches!(run(&[], [1; 3]), Err(Error::Buffers { got: 0, want: 1 })), "no buffer");
        assert!(matches!(run(&[vec![0.0; 8]], [1 << 20, 1, 1]), Err(Error::Refused(_))), "groups");
        assert!(
            matches!(kernel.bind(&device.device, []), Err(pipeline::Error::Buffers { got: 0, want: 1, .. })),
            "no buffer"
        );
    }
}
