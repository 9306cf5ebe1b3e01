//! The kernels for one token of one sequence, and how their work is divided among workgroups.

use rwkv_core::ModelConfig;
use rwkv_core::quant;
use rwkv_kernels::gpu::Device;
use rwkv_kernels::kernels::weights as stored;
use rwkv_kernels::kernels::{channel_mix_value, linear, mix_in, time_mix_resident};
use rwkv_kernels::pipeline::Pipeline;

use super::pipelines::{Held, PROCESSORS, STRAIGHT, compile, lanes, readout_of_heads};
use super::{Error, Setup, count};
use crate::recipe::Matrix;
/// So many times the rows of other stacks go to a workgroup of the head, which has many: the norm is repeated less.
pub(super) const HEAD_TILES: u32 = 8;

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
    /// Rows of a stack to a workgroup of `mix_in`, at most: two or one to each of its teams.
    pub(super) mix_tile: u32,
    /// Of which tiles are multiples.
    pub(super) team_rows: u32,
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
        // Large workgroups, since each norms the row anew; long rows are multiplied two at a time. Measured on an H200.
        let (mix_lanes, team_rows) = if width < 2048 { (lanes(512), 1) } else { (lanes(1024), 2) };
        if 4 * (width + mix_lanes) > capabilities.workgroup_bytes || width > 16 * mix_lanes {
            return Ok(None);
        }
        // At least 256: four adapters at once.
        let heads_lanes = match held {
            Held::Plain => half(device).max(256),
            Held::Resident { .. } => {
                let fits = time_mix_resident::workgroup_bytes(512) <= capabilities.workgroup_bytes;
                lanes(if fits { 512 } else { 256 }).max(256)
            }
        };
        let blocks = |of: &[Matrix]| setup.weights.blocks(config.n_layers, of).collect::<Vec<_>>();
        let (linear, linear_tile) = linear_of(device, Some(config.width), &blocks(&[Matrix::Output]))?;
        let (value, columns) = value_of(device, config, &blocks(&[Matrix::FfnValue]), setup.skip_zeros)?;
        let formats = stored::formats(blocks(&STRAIGHT).into_iter().chain([None]));
        let f = f64::from;
        Ok(Some(Self {
            mix_in: compile(
                device,
                mix_in::VARIANTS,
                &[("LANES", f(mix_lanes)), ("TEAM_ROWS", f(team_rows)), ("WIDTH", f(width)), formats],
            )?,
            time_mix: held.compile(device, heads_lanes, true, !setup.norm_apart(), None)?,
            readout: readout_of_heads(device, setup, None)?,
            linear,
            value,
            mix_tile: tile(mix_lanes, team_rows),
            team_rows,
            heads_lanes,
            linear_tile,
            columns,
        }))
    }
}

impl StepKernels {
    /// Rows of a stack to a workgroup: the fewest with which each of the workgroups has a processor of its own, so that none has
    /// more to do than it must, or else as many as its teams take at once.
    pub(super) fn stack_tile(&self, stack: &[mix_in::Stacked]) -> u32 {
        let groups = |&tile: &u32| stack.iter().map(|of| count(of.outputs).div_ceil(tile)).sum::<u32>();
        let mut tiles = (1..=self.mix_tile / self.team_rows).map(|teams| teams * self.team_rows);
        tiles.find(|tile| groups(tile) <= PROCESSORS).unwrap_or(self.mix_tile)
    }
}

/// Rows of a matrix to a workgroup, so many to a team. Teams are subgroups of 32 on most devices; others go through a
/// tile more or fewer times.
fn tile(lanes: u32, rows: u32) -> u32 {
    (lanes / 32).max(1) * rows
}

/// Lanes of kernels that need 32 to 64 bytes of workgroup memory for each, as `time_mix` and `channel_mix_value` do.
fn half(device: &Device) -> u32 {
    lanes(device)(if device.capabilities().workgroup_bytes >= 32 << 10 { 512 } else { 256 })
}

/// `linear`, and outputs to a workgroup of it. Of a matrix of `known` rows and columns alone, it has them compiled in.
pub(super) fn linear_of(
    device: &Device,
    known: Option<usize>,
    formats: &[Option<quant::Format>],
) -> Result<(Pipeline, u32), Error> {
    // Small workgroups begin sooner, but each has to hold the row. Measured on an H100.
    let lanes = lanes(device)(if known.is_some_and(|width| width <= 2048) { 128 } else { 256 });
    let known = known.map_or(0, count);
    let fits = 4 * (known + lanes + 32) <= device.capabilities().workgroup_bytes;
    let (known, tile) = if fits && known > 0 { (known, tile(lanes, 1)) } else { (0, 0) };
    let overrides = [
        ("LANES", lanes.into()),
        ("TEAM_ROWS", 1.0),
        ("AHEAD", 4.0),
        ("HELD", known.into()),
        ("OUTPUTS", known.into()),
        ("TILE", tile.into()),
        stored::formats(formats.iter().copied()),
    ];
    Ok((compile(device, linear::VARIANTS, &overrides)?, self::tile(lanes, 1)))
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
