//! Value residual: from layer 1 on, each value is drawn towards the first layer's.
//!
//! ```text
//! v = v + (v_first - v) * sigmoid(vl)          vl = the output of the v adapter
//! ```

use crate::Real;
use crate::real::sigmoid;

/// Mixes `v` in place with `v_first`, both `[T, D]`, by the adapter's output `vl` `[T, D]`.
///
/// # Panics
///
/// If a slice's length disagrees.
pub fn value_residual<R: Real>(v_first: &[R], vl: &[R], v: &mut [R]) {
    assert_eq!(v_first.len(), v.len(), "v_first is not [T, D]");
    assert_eq!(vl.len(), v.len(), "vl is not [T, D]");
    for j in 0..v.len() {
        v[j] += (v_first[j] - v[j]) * sigmoid(vl[j]);
    }
}

#[cfg(test)]
mod tests {
    use super::value_residual;

    #[test]
    fn gate_at_its_ends_and_middle() {
        let mut v = [1.0f64, 1.0, 1.0];
        value_residual(&[5.0, 5.0, 5.0], &[-800.0, 0.0, 800.0], &mut v);
        assert_eq!(v, [1.0, 3.0, 5.0], "own, half, first");
    }
}
