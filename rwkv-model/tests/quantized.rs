//! Models with quantised matrices: what they compute, on either device, and in files.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::sync::LazyLock;

use rwkv_core::compare::{magnitude, max_abs};
use rwkv_core::model::{Logits, Model, Options, Segment, State};
use rwkv_core::ops::linear::Matrix as Plain;
use rwkv_core::{Elements, Real};
use rwkv_model::checkpoint::Fault;
use rwkv_model::recipe::{Matrix, Recipe, WeightFormat};
use rwkv_model::{Checkpoint, Engine, EngineOptions, Error};
use support::{Tensor, open, random_model, safetensors, shown, together};

/// The limit of an engine's logits is so many times the distance of plain loops in f32 from those in f64: as in `gpu.rs`.
const FACTOR: f64 = 8.0;

const RECIPES: [&str; 4] =
    ["int8", "int4", "int4,head=int8,att.value=f16,0.ffn.key=int8", "f16,ffn.value=int4,head=int4"];

fn recipe(text: &str) -> Recipe {
    text.parse().unwrap()
}

fn bundled() -> &'static Checkpoint {
    static BUNDLED: LazyLock<Checkpoint> = LazyLock::new(|| Checkpoint::open(support::BUNDLED).unwrap());
    &BUNDLED
}

fn engine(checkpoint: &Checkpoint, weights: &str, options: EngineOptions) -> Engine {
    Engine::new(checkpoint, EngineOptions { weights: recipe(weights), ..options }, &|_| {}).unwrap()
}

/// A model whose extents are no multiples of a block.
fn small() -> Vec<Tensor> {
    random_model([3, 2, 20, 90, 37, 6], 4)
}

fn text(n: usize) -> Vec<u32> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/books-10m/valid.txt");
    std::fs::read(path).unwrap()[..n].iter().map(|&byte| byte.into()).collect()
}

/// The model with the matrices that a recipe quantises as their decoded values.
fn decoded(model: &[Tensor], weights: &str) -> Vec<Tensor> {
    let checkpoint = open(safetensors(model), None).unwrap();
    let of = |tensor: &Tensor| {
        let Some((layer, matrix)) = Matrix::of(&tensor.name) else { return tensor.clone() };
        let Some(blocks) = checkpoint.blocks(&recipe(weights), layer, matrix).unwrap() else {
            return tensor.clone();
        };
        let values = blocks.decode();
        let rows = Tensor::new(&tensor.name, &[blocks.rows(), blocks.columns()], values.weights());
        if matrix == Matrix::FfnValue { rows.transposed() } else { rows }
    };
    model.iter().map(of).collect()
}

/// Bit for bit, in any number of rows.
#[test]
fn the_cpu_computes_with_the_decoded_weights() {
    for weights in RECIPES {
        let quantised = engine(&open(safetensors(&small()), None).unwrap(), weights, support::on_cpu());
        let plain = support::engine(safetensors(&decoded(&small(), weights)), support::on_cpu());
        let prompts: Vec<Vec<u32>> = [1, 3, 40].map(|n| (0..n).map(|i| i * 7 % 37).collect()).into();
        let [got, want] = [&quantised, &plain].map(|engine| {
            let sessions = together(engine, &prompts);
            sessions.iter().map(shown).collect::<Vec<_>>()
        });
        assert_eq!(got, want, "{weights}");
        if weights != RECIPES[3] {
            let ratio = quantised.weight_bytes() as f64 / plain.weight_bytes() as f64;
            assert!(ratio < 0.75, "{weights}: {ratio} of the bytes");
        }
    }
}

/// By plain loops.
fn reference<R: Real>(weights: &str, tokens: &[u32]) -> Vec<R> {
    let model: Model<R, Plain<f32>> = bundled().load_with(&recipe(weights), &|_| {}).unwrap();
    let mut state = State::new(&model.config);
    let segment = Segment { tokens, state: &mut state, logits: Logits::All };
    model.forward(&mut [segment], Options::default())
}

/// Of the logits' magnitude, what may be lost where cooperative matrices round what they multiply to halves.
const OF_HALVES: f64 = 2e-3;

/// The same where vectors are multiplied by blocks one token at a time: numbers are in units of which the largest of 32 has 32,512, and lose
/// up to half of one. Of normal numbers, whose largest is 2.3 in the mean, that is `2.1e-5` of their size in the mean, a thirteenth of the `2.8e-4`
/// that halves lose. Three times as much is let pass, since what a trained model multiplies has larger ones among smaller.
const OF_BLOCKS: f64 = OF_HALVES / 4.0;

/// CPU and GPU agree with loops in f64 as closely as loops in f32 do, and so with each other: in one pass and token by token, but for
/// what blocks are multiplied by.
#[test]
fn logits_are_those_of_plain_loops() {
    let tokens = text(24);
    for weights in RECIPES {
        let exact: Vec<f64> = reference(weights, &tokens);
        let plain: Vec<f32> = reference(weights, &tokens);
        let off = plain.iter().zip(&exact).map(|(p, e)| (f64::from(*p) - e).abs()).fold(0.0, f64::max);
        let check = |what: &str, engine: &Engine, [of_pass, limit]: [f64; 2]| {
            let whole = engine.session().logits_of(&tokens).unwrap();
            max_abs(&whole, &exact, of_pass).unwrap_or_else(|e| panic!("{weights}, {what}, one pass: {e}"));
            let mut session = engine.session();
            let mut steps = Vec::new();
            tokens.iter().for_each(|&token| steps.extend_from_slice(session.step(token).unwrap()));
            max_abs(&steps, &exact, limit).unwrap_or_else(|e| panic!("{weights}, {what}, steps: {e}"));
        };
        check("CPU", &engine(bundled(), weights, support::on_cpu()), [FACTOR * off; 2]);
        let Some(on_gpu) = support::on_gpu() else { return };
        let portable = EngineOptions { portable: true, ..on_gpu.clone() };
        check("GPU", &engine(bundled(), weights, portable), [FACTOR * off, OF_BLOCKS * magnitude(&exact)]);
        // Cooperative matrices round what they multiply to halves.
        check("GPU, all it has", &engine(bundled(), weights, on_gpu), [OF_HALVES * magnitude(&exact); 2]);
    }
}

/// So many hidden units that cooperative matrices divide them among products that are added up, in blocks too: see `gpu`.
#[test]
fn many_hidden_units_are_divided() {
    let Some(on_gpu) = support::on_gpu() else { return };
    let checkpoint = open(safetensors(&random_model([2, 1, 64, 8192, 40, 8], 6)), None).unwrap();
    let tokens: Vec<u32> = (0..24).map(|i| i * 7 % 40).collect();
    for weights in ["int8", "int4"] {
        let [want, got] = [support::on_cpu(), on_gpu.clone()]
            .map(|options| engine(&checkpoint, weights, options).session().logits_of(&tokens).unwrap());
        let want: Vec<f64> = want.into_iter().map(f64::from).collect();
        max_abs(&got, &want, OF_HALVES * magnitude(&want)).unwrap_or_else(|e| panic!("{weights}: {e}"));
    }
}

/// What holds of halves on a GPU holds of blocks.
#[test]
fn a_sequence_on_the_gpu_has_its_bits() {
    let Some(on_gpu) = support::on_gpu() else { return };
    let engine = engine(bundled(), RECIPES[2], EngineOptions { batch_invariant: true, ..on_gpu });
    let tokens = text(40);
    let prompts = [tokens[..9].to_vec(), tokens.clone(), tokens[3..20].to_vec()];
    let beside = together(&engine, &prompts);
    let mut alone = engine.session();
    tokens.chunks(7).for_each(|part| alone.prefill(part).unwrap());
    assert_eq!(shown(&beside[1]), shown(&alone), "whole beside others, in parts alone");
}

/// A file opens as what was quantised when it was written, and is that whatever else is asked for.
#[test]
fn files_are_what_was_quantised() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    for model in [small(), support::as_web_rwkv(&small()), support::as_stacked_fla(&small())] {
        let checkpoint = open(safetensors(&model), None).unwrap();
        for weights in RECIPES {
            checkpoint.write_quantised(&path, &recipe(weights), &|_| {}).unwrap();
            let written = Checkpoint::open(&path).unwrap();
            assert_eq!(written.recipe(), &recipe(weights), "its recipe");
            assert_eq!(written.lora(), checkpoint.lora(), "its adapters");
            let tokens = [1, 2, 36, 0];
            let want = engine(&checkpoint, weights, support::on_cpu()).session().logits_of(&tokens).unwrap();
            for others in ["f16", weights] {
                let got = engine(&written, others, support::on_cpu()).session().logits_of(&tokens).unwrap();
                assert_eq!(got, want, "{weights}, with {others} for the rest");
            }
            // Quantised further: what is in blocks stays.
            let again = folder.path().join("again.safetensors");
            written.write_quantised(&again, &recipe("int8,head=int8"), &|_| {}).unwrap();
            let rest = Checkpoint::open(&again).unwrap();
            for (layer, of) in (0..3).flat_map(|layer| Matrix::ALL.map(|of| (layer, of))) {
                let want = match recipe(weights).format(layer, of) {
                    WeightFormat::F16 => WeightFormat::Int8,
                    format => format,
                };
                assert_eq!(rest.recipe().format(layer, of), want, "{weights}: {of:?} of layer {layer}");
            }
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing but the files");
}

#[test]
fn files_open_on_the_gpu() {
    let Some(on_gpu) = support::on_gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    bundled().write_quantised(&path, &recipe("int4,head=int8"), &|_| {}).unwrap();
    let quantised = engine(bundled(), "int4,head=int8", on_gpu.clone());
    let opened = Engine::open_with(&path, on_gpu, &|_| {}).unwrap();
    assert_ne!(opened.fingerprint(), quantised.fingerprint(), "another model than that of its halves");
    let [got, want] = [opened, quantised].map(|engine| engine.session().logits_of(&text(5)).unwrap());
    assert_eq!(got, want, "bits");
}

/// Of a weight beyond halves, which a GPU refuses, its place in the file is told: that of its blocks, whose rows are hidden units in
/// the channel mix's value, or that in what the file has them from.
#[test]
fn a_weight_beyond_halves_is_told_by_its_place_in_the_file() {
    let Some(on_gpu) = support::on_gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let (width, hidden, row, column) = (64, 96, 5, 33);
    let place = row * hidden + column;
    for (name, place, in_blocks) in [
        ("blocks.1.ffn.value.weight", place, column * width + row),
        ("blocks.1.att.key.weight", place, place),
    ] {
        let mut model = random_model([2, 1, width, hidden, 37, 8], 4);
        let tensor = model.iter_mut().find(|t| t.name == name).unwrap();
        tensor.bytes[4 * place..][..4].copy_from_slice(&65_536f32.to_le_bytes());
        let plain = open(safetensors(&model), None).unwrap();
        plain.write_quantised(&path, &recipe("int8"), &|_| {}).unwrap();
        let written = Checkpoint::open(&path).unwrap();
        for (checkpoint, weights, at) in [(&plain, "int8", place), (&written, "f16", in_blocks)] {
            let options = EngineOptions { weights: recipe(weights), ..on_gpu.clone() };
            let error = Engine::new(checkpoint, options, &|_| {}).unwrap_err().to_string();
            for part in [name, &format!("element {at},")] {
                assert!(error.contains(part), "{part}: {error}");
            }
        }
    }
}

/// Whatever is wrong is said, and nothing is left behind.
#[test]
fn faults_are_named() {
    let with = |name: &str, at: usize, value: f32| {
        let mut model = small();
        let tensor = model.iter_mut().find(|t| t.name == name).unwrap();
        tensor.bytes[4 * at..][..4].copy_from_slice(&value.to_le_bytes());
        open(safetensors(&model), None).unwrap()
    };
    let load = |checkpoint: &Checkpoint, weights: &str| {
        let options = EngineOptions { weights: recipe(weights), ..support::on_cpu() };
        match Engine::new(checkpoint, options, &|_| {}) {
            Err(Error::Checkpoint(error)) => error.fault,
            other => panic!("{other:?}"),
        }
    };
    for name in ["blocks.1.ffn.value.weight", "blocks.2.att.key.weight", "head.weight"] {
        for value in [f32::NAN, f32::INFINITY] {
            let fault = load(&with(name, 5, value), "int8,head=int4");
            assert!(matches!(&fault, Fault::NotFinite { tensor, index: 5 } if tensor == name), "{fault}");
        }
        let fault = load(&with(name, 5, -1e9), "int8,head=int4");
        assert!(matches!(&fault, Fault::Quantising { tensor, .. } if tensor == name), "{fault}");
    }
    let sound = open(safetensors(&small()), None).unwrap();
    let fault = load(&sound, "int8,3.ffn.key=int4");
    assert!(matches!(fault, Fault::RecipeLayer { layer: 3, layers: 3 }), "{fault}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let nan = with("blocks.2.att.key.weight", 5, f32::NAN);
    assert!(nan.write_quantised(&path, &recipe("int8"), &|_| {}).is_err(), "a model that is not finite");
    assert!(sound.write_quantised(&path, &recipe("int8,9.ffn.key=int4"), &|_| {}).is_err(), "no such layer");
    let nowhere = folder.path().join("none").join("model.safetensors");
    let error = sound.write_quantised(&nowhere, &recipe("int8"), &|_| {}).unwrap_err().to_string();
    assert!(error.contains("none"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left");

    // A file that says something else of itself than it holds.
    sound.write_quantised(&path, &recipe("int8"), &|_| {}).unwrap();
    let file = std::fs::read(&path).unwrap();
    let said = |text: &str| {
        let header = usize::try_from(u64::from_le_bytes(file[..8].try_into().unwrap())).unwrap();
        let old = String::from_utf8(file[8..8 + header].to_vec()).unwrap();
        let new = old.replace("\"rwkv.weights\":\"int8\"", &format!("\"rwkv.weights\":\"{text}\""));
        assert_ne!(old, new, "the recipe is there");
        let bytes = [&(new.len() as u64).to_le_bytes()[..], new.as_bytes(), &file[8 + header..]].concat();
        open(bytes, None).unwrap_err().fault
    };
    assert!(matches!(said("int4"), Fault::Shape { .. }), "bytes for half bytes");
    assert!(matches!(said("f16"), Fault::Shape { .. }), "bytes for halves");
    assert!(matches!(said("int9"), Fault::Recipe(_)), "no format");
    assert!(matches!(said("int8,7.ffn.key=f16"), Fault::RecipeLayer { layer: 7, .. }), "no layer");
    assert!(matches!(said("int8,head=int8"), Fault::Shape { .. }), "halves for bytes");
}

/// What runs one operation at a time keeps to halves, and says so.
#[test]
fn without_fusion_weights_are_halves() {
    let Some(on_gpu) = support::on_gpu() else { return };
    let options = EngineOptions { fused: false, weights: recipe("int8"), ..on_gpu };
    let refused = Engine::new(bundled(), options, &|_| {}).map(|_| ()).unwrap_err();
    assert!(refused.to_string().contains("without fusion"), "{refused}");
}

/// Files of halves are told from files of floats by their elements alone.
#[test]
fn a_recipe_of_halves_writes_a_plain_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let halves: Vec<Tensor> = small().iter().map(|t| t.to("F16")).collect();
    let checkpoint = open(safetensors(&halves), None).unwrap();
    checkpoint.write_quantised(&path, &Recipe::default(), &|_| {}).unwrap();
    let written = Checkpoint::open(&path).unwrap();
    for (name, _) in checkpoint.tensors() {
        let [got, want] = [&written, &checkpoint].map(|of| of.tensor(name).unwrap());
        assert!(matches!(got, Elements::F16(_)) && got == want, "{name}");
    }
}
