//! Linear layer: `y[t][o] = sum_i weight[o][i] * x[t][i]`.

use crate::{Real, Weight};

/// Something that multiplies rows by a matrix: the definition below, or a faster twin of it.
pub trait Linear<R: Real>: Send + Sync {
    /// Columns of the matrix, the length of an input row.
    fn inputs(&self) -> usize;

    /// Rows of the matrix, the length of an output row.
    fn outputs(&self) -> usize;

    /// Multiplies every row of `x` `[T, inputs]` into `y` `[T, outputs]`.
    ///
    /// # Panics
    ///
    /// If the lengths of `x` and `y` disagree.
    fn apply(&self, x: &[R], y: &mut [R]);

    /// As [`Self::apply`], for rows that are mostly zero: a zero may be left out of the sum. Weights are
    /// finite, so the result is the same.
    ///
    /// # Panics
    ///
    /// If the lengths of `x` and `y` disagree.
    fn apply_sparse(&self, x: &[R], y: &mut [R]) {
        self.apply(x, y);
    }

    /// Applies several layers, each to its own rows. A faster twin runs them side by side.
    ///
    /// # Panics
    ///
    /// If the lengths of a job's `x` and `y` disagree.
    fn apply_all(jobs: &mut [Job<'_, Self, R>])
    where
        Self: Sized,
    {
        for job in jobs {
            job.layer.apply(job.x, job.y);
        }
    }
}

/// One layer, what goes in and what comes out.
#[derive(Debug)]
pub struct Job<'a, M, R> {
    /// The layer.
    pub layer: &'a M,
    /// Input rows, `[T, inputs]`.
    pub x: &'a [R],
    /// Output rows, `[T, outputs]`.
    pub y: &'a mut [R],
}

/// Rows in `x` and `y`, checked against the layer's extents.
///
/// # Panics
///
/// If they disagree.
pub(crate) fn rows<R: Real>(layer: &impl Linear<R>, x: &[R], y: &[R]) -> usize {
    let rows = x.len() / layer.inputs();
    assert_eq!(x.len(), rows * layer.inputs(), "x is not [T, inputs]");
    assert_eq!(y.len(), rows * layer.outputs(), "y is not [T, outputs]");
    rows
}

/// A matrix `[outputs, inputs]` in row-major order, multiplied as the formula says.
#[derive(Clone, Debug)]
pub struct Matrix<W> {
    inputs: usize,
    weights: Vec<W>,
}

impl<W: Weight> Matrix<W> {
    /// Takes `weights` `[outputs, inputs]`.
    ///
    /// # Panics
    ///
    /// If there are no inputs, or the length is not a multiple of them.
    #[must_use]
    pub fn new(inputs: usize, weights: Vec<W>) -> Self {
        assert!(inputs > 0 && weights.len().is_multiple_of(inputs), "weights are not [outputs, inputs]");
        Self { inputs, weights }
    }

    /// The weights, `[outputs, inputs]`.
    #[must_use]
    pub fn weights(&self) -> &[W] {
        &self.weights
    }
}

impl<W: Weight, R: Real> Linear<R> for Matrix<W> {
    fn inputs(&self) -> usize {
        self.inputs
    }

    fn outputs(&self) -> usize {
        self.weights.len() / self.inputs
    }

    fn apply(&self, x: &[R], y: &mut [R]) {
        rows(self, x, y);
        let outputs = Linear::<R>::outputs(self);
        for (x, y) in x.chunks_exact(self.inputs).zip(y.chunks_exact_mut(outputs)) {
            for (y, weights) in y.iter_mut().zip(self.weights.chunks_exact(self.inputs)) {
                *y = R::zero();
                for (&w, &x) in weights.iter().zip(x) {
                    *y += w.widen::<R>() * x;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};
    use proptest::prelude::*;

    use super::{Linear, Matrix};
    use crate::compare::max_abs;
    use crate::rng::SplitMix64;
    use crate::{Real, Weight};

    fn apply<W: Weight>(inputs: usize, weights: Vec<W>, x: &[f64]) -> Vec<f64> {
        let matrix = Matrix::new(inputs, weights);
        let mut y = vec![f64::NAN; x.len() / inputs * Linear::<f64>::outputs(&matrix)];
        matrix.apply(x, &mut y);
        y
    }

    #[test]
    fn known_product_in_every_weight_type() {
        let (w, x, want) = ([1.0f32, 2.0, 3.0, -4.0, 0.5, 0.0], [1.0, 10.0, 4.0, 2.0], [21.0, -37.0, 0.5]);
        assert_eq!(apply(2, w.to_vec(), &x)[..3], want, "f32");
        assert_eq!(apply(2, w.map(f16::from_f32).to_vec(), &x)[..3], want, "f16");
        assert_eq!(apply(2, w.map(bf16::from_f32).to_vec(), &x)[3..], [8.0, 4.0, 2.0], "bf16, second row");
    }

    proptest! {
        #[test]
        fn is_linear(inputs in 1usize..20, outputs in 1usize..20, seed: u64, scale in -4.0f64..4.0) {
            let mut rng = SplitMix64::new(seed);
            let mut draw = |n: usize| (0..n).map(|_| f64::from(rng.normal())).collect::<Vec<_>>();
            let (w, a, b) = (draw(inputs * outputs), draw(inputs), draw(inputs));
            let mixed: Vec<f64> = a.iter().zip(&b).map(|(a, b)| a * scale + b).collect();
            let (ya, yb) = (apply(inputs, w.clone(), &a), apply(inputs, w.clone(), &b));
            let want: Vec<f64> = ya.iter().zip(&yb).map(|(a, b)| a * scale + b).collect();
            let limit = 1e-13 * inputs as f64 * f64::of(100.0);
            prop_assert!(max_abs(&apply(inputs, w, &mixed), &want, limit).is_ok(), "f(sa + b) = s f(a) + f(b)");
        }
    }

    #[test]
    #[should_panic(expected = "y is not [T, outputs]")]
    fn an_output_of_another_length_is_refused() {
        Matrix::new(2, vec![1.0f32; 6]).apply(&[1.0f64; 4], &mut [0.0; 5]);
    }
}
