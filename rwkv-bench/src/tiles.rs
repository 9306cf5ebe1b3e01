//! Every tile of `matmul` at the products of a layer, each by itself: which is fastest for how many rows, and how near memory's rate.
//!
//! A product is first compared with sums in double precision, then timed by the difference of a long and a short chain of dispatches that
//! wait for each other, each of other weights. In a ring, several pipelines (`--ring`) take turns, which do the same but have code of their
//! own: a processor that keeps less code than that reads it anew at each dispatch, as it does in an engine whose layer has more.
//!
//! Products take the place of what is there as they are, whatever an engine makes of them.

use std::thread;
use std::time::Instant;

use anyhow::{Context as _, anyhow, ensure};
use clap::Args;
use half::f16;
use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::matmul::Rows;
use rwkv_core::quant::{BLOCK, Blocks, Format};
use rwkv_core::rng::SplitMix64;
use rwkv_kernels::gpu::{Device, Request};
use rwkv_kernels::kernels::matmul::{
    COOP_TILES, COOP_TILES_UNSPLIT, Coop, Dims, Job, Kinds, Store, TILES, Tile, lower,
};
use rwkv_kernels::kernels::weights::{ELEMENT, elements, laid, len, set};
use rwkv_kernels::pipeline::Pipeline;
use rwkv_kernels::{Kernel, choose};
use wgpu::util::DeviceExt as _;

use crate::gpu::copies;
use crate::random_model::shape_of;
use crate::table::Table;

/// Times tiles.
#[derive(Args)]
pub(crate) struct TilesArgs {
    /// The shapes whose products are multiplied, by name.
    #[arg(long, value_delimiter = ',', default_value = "1.5B")]
    shapes: Vec<String>,
    /// Rows.
    #[arg(long, value_delimiter = ',', default_value = "32,128", value_parser = clap::value_parser!(u32).range(1..))]
    rows: Vec<u32>,
    /// What the matrices are in: f16, int8 or int4.
    #[arg(long, value_delimiter = ',', default_value = "f16", value_parser = format_of)]
    weights: Vec<Weights>,
    /// Pipelines of a ring.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u32).range(1..=256))]
    ring: u32,
    /// The GPU: part of its name, or its number.
    #[arg(long)]
    adapter: Option<String>,
    /// Print the tables as markdown.
    #[arg(long)]
    markdown: bool,
}

/// What a matrix is in.
#[derive(Clone, Copy)]
struct Weights(Option<Format>);

fn format_of(name: &str) -> Result<Weights, rwkv_core::quant::UnknownFormat> {
    Ok(Weights(if name == "f16" { None } else { Some(name.parse()?) }))
}

/// A product of a layer.
#[derive(Clone, Copy)]
struct Product {
    name: &'static str,
    inputs: usize,
    outputs: usize,
    transposed: bool,
    /// Among how many jobs its inputs are divided.
    parts: usize,
}

/// Rows up to which an engine divides the inputs of products that it adds to the residual stream.
const FEW: usize = 256;

fn products(width: usize, rows: usize) -> [Product; 4] {
    let few = if rows <= FEW { 4 } else { 1 };
    let of = |name, inputs, outputs, transposed, parts| Product { name, inputs, outputs, transposed, parts };
    [
        of("r k v", width, 3 * width, false, 1),
        of("output", width, width, false, few),
        of("key", width, 4 * width, false, 1),
        of("value", 4 * width, width, true, few),
    ]
}

/// Rows of a buffer that differ; then they come again. A prime number, so that a row in the wrong place shows.
const DIFFERENT: usize = 61;

/// Bytes of weights that are gone through before the first come again: more than caches hold.
const THROUGH: usize = 512 << 20;

/// Dispatches of a chain, the short and the long.
const CHAINS: [usize; 2] = [40, 400];
const REPEATS: usize = 9;

/// Outputs that are compared.
const COMPARED: usize = 400;

#[expect(clippy::print_stdout, reason = "the report")]
pub(crate) fn report(args: &TilesArgs) -> anyhow::Result<()> {
    let named = |shape: &String| Ok((shape.clone(), shape_of(shape)?.width()));
    let shapes = args.shapes.iter().map(named).collect::<anyhow::Result<Vec<_>>>()?;
    let device = Device::open_with(&Request { adapter: args.adapter.clone(), ..Request::default() })?;
    let copied = copies(args.adapter.clone())? / 1e9;
    println!("{}, {copied:.0} GB/s are copied", device.name());
    let ring = format!("us, {} in turns", args.ring);
    let mut table = Table::new(&["product", "in", "rows", "tile", "off", "us", &ring, "GB/s", "of copies"]);
    // What was measured is shown, whatever went wrong then.
    let done = shapes.iter().try_for_each(|(shape, width)| {
        args.rows.iter().try_for_each(|&rows| {
            let rows = rows as usize;
            products(*width, rows)
                .into_iter()
                .flat_map(|product| args.weights.iter().map(move |&Weights(format)| (product, format)))
                .try_for_each(|(product, format)| {
                    let operands = Operands::new(&device, product, format, rows)?;
                    for tile in tiles(&device, rows) {
                        let Measured { error, one, ring } = measure(&device, &operands, tile, args.ring)
                            .with_context(|| format!("{shape}, {}, {rows} rows, {tile:?}", product.name))?;
                        let rate = operands.bytes as f64 / one / 1e9;
                        table.push(vec![
                            format!("{shape} {}", product.name),
                            format.map_or("f16", Format::name).to_owned(),
                            rows.to_string(),
                            described(tile, format),
                            format!("{error:.0e}"),
                            format!("{:.2}", 1e6 * one),
                            ring.map_or_else(String::new, |ring| format!("{:.2}", 1e6 * ring)),
                            format!("{rate:.0}"),
                            format!("{:.0} %", 100.0 * rate / copied),
                        ]);
                    }
                    anyhow::Ok(())
                })
        })
    });
    println!("{}", table.text(args.markdown));
    done
}

/// Of cooperative matrices, those that are not mostly without rows, nor go through the weights more than sixteen times if there are larger ones.
fn tiles(device: &Device, rows: usize) -> Vec<Tile> {
    let coop = device.capabilities().features.coop;
    let all = if coop { [&COOP_TILES_UNSPLIT[..1], &COOP_TILES].concat() } else { TILES.to_vec() };
    let most = rows.next_power_of_two().max(16);
    let least = all.iter().map(|tile| tile.rows as usize).max().unwrap_or(0).min(rows.div_ceil(16));
    all.into_iter().filter(|tile| !coop || (least..=most).contains(&(tile.rows as usize))).collect()
}

fn described(tile: Tile, format: Option<Format>) -> String {
    let Tile { rows, cols, coop } = tile;
    let parts = coop.map(|Coop { split, step, ahead, .. }| {
        format!(" by {split}, {} of {step} ahead", ahead[usize::from(format.is_some())])
    });
    format!("{rows} x {cols}{}", parts.unwrap_or_default())
}

/// The buffers of a product, and what they hold.
struct Operands {
    product: Product,
    format: Option<Format>,
    rows: usize,
    /// The rows of the matrix that differ, decoded.
    decoded: Vec<f64>,
    x: Vec<f64>,
    weights: Vec<wgpu::Buffer>,
    x_buffer: wgpu::Buffer,
    y: wgpu::Buffer,
    /// Of the matrix.
    bytes: usize,
}

impl Operands {
    fn new(device: &Device, product: Product, format: Option<Format>, rows: usize) -> anyhow::Result<Self> {
        let Product { inputs, outputs, transposed, parts, .. } = product;
        let [lines, columns] = if transposed { [inputs, outputs] } else { [outputs, inputs] };
        let mut rng = SplitMix64::new(7);
        let drawn: Vec<f16> =
            (0..DIFFERENT * columns).map(|_| f16::from_f32(rng.uniform(-1.0, 1.0))).collect();
        let singles: Vec<f32> = drawn.iter().map(|w| w.to_f32()).collect();
        // Lines of the matrix that differ, and their scales, by bytes.
        let (different, scales, decoded) = match format {
            None => (bytemuck::cast_slice(&drawn).to_vec(), Vec::new(), singles),
            Some(format) => {
                let blocks = Blocks::encode(format, columns, &singles)?;
                let scales: Vec<u8> = bytemuck::cast_slice(blocks.scales()).to_vec();
                let mut decoded = vec![0.0f32; drawn.len()];
                decoded.chunks_exact_mut(columns).enumerate().for_each(|(i, out)| blocks.decode_row(i, out));
                (laid(format, blocks.weights()).into_owned(), scales, decoded)
            }
        };
        let again =
            |of: &[u8]| of.iter().copied().cycle().take(of.len() / DIFFERENT * lines).collect::<Vec<u8>>();
        let mut matrix = again(&different);
        matrix.extend(again(&scales));
        let bytes = matrix.len();
        matrix.resize(len(format, lines * columns) * ELEMENT, 0);

        // What cooperative matrices read are halves.
        let x: Vec<f16> = (0..rows * inputs).map(|_| f16::from_f32(rng.uniform(-1.0, 1.0))).collect();
        let x_bytes = if device.capabilities().features.coop {
            bytemuck::cast_slice(&x).to_vec()
        } else {
            bytemuck::cast_slice(&x.iter().map(|x| x.to_f32()).collect::<Vec<_>>()).to_vec()
        };
        let buffer = |contents: &[u8]| {
            device.device().create_buffer_init(&wgpu::util::BufferInitDescriptor {
                label: None,
                contents,
                usage: wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST,
            })
        };
        let n = if device.is_gpu() { THROUGH.div_ceil(matrix.len()).max(2) } else { 1 };
        let first = buffer(&matrix);
        let mut encoder = encoder(device);
        let mut weights = vec![first];
        for _ in 1..n {
            let copy = device.device().create_buffer(&wgpu::BufferDescriptor {
                label: None,
                size: weights[0].size(),
                usage: weights[0].usage(),
                mapped_at_creation: false,
            });
            encoder.copy_buffer_to_buffer(&weights[0], 0, &copy, 0, copy.size());
            weights.push(copy);
        }
        device.queue().submit([encoder.finish()]);
        let y_bytes = (parts * rows * outputs * size_of::<f32>()) as u64;
        let most = device.device().limits().max_buffer_size;
        ensure!(y_bytes <= most, "{rows} rows have {y_bytes} bytes of outputs, a buffer has {most} at most");
        let y = buffer(bytemuck::cast_slice(&vec![f32::NAN; parts * rows * outputs]));
        let doubles = |of: &mut dyn Iterator<Item = f32>| of.map(f64::from).collect();
        Ok(Self {
            product,
            format,
            rows,
            decoded: doubles(&mut decoded.into_iter()),
            x: doubles(&mut x.iter().map(|x| x.to_f32())),
            weights,
            x_buffer: buffer(&x_bytes),
            y,
            bytes,
        })
    }

    fn jobs(&self, coop: bool) -> Vec<Job> {
        let Product { inputs, outputs, transposed, parts, .. } = self.product;
        let own = inputs / parts;
        let per_word = if coop { 2 } else { 1 };
        let part = |part: usize| {
            let (before, row) =
                if transposed { (part * own * outputs, outputs) } else { (part * own, inputs) };
            let scales =
                elements(self.format, inputs * outputs) * (ELEMENT / size_of::<f16>()) + before / BLOCK;
            Job {
                inputs: own,
                outputs,
                weights: elements(self.format, before),
                row,
                format: self.format,
                scales: if self.format.is_some() { scales } else { 0 },
                x: Rows { offset: part * own / per_word, stride: inputs / per_word },
                exponent: 0,
                y: Rows { offset: part * self.rows * outputs, stride: outputs },
                activation: Activation::Identity,
                store: Store::Put,
            }
        };
        (0..parts).map(part).collect()
    }

    fn weight(&self, input: usize, output: usize) -> f64 {
        let Product { inputs, outputs, transposed, .. } = self.product;
        let [line, column, columns] =
            if transposed { [input, output, outputs] } else { [output, input, inputs] };
        self.decoded[line % DIFFERENT * columns + column]
    }

    /// How far the product that is in `y` is from that in double precision, of the sum of the sizes of what is added.
    fn verify(&self, device: &Device, tile: Tile) -> anyhow::Result<f64> {
        let Product { inputs, outputs, parts, .. } = self.product;
        let got = read(device, &self.y)?;
        ensure!(got.iter().all(|y| y.is_finite()), "the product is not all there");
        // Decoded weights are rounded to halves, and an addition of cooperative matrices may lose a unit of single precision.
        let added = inputs + parts + tile.coop.map_or(0, |of| of.split as usize);
        let rounded = if self.format.is_some() { 2f64.powi(-11) } else { 0.0 };
        let limit = added as f64 * 2f64.powi(-23) + rounded;
        let mut worst = 0f64;
        for i in 0..COMPARED {
            let (t, o) = (i % self.rows, i * 131 % outputs);
            let terms = |k: usize| self.weight(k, o) * self.x[t * inputs + k];
            let want: f64 = (0..inputs).map(terms).sum();
            let size: f64 = (0..inputs).map(|k| terms(k).abs()).sum();
            let sum: f64 = (0..parts).map(|part| f64::from(got[(part * self.rows + t) * outputs + o])).sum();
            worst = worst.max((sum - want).abs() / size);
        }
        ensure!(worst <= limit, "off by {worst:.1e} of what is added, the limit is {limit:.1e}");
        Ok(worst)
    }
}

struct Measured {
    error: f64,
    /// Seconds of a dispatch.
    one: f64,
    ring: Option<f64>,
}

fn measure(device: &Device, of: &Operands, tile: Tile, ring: u32) -> anyhow::Result<Measured> {
    let jobs = of.jobs(tile.coop.is_some());
    let words = |buffer: &wgpu::Buffer, bytes: usize| usize::try_from(buffer.size()).unwrap_or(0) / bytes;
    let dims = Dims {
        rows: of.rows,
        tile,
        transposed: of.product.transposed,
        weights: words(&of.weights[0], ELEMENT),
        x: words(&of.x_buffer, size_of::<u32>()),
        y: words(&of.y, size_of::<u32>()),
    };
    let (params, records, groups) = lower(dims, &jobs)?;
    let table = |contents, usage| {
        let descriptor = wgpu::util::BufferInitDescriptor { label: None, contents, usage };
        device.device().create_buffer_init(&descriptor)
    };
    let params = table(bytemuck::bytes_of(&params), wgpu::BufferUsages::UNIFORM);
    let records = table(bytemuck::cast_slice(&records), wgpu::BufferUsages::STORAGE);

    let pipelines = compile(device, of, tile, &jobs, ring)?;
    let bind = |pipeline: usize, weights: usize| {
        let all = [&params, &records, &of.weights[weights], &of.x_buffer, &of.y];
        let pipeline = &pipelines[pipeline];
        anyhow::Ok((
            pipeline,
            pipeline.bind(device.device(), all.map(wgpu::Buffer::as_entire_buffer_binding))?,
        ))
    };
    let n = of.weights.len();
    let one = (0..n).map(|i| bind(0, i)).collect::<anyhow::Result<Vec<_>>>()?;
    let turns = |i: usize| bind(i % pipelines.len(), i % n);
    let many = (0..n * pipelines.len()).map(turns).collect::<anyhow::Result<Vec<_>>>()?;
    let run = |of: &[(&Pipeline, wgpu::BindGroup)], n: usize| {
        let mut encoder = encoder(device);
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            of.iter().cycle().take(n).for_each(|(pipeline, group)| pipeline.encode(&mut pass, group, groups));
        }
        let commands = encoder.finish();
        let begun = Instant::now();
        device.queue().submit([commands]);
        device.device().poll(wgpu::PollType::wait_indefinitely())?;
        anyhow::Ok(begun.elapsed().as_secs_f64())
    };
    device.queue().write_buffer(&of.y, 0, &vec![0xff; usize::try_from(of.y.size())?]);
    run(&many, 1)?;
    let error = of.verify(device, tile)?;
    let each = |of: &[(&Pipeline, wgpu::BindGroup)]| {
        // Drivers that run on the CPU are not to be timed, but to be gone through.
        let (repeats, [short, long]) = if device.is_gpu() { (REPEATS, CHAINS) } else { (1, [1, 2]) };
        run(of, long)?;
        let slope = |_| {
            let (short_s, long_s) = (run(of, short)?, run(of, long)?);
            anyhow::Ok((long_s - short_s) / (long - short) as f64)
        };
        let mut slopes = (0..repeats).map(slope).collect::<anyhow::Result<Vec<_>>>()?;
        slopes.sort_by(f64::total_cmp);
        anyhow::Ok(slopes[repeats / 2])
    };
    let ring = if pipelines.len() > 1 { Some(each(&many)?) } else { None };
    Ok(Measured { error, one: each(&one)?, ring })
}

/// So many pipelines, of texts that differ.
fn compile(
    device: &Device,
    of: &Operands,
    tile: Tile,
    jobs: &[Job],
    n: u32,
) -> anyhow::Result<Vec<Pipeline>> {
    let kernel = choose(tile.variants(), &device.capabilities()).ok_or_else(|| anyhow!("no variant"))?;
    let mut overrides = tile.overrides(of.product.transposed, set([of.format]));
    overrides.extend(tile.kinds(jobs).into_iter().flat_map(Kinds::overrides));
    let one = |i| {
        let own = with_code_of_its_own(kernel, i).context("no entry point")?;
        Ok(unchecked(device, &own, &overrides)?)
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..n).map(|i| scope.spawn(move || one(i))).collect();
        threads.into_iter().map(|of| of.join().map_err(|_| anyhow!("a compiler panicked"))?).collect()
    })
}

/// The kernel with a number of rows at which it does nothing, of which there are never so many; the first is as it is. (A driver keeps one
/// code for texts that differ only in constants on which nothing depends.)
fn with_code_of_its_own(kernel: &Kernel, i: u32) -> Option<Kernel> {
    if i == 0 {
        return Some(*kernel);
    }
    let entry = kernel.source.find(&format!("fn {}(", kernel.name))?;
    let body = entry + kernel.source[entry..].find("{\n")? + 2;
    let (before, after) = kernel.source.split_at(body);
    let text = format!("{before}    if params.rows == {}u {{ return; }}\n{after}", u32::MAX - i);
    Some(Kernel { source: text.leak(), ..*kernel })
}

#[expect(unsafe_code, reason = "as the engine compiles it, or it is not what is timed")]
fn unchecked(
    device: &Device,
    kernel: &Kernel,
    overrides: &[(&str, f64)],
) -> Result<Pipeline, rwkv_kernels::pipeline::Error> {
    // SAFETY: `lower` has admitted the jobs for the buffers that are bound, and made the table of tiles. The text is the crate's, but for
    // an early return.
    unsafe { Pipeline::new_unchecked(device.device(), kernel, overrides, None) }
}

fn encoder(device: &Device) -> wgpu::CommandEncoder {
    device.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default())
}

fn read(device: &Device, from: &wgpu::Buffer) -> anyhow::Result<Vec<f32>> {
    let to = device.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: from.size(),
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let mut encoder = encoder(device);
    encoder.copy_buffer_to_buffer(from, 0, &to, 0, from.size());
    device.queue().submit([encoder.finish()]);
    to.slice(..).map_async(wgpu::MapMode::Read, |_| ());
    device.device().poll(wgpu::PollType::wait_indefinitely())?;
    let bytes = to.slice(..).get_mapped_range()?;
    Ok(bytemuck::pod_collect_to_vec(&bytes))
}

#[cfg(test)]
mod tests {
    use rwkv_kernels::gpu::device_for_tests;

    use super::*;

    /// What is uploaded is what is compared with, in every format and both ways round.
    #[test]
    fn products_are_right() {
        let Some(device) = device_for_tests() else { return };
        for format in [None, Some(Format::Int8), Some(Format::Int4)] {
            for transposed in [false, true] {
                let product = Product { name: "any", inputs: 128, outputs: 192, transposed, parts: 2 };
                let operands = Operands::new(device, product, format, 5).unwrap();
                for tile in tiles(device, 5) {
                    let measured = measure(device, &operands, tile, 1);
                    assert!(measured.is_ok(), "{format:?}, {transposed}, {tile:?}: {:?}", measured.err());
                }
            }
        }
    }
}
