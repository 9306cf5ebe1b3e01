//! What the pictures have in common.

use anyhow::anyhow;
use plotters::style::RGBColor;

/// Of all that is written.
pub(crate) const FONT: &str = "sans-serif";

/// Of curves and bars, told apart in print too.
pub(crate) const COLOURS: [RGBColor; 6] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0xd6, 0x5f, 0x0e),
    RGBColor(0x2c, 0x8a, 0x2c),
    RGBColor(0xb0, 0x2a, 0x30),
    RGBColor(0x7a, 0x55, 0xa8),
    RGBColor(0x12, 0x8a, 0x96),
];

/// A place on a logarithmic axis, which `plotters` finds by multiplying: without what that is off by.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "what `plotters` calls")]
pub(crate) fn place(value: &f64) -> String {
    format!("{}", (value * 1e6).round() / 1e6)
}

/// What drawing can fail with borrows from the picture.
pub(crate) fn fail(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("drawing: {error}")
}
