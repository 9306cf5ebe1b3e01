//! The fused kernel of the heads in a program that has its own wgpu: instance, device, buffers, pass.
//!
//! `cargo run --example foreign` feeds one token to an empty state and prints what the heads say. The operands are chosen
//! so that it is the bonus alone: `(r . k) v`, with r = k = 1/8 in 64 channels and v = 1.
#![expect(clippy::print_stdout, reason = "an example talks to a terminal")]

use std::error::Error;

use rwkv_core::config::Ranks;
use rwkv_kernels::kernels::time_mix::{self, Dims, HEAD_SIZE, Segment};
use rwkv_kernels::pipeline::Pipeline;
use rwkv_kernels::{Capabilities, choose};
use wgpu::util::{BufferInitDescriptor, DeviceExt as _};

fn main() -> Result<(), Box<dyn Error>> {
    // The program's own device, with WebGPU's default limits and no features.
    let instance = wgpu::Instance::default();
    let Ok(adapter) = pollster::block_on(instance.request_adapter(&wgpu::RequestAdapterOptions::default()))
    else {
        println!("SKIPPED: no adapter");
        return Ok(());
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))?;

    // The kernel, in the best variant for that device.
    let capabilities = Capabilities::new(device.features(), &device.limits(), &device.adapter_info());
    let kernel =
        choose(time_mix::VARIANTS, &capabilities).ok_or("the device has less than WebGPU's limits")?;
    let pipeline = Pipeline::new(&device, kernel, &[])?;

    // One token of one sequence, in a model of one head with adapters of rank 8. Its state is read and written in place.
    let (width, ranks) = (HEAD_SIZE, Ranks { w: 8, a: 8, v: 8, g: 8 });
    let (inputs, stride) = (3 * width + 32, width * HEAD_SIZE);
    let dims =
        Dims { rows: 1, segments: 1, heads: 1, head_size: HEAD_SIZE, ranks, inputs, stride, offset: 0 };
    let [lanes, ..] = kernel.workgroup_size;
    let (params, groups) = time_mix::lower(dims, Some(lanes))?;
    let segment = Segment { first: 0, rows: 1, from: 0, to: 0 };
    // r and k, v, and what the adapters' first factors gave: their second are of 1/8 each, so that all products are 1.
    let operands = [vec![0.125; 2 * width], vec![1.0; width], vec![1.0; 32]].concat();
    const EIGHTHS: u32 = 0x3000_3000; // two halves
    let mut vectors = vec![0f32; 8 * width];
    vectors[5 * width..6 * width].fill(1.0); // r_k; the gain of the norm is 0, so that the bonus is left

    // The program's own buffers, in the order that the kernel lists.
    let storage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let buffer = |contents: &[u8], usage| {
        device.create_buffer_init(&BufferInitDescriptor { label: None, contents, usage })
    };
    let floats = |values: &[f32]| buffer(bytemuck::cast_slice(values), storage);
    let buffers: Vec<_> = kernel
        .bindings
        .iter()
        .map(|binding| match binding.name {
            "params" => buffer(bytemuck::bytes_of(&params), wgpu::BufferUsages::UNIFORM),
            "segments" => buffer(bytemuck::bytes_of(&segment), storage),
            "inputs" => floats(&operands),
            "weights" => buffer(bytemuck::cast_slice(&vec![EIGHTHS; 32 * width / 2]), storage),
            "vectors" => floats(&vectors),
            "state" => floats(&vec![0.0; stride]),
            "v_first" => floats(&vec![1.0; width]),
            _ => floats(&vec![0.0; width]), // `out`, and `up`, which is not read
        })
        .collect();
    let group = pipeline.bind(&device, buffers.iter().map(wgpu::Buffer::as_entire_buffer_binding))?;

    // The program's own pass, to which the kernel adds one dispatch.
    let out = &buffers[buffers.len() - 1];
    let readable = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: out.size(),
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pipeline.encode(&mut pass, &group, groups);
    }
    encoder.copy_buffer_to_buffer(out, 0, &readable, 0, out.size());
    queue.submit([encoder.finish()]);
    readable.slice(..).map_async(wgpu::MapMode::Read, |_| ());
    device.poll(wgpu::PollType::wait_indefinitely())?;
    let out: Vec<f32> = bytemuck::pod_collect_to_vec(&readable.slice(..).get_mapped_range()?);
    println!("{} on {}: {:?} ..", kernel.label(), adapter.get_info().name, &out[..4]);
    assert_eq!(out, vec![1.0; width], "(r . k) v");
    Ok(())
}
