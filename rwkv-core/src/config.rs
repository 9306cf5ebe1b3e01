//! Every extent of a model, named once.

/// The extents of an RWKV-7 model, all read from its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ModelConfig {
    /// Layers, `L`.
    pub n_layers: usize,
    /// Width of the residual stream, `D = H * N`.
    pub width: usize,
    /// Heads per layer, `H`.
    pub n_heads: usize,
    /// Channels per head, `N`.
    pub head_size: usize,
    /// Hidden units of the channel mix, `F`.
    pub hidden: usize,
    /// Tokens in the vocabulary, `V`.
    pub vocab: usize,
    /// Ranks of the four `LoRA` adapters.
    pub ranks: Ranks,
}

/// Ranks of the `LoRA` adapters. They follow no formula across released models: read them from the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ranks {
    /// Decay adapter, `w1 [D, rank]`.
    pub w: usize,
    /// In-context learning rate adapter, `a1 [D, rank]`.
    pub a: usize,
    /// Value residual adapter, `v1 [D, rank]`; 0 in a model of one layer, which has none.
    pub v: usize,
    /// Gate adapter, `g1 [D, rank]`.
    pub g: usize,
}

impl ModelConfig {
    /// Elements of one layer's WKV state, `[H, N, N]`.
    #[must_use]
    pub const fn wkv_len(&self) -> usize {
        self.n_heads * self.head_size * self.head_size
    }

    /// Parameters that a decode step reads: all but the embedding table and what layer 0 does not use.
    #[must_use]
    pub const fn streamed_params(&self) -> usize {
        let (d, r) = (self.width, self.ranks);
        let matrices = 4 * d * d + 2 * d * self.hidden;
        let lora = 2 * d * (r.w + r.a + r.g);
        // six lerps, w0, a0, k_k, k_a, r_k, ln_x, ln1, ln2 (two each), ffn.x_k
        let vectors = 18 * d;
        let value_residual = (self.n_layers - 1) * (2 * d * r.v + d);
        self.n_layers * (matrices + lora + vectors) + value_residual + self.vocab * d + 2 * d
    }
}
