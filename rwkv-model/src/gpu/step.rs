//! The kernels for one token of one sequence, and how their work is divided among workgroups.

use rwkv_core::ModelConfig;
use rwkv_core::quant;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::kernels::own_columns::Teams;
use rwkv_kernels::kernels::weights as stored;
use rwkv_kernels::kernels::{channel_mix_value, linear, mix_in, time_mix_resident};
use rwkv_kernels::pipeline::Pipeline;

use super::pipelines::{Held, PROCESSORS, STRAIGHT, compile, lanes, readout_of_heads};
use super::{Error, Setup, count};
use crate::recipe::Matrix;

/// The kernels of the form for one token, and how its work is divided.
#[derive(Debug)]
pub(super) struct StepKernels {
    pub(super) mix_in: Pipeline,
    /// With the adapters' second factors multiplied in it.
    pub(super) time_mix: Pipeline,
    /// As [`Kernels::readout`].
    pub(super) readout: Option<Pipeline>,
    pub(super) linear: Pipeline,
    pub(super) value: Pipeline,
    /// Of a workgroup of `mix_in`.
    mix_teams: Teams,
    /// Lanes of a workgroup of `time_mix`.
    pub(super) heads_lanes: u32,
    /// Outputs to a workgroup.
    pub(super) linear_tile: u32,
    /// Columns to a workgroup.
    pub(super) columns: u32,
}

impl StepKernels {
    /// The kernels, or none where a row does not fit into the memory of a workgroup.
    pub(super) fn new(
        device: &Device,
        config: &ModelConfig,
        setup: &Setup,
        held: Held,
    ) -> Result<Option<Self>, Error> {
        let capabilities = device.capabilities();
        let lanes = lanes(device);
        let width = count(config.width);
        // A processor has too few narrow rows of blocks for more lanes.
        let mix_lanes = lanes(if width < 2048 { 256 } else { REGISTERS_FOR });
        let mix_teams = Teams::new(mix_lanes, Some(config.width));
        if mix_teams.workgroup_bytes() > capabilities.workgroup_bytes || width > 16 * mix_lanes {
            return Ok(None);
        }
        let heads_lanes = match held {
            Held::Plain => half(device),
            Held::Resident { .. } => {
                let fits = time_mix_resident::workgroup_bytes(512) <= capabilities.workgroup_bytes;
                lanes(if fits { 512 } else { 256 })
            }
        };
        let blocks = |of: &[Matrix]| setup.weights.blocks(config.n_layers, of).collect::<Vec<_>>();
        let (linear, linear_tile) = output_of(device, config.width, &blocks(&[Matrix::Output]))?;
        let (value, columns) = value_of(device, config, &blocks(&[Matrix::FfnValue]), setup.skip_zeros)?;
        let formats = stored::formats(blocks(&STRAIGHT).into_iter().chain([None]));
        let f = f64::from;
        Ok(Some(Self {
            mix_in: compile(
                device,
                mix_in::VARIANTS,
                &[&mix_teams.overrides()[..], &[("WIDTH", f(width)), formats]].concat(),
            )?,
            time_mix: held.compile(device, heads_lanes, true, !setup.norm_apart(), None)?,
            readout: readout_of_heads(device, setup, None)?,
            linear,
            value,
            mix_teams,
            heads_lanes,
            linear_tile,
            columns,
        }))
    }
}

impl StepKernels {
    /// [Rows of halves](mix_in::rows_of_tile) to a workgroup: the smallest multiple of those it multiplies at once with which there is a
    /// processor for each workgroup. So none has more to do than it must, and none norms twice.
    pub(super) fn stack_tile(&self, stack: &[mix_in::Stacked]) -> u32 {
        let groups = |&tile: &u32| {
            stack.iter().map(|of| of.outputs.div_ceil(mix_in::rows_of_tile(of.format, tile))).sum::<usize>()
        };
        let most = stack.len().max(PROCESSORS as usize);
        let tiles = (1..).map(|steps| steps * count(self.mix_teams.rows_at_once(None)));
        tiles.take_while(|&tile| tile < MOST_ROWS).find(|tile| groups(tile) <= most).unwrap_or(MOST_ROWS)
    }
}

/// Lanes with columns of their own that a processor has registers for, on an H200: a key of 7.2B takes 35.9 us with 512, 39.0 with 256 and
/// 40 with 1,024.
const REGISTERS_FOR: u32 = 512;

/// Of halves to a workgroup.
const MOST_ROWS: u32 = 1 << 16;

/// `linear`, and outputs to a workgroup of it.
pub(super) fn linear_of(device: &Device) -> Result<(Pipeline, u32), Error> {
    let teams = Teams::new(lanes(device)(256), None);
    Ok((compile(device, linear::VARIANTS, &teams.overrides())?, count(teams.rows_at_once(None))))
}

/// The same for the square matrix of a layer's output, compiled in. A workgroup has as many outputs as it multiplies at once, or so many
/// times as many that all workgroups are at work at the same time. Measured on an H200: of 1.5B in halves, 5.6 us with 256 lanes and 5.8
/// with 512 (4.9 in the kernel before, whose lanes had no columns of their own); of 7.2B, 12.2 and 11.5.
fn output_of(
    device: &Device,
    width: usize,
    formats: &[Option<quant::Format>],
) -> Result<(Pipeline, u32), Error> {
    let wanted = (count(width) / 8).next_power_of_two().clamp(128, REGISTERS_FOR);
    let teams = Teams::new(lanes(device)(wanted), Some(width));
    let step = formats.iter().map(|&format| teams.rows_at_once(format)).max().unwrap_or(1);
    let groups = PROCESSORS * REGISTERS_FOR / teams.lanes;
    let tile = count(width.div_ceil(groups as usize).next_multiple_of(step));
    let known = [("INPUTS", count(width).into()), ("OUTPUTS", count(width).into()), ("TILE", tile.into())];
    let overrides = [&teams.overrides()[..], &known, &[stored::formats(formats.iter().copied())]].concat();
    Ok((compile(device, linear::VARIANTS, &overrides)?, tile))
}

/// Lanes of kernels that need up to 64 bytes of workgroup memory for each, as `time_mix` and `channel_mix_value` do.
fn half(device: &Device) -> u32 {
    lanes(device)(if device.capabilities().workgroup_bytes >= 32 << 10 { 512 } else { 256 })
}

/// `channel_mix_value`, and columns to a workgroup of it.
pub(super) fn value_of(
    device: &Device,
    config: &ModelConfig,
    formats: &[Option<quant::Format>],
    skip_zeros: bool,
) -> Result<(Pipeline, u32), Error> {
    let (lanes, columns) = (half(device), if config.width <= 1024 { 16 } else { 32 });
    // As few as suffice for all hidden units at once, if eight do.
    let parts = (count(config.hidden) / 4).div_ceil(lanes).clamp(1, 8);
    let overrides = [
        ("LANES", lanes.into()),
        ("COLUMNS", columns.into()),
        ("PARTS", parts.into()),
        ("ALL", f64::from(u8::from(!skip_zeros))),
        ("WIDTH", count(config.width).into()),
        ("HIDDEN", count(config.hidden).into()),
        stored::formats(formats.iter().copied()),
    ];
    Ok((compile(device, channel_mix_value::VARIANTS, &overrides)?, columns))
}
