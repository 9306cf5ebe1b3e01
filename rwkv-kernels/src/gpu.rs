//! A device, pipelines built from reflected bindings, and checked dispatches: the one place that speaks to wgpu.

use std::io::Write as _;
use std::sync::OnceLock;

use wgpu::util::DeviceExt as _;

use crate::{Access, Binding};

/// Words on each side of a storage buffer of [`Device::run`]: 256 bytes, the alignment of a binding's offset.
const GUARD_LEN: usize = 64;

/// What the guard words hold: a NaN, so that reading one shows in the result as writing one shows here.
const GUARD: u32 = 0x7FC0_BEEF;

/// Why there is no device, or why it did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No adapter answered.
    #[error("no adapter")]
    Adapter(#[from] wgpu::RequestAdapterError),
    /// The adapter gave no device with the default limits.
    #[error("no device")]
    Device(#[from] wgpu::RequestDeviceError),
    /// The device refused a shader, a pipeline or a dispatch.
    #[error("refused")]
    Refused(#[from] wgpu::Error),
    /// The device did not finish.
    #[error("not finished")]
    Poll(#[from] wgpu::PollError),
    /// A finished buffer could not be read.
    #[error("not readable")]
    Map(#[from] wgpu::MapRangeError),
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

/// A device with WebGPU's default limits, the ones every kernel is checked against, and its queue.
#[derive(Debug)]
pub struct Device {
    device: wgpu::Device,
    queue: wgpu::Queue,
    name: String,
}

/// A compiled kernel. It belongs to the device that made it.
#[derive(Debug)]
pub struct Pipeline {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
    bindings: Vec<Binding>,
}

impl Device {
    /// Opens the fastest adapter there is.
    ///
    /// # Errors
    ///
    /// If there is no adapter, or it gives no device with WebGPU's default limits.
    pub fn open() -> Result<Self, Error> {
        pollster::block_on(async {
            let adapter = wgpu::Instance::default()
                .request_adapter(&wgpu::RequestAdapterOptions {
                    power_preference: wgpu::PowerPreference::HighPerformance,
                    ..Default::default()
                })
                .await?;
            let (device, queue) = adapter.request_device(&wgpu::DeviceDescriptor::default()).await?;
            let info = adapter.get_info();
            Ok(Self { device, queue, name: format!("{} ({})", info.name, info.backend) })
        })
    }

    /// The adapter's name and the API it is reached by.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compiles a kernel of one entry point for the layout that `bindings` describe.
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] if the source is invalid or does not fit the layout.
    pub fn pipeline(&self, source: &str, bindings: &[Binding]) -> Result<Pipeline, Error> {
        self.checked(|device| {
            let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: None,
                source: wgpu::ShaderSource::Wgsl(source.into()),
            });
            let entries: Vec<_> = (0..).zip(bindings).map(|(at, b)| layout_entry(at, b.access)).collect();
            let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
                label: None,
                entries: &entries,
            });
            let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(&layout)],
                immediate_size: 0,
            });
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: None,
                layout: Some(&pipeline_layout),
                module: &module,
                entry_point: None,
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                cache: None,
            });
            Ok(Pipeline { pipeline, layout, bindings: bindings.to_vec() })
        })
    }

    /// Runs one dispatch on fresh buffers and returns all of them as it left them. For tests, not for speed.
    ///
    /// `params` fills the uniform, `buffers` the storage bindings in order. Each buffer lies between guard words
    /// that the binding includes at its end, so that a kernel which runs over by up to 64 words is found out; what
    /// it does further out, the device drops or clamps.
    ///
    /// # Errors
    ///
    /// If the device refuses the call or fails in it, or the kernel wrote past the end of a buffer.
    pub fn run(
        &self,
        kernel: &Pipeline,
        params: &[u8],
        buffers: &[Vec<f32>],
        groups: [u32; 3],
    ) -> Result<Vec<Vec<f32>>, Error> {
        let storage: Vec<_> = kernel.bindings.iter().filter(|b| b.access != Access::Uniform).collect();
        if storage.len() != buffers.len() {
            return Err(Error::Buffers { got: buffers.len(), want: storage.len() });
        }
        let readable = self.checked(|device| {
            let uniform = device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
                label: None,
                contents: params,
                usage: wgpu::BufferUsages::UNIFORM,
            });
            let guarded: Vec<_> = buffers.iter().map(|data| guarded(device, data)).collect();
            let mut rest = guarded.iter();
            let entries: Vec<_> = (0..)
                .zip(&kernel.bindings)
                .filter_map(|(binding, b)| {
                    let (buffer, offset) = match b.access {
                        Access::Uniform => (&uniform, 0),
                        Access::Read | Access::ReadWrite => (rest.next()?, 4 * GUARD_LEN as u64),
                    };
                    let resource =
                        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset, size: None });
                    Some(wgpu::BindGroupEntry { binding, resource })
                })
                .collect();
            let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &kernel.layout,
                entries: &entries,
            });
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                pass.set_pipeline(&kernel.pipeline);
                pass.set_bind_group(0, &group, &[]);
                pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
            }
            let readable: Vec<_> = guarded.iter().map(|from| copied(device, &mut encoder, from)).collect();
            self.queue.submit([encoder.finish()]);
            for buffer in &readable {
                // A failure shows when the range is asked for below.
                buffer.slice(..).map_async(wgpu::MapMode::Read, |_| ());
            }
            device.poll(wgpu::PollType::wait_indefinitely())?;
            Ok(readable)
        })?;
        storage.iter().zip(&readable).map(|(b, buffer)| unguarded(b.name, buffer)).collect()
    }

    /// Does `what` and reports the device's objections as an error; by default they would panic.
    fn checked<T>(&self, what: impl FnOnce(&wgpu::Device) -> Result<T, Error>) -> Result<T, Error> {
        let memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let validation = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let done = what(&self.device);
        // Inner scope first. An objection explains what failed after it, so it goes before.
        let objections = [pollster::block_on(validation.pop()), pollster::block_on(memory.pop())];
        match objections.into_iter().flatten().next() {
            Some(objection) => Err(objection.into()),
            None => done,
        }
    }
}

fn layout_entry(binding: u32, access: Access) -> wgpu::BindGroupLayoutEntry {
    let ty = match access {
        Access::Uniform => wgpu::BufferBindingType::Uniform,
        Access::Read => wgpu::BufferBindingType::Storage { read_only: true },
        Access::ReadWrite => wgpu::BufferBindingType::Storage { read_only: false },
    };
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
        count: None,
    }
}

/// A storage buffer of guard words, `data`, guard words.
fn guarded(device: &wgpu::Device, data: &[f32]) -> wgpu::Buffer {
    let guard = [f32::from_bits(GUARD); GUARD_LEN];
    device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
        label: None,
        contents: bytemuck::cast_slice(&[&guard, data, &guard].concat()),
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

/// The data between intact guard words.
fn unguarded(name: &'static str, buffer: &wgpu::Buffer) -> Result<Vec<f32>, Error> {
    let words: Vec<u32> = bytemuck::pod_collect_to_vec(&buffer.slice(..).get_mapped_range()?);
    let (before, rest) = words.split_at(GUARD_LEN);
    let (data, after) = rest.split_at(rest.len() - GUARD_LEN);
    if before.iter().chain(after).any(|&word| word != GUARD) {
        return Err(Error::Guard(name));
    }
    Ok(data.iter().copied().map(f32::from_bits).collect())
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

#[cfg(test)]
mod tests {
    use super::{Error, device_for_tests};
    use crate::{Access, Binding};

    const OUT: &[Binding] = &[Binding { name: "out", access: Access::ReadWrite }];

    /// Writes `index[i]` of eight words.
    fn writes(index: &str) -> String {
        format!(
            "@group(0) @binding(0) var<storage, read_write> out: array<f32>;\n\
             @compute @workgroup_size(8)\n\
             fn main(@builtin(local_invocation_index) i: u32) {{ out[{index}] = f32(i); }}"
        )
    }

    #[test]
    fn guards_catch_what_runs_over() {
        let Some(device) = device_for_tests() else { return };
        let run = |source: &str| {
            let kernel = device.pipeline(source, OUT).unwrap();
            device.run(&kernel, &[], &[vec![f32::NAN; 8]], [1, 1, 1])
        };
        assert_eq!(run(&writes("i")).unwrap(), [[0., 1., 2., 3., 4., 5., 6., 7.]], "in bounds");
        assert!(matches!(run(&writes("i + 1u")), Err(Error::Guard("out"))), "one past the end");
    }

    #[test]
    fn objections_are_errors() {
        let Some(device) = device_for_tests() else { return };
        assert!(
            matches!(device.pipeline("fn f() -> f32 { return 1u; }", OUT), Err(Error::Refused(_))),
            "type"
        );
        assert!(matches!(device.pipeline(&writes("i"), &[]), Err(Error::Refused(_))), "layout lacks `out`");
        let kernel = device.pipeline(&writes("i"), OUT).unwrap();
        let run = |buffers: &[Vec<f32>], groups| device.run(&kernel, &[], buffers, groups);
        assert!(matches!(run(&[], [1; 3]), Err(Error::Buffers { got: 0, want: 1 })), "no buffer");
        assert!(matches!(run(&[vec![0.0; 8]], [1 << 20, 1, 1]), Err(Error::Refused(_))), "groups");
    }
}
