//! What the kernels of `own_columns.wgsl` are compiled for: those of one vector and the rows of a matrix.

use rwkv_core::quant::Format;

use super::weights;
use crate::Kernel;

/// Elements of weights that a lane has of each row: of halves, and in blocks a whole one.
const LANE_COLUMNS: usize = rwkv_core::quant::BLOCK;

/// Elements of weights that a lane reads at once.
const AT_ONCE: usize = 8;

/// Invocations that the variants with subgroups take for granted in one.
pub const SUBGROUP: u32 = 8;

/// Those of a kernel's variants that are for devices whose subgroups have so many invocations at least.
pub fn variants(all: &[Kernel], subgroup: u32) -> impl Iterator<Item = &Kernel> + Clone {
    all.iter().filter(move |kernel| !kernel.features.subgroup || subgroup >= SUBGROUP)
}

/// How the rows of a matrix are divided in a workgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Teams {
    /// Of the workgroup.
    lanes: u32,
    /// Which share a row.
    row_lanes: u32,
}

impl Teams {
    /// For rows of so many weights, if they are known: as many lanes as they have blocks, or a few more, so that sums over whole
    /// subgroups are of one row. `lanes` is a power of two, 8 at least.
    #[must_use]
    pub fn new(lanes: u32, columns: Option<usize>) -> Self {
        let blocks = columns.map_or(32, |columns| columns.div_ceil(LANE_COLUMNS));
        let whole = if blocks > 32 { blocks.next_multiple_of(32) } else { blocks.next_power_of_two().max(8) };
        Self { lanes, row_lanes: u32::try_from(whole).unwrap_or(lanes).min(lanes) }
    }

    /// Lanes of the workgroup.
    #[must_use]
    pub const fn lanes(self) -> u32 {
        self.lanes
    }

    /// The overrides of a pipeline. Of all sums of rows a lane keeps one at a time.
    #[must_use]
    pub fn overrides(self) -> [(&'static str, f64); 2] {
        [("LANES", self.lanes.into()), ("ROW_LANES", self.row_lanes.into())]
    }

    /// Rows that a workgroup has at once.
    #[must_use]
    pub fn rows_at_once(self, format: Option<Format>) -> usize {
        (self.lanes / self.row_lanes) as usize * AT_ONCE / weights::elements(format, LANE_COLUMNS)
    }

    /// The workgroup memory of a kernel: a span of the vector, and two sums of each lane.
    #[must_use]
    pub const fn workgroup_bytes(self) -> u32 {
        4 * (32 * self.row_lanes + 2 * self.lanes)
    }
}
