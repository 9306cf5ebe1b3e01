//! The wkv7 kernel in a program that has its own wgpu: instance, device, buffers, pass.
//!
//! `cargo run --example foreign` feeds one token to an empty state, v = 1 and k = r = 1/8 in every channel, and
//! prints the output: `y = v (k . r)`, which is 64 / 64.
#![expect(clippy::print_stdout, reason = "an example talks to a terminal")]

use std::error::Error;

use rwkv_core::ops::wkv7::Dims;
use rwkv_kernels::kernels::wkv7;
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
    let capabilities = Capabilities::new(device.features(), &device.limits());
    let kernel = choose(wkv7::VARIANTS, &capabilities).ok_or("the device has less than WebGPU's limits")?;
    let pipeline = Pipeline::new(&device, kernel, &[])?;

    // The program's own buffers, in the order that the kernel lists: params r lw k v a b state y.
    let dims = Dims { tokens: 1, heads: 1, head_size: 64 };
    let (params, groups) = wkv7::lower(dims)?;
    let storage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let buffer = |contents: &[u8], usage| {
        device.create_buffer_init(&BufferInitDescriptor { label: None, contents, usage })
    };
    let filled = |len: usize, value: f32| buffer(bytemuck::cast_slice(&vec![value; len]), storage);
    let buffers: Vec<_> = kernel
        .bindings
        .iter()
        .map(|binding| match binding.name {
            "params" => buffer(bytemuck::bytes_of(&params), wgpu::BufferUsages::UNIFORM),
            "state" => filled(dims.state_len(), 0.0),
            "k" | "r" => filled(dims.vector_len(), 0.125),
            "v" => filled(dims.vector_len(), 1.0),
            _ => filled(dims.vector_len(), 0.0),
        })
        .collect();
    let group = pipeline.bind(&device, buffers.iter().map(wgpu::Buffer::as_entire_buffer_binding))?;

    // The program's own pass, to which the kernel adds one dispatch.
    let y = &buffers[buffers.len() - 1];
    let readable = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: y.size(),
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pipeline.encode(&mut pass, &group, groups);
    }
    encoder.copy_buffer_to_buffer(y, 0, &readable, 0, y.size());
    queue.submit([encoder.finish()]);
    readable.slice(..).map_async(wgpu::MapMode::Read, |_| ());
    device.poll(wgpu::PollType::wait_indefinitely())?;
    let y: Vec<f32> = bytemuck::pod_collect_to_vec(&readable.slice(..).get_mapped_range()?);
    println!("{} on {}: y = {:?} ..", kernel.label(), adapter.get_info().name, &y[..4]);
    assert_eq!(y, vec![1.0; dims.vector_len()], "y = v (k . r)");
    Ok(())
}
