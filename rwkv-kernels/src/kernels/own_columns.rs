//! What the kernels of `own_columns.wgsl` are compiled for: those of one vector and the rows of a matrix.

use rwkv_core::quant::{BLOCK, Format};

use super::weights;

/// Elements of weights that a lane reads at once.
const AT_ONCE: usize = 8;

/// How a workgroup is divided among rows of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Teams {
    /// Of the workgroup.
    pub lanes: u32,
    /// Of those, which share a row: a multiple of eight.
    pub row_lanes: u32,
}

impl Teams {
    /// For rows of so many weights, if they are known: a lane to each 32, and a few more, so that a subgroup of 32 has no lanes of two rows.
    /// `lanes` must be a power of two, 8 at least.
    #[must_use]
    pub fn new(lanes: u32, columns: Option<usize>) -> Self {
        let blocks = columns.map_or(32, |columns| columns.div_ceil(BLOCK));
        let whole = if blocks > 32 { blocks.next_multiple_of(32) } else { blocks.next_power_of_two().max(8) };
        Self { lanes, row_lanes: u32::try_from(whole).unwrap_or(lanes).min(lanes) }
    }

    /// The overrides of a pipeline.
    #[must_use]
    pub fn overrides(self) -> [(&'static str, f64); 2] {
        [("LANES", self.lanes.into()), ("ROW_LANES", self.row_lanes.into())]
    }

    /// Rows that a workgroup has at once.
    #[must_use]
    pub fn rows_at_once(self, format: Option<Format>) -> usize {
        (self.lanes / self.row_lanes) as usize * AT_ONCE / weights::elements(format, BLOCK)
    }

    /// The workgroup memory of a kernel: of floats, 32 to each lane of a row, and two to each of all.
    #[must_use]
    pub const fn workgroup_bytes(self) -> u32 {
        4 * (32 * self.row_lanes + 2 * self.lanes)
    }
}

#[cfg(test)]
mod tests {
    use super::Teams;

    #[test]
    fn rows_have_lanes_enough() {
        for lanes in [8, 64, 256, 512, 1024] {
            for columns in (1..300).map(|n| 32 * n) {
                let Teams { row_lanes, .. } = Teams::new(lanes, Some(columns));
                assert!(
                    row_lanes.is_multiple_of(8) && row_lanes <= lanes,
                    "{columns} in {lanes}: {row_lanes}"
                );
                // As `mix_in` has it: all columns in one span, of which a lane holds 4 times 4 at most.
                let fits = columns <= 16 * lanes as usize;
                assert!(!fits || 32 * row_lanes as usize >= columns, "{columns} in {lanes}: {row_lanes}");
                assert!(!fits || lanes < 16 || row_lanes <= lanes / 2, "{columns} in {lanes}: {row_lanes}");
            }
        }
        let of = |columns| Teams::new(512, Some(columns)).row_lanes;
        assert_eq!([96, 256, 1024, 1056, 2560, 4096].map(of), [8, 8, 32, 64, 96, 128], "for whole subgroups");
    }
}
