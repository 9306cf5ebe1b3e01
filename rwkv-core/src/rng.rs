//! Randomness that is a pure function of its counter.

/// `SplitMix64` (Steele, Lea and Flood, 2014): a stream for drawing tests and benches, the same numbers
/// on every machine.
#[derive(Clone, Debug)]
pub struct SplitMix64(u64);

impl SplitMix64 {
    /// Starts the stream named `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// The next value, uniform in `[lo, hi)`.
    #[expect(clippy::cast_precision_loss, reason = "24 bits fit an f32 exactly")]
    pub fn uniform(&mut self, lo: f32, hi: f32) -> f32 {
        let bits = self.next_u64() >> 40;
        lo + (hi - lo) * (bits as f32 / (1u64 << 24) as f32)
    }

    /// The next value of the standard normal distribution (the sum of twelve uniforms, less six: exact
    /// enough for drawing operands, and free of `ln` and `cos`, which differ between machines).
    pub fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform(0.0, 1.0)).sum::<f32>() - 6.0
    }
}

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four words
/// from a 128-bit counter and a 64-bit key, in `u32` arithmetic alone, so that a GPU draws the same.
#[must_use]
pub const fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let mut round = 0;
    while round < 10 {
        let (hi0, lo0) = mul_hi_lo(MULTIPLIERS[0], counter[0]);
        let (hi1, lo1) = mul_hi_lo(MULTIPLIERS[1], counter[2]);
        counter = [hi1 ^ counter[1] ^ key[0], lo1, hi0 ^ counter[3] ^ key[1], lo0];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        round += 1;
    }
    counter
}

#[expect(clippy::cast_possible_truncation, reason = "the halves of a 64-bit product")]
const fn mul_hi_lo(a: u32, b: u32) -> (u32, u32) {
    let product = a as u64 * b as u64;
    ((product >> 32) as u32, product as u32)
}

#[cfg(test)]
mod tests {
    use super::{SplitMix64, philox4x32};

    /// The known answers of the authors' Random123 library (`kat_vectors`).
    #[test]
    fn philox_known_answers() {
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            "all zero"
        );
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            "all ones"
        );
        assert_eq!(
            philox4x32([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            "digits of pi"
        );
    }

    /// The first outputs of the authors' `splitmix64.c` from a state of zero.
    #[test]
    fn splitmix_known_answers() {
        let mut rng = SplitMix64::new(0);
        let want = [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f];
        assert_eq!([0; 3].map(|_| rng.next_u64()), want, "from zero");
    }

    #[test]
    fn draws_have_their_range_and_moments() {
        let mut rng = SplitMix64::new(1);
        let uniform: Vec<f32> = (0..10_000).map(|_| rng.uniform(-2.0, 6.0)).collect();
        let (least, most) = uniform.iter().fold((6f32, -2f32), |(a, b), &v| (a.min(v), b.max(v)));
        assert!((-2.0..-1.98).contains(&least) && (5.98..6.0).contains(&most), "{least} {most}");
        let normal: Vec<f32> = (0..10_000).map(|_| rng.normal()).collect();
        let mean = normal.iter().sum::<f32>() / 1e4;
        let variance = normal.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 1e4;
        // five deviations of the mean, and of the variance
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.07, "{mean} {variance}");
    }
}
