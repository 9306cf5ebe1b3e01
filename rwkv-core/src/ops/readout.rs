//! Readout: what the heads say, normalised per head, with the bonus of the present token, gated.
//!
//! ```text
//! y   = (y - mean(y)) / sqrt(var(y) + 64e-5) * gain + bias          moments over a head's N channels
//! y  += (sum_j r[j] * k[j] * r_k[j]) * v                            per head; k modulated, v mixed
//! out = y * gate
//! ```
//!
//! `y` before the norm is unbounded (81,599 in the bundled model): it must not pass through `f16`.

use super::layer_norm::moments;
use crate::Real;

/// The eps of the group norm `ln_x`: PyTorch's 1e-5, times 64. It stays 64e-5 whatever the head size.
pub const GN_EPS: f64 = 64e-5;

/// The operands, `[T, H, N]` or `[H, N]`.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a, R> {
    /// Output of the state update, `[T, H, N]`.
    pub y: &'a [R],
    /// Receptance, `[T, H, N]`.
    pub r: &'a [R],
    /// Modulated key, `[T, H, N]`.
    pub k: &'a [R],
    /// Mixed value, `[T, H, N]`.
    pub v: &'a [R],
    /// Gate, `[T, H, N]`.
    pub gate: &'a [R],
    /// Gain of the group norm, `[H, N]`.
    pub gain: &'a [R],
    /// Bias of the group norm, `[H, N]`.
    pub bias: &'a [R],
    /// Bonus weight, `[H, N]`.
    pub r_k: &'a [R],
}

/// Computes the readout into `out` `[T, H, N]`.
///
/// # Panics
///
/// If a slice's length disagrees.
pub fn readout<R: Real>(head_size: usize, x: Inputs<'_, R>, out: &mut [R]) {
    let width = x.gain.len();
    assert_eq!(out.len() % width, 0, "out is not [T, H, N]");
    assert_eq!(width % head_size, 0, "gain is not [H, N]");
    for s in [x.y, x.r, x.k, x.v, x.gate] {
        assert_eq!(s.len(), out.len(), "operand is not [T, H, N]");
    }
    for s in [x.bias, x.r_k] {
        assert_eq!(s.len(), width, "vector is not [H, N]");
    }
    for t in (0..out.len()).step_by(width) {
        for h in (0..width).step_by(head_size) {
            let at = t + h..t + h + head_size;
            let (y, r, k) = (&x.y[at.clone()], &x.r[at.clone()], &x.k[at.clone()]);
            let (v, gate, out) = (&x.v[at.clone()], &x.gate[at.clone()], &mut out[at]);
            let (gain, bias, r_k) = (&x.gain[h..], &x.bias[h..], &x.r_k[h..]);
            let (mean, scale) = moments(y, GN_EPS);
            let bonus = (0..head_size).map(|j| r[j] * k[j] * r_k[j]).sum::<R>();
            for j in 0..head_size {
                out[j] = ((y[j] - mean) * scale * gain[j] + bias[j] + bonus * v[j]) * gate[j];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Inputs, readout};

    #[test]
    fn norm_then_bonus_then_gate() {
        let x = Inputs {
            y: &[1.0e6f64, 3.0e6],
            r: &[1.0, 2.0],
            k: &[3.0, 1.0],
            v: &[10.0, 100.0],
            gate: &[1.0, 0.5],
            gain: &[1.0, 1.0],
            bias: &[0.25, 0.25],
            r_k: &[1.0, -1.0],
        };
        let mut out = [f64::NAN; 2];
        readout(2, x, &mut out);
        // norm gives -1 and 1; the bonus is 1*3*1 - 2*1*1 = 1, times v
        for (got, want) in out.iter().zip([-1.0 + 0.25 + 10.0, (1.0 + 0.25 + 100.0) * 0.5]) {
            assert!((got - want).abs() < 1e-9, "{got} {want}");
        }
    }

    #[test]
    fn eps_is_the_same_for_every_head_size() {
        for n in [2, 16, 128] {
            // a deviation of 0.01, so that eps tells
            let y: Vec<f64> = (0..n).map(|j| if j % 2 == 0 { -0.01 } else { 0.01 }).collect();
            let (zero, one) = (vec![0.0; n], vec![1.0; n]);
            let (r, k, v, gate, gain, bias, r_k) = (&zero, &zero, &zero, &one, &one, &zero, &zero);
            let mut out = vec![f64::NAN; n];
            readout(n, Inputs { y: &y, r, k, v, gate, gain, bias, r_k }, &mut out);
            let want = 0.01 / (1e-4f64 + 64e-5).sqrt();
            assert!((out[1] - want).abs() < 1e-12, "head size {n}: {} {want}", out[1]);
        }
    }

    #[test]
    fn every_head_has_its_own_vectors() {
        let one = [1.0f64; 4];
        let x = Inputs {
            y: &[-1e6, 1e6, -1e6, 1e6],
            r: &one,
            k: &one,
            v: &one,
            gate: &one,
            gain: &[1.0, 1.0, 2.0, 2.0],
            bias: &[0.0, 0.0, 10.0, 10.0],
            r_k: &[0.0, 0.0, 50.0, 50.0],
        };
        let mut out = [f64::NAN; 4];
        readout(2, x, &mut out);
        for (got, want) in out.iter().zip([-1.0, 1.0, 108.0, 112.0]) {
            assert!((got - want).abs() < 1e-9, "{out:?}");
        }
    }
}
