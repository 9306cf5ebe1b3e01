//! Damaged and hostile files: a typed error or a model that runs, never a panic, never more memory than a file warrants.
//!
//! The files are small; the allocator of this test refuses more than [`LIMIT`] bytes in all, which ends the test.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::alloc::System;

use cap::Cap;
use rwkv_core::rng::SplitMix64;
use rwkv_model::{Engine, EngineOptions, Error};
use support::{Tensor, as_fla, as_web_rwkv, engine, open, pth, random_model, safetensors};

const LIMIT: usize = 256 << 20;

#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, LIMIT);

/// Corrupted files tried for each of the kinds.
const FILES: usize = 4_000;

fn model() -> Vec<Tensor> {
    random_model([2, 1, 4, 6, 5, 2], 1).iter().map(|t| t.to("F16")).collect()
}

/// The model in a file with quantised matrices.
fn quantised(recipe: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let checkpoint = open(safetensors(&model()), None).unwrap();
    checkpoint.write_quantised(&path, &recipe.parse().unwrap(), &|_| {}).unwrap();
    std::fs::read(path).unwrap()
}

/// Opens, loads and runs a file that may hold anything.
fn survive(bytes: Vec<u8>) -> Result<(), Error> {
    let checkpoint = open(bytes, None)?;
    let options = EngineOptions { pass_tokens: 2, ..support::on_cpu() };
    let engine = Engine::new(&checkpoint, options, &|_| {})?;
    let mut session = engine.session();
    session.prefill(&[0])?; // every vocabulary has a token 0
    let _ = session.prefill(&[4, 3, 0]); // but not every one these
    let logits = session.logits()?;
    assert_eq!(logits.len(), engine.config().vocab, "logits of the vocabulary");
    Ok(())
}

/// One way to damage a file.
fn damage(file: &[u8], rng: &mut SplitMix64) -> Vec<u8> {
    let mut bytes = file.to_vec();
    let mut below = |n: usize| usize::try_from(rng.next_u64() % n.max(1) as u64).unwrap();
    // damage to the directory matters most: where a file has most of its structure
    let at = if below(3) == 0 { below(file.len()) } else { below(file.len().min(6_000)) };
    match below(8) {
        0 => bytes.truncate(at),
        1 => bytes[at] ^= 1 << below(8),
        2 => bytes[at] = u8::try_from(below(256)).unwrap(),
        3 => bytes[at] = [0, 0xff, b'0', b'9', b'-', b'{', b'"', b'.'][below(8)],
        4 => drop(bytes.splice(at..at, vec![0; below(40)])),
        5 => drop(bytes.drain(at..(at + below(40)).min(file.len()))),
        6 => {
            let from = below(file.len());
            let piece = file[from..(from + below(64)).min(file.len())].to_vec();
            let end = (at + piece.len()).min(file.len());
            drop(bytes.splice(at..end, piece));
        }
        _ => {
            // several small faults at once, digits into digits: offsets and extents that lie
            for _ in 0..4 {
                let at = below(file.len().min(6_000));
                if bytes[at].is_ascii_digit() {
                    bytes[at] = b'0' + u8::try_from(below(10)).unwrap();
                }
            }
        }
    }
    bytes
}

#[test]
fn corrupted_files() {
    let files = [
        quantised("int4,ffn.key=int8,head=int8"),
        safetensors(&model()),
        pth(&model()),
        safetensors(&as_fla(&model())),
        safetensors(&as_web_rwkv(&model())),
    ];
    let (mut refused, mut rng) = (0, SplitMix64::new(2));
    for file in &files {
        survive(file.clone()).unwrap();
        for _ in 0..FILES {
            if let Err(error) = survive(damage(file, &mut rng)) {
                assert!(!error.to_string().is_empty(), "{error:?} says nothing");
                refused += 1;
            }
        }
    }
    // weights may be damaged into other weights, and then a file is sound; most of these files are not
    assert!(refused > FILES, "of {} files, only {refused} were refused", files.len() * FILES);
    survive(files[0].clone()).unwrap();
}

/// A whole file, cut at every length.
#[test]
fn files_cut_anywhere() {
    for file in [safetensors(&model()), pth(&model()), quantised("int4")] {
        for length in 0..file.len() {
            assert!(survive(file[..length].to_vec()).is_err(), "cut to {length} of {}", file.len());
        }
    }
}

/// A safetensors file with the header given and `data` bytes behind it.
fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

#[test]
fn hostile_headers() {
    let tensor = |shape: &str, offsets: &str| {
        format!(r#"{{"emb.weight":{{"dtype":"F16","shape":[{shape}],"data_offsets":[{offsets}]}}}}"#)
    };
    for (what, header) in [
        ("a huge shape", tensor("4611686018427387904,4", "0,8")),
        ("a shape whose product overflows", tensor("9223372036854775807,9223372036854775807", "0,2")),
        ("no extent", tensor("0,0", "0,0")),
        ("offsets beyond the file", tensor("2,2", "100000000000,100000000008")),
        ("offsets backwards", tensor("2,2", "8,0")),
        ("negative offsets", tensor("2,2", "-8,0")),
        ("a float for an extent", tensor("2.5,2", "0,8")),
        ("a gap", tensor("2,1", "4,8")),
        ("no object", "[1,2,3]".to_owned()),
        ("deep nesting", "{\"a\":".repeat(100_000)),
        ("nothing", "{}".to_owned()),
    ] {
        let error = survive(with_header(&header, 8)).unwrap_err();
        assert!(!error.to_string().is_empty(), "{what}");
    }
    // a header said to be longer than the file, and than memory
    for length in [9u64, 1 << 20, 1 << 40, u64::MAX] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(b"{}");
        assert!(survive(bytes).is_err(), "a header of {length} bytes");
    }
}

/// Overlapping tensors, in a model that is otherwise whole.
#[test]
fn overlapping_tensors() {
    let file = safetensors(&model());
    let header = usize::try_from(u64::from_le_bytes(file[..8].try_into().unwrap())).unwrap();
    let mut text: serde_json::Value = serde_json::from_slice(&file[8..8 + header]).unwrap();
    let first = text["emb.weight"]["data_offsets"].clone();
    text["head.weight"]["data_offsets"] = first;
    let error = survive(with_header(&text.to_string(), file.len() - 8 - header)).unwrap_err().to_string();
    assert!(error.contains("spans bytes"), "{error}");
}

/// Files that claim much more than they hold: many layers that share one storage, many tensors of no length.
#[test]
fn claims_beyond_the_file() {
    use support::pth_writer::{View, state_dict, zip};
    let one: Vec<Tensor> = random_model([2, 1, 64, 256, 5, 2], 1).iter().map(|t| t.to("F16")).collect();
    let views: Vec<View> = one
        .iter()
        .flat_map(|t| {
            let layers = if t.name.starts_with("blocks.1.") { 1..200 } else { 0..1 };
            layers.map(|layer| View {
                name: t.name.replace("blocks.1.", &format!("blocks.{layer}.")),
                class: "HalfStorage",
                key: "0".to_owned(),
                start: 0,
                shape: t.shape.iter().map(|&n| i64::try_from(n).unwrap()).collect(),
                stride: (0..t.shape.len())
                    .map(|axis| i64::try_from(t.shape[axis + 1..].iter().product::<usize>()).unwrap())
                    .collect(),
            })
        })
        .collect();
    let storage = vec![0; one.iter().map(|t| t.bytes.len()).max().unwrap()];
    let entries =
        [("m/data.pkl", state_dict(&views)), ("m/byteorder", b"little".to_vec()), ("m/data/0", storage)];
    let shared = zip(&entries.map(|(name, bytes)| (name.to_owned(), bytes)));
    let error = survive(shared).unwrap_err().to_string();
    assert!(error.contains("the tensors have") && error.contains("bytes, the file only"), "{error}");

    let empty = |name: String| Tensor { name, dtype: "F16", shape: vec![0], bytes: vec![] };
    let mut many: Vec<Tensor> = (0..20_000).map(|i| empty(format!("blocks.{i}.att.x_x"))).collect();
    many.extend(model());
    let error = survive(safetensors(&many)).unwrap_err().to_string();
    assert!(error.contains("blocks.0.att.x_x") || error.contains("blocks.2."), "{error}");
}

/// A good engine is not disturbed by bad files opened beside it.
#[test]
fn a_good_engine_works_on() {
    let good = engine(safetensors(&model()), support::on_cpu());
    let want = good.session().logits_of(&[0, 1, 2]).unwrap();
    let mut rng = SplitMix64::new(3);
    for _ in 0..200 {
        let _ = survive(damage(&pth(&model()), &mut rng));
    }
    assert_eq!(good.session().logits_of(&[0, 1, 2]).unwrap(), want, "as before");
}
