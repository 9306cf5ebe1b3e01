//! Products of rows with several matrices, side by side: `y = activation(W x)`, or `y += activation(W x)`.
//!
//! Each job takes its rows from columns of one buffer and leaves them in columns of another, so that the jobs of a pass
//! need no copies between them.

use super::activation::Activation;
use super::linear::Linear;
use crate::Real;

/// Rows that lie in a buffer among others: row `t` starts at `offset + t * stride`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rows {
    /// Where row 0 starts.
    pub offset: usize,
    /// From the start of a row to that of the next.
    pub stride: usize,
}

impl Rows {
    /// Where row `t` starts.
    fn at(self, t: usize) -> usize {
        self.offset + t * self.stride
    }
}

/// One product: `W`, where its rows come from and go to, and what becomes of them.
#[derive(Debug)]
pub struct Job<'a, M> {
    /// The matrix `W`.
    pub layer: &'a M,
    /// Input rows in `x`.
    pub x: Rows,
    /// Output rows in `y`. No element of `y` is of two jobs.
    pub y: Rows,
    /// What the products pass through.
    pub activation: Activation,
    /// Whether they are added to what is there.
    pub accumulate: bool,
}

/// Runs every job over `rows` rows.
///
/// # Panics
///
/// If a job's rows are not all in `x` and `y`.
pub fn matmul<R: Real, M: Linear<R>>(rows: usize, jobs: &[Job<'_, M>], x: &[R], y: &mut [R]) {
    for job in jobs {
        let (inputs, outputs) = (job.layer.inputs(), job.layer.outputs());
        let own: Vec<R> = (0..rows).flat_map(|t| &x[job.x.at(t)..][..inputs]).copied().collect();
        let mut products = vec![R::zero(); rows * outputs];
        job.layer.apply(&own, &mut products);
        job.activation.apply(&mut products);
        for (t, products) in products.chunks_exact(outputs).enumerate() {
            for (y, &product) in y[job.y.at(t)..][..outputs].iter_mut().zip(products) {
                *y = if job.accumulate { *y + product } else { product };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Job, Rows, matmul};
    use crate::ops::activation::Activation;
    use crate::ops::linear::Matrix;

    #[test]
    fn jobs_take_and_leave_columns() {
        let (a, b) = (Matrix::new(2, vec![1.0f32, 1.0, 1.0, -1.0]), Matrix::new(1, vec![3.0f32]));
        let squared = Activation::SquaredRelu;
        let x = [5.0f64, 1.0, 2.0, 7.0, 4.0, 1.0];
        let mut y = [10.0f64; 8];
        let jobs = [
            Job {
                layer: &a,
                x: Rows { offset: 1, stride: 3 },
                y: Rows { offset: 0, stride: 4 },
                activation: squared,
                accumulate: false,
            },
            Job {
                layer: &b,
                x: Rows { offset: 0, stride: 3 },
                y: Rows { offset: 3, stride: 4 },
                activation: Activation::Identity,
                accumulate: true,
            },
        ];
        matmul(2, &jobs, &x, &mut y);
        assert_eq!(y, [9.0, 0.0, 10.0, 25.0, 25.0, 9.0, 10.0, 31.0], "by hand");
    }
}
