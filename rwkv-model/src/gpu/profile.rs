//! How long dispatches take on the device, from timestamps between them.

use rwkv_kernels::gpu::Device;

use super::plan::{Shape, Step};
use super::{Error, read, staging};

/// Dispatches between two calls of `take`, at most; later ones are not timed.
const CAPACITY: u32 = 4096;

/// What was timed.
#[derive(Clone, Debug, Default)]
pub struct Profile {
    /// Every dispatch, in order.
    pub dispatches: Vec<Dispatch>,
}

/// One dispatch.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// What it does in a model: `projections`, `heads`, ..
    pub part: &'static str,
    /// The kernel's variant.
    pub kernel: String,
    /// When it began, in nanoseconds since the first.
    pub start_ns: f64,
    /// How long it took, the gap before it included.
    pub ns: f64,
    /// Bytes of weights and states that it reads and writes for one row; of the channel mix's value, all weights,
    /// though it skips most.
    pub bytes: u64,
}

/// Records timestamps.
#[derive(Debug)]
pub(super) struct Recorder {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    /// Nanoseconds of a tick.
    period: f32,
    /// The dispatches that were timed, and whether a pass begins with them: a timestamp more.
    timed: Vec<(Dispatch, bool)>,
    used: u32,
}

impl Recorder {
    /// None where the device has no timestamps.
    pub(super) fn new(device: &Device) -> Option<Self> {
        let needed = wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_PASSES;
        let (device, queue) = (device.device(), device.queue());
        device.features().contains(needed).then(|| Self {
            queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("profile"),
                ty: wgpu::QueryType::Timestamp,
                count: CAPACITY,
            }),
            resolved: device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("profile"),
                size: u64::from(CAPACITY) * size_of::<u64>() as u64,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            }),
            period: queue.get_timestamp_period(),
            timed: Vec::new(),
            used: 0,
        })
    }

    /// Encodes a pass with a timestamp before and after every dispatch.
    pub(super) fn encode(&mut self, pass: &mut wgpu::ComputePass<'_>, steps: &[&Step], shape: Shape) {
        let room = (CAPACITY - self.used).saturating_sub(1) as usize;
        for (at, step) in steps.iter().enumerate() {
            if steps.len() <= room {
                if at == 0 {
                    self.stamp(pass);
                }
                let (kernel, part, bytes) = (step.pipeline.kernel().label(), step.part, step.bytes);
                self.timed.push((Dispatch { part, kernel, start_ns: 0.0, ns: 0.0, bytes }, at == 0));
            }
            step.encode(pass, shape);
            if steps.len() <= room {
                self.stamp(pass);
            }
        }
    }

    fn stamp(&mut self, pass: &mut wgpu::ComputePass<'_>) {
        pass.write_timestamp(&self.queries, self.used);
        self.used += 1;
    }

    /// Waits for what was submitted, and gives what was recorded.
    pub(super) fn take(&mut self, device: &Device) -> Result<Profile, Error> {
        let bytes = u64::from(self.used) * size_of::<u64>() as u64;
        if bytes == 0 {
            return Ok(Profile::default());
        }
        let staging = staging(device, bytes)?;
        let mut encoder = device.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        // Here and not after each pass, all of which would take 0.06 ms longer, those that are not timed too.
        encoder.resolve_query_set(&self.queries, 0..self.used, &self.resolved, 0);
        encoder.copy_buffer_to_buffer(&self.resolved, 0, &staging, 0, bytes);
        device.queue().submit([encoder.finish()]);
        let ticks: Vec<u64> = read(device, &staging)?;
        self.used = 0;

        let first = ticks[0];
        #[expect(clippy::cast_precision_loss, reason = "ticks of less than a day")]
        let since = |from: u64, to: u64| to.saturating_sub(from) as f64 * f64::from(self.period);
        let (mut dispatches, mut at) = (Vec::new(), 0);
        for (dispatch, begins) in self.timed.drain(..) {
            at += usize::from(begins);
            let (start, end) = (ticks[at - 1], ticks[at]);
            dispatches.push(Dispatch { start_ns: since(first, start), ns: since(start, end), ..dispatch });
            at += 1;
        }
        Ok(Profile { dispatches })
    }
}
