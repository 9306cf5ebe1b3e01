//! What lowerings share: extents, why they are refused, and the grid.
//!
//! The kernels that use it walk what they work on in steps of the grid, so that any number of workgroups does all of
//! the work, and what [`lower`](super::add::lower) counts is what a device is best filled with.

use rwkv_core::ops::wkv7;

use super::MAX_GROUPS;
use crate::Kernel;

/// Extents of an operand whose elements are all treated alike, four at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dims {
    /// Rows, `T`.
    pub rows: usize,
    /// Elements of a row, `D`.
    pub width: usize,
}

/// Why a call cannot be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The kernel reads four elements at a time, and each row from its start.
    #[error("{kernel}: rows of {width} elements are not vectors of 4")]
    Vectors {
        /// The kernel.
        kernel: &'static str,
        /// Elements of a row.
        width: usize,
    },
    /// An operand `[rows, width]` is longer than a `u32` can index.
    #[error("{kernel}: {rows} rows of {width} elements are beyond 32-bit indices")]
    Len {
        /// The kernel.
        kernel: &'static str,
        /// The rows asked for.
        rows: usize,
        /// Elements of a row.
        width: usize,
    },
    /// What a row is made of does not fit into it.
    #[error("{kernel}: {width} elements from {offset} do not fit into {stride}")]
    Stride {
        /// The kernel.
        kernel: &'static str,
        /// What is to fit.
        width: usize,
        /// Where it begins.
        offset: usize,
        /// What there is.
        stride: usize,
    },
    /// More workgroups along a dimension than a dispatch has.
    #[error("{kernel}: {got:?} workgroups, at most {MAX_GROUPS} along a dimension")]
    Groups {
        /// The kernel.
        kernel: &'static str,
        /// As many as asked for.
        got: [usize; 2],
    },
}

/// The most that a kernel indexes. Whoever walks steps over the end by less than a grid of the largest workgroups,
/// and must not wrap to the start.
const MAX_LEN: u32 = u32::MAX - MAX_GROUPS * 1024;

/// Elements of an operand `[rows, width]`.
pub(super) fn elements(kernel: &Kernel, rows: usize, width: usize) -> Result<u32, Error> {
    let len = rows.checked_mul(width).and_then(|len| u32::try_from(len).ok());
    len.filter(|&len| len <= MAX_LEN).ok_or(Error::Len { kernel: kernel.name, rows, width })
}

impl Dims {
    /// Vectors of 4 in a row, and in all rows.
    pub(super) fn vectors(self, kernel: &Kernel) -> Result<(u32, u32), Error> {
        let Self { rows, width } = self;
        if !width.is_multiple_of(4) {
            return Err(Error::Vectors { kernel: kernel.name, width });
        }
        // One row is within the indices even where there are none.
        let of =
            |n| elements(kernel, n, width / 4).map_err(|_| Error::Len { kernel: kernel.name, rows, width });
        Ok((of(1)?, of(rows)?))
    }
}

/// Workgroups that give each of `n` items its invocation, as far as one dispatch can.
pub(super) fn grid(kernel: &Kernel, n: u32) -> [u32; 3] {
    [n.div_ceil(kernel.workgroup_size[0]).min(MAX_GROUPS), 1, 1]
}

/// That `width` elements from `offset` fit into rows of `stride`, of which all elements can be indexed: the stride.
pub(super) fn fits(kernel: &Kernel, rows: usize, [offset, width, stride]: [usize; 3]) -> Result<u32, Error> {
    if offset.checked_add(width).is_none_or(|end| end > stride) {
        return Err(Error::Stride { kernel: kernel.name, width, offset, stride });
    }
    elements(kernel, rows, stride)?;
    elements(kernel, 1, stride)
}

/// A workgroup for each of `x` by `y`.
pub(super) fn groups(kernel: &Kernel, [x, y]: [usize; 2]) -> Result<[u32; 3], Error> {
    let of = |n| super::groups(n).ok_or(Error::Groups { kernel: kernel.name, got: [x, y] });
    Ok([of(x)?, of(y)?, 1])
}

/// Extents of operands `[T, H, N]`, a row for each head of a token.
pub(super) struct Rows {
    /// `T H`.
    pub(super) rows: u32,
    /// `H`.
    pub(super) heads: u32,
    /// `N`.
    pub(super) head_size: u32,
}

/// Extents and workgroups of a kernel that gives each head of a token a workgroup, as far as one dispatch can.
pub(super) fn rows(kernel: &Kernel, dims: wkv7::Dims) -> Result<(Rows, [u32; 3]), Error> {
    let rows = dims.tokens.saturating_mul(dims.heads);
    let len = elements(kernel, rows, dims.head_size)?;
    let of = |n| elements(kernel, n, 1);
    let rows = Rows { rows: of(rows)?, heads: of(dims.heads)?, head_size: of(dims.head_size)? };
    // None where there is no element: a mean of nothing is not a number.
    let groups = [rows.rows.min(len).min(MAX_GROUPS), 1, 1];
    Ok((rows, groups))
}
