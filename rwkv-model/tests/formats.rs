//! One model in every format, dialect and type gives the same logits; a file that is not a model says why.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use rwkv_model::checkpoint::{Dialect, Format, LoraLayout};
use rwkv_model::{Checkpoint, EngineOptions};
use support::{
    Tensor, as_fla, as_stacked_fla, as_web_rwkv, engine, open, pth, random_model, read, safetensors, vectors,
};

const TOKENS: [u32; 9] = [3, 1, 4, 1, 5, 9, 2, 6, 5];

/// Logits of a checkpoint in memory.
fn logits(bytes: Vec<u8>, lora: Option<LoraLayout>) -> Vec<f32> {
    let engine = engine(bytes, EngineOptions { lora, ..support::on_cpu() });
    engine.session().logits_of(&TOKENS).unwrap()
}

#[test]
fn every_format_gives_the_same_bits() {
    let model = read(&vectors("model_f32"));
    for dtype in ["F32", "F16", "BF16"] {
        let model: Vec<Tensor> = model.iter().map(|t| t.to(dtype)).collect();
        let want = logits(safetensors(&model), None);
        assert!(want.iter().all(|l| l.is_finite()), "{dtype}: finite");
        let ways: [(&str, Vec<u8>); 7] = [
            ("web-rwkv", safetensors(&as_web_rwkv(&model))),
            ("fla", safetensors(&as_fla(&model))),
            ("fla with stacked mixes", safetensors(&as_stacked_fla(&model))),
            ("pth", pth(&model)),
            ("pth, transposed", pth(&as_web_rwkv(&model))),
            ("pth, fla names", pth(&as_fla(&model))),
            ("widened", safetensors(&model.iter().map(|t| t.to("F32")).collect::<Vec<_>>())),
        ];
        for (name, bytes) in ways {
            assert_eq!(logits(bytes, None), want, "{dtype}: {name}");
        }
    }
    // types may be mixed within a file
    let mixed: Vec<Tensor> = model
        .iter()
        .map(|t| t.to("F16"))
        .map(|t| if t.name.contains("ln") { t.to("F32") } else { t })
        .collect();
    let half: Vec<Tensor> = model.iter().map(|t| t.to("F16")).collect();
    assert_eq!(logits(safetensors(&mixed), None), logits(safetensors(&half), None), "mixed types");
}

#[test]
fn a_file_tells_what_it_is() {
    let model = random_model([2, 2, 8, 24, 20, 4], 1);
    let cases = [
        (safetensors(&model), Format::Safetensors, Dialect::Official, LoraLayout::Official),
        (safetensors(&as_web_rwkv(&model)), Format::Safetensors, Dialect::Official, LoraLayout::Transposed),
        (safetensors(&as_fla(&model)), Format::Safetensors, Dialect::Fla, LoraLayout::Transposed),
        (pth(&model), Format::Pth, Dialect::Official, LoraLayout::Official),
    ];
    for (bytes, format, dialect, lora) in cases {
        let checkpoint = open(bytes, None).unwrap();
        assert_eq!(
            (checkpoint.format(), checkpoint.dialect(), checkpoint.lora()),
            (format, dialect, lora),
            "told"
        );
        assert_eq!(checkpoint.ignored(), [""; 0], "{format:?} {dialect:?}: every tensor has its use");
        let config = checkpoint.config();
        let ranks = config.ranks;
        assert_eq!(
            (config.n_layers, config.width, config.n_heads, config.head_size),
            (2, 16, 2, 8),
            "extents"
        );
        assert_eq!((config.hidden, config.vocab), (24, 20), "extents");
        assert_eq!([ranks.w, ranks.a, ranks.v, ranks.g], [4; 4], "ranks");
    }
}

/// The content tells, not the name: a safetensors file may be called anything.
#[test]
fn the_name_does_not_matter() {
    let dir = tempfile::tempdir().unwrap();
    let model = random_model([1, 1, 8, 16, 12, 4], 2);
    for (name, bytes) in [("model.pth", safetensors(&model)), ("model.safetensors", pth(&model))] {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(Checkpoint::open(&path).unwrap().config().vocab, 12, "{name}");
    }
}

/// Where every rank equals the width, shapes do not tell which way round the adapters are: the caller does.
#[test]
fn square_adapters_need_an_option() {
    let model = random_model([2, 1, 16, 16, 11, 16], 3);
    let (official, transposed) = (safetensors(&model), safetensors(&as_web_rwkv(&model)));
    let want = logits(official.clone(), None);
    assert_eq!(logits(official, Some(LoraLayout::Official)), want, "the default");
    assert_eq!(logits(transposed.clone(), Some(LoraLayout::Transposed)), want, "told");
    assert_ne!(logits(transposed, None), want, "not told");
    // the names of fla tell even then
    assert_eq!(logits(safetensors(&as_fla(&model)), None), want, "fla");
    // an option does not overrule what shapes tell
    let told = random_model([2, 1, 16, 16, 11, 4], 3);
    let want = logits(safetensors(&told), None);
    assert_eq!(logits(safetensors(&told), Some(LoraLayout::Transposed)), want, "shapes tell");
}

/// A model of one layer has no value residual adapter.
#[test]
fn one_layer() {
    let checkpoint = open(safetensors(&random_model([1, 2, 8, 16, 10, 4], 4)), None).unwrap();
    assert_eq!((checkpoint.config().n_layers, checkpoint.config().ranks.v), (1, 0), "extents");
}

/// What is wrong with a changed model.
fn fault(change: impl FnOnce(&mut Vec<Tensor>)) -> String {
    let mut model = random_model([2, 2, 8, 24, 20, 4], 1);
    change(&mut model);
    match open(safetensors(&model), None) {
        Ok(checkpoint) => {
            checkpoint.load::<f32, rwkv_core::fast::linear::Packed>(&|_| {}).unwrap_err().to_string()
        }
        Err(error) => error.to_string(),
    }
}

fn find<'a>(model: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    model.iter_mut().find(|t| t.name == name).unwrap()
}

#[test]
fn faults_name_the_tensor_and_the_shapes() {
    let missing = fault(|m| m.retain(|t| t.name != "blocks.1.att.w2"));
    assert_eq!(missing, "memory: tensor blocks.1.att.w2 is missing, expected [4, 16]", "missing");
    let missing = fault(|m| m.retain(|t| !t.name.starts_with("blocks.0")));
    assert_eq!(missing, "memory: tensor blocks.0.att.r_k is missing, expected [heads, head size]", "a layer");
    let shape = fault(|m| find(m, "blocks.1.ffn.value.weight").shape = vec![24, 16]);
    let want = "memory: tensor blocks.1.ffn.value.weight has shape [24, 16], expected [16, 24]";
    assert_eq!(shape, want, "the wrong way round");
    let shape = fault(|m| find(m, "blocks.0.att.r_k").shape = vec![16]);
    assert_eq!(shape, "memory: tensor blocks.0.att.r_k has shape [16], expected [heads, head size]", "flat");
    let shape =
        fault(|m| *find(m, "blocks.0.att.r_k") = Tensor::new("blocks.0.att.r_k", &[3, 8], &[0.0; 24]));
    let want =
        "memory: tensor blocks.0.att.r_k has shape [3, 8], expected [heads, head size] with a product of 16";
    assert_eq!(shape, want, "heads that do not make the width");
    let both = fault(|m| {
        let w1 = find(m, "blocks.0.att.w1");
        *w1 = w1.transposed();
    });
    assert!(
        both.contains("has shape") && both.contains("expected"),
        "some adapters this way, some that: {both}"
    );
    let infinite =
        fault(|m| find(m, "blocks.1.att.key.weight").bytes[4 * 77 + 2..][..2].copy_from_slice(&[0x80, 0x7f]));
    assert_eq!(infinite, "memory: tensor blocks.1.att.key.weight is not finite at element 77", "infinity");
    let gap = fault(|m| m.push(Tensor::new("blocks.4000000000.ln1.weight", &[16], &[1.0; 16])));
    assert_eq!(gap, "memory: tensor blocks.2.ln1.weight is missing, expected [16]", "a layer far away");
    let gap = fault(|m| m.push(Tensor::new("blocks.2.ln1.weight", &[16], &[1.0; 16])));
    assert!(
        gap.contains("tensor blocks.2.") && gap.contains("is missing"),
        "a layer that is not whole: {gap}"
    );
}

#[test]
fn other_models_are_refused_by_name() {
    let foreign = |name: &str| fault(|m| m.push(Tensor::new(name, &[16], &[1.0; 16])));
    let want = "memory: tensor blocks.0.ffn.s_emb.weight: a model of RWKV-7a or 7b (DeepEmbed); only RWKV-7 is supported";
    assert_eq!(foreign("blocks.0.ffn.s_emb.weight"), want, "7a");
    assert!(foreign("blocks.0.att.time_decay").contains("RWKV-4, 5 or 6"), "older");
    let none = fault(|m| *m = vec![Tensor::new("transformer.wte.weight", &[4, 4], &[0.0; 16])]);
    let want = "memory: no RWKV-7 model: none of its 1 tensors (transformer.wte.weight, ..) is emb.weight or model.embeddings.weight";
    assert_eq!(none, want, "another");
    let twice = fault(|m| m.push(Tensor::new("EMB.weight", &[20, 16], &[0.0; 320])));
    assert_eq!(
        twice, "memory: tensor emb.weight is there twice, the second time as emb.weight",
        "letters aside"
    );
    let double = open(
        {
            let model = random_model([1, 1, 8, 16, 12, 4], 2);
            let tensors: Vec<_> = model
                .iter()
                .map(|t| {
                    let bytes = t.values().iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect();
                    (t.name.clone(), "F64", t.shape.clone(), bytes)
                })
                .collect();
            support::pth_writer::write_pth(&tensors)
        },
        None,
    );
    let message = double.map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("is of type F64, expected F32, F16 or BF16"), "double precision: {message}");
}

#[test]
fn a_file_that_is_not_there() {
    let error = Checkpoint::open("no/such/file").unwrap_err().to_string();
    assert!(error.starts_with("no/such/file: "), "{error}");
}

/// Axes of one beside a matrix, or a matrix that is a vector: refused, where a vector may have them.
#[test]
fn matrices_have_two_axes() {
    for (tensor, shape, rank) in [
        ("blocks.1.att.w1", vec![1, 16, 4], 4),
        ("blocks.0.att.w2", vec![1, 4, 16], 4),
        ("blocks.0.att.w2", vec![16], 1),
        ("blocks.0.att.w2", vec![16, 1], 1),
        ("blocks.1.att.w1", vec![1, 16], 1),
        ("blocks.1.ffn.key.weight", vec![24, 1, 16], 4),
    ] {
        let mut model = random_model([2, 2, 8, 24, 20, rank], 1);
        find(&mut model, tensor).shape.clone_from(&shape);
        let error = open(safetensors(&model), None).unwrap_err().to_string();
        assert!(error.contains(&format!("tensor {tensor} has shape {shape:?}")), "{error}");
    }
}

/// For structures other than the model's: the tensors by official name.
#[test]
fn tensors_one_by_one() {
    let model = random_model([2, 2, 8, 24, 20, 4], 1);
    let checkpoint = open(safetensors(&as_fla(&model)), None).unwrap();
    assert_eq!(checkpoint.tensors().count(), model.len(), "all of them");
    let key = checkpoint.tensor("blocks.1.ffn.key.weight").unwrap();
    assert_eq!(key.widen::<f32>(), find(&mut model.clone(), "blocks.1.ffn.key.weight").values(), "values");
    assert!(checkpoint.tensor("blocks.7.ffn.key.weight").is_err(), "no such tensor");
}

/// A file that is cut short after it was opened: an error that names the tensor, and no harm done.
#[test]
fn cut_short_while_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let bytes = safetensors(&random_model([2, 2, 8, 24, 20, 4], 1));
    std::fs::write(&path, &bytes).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(bytes.len() as u64 / 2).unwrap();
    let error = checkpoint.load::<f32, rwkv_core::fast::linear::Packed>(&|_| {}).unwrap_err().to_string();
    assert!(
        error.contains("model: reading tensor ") && error.contains(": failed to fill whole buffer"),
        "{error}"
    );
}

/// Names differ in case between files (`r_k`, `R_K`).
#[test]
fn case_does_not_matter() {
    let model = random_model([2, 2, 8, 24, 20, 4], 1);
    let upper: Vec<Tensor> =
        model.iter().map(|t| Tensor { name: t.name.to_uppercase(), ..t.clone() }).collect();
    assert_eq!(logits(safetensors(&upper), None), logits(safetensors(&model), None), "bits");
}

#[test]
fn every_other_architecture_is_refused() {
    for (name, architecture) in [
        ("blocks.0.ffn.s0", "RWKV-7a or 7b (DeepEmbed)"),
        ("blocks.0.att.time_mix_k", "RWKV-4 or 5"),
        ("blocks.0.att.time_maa_x", "RWKV-6"),
    ] {
        let fault = fault(|m| m.push(Tensor::new(name, &[16], &[1.0; 16])));
        let want = format!("memory: tensor {name}: a model of {architecture}; only RWKV-7 is supported");
        assert_eq!(fault, want, "{name}");
    }
}

#[test]
fn infinity_is_found_in_every_type() {
    for (dtype, infinity) in [("F16", 0x7c00u16), ("BF16", 0x7f80)] {
        let fault = fault(|m| {
            let key = find(m, "blocks.1.att.key.weight");
            *key = key.to(dtype);
            key.bytes[2 * 77..][..2].copy_from_slice(&infinity.to_le_bytes());
        });
        assert_eq!(fault, "memory: tensor blocks.1.att.key.weight is not finite at element 77", "{dtype}");
    }
}

/// A tensor of more elements than are read at a time, faulty behind the first of them.
#[test]
fn tensors_read_in_stretches() {
    let mut model = random_model([1, 1, 16, 16, 70_000, 4], 1);
    let at = 1_100_000; // of 1,120,000; a stretch is 1,048,576
    find(&mut model, "emb.weight").bytes[4 * at..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let checkpoint = open(safetensors(&model), None).unwrap();
    let error = checkpoint.load::<f32, rwkv_core::fast::linear::Packed>(&|_| {}).map(|_| ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "memory: tensor emb.weight is not finite at element 1100000",
        "where it is"
    );
}

#[test]
fn a_path_opens_with_its_options_and_progress() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    let model = random_model([2, 1, 16, 16, 11, 16], 3);
    std::fs::write(&path, safetensors(&as_web_rwkv(&model))).unwrap();
    let done = std::sync::atomic::AtomicU64::new(0);
    let options = EngineOptions { lora: Some(LoraLayout::Transposed), ..support::on_cpu() };
    let engine = rwkv_model::Engine::open_with(&path, options, &|progress| {
        done.fetch_max(progress.done, std::sync::atomic::Ordering::Relaxed);
    })
    .unwrap();
    assert_eq!(engine.session().logits_of(&TOKENS).unwrap(), logits(safetensors(&model), None), "told");
    assert_eq!(done.into_inner(), Checkpoint::open(&path).unwrap().bytes(), "every byte was told of");
}

/// What the model has no use for is not counted.
#[test]
fn bytes_are_those_of_the_model() {
    let model = random_model([1, 1, 8, 16, 12, 4], 2);
    let mut with = model.clone();
    with.push(Tensor::new("blocks.0.att.v0", &[1, 1, 8], &[0.0; 8]));
    let bytes = |model: &[Tensor]| open(safetensors(model), None).unwrap().bytes();
    assert_eq!(bytes(&with), bytes(&model), "the adapter of layer 0 is not read");
    assert_eq!(bytes(&model), model.iter().map(|t| t.bytes.len() as u64).sum::<u64>(), "all others are");
}

#[test]
fn streamed_parameters_are_those_of_the_file() {
    let model = random_model([3, 2, 8, 24, 20, 4], 1);
    let streamed = model.iter().filter(|t| t.name != "emb.weight" && !t.name.contains("ln0"));
    let want: usize = streamed.map(|t| t.shape.iter().product::<usize>()).sum();
    assert_eq!(open(safetensors(&model), None).unwrap().config().streamed_params(), want, "of every tensor");
}

/// Gives the factors of one adapter another rank, in every layer.
fn with_rank(model: &mut [Tensor], adapter: &str, rank: usize) {
    for t in model {
        let values: Vec<f32> = (0u16..).map(|i| f32::from(i % 7) / 10.0 - 0.3).take(16 * rank).collect();
        if t.name.ends_with(&format!(".att.{adapter}1")) {
            *t = Tensor::new(&t.name, &[16, rank], &values);
        } else if t.name.ends_with(&format!(".att.{adapter}2")) {
            *t = Tensor::new(&t.name, &[rank, 16], &values);
        }
    }
}

#[test]
fn adapters_have_ranks_of_their_own() {
    let mut model = random_model([2, 2, 8, 24, 20, 4], 1);
    for (adapter, rank) in [("w", 3), ("a", 5), ("v", 2), ("g", 7)] {
        with_rank(&mut model, adapter, rank);
    }
    let ranks = open(safetensors(&model), None).unwrap().config().ranks;
    assert_eq!([ranks.w, ranks.a, ranks.v, ranks.g], [3, 5, 2, 7], "each its own");
    let want = logits(safetensors(&model), None);
    assert_eq!(logits(safetensors(&as_web_rwkv(&model)), None), want, "web-rwkv");
    assert_eq!(logits(pth(&as_fla(&model)), None), want, "fla");
}

#[test]
fn extents_of_zero_are_refused() {
    let rank = fault(|m| with_rank(m, "w", 0));
    let want = "memory: tensor blocks.0.att.w1 has shape [16, 0], expected [width, rank] or [rank, width]";
    assert_eq!(rank, want, "rank");
    let hidden = fault(|m| {
        for t in m {
            match t.name.split_once(".ffn.").map(|(_, name)| name.to_owned()).as_deref() {
                Some("key.weight") => *t = Tensor::new(&t.name, &[0, 16], &[]),
                Some("value.weight") => *t = Tensor::new(&t.name, &[16, 0], &[]),
                _ => {}
            }
        }
    });
    let want = "memory: tensor blocks.0.ffn.key.weight has shape [0, 16], expected [hidden, width]";
    assert_eq!(hidden, want, "hidden units");
    let vocab = fault(|m| {
        for name in ["emb.weight", "head.weight"] {
            *find(m, name) = Tensor::new(name, &[0, 16], &[]);
        }
    });
    assert_eq!(vocab, "memory: tensor emb.weight has shape [0, 16], expected [vocabulary, width]", "tokens");
}
