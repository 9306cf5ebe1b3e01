//! What the machine gives: a copy and a product of matrices, timed beside every case. They are the ceilings that figures
//! are shares of, and the controls that tell when the machine itself has changed.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, ensure};
use half::f16;
use rayon::prelude::*;
use rwkv_core::ElementType;
use rwkv_core::fast::linear::Packed;
use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::linear::Linear;
use rwkv_core::ops::matmul::Rows;
use rwkv_core::real::Elements;
use rwkv_kernels::choose;
use rwkv_kernels::gpu::{Device, Request};
use rwkv_kernels::kernels::matmul::{self, COOP_TILES_UNSPLIT, TILES};
use rwkv_kernels::kernels::weights::set;
use rwkv_kernels::kernels::{add, extents};
use rwkv_kernels::pipeline::Pipeline;
use wgpu::util::DeviceExt as _;

/// One of the two, which runs for some milliseconds.
pub(crate) struct Control {
    run: Box<dyn FnMut() -> anyhow::Result<()>>,
    /// Bytes read and written, or operations.
    work: f64,
}

impl Control {
    /// How fast it is: bytes or operations a second.
    pub(crate) fn rate(&mut self) -> anyhow::Result<f64> {
        let begun = Instant::now();
        (self.run)()?;
        Ok(self.work / begun.elapsed().as_secs_f64())
    }
}

/// Copies, of as many bytes as a decode step reads, and products.
pub(crate) struct Controls {
    pub(crate) copy: Control,
    pub(crate) matmul: Control,
}

/// Elements copied by a task.
const TASK: usize = 1 << 16;

/// Extents of the products: rows of as many columns, by as many outputs.
const CPU_EXTENTS: [usize; 2] = [256, 1024];

/// Bytes of a copy on a GPU, and how many are submitted at once.
const GPU_COPY: [u64; 2] = [256 << 20, 8];

/// Extent of the products on a GPU, in every direction.
const GPU_EXTENT: usize = 4096;

impl Controls {
    /// On the CPU.
    pub(crate) fn cpu(bytes: usize) -> anyhow::Result<Self> {
        let from = vec![1u64; (bytes / size_of::<u64>()).max(TASK)];
        let mut to = vec![0u64; from.len()];
        let work = 2.0 * size_of_val(&from[..]) as f64;
        let copy = Control {
            run: Box::new(move || {
                to.par_chunks_mut(TASK)
                    .zip(from.par_chunks(TASK))
                    .for_each(|(to, from)| to.copy_from_slice(from));
                black_box(&to);
                Ok(())
            }),
            work,
        };
        let [rows, n] = CPU_EXTENTS;
        let halves = |range: std::ops::Range<usize>| {
            Ok::<_, anyhow::Error>(Elements::F16(vec![f16::from_f32(0.5); range.len() * n]))
        };
        let matrix = Packed::pack(n, n, ElementType::F16, halves)?;
        let (x, mut y) = (vec![0.25f32; rows * n], vec![f32::NAN; rows * n]);
        matrix.apply(&x, &mut y);
        ensure!(y.iter().all(|&y| y == 0.125 * n as f32), "the control's products are wrong");
        let run = Box::new(move || {
            matrix.apply(&x, &mut y);
            black_box(&y);
            Ok(())
        });
        Ok(Self { copy, matmul: Control { run, work: 2.0 * (rows * n * n) as f64 } })
    }

    /// On a GPU, of a device of its own there: on a software driver of little.
    pub(crate) fn gpu(adapter: Option<String>) -> anyhow::Result<Self> {
        let device = opened(adapter)?;
        let n = if device.is_gpu() { GPU_EXTENT } else { 128 };
        Ok(Self { copy: copy(device)?, matmul: products(device, n)? })
    }
}

/// Copies on a GPU, of a device of its own there.
pub(crate) fn gpu_copy(adapter: Option<String>) -> anyhow::Result<Control> {
    copy(opened(adapter)?)
}

fn opened(adapter: Option<String>) -> anyhow::Result<&'static Device> {
    let device = Device::open_with(&Request { adapter, ..Request::default() })?;
    Ok(Box::leak(Box::new(device)))
}

/// Waits until a device is done.
fn wait(device: &Device) -> anyhow::Result<()> {
    device.device().poll(wgpu::PollType::wait_indefinitely())?;
    device.fault().map_or(Ok(()), |fault| Err(anyhow::anyhow!("the device failed: {fault}")))
}

/// A kernel of the engine's, and what it is called with.
struct Call<'a> {
    pipeline: Pipeline,
    params: &'a [u8],
    /// The last is written.
    operands: &'a [&'a [u8]],
    groups: [u32; 3],
    /// What each element of the last is after the first call.
    want: f32,
}

/// Calls, so many at once and checked once, of so much work each.
fn calls(device: &'static Device, call: Call<'_>, times: u64, work: f64) -> anyhow::Result<Control> {
    let Call { pipeline, params, operands, groups, want } = call;
    let init = |contents: &[u8], usage| {
        let usage = usage | wgpu::BufferUsages::COPY_SRC;
        device.device().create_buffer_init(&wgpu::util::BufferInitDescriptor { label: None, contents, usage })
    };
    let mut buffers = vec![init(params, wgpu::BufferUsages::UNIFORM)];
    buffers.extend(operands.iter().map(|operand| init(operand, wgpu::BufferUsages::STORAGE)));
    let group = pipeline.bind(device.device(), buffers.iter().map(wgpu::Buffer::as_entire_buffer_binding))?;
    let written = buffers.pop().context("nothing is written")?;
    let submit = move |times: u64, read: Option<&wgpu::Buffer>| {
        let mut encoder = device.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            (0..times).for_each(|_| pipeline.encode(&mut pass, &group, groups));
        }
        if let Some(read) = read {
            encoder.copy_buffer_to_buffer(&written, 0, read, 0, read.size());
        }
        device.queue().submit([encoder.finish()]);
    };
    let read = device.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: operands.last().map_or(0, |operand| operand.len() as u64),
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    submit(1, Some(&read));
    read.slice(..).map_async(wgpu::MapMode::Read, |_| ());
    wait(device)?;
    {
        let bytes = read.slice(..).get_mapped_range()?;
        let right = bytemuck::cast_slice::<u8, f32>(&bytes).iter().all(|&y| y == want);
        ensure!(right, "what the control computes is wrong");
    }
    let run = move || {
        submit(times, None);
        wait(device)
    };
    Ok(Control { run: Box::new(run), work: work * times as f64 })
}

/// Sums of two buffers into one, by the engine's own kernel: a copy that the driver makes goes by way of an engine of its own,
/// at a quarter of what kernels reach.
fn copy(device: &'static Device) -> anyhow::Result<Control> {
    let [bytes, times] = if device.is_gpu() { GPU_COPY } else { [1 << 20, 1] };
    let bytes = bytes.min(device.device().limits().max_storage_buffer_binding_size);
    let kernel = add::VARIANTS.first().context("no kernel for sums")?;
    let width = usize::try_from(bytes)? / size_of::<f32>() / 4 * 4;
    let (params, groups) = add::lower(extents::Dims { rows: 1, width })?;
    let ones = vec![1.0f32; width];
    let ones: &[u8] = bytemuck::cast_slice(&ones);
    let call = Call {
        pipeline: Pipeline::new(device.device(), kernel, &[])?,
        params: bytemuck::bytes_of(&params),
        operands: &[ones, ones],
        groups,
        want: 2.0,
    };
    // Two are read, one is written.
    calls(device, call, times, 3.0 * ones.len() as f64)
}

/// The engine's own products, in the largest tile of the best variant.
fn products(device: &'static Device, n: usize) -> anyhow::Result<Control> {
    let coop = device.capabilities().features.coop;
    let tiles = if coop { &COOP_TILES_UNSPLIT[..] } else { &TILES };
    let tile = *tiles.last().context("no tile")?;
    let kernel = choose(tile.variants(), &device.capabilities()).context("no kernel for products")?;
    let rows = Rows { offset: 0, stride: n };
    let job = matmul::Job {
        format: None,
        scales: 0,
        inputs: n,
        outputs: n,
        weights: 0,
        row: n,
        x: rows,
        exponent: 0,
        y: rows,
        activation: Activation::Identity,
        store: matmul::Store::Put,
    };
    let dims = matmul::Dims { rows: n, tile, transposed: false, weights: n * n / 8, x: n * n, y: n * n };
    let (params, records, groups) = matmul::lower(dims, &[job])?;
    // Products of a quarter and a half are exact, in halves too, which are two to a word.
    let halves = |x: f32, n: usize| vec![f16::from_f32(x).to_bits(); n];
    let (weights, of_halves, of_floats) = (halves(0.5, n * n), halves(0.25, 2 * n * n), vec![0.25f32; n * n]);
    let x: &[u8] = if coop { bytemuck::cast_slice(&of_halves) } else { bytemuck::cast_slice(&of_floats) };
    let poison = vec![f32::NAN; n * n];
    let call = Call {
        pipeline: Pipeline::new(device.device(), kernel, &tile.overrides(false, set([None])))?,
        params: bytemuck::bytes_of(&params),
        operands: &[
            bytemuck::cast_slice(&records),
            bytemuck::cast_slice(&weights),
            x,
            bytemuck::cast_slice(&poison),
        ],
        groups,
        want: 0.125 * n as f32,
    };
    calls(device, call, 1, 2.0 * (n as f64).powi(3))
}

#[cfg(test)]
mod tests {
    use super::Controls;

    #[test]
    fn both_have_a_rate() {
        let mut all = vec![Controls::cpu(1 << 20).unwrap()];
        if rwkv_kernels::gpu::device_for_tests().is_some() {
            all.push(Controls::gpu(None).unwrap());
        }
        for controls in &mut all {
            for control in [&mut controls.copy, &mut controls.matmul] {
                let rate = control.rate().unwrap();
                assert!(rate.is_finite() && rate > 0.0, "{rate}");
            }
        }
    }
}
