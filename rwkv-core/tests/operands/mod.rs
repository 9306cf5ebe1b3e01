//! Operands of the state update, as the tests of its forms share them.
#![expect(clippy::unwrap_used, reason = "a test that cannot read its file fails")]

use rwkv_core::Real;
use rwkv_core::compare::{magnitude, max_abs};
use rwkv_core::ops::wkv7::{Dims, Inputs, wkv7};

/// Owned operands of one call.
#[derive(Clone)]
pub(crate) struct Operands<R> {
    pub(crate) dims: Dims,
    pub(crate) r: Vec<R>,
    pub(crate) lw: Vec<R>,
    pub(crate) k: Vec<R>,
    pub(crate) v: Vec<R>,
    pub(crate) a: Vec<R>,
    pub(crate) b: Vec<R>,
    pub(crate) state: Vec<R>,
}

impl<R: Real> Operands<R> {
    pub(crate) fn inputs(&self) -> Inputs<'_, R> {
        Inputs { r: &self.r, lw: &self.lw, k: &self.k, v: &self.v, a: &self.a, b: &self.b }
    }

    /// State and output after `run`.
    pub(crate) fn after(&self, run: impl Fn(Dims, Inputs<'_, R>, &mut [R], &mut [R])) -> (Vec<R>, Vec<R>) {
        let (mut state, mut y) = (self.state.clone(), vec![R::nan(); self.dims.vector_len()]);
        run(self.dims, self.inputs(), &mut state, &mut y);
        (state, y)
    }

    pub(crate) fn wide(&self) -> Operands<f64> {
        let wide = |v: &[R]| v.iter().map(|x| x.wide()).collect();
        let Self { dims, r, lw, k, v, a, b, state } = self;
        Operands {
            dims: *dims,
            r: wide(r),
            lw: wide(lw),
            k: wide(k),
            v: wide(v),
            a: wide(a),
            b: wide(b),
            state: wide(state),
        }
    }
}

/// A golden case: operands in f32, and the state and output that an f64 run makes of them, stored in f32.
pub(crate) struct Golden {
    pub(crate) name: &'static str,
    pub(crate) operands: Operands<f32>,
    pub(crate) state: Vec<f32>,
    pub(crate) y: Vec<f32>,
}

impl Golden {
    /// All four, each reproduced by the definition in f64 to what storing it in f32 leaves: half a unit of the largest.
    pub(crate) fn all() -> Vec<Self> {
        ["realistic", "fastest_decay", "sticky", "mixed_decay"].into_iter().map(Self::read).collect()
    }

    fn read(name: &'static str) -> Self {
        let path = format!("{}/tests/vectors/wkv_{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let get = |name: &str| -> Vec<f32> {
            let bytes = file.tensor(name).unwrap().data();
            bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
        };
        let shape = file.tensor("r").unwrap().shape().to_vec();
        let dims = Dims { tokens: shape[0], heads: shape[1], head_size: shape[2] };
        let (r, lw, k, v) = (get("r"), get("logw"), get("k"), get("v"));
        let operands = Operands { dims, r, lw, k, v, a: get("a"), b: get("b"), state: get("S0") };
        let golden = Self { name, state: get("S_final"), y: get("y"), operands };
        golden.check(
            "f64",
            &golden.operands.wide().after(wkv7),
            f64::from(f32::EPSILON) / 2.0 * magnitude(&golden.y),
        );
        golden
    }

    /// Compares a run with it.
    pub(crate) fn check<R: Real>(&self, run: &str, (state, y): &(Vec<R>, Vec<R>), limit: f64) {
        max_abs(state, &self.state, limit).unwrap_or_else(|e| panic!("{}, {run}, state: {e}", self.name));
        max_abs(y, &self.y, limit).unwrap_or_else(|e| panic!("{}, {run}, y: {e}", self.name));
    }
}
