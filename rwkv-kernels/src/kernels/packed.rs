//! Rows that kernels write as halves for the cooperative matrices that read them: what is said in `packed.wgsl`. The
//! rounding is that of [`rwkv_core::ops::to_halves`].
//!
//! A row of halves begins at the word where the row in single precision would, and takes half of its words, so that nothing
//! else about a layout depends on what it is written as.

/// The override `HALVES` of a pipeline whose rows are halves of what `2^exponent` divides, or single precision.
#[must_use]
pub fn halves(exponent: Option<u8>) -> (&'static str, f64) {
    ("HALVES", exponent.map_or(0.0, |exponent| f64::from(exponent) + 1.0))
}

/// Rows `[T, D]` in `f32` as words, and back.
#[cfg(test)]
#[cfg(feature = "gpu")]
pub(super) mod tests {
    use half::f16;
    use rwkv_core::ops::to_halves::to_halves;

    /// What a kernel's rows may be written as.
    pub(in crate::kernels) const EXPONENTS: [Option<u8>; 3] = [None, Some(0), Some(4)];

    /// As a kernel finds them, or leaves them. What a row of halves does not take is NaN.
    pub(in crate::kernels) fn words(rows: &[f32], width: usize, exponent: Option<u8>) -> Vec<u32> {
        let Some(exponent) = exponent else { return rows.iter().map(|x| x.to_bits()).collect() };
        let row = |row: &[f32]| {
            let halves = to_halves(row, exponent);
            let two = |of: &[f16]| u32::from(of[0].to_bits()) | u32::from(of[1].to_bits()) << 16;
            let mut words: Vec<u32> = halves.chunks_exact(2).map(two).collect();
            words.resize(row.len(), f32::NAN.to_bits());
            words
        };
        rows.chunks_exact(width.max(1)).flat_map(row).collect()
    }

    /// What words say, after nothing else was written.
    pub(in crate::kernels) fn floats(words: &[u32], width: usize, exponent: Option<u8>) -> Vec<f32> {
        let Some(exponent) = exponent else { return words.iter().map(|&x| f32::from_bits(x)).collect() };
        let row = |row: &[u32]| {
            let (halves, rest) = row.split_at(width / 2);
            assert!(rest.iter().all(|&x| f32::from_bits(x).is_nan()), "half of a row is written");
            let unit = f32::from(exponent).exp2();
            let two = |x: &u32| [*x, x >> 16].map(|x| unit * f16::from_bits((x & 0xFFFF) as u16).to_f32());
            halves.iter().flat_map(two).collect::<Vec<_>>()
        };
        words.chunks_exact(width.max(1)).flat_map(row).collect()
    }

    /// What is wanted of rows, and how far off it may be, as they are written: see [`to_halves`].
    pub(in crate::kernels) fn rounded(want: f64, limit: f64, exponent: Option<u8>) -> (f64, f64) {
        let Some(exponent) = exponent else { return (want, limit) };
        let unit = f64::from(exponent).exp2();
        let most = f64::from(f16::MAX) * unit;
        let rounding = (want.abs() + limit) * 2f64.powi(-11) + unit * 2f64.powi(-25);
        (want.clamp(-most, most), limit + rounding)
    }
}
