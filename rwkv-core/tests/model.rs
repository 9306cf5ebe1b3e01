//! The forward pass is the operations, one after another: it batches, packs and threads them, and changes no bit.

use rwkv_core::config::Ranks;
use rwkv_core::model::{Adapter, Block, ChannelMix, Logits, Model, Norm, Options, Segment, State, TimeMix};
use rwkv_core::ops::activation::Activation;
use rwkv_core::ops::layer_norm::{LN_EPS, layer_norm};
use rwkv_core::ops::linear::{Linear, Matrix};
use rwkv_core::ops::lora::lora;
use rwkv_core::ops::token_shift::token_shift;
use rwkv_core::ops::{
    channel_mix, decay, embedding, head, kappa, learning_rate, readout, value_residual, wkv7,
};
use rwkv_core::rng::SplitMix64;
use rwkv_core::{Elements, ModelConfig};

const CONFIG: ModelConfig = ModelConfig {
    n_layers: 2,
    width: 12,
    n_heads: 3,
    head_size: 4,
    hidden: 20,
    vocab: 9,
    ranks: Ranks { w: 2, a: 3, v: 4, g: 5 },
};

type Reference = Model<f64, Matrix<f32>>;

/// A random model whose weights are exact in f32.
fn model(seed: u64) -> Reference {
    let (c, mut rng) = (CONFIG, SplitMix64::new(seed));
    let mut draw = |n: usize| (0..n).map(|_| rng.normal() * 0.5).collect::<Vec<f32>>();
    let embedding = Elements::F32(draw(c.vocab * c.width));
    let wide = |v: Vec<f32>| v.into_iter().map(f64::from).collect::<Vec<f64>>();
    let mut matrix = |outputs: usize, inputs: usize| Matrix::new(inputs, draw(outputs * inputs));
    let (mut vectors, d) = (SplitMix64::new(seed + 1), c.width);
    let mut vector = |n: usize| wide((0..n).map(|_| vectors.normal()).collect());
    let blocks = (0..c.n_layers)
        .map(|layer| {
            let mut adapter = |rank: usize, bias: usize| Adapter {
                down: matrix(rank, d),
                up: matrix(d, rank),
                bias: vector(bias),
            };
            let (w, a, g) = (adapter(c.ranks.w, d), adapter(c.ranks.a, d), adapter(c.ranks.g, 0));
            let v = (layer > 0).then(|| adapter(c.ranks.v, d));
            let mut norm = || Norm { gain: vector(d), bias: vector(d) };
            let (ln1, ln2, group) = (norm(), norm(), norm());
            let [receptance, key, value, output] = [(); 4].map(|()| matrix(d, d));
            let (k_k, k_a, r_k) = (vector(d), vector(d), vector(d));
            let mixes = vector(6 * d);
            Block {
                ln1,
                time_mix: TimeMix {
                    mixes,
                    receptance,
                    key,
                    value,
                    output,
                    w,
                    a,
                    v,
                    g,
                    k_k,
                    k_a,
                    r_k,
                    norm: group,
                },
                ln2,
                channel_mix: ChannelMix {
                    mix: vector(d),
                    key: matrix(c.hidden, d),
                    value: matrix(d, c.hidden),
                },
            }
        })
        .collect();
    let ln0 = Norm { gain: vector(d), bias: vector(d) };
    let ln_out = Norm { gain: vector(d), bias: vector(d) };
    Model { config: c, embedding, ln0, blocks, ln_out, head: matrix(c.vocab, d) }
}

fn norm(x: &[f64], norm: &Norm<f64>) -> Vec<f64> {
    let mut y = vec![f64::NAN; x.len()];
    layer_norm(x, &norm.gain, &norm.bias, LN_EPS, &mut y);
    y
}

fn apply(matrix: &Matrix<f32>, x: &[f64]) -> Vec<f64> {
    let mut y = vec![f64::NAN; x.len() / Linear::<f64>::inputs(matrix) * Linear::<f64>::outputs(matrix)];
    matrix.apply(x, &mut y);
    y
}

fn adapter(adapter: &Adapter<f64, Matrix<f32>>, activation: Activation, x: &[f64]) -> Vec<f64> {
    let mut y = vec![f64::NAN; x.len()];
    lora((&adapter.down, activation, &adapter.up), &adapter.bias, x, &mut y);
    y
}

/// Shifts by the row kept in the state, and keeps the last.
fn shift(x: &[f64], kept: &mut [f64], mixes: &[f64]) -> Vec<f64> {
    let mut out = vec![f64::NAN; x.len() * mixes.len() / kept.len()];
    token_shift(x, kept, mixes, &mut out);
    kept.copy_from_slice(&x[x.len() - kept.len()..]);
    out
}

/// One sequence through every operation, as the formulas of their files say.
fn by_operations(model: &Reference, tokens: &[u32], state: &mut State<f64>) -> Vec<f64> {
    let (c, d, t) = (model.config, model.config.width, tokens.len());
    let Elements::F32(table) = &model.embedding else { panic!("drawn as F32") };
    let mut x = vec![f64::NAN; t * d];
    embedding::embedding(tokens, table, &model.ln0.gain, &model.ln0.bias, &mut x);
    let mut v_first = Vec::new();
    for (layer, block) in model.blocks.iter().enumerate() {
        let at = layer * d..(layer + 1) * d;
        let mix = &block.time_mix;
        let mixed = shift(&norm(&x, &block.ln1), &mut state.att_shift[at.clone()], &mix.mixes);
        let [xr, xw, xk, xv, xa, xg] = [0, 1, 2, 3, 4, 5].map(|m| &mixed[m * t * d..][..t * d]);
        let (r, mut k, mut v) = (apply(&mix.receptance, xr), apply(&mix.key, xk), apply(&mix.value, xv));
        let (mut lw, mut a) =
            (adapter(&mix.w, Activation::Tanh, xw), adapter(&mix.a, Activation::Identity, xa));
        let gate = adapter(&mix.g, Activation::Sigmoid, xg);
        decay::log_decay(&mut lw);
        learning_rate::learning_rate(&mut a);
        match &mix.v {
            None => v_first.clone_from(&v),
            Some(of_v) => {
                value_residual::value_residual(&v_first, &adapter(of_v, Activation::Identity, xv), &mut v);
            }
        }
        let mut b = vec![f64::NAN; t * d];
        kappa::kappa(c.head_size, &k, &mix.k_k, &mut b);
        learning_rate::modulate_key(&a, &mix.k_a, &mut k);
        learning_rate::directions(&mut a, &mut b);
        let dims = wkv7::Dims { tokens: t, heads: c.n_heads, head_size: c.head_size };
        let inputs = wkv7::Inputs { r: &r, lw: &lw, k: &k, v: &v, a: &a, b: &b };
        let (mut y, mut out) = (vec![f64::NAN; t * d], vec![f64::NAN; t * d]);
        wkv7::wkv7(dims, inputs, &mut state.wkv[layer * c.wkv_len()..][..c.wkv_len()], &mut y);
        let (gain, bias, r_k) = (&mix.norm.gain, &mix.norm.bias, &mix.r_k);
        readout::readout(
            c.head_size,
            readout::Inputs { y: &y, r: &r, k: &k, v: &v, gate: &gate, gain, bias, r_k },
            &mut out,
        );
        x.iter_mut().zip(apply(&mix.output, &out)).for_each(|(x, y)| *x += y);

        let mix = &block.channel_mix;
        let shifted = shift(&norm(&x, &block.ln2), &mut state.ffn_shift[at], &mix.mix);
        let (mut hidden, mut y) = (vec![f64::NAN; t * c.hidden], vec![f64::NAN; t * d]);
        channel_mix::channel_mix(&mix.key, &mix.value, &shifted, &mut hidden, &mut y);
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
    let mut logits = vec![f64::NAN; t * c.vocab];
    head::head(&model.head, &model.ln_out.gain, &model.ln_out.bias, &x, &mut logits);
    logits
}

#[test]
fn the_forward_pass_is_the_operations() {
    let model = model(1);
    let calls: [&[u32]; 3] = [&[1, 5, 8, 0, 3, 3, 2], &[4], &[7, 7, 1]];
    let (mut state, mut want_state) = (State::new(&CONFIG), State::new(&CONFIG));
    for tokens in calls {
        let segment = Segment { tokens, state: &mut state, logits: Logits::All };
        let logits = model.forward(&mut [segment], Options::default());
        assert_eq!(logits, by_operations(&model, tokens, &mut want_state), "{tokens:?}");
        assert_eq!(state, want_state, "after {tokens:?}");
    }
}

/// Segments beside each other are as alone, whatever logits are asked for.
#[test]
fn packed_segments_are_as_alone() {
    let model = model(2);
    let tokens: [&[u32]; 4] = [&[1, 5, 8], &[4], &[7, 7, 1, 0, 2], &[3, 8]];
    let logits = [Logits::Last, Logits::All, Logits::None, Logits::All];
    let mut states = [(); 4].map(|()| State::new(&CONFIG));
    let mut segments: Vec<_> = tokens
        .iter()
        .zip(&mut states)
        .zip(logits)
        .map(|((tokens, state), logits)| Segment { tokens, state, logits })
        .collect();
    let got = model.forward(&mut segments, Options::default());
    let mut want = Vec::new();
    for ((tokens, logits), state) in tokens.iter().zip(logits).zip(&states) {
        let mut alone = State::new(&CONFIG);
        let all = by_operations(&model, tokens, &mut alone);
        assert_eq!(*state, alone, "{tokens:?}");
        want.extend_from_slice(&all[all.len() - logits.rows(tokens.len()) * CONFIG.vocab..]);
    }
    assert_eq!(got, want, "the rows asked for, in order");
    assert_eq!(model.forward::<State<f64>>(&mut [], Options::default()), [0.0; 0], "no segments");
}
