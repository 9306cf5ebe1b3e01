//! Sessions through files: they go on as if nothing had been, on any device, and with no other model.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::path::PathBuf;

use rwkv_core::compare::nmse;
use rwkv_kernels::gpu::device_for_tests;
use rwkv_model::engine::Device;
use rwkv_model::store::{self, MemoryStore, StateStore};
use rwkv_model::{Engine, EngineOptions, Error, Sampler, Session, Tokenizer};
use rwkv_state::format::SparseRule;
use rwkv_state::snapshot::{Fault, Snapshot};
use rwkv_state::{EncodedState, StateFormat};
use support::{BUNDLED, Tensor, as_fla, as_stacked_fla, as_web_rwkv, engine, pth, random_model, safetensors};

const VOCAB: usize = 50;

fn options() -> EngineOptions {
    EngineOptions { device: Device::Cpu, pass_tokens: 16, ..EngineOptions::default() }
}

fn model(seed: u64) -> Vec<Tensor> {
    random_model([2, 2, 64, 100, VOCAB, 6], seed)
}

fn small(seed: u64) -> Engine {
    engine(safetensors(&model(seed)), options())
}

fn file(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("a.state")
}

/// Prompted, and with penalties that matter.
fn sampler() -> Sampler {
    Sampler { temperature: 1.0, presence_penalty: 0.5, frequency_penalty: 0.5, seed: 3, ..Sampler::default() }
}

/// A session that has read and generated.
fn talked(engine: &Engine) -> Session {
    let mut session = engine.session();
    session.prefill(&[1, 2, 3, 40, 5, 6, 7]).unwrap();
    generate(&mut session, 20);
    session
}

fn generate(session: &mut Session, n: usize) -> Vec<u32> {
    session.generate(sampler()).take(n).map(Result::unwrap).collect()
}

/// Exactly stored, it goes on bit by bit, also in another engine of the same model; its past counts.
#[test]
fn goes_on_bit_equal() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder);
    let mut session = talked(&small(7));
    session.save(&path, StateFormat::F32).unwrap();
    let mut loaded = small(7).load_session(&path).unwrap();
    assert_eq!(loaded.position(), 27, "position");
    assert_eq!(loaded.state().unwrap(), session.state().unwrap(), "state");
    assert_eq!(loaded.logits().unwrap(), session.logits().unwrap(), "logits");
    let want = generate(&mut session, 30);
    assert_eq!(generate(&mut loaded, 30), want, "at once, with the counts");
    assert_eq!(loaded.step(9).unwrap(), session.step(9).unwrap(), "and on");
    // What was saved does not change with what comes after.
    let again = small(7).load_session(&path).unwrap();
    assert_eq!(again.position(), 27, "as it was saved");
    // The counts do matter: with none, another text.
    let mut snapshot = Snapshot::load(&path).unwrap();
    assert_eq!(snapshot.counts.values().sum::<u32>(), 20, "generated");
    snapshot.counts.clear();
    snapshot.save(&path).unwrap();
    assert_ne!(generate(&mut small(7).load_session(&path).unwrap(), 30), want, "without the counts");
}

/// Through a store as through a file: put by one engine, gone on with by another that is opened anew.
fn moves(store: &dyn StateStore) {
    let mut session = talked(&small(7));
    session.save_to(store, "user-17", StateFormat::F32).unwrap();
    let there = small(7);
    let mut loaded = there.load_from(store, "user-17").unwrap();
    assert_eq!(loaded.position(), 27, "position");
    assert_eq!(loaded.state().unwrap(), session.state().unwrap(), "state");
    assert_eq!(loaded.logits().unwrap(), session.logits().unwrap(), "logits");
    assert_eq!(generate(&mut loaded, 30), generate(&mut session, 30), "the same text");
    assert_eq!(loaded.step(9).unwrap(), session.step(9).unwrap(), "and on");

    // Back, in the place of the first.
    loaded.save_to(store, "user-17", StateFormat::F32).unwrap();
    let back = small(7).load_from(store, "user-17").unwrap();
    assert_eq!(back.position(), 58, "as far as it went there");
    assert_eq!(back.state().unwrap(), session.state().unwrap(), "there and back");

    let missing = there.load_from(store, "user-18").unwrap_err();
    assert!(matches!(&missing, Error::Store(store::Error::Missing { key }) if key == "user-18"), "{missing}");
    let no_key = session.save_to(store, "../17", StateFormat::F16).unwrap_err();
    assert!(matches!(no_key, Error::Store(store::Error::Key { .. })), "{no_key}");
    let error = small(8).load_from(store, "user-17").unwrap_err();
    assert!(matches!(error, Error::OtherModel { .. }), "{error}");
    assert!(error.to_string().starts_with("user-17: a session of model "), "{error}");
}

#[test]
fn moves_through_memory() {
    let store = MemoryStore::new(1 << 20);
    moves(&store);
    let full = MemoryStore::new(1 << 10);
    let error = talked(&small(7)).save_to(&full, "a", StateFormat::F32).unwrap_err();
    assert!(matches!(error, Error::Store(store::Error::TooLarge { limit: 1024, .. })), "{error}");
}

#[cfg(feature = "object-store")]
#[test]
fn moves_through_a_directory() {
    let folder = tempfile::tempdir().unwrap();
    moves(&store::ObjectStore::local(folder.path()).unwrap());
    // What the store has is a file, and the other way round.
    let path = folder.path().join("user-17.state");
    assert_eq!(small(7).load_session(&path).unwrap().position(), 58, "as a file");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let opened_anew = store::ObjectStore::local(folder.path()).unwrap();
    let damaged = small(7).load_from(&opened_anew, "user-17").unwrap_err();
    assert!(
        matches!(&damaged, Error::Store(store::Error::Damaged { fault: Fault::Checksum { .. }, .. })),
        "{damaged}"
    );
}

#[test]
fn every_format_as_it_is_encoded() {
    let folder = tempfile::tempdir().unwrap();
    let (path, engine) = (file(&folder), small(7));
    let session = talked(&engine);
    let (layout, state) = (engine.state_layout(), session.state().unwrap());
    for format in [
        StateFormat::F32,
        StateFormat::F16,
        StateFormat::Int8Scaled,
        StateFormat::Sparse(SparseRule::default()),
        StateFormat::Sparse(SparseRule::TopK { k: 9 }),
    ] {
        session.save(&path, format).unwrap();
        let loaded = engine.load_session(&path).unwrap();
        // The format's own bound is proven where it is; here the file adds nothing to it.
        let want = EncodedState::encode(&layout, &state, format).unwrap().decode();
        assert_eq!(loaded.state().unwrap(), want, "{format:?}");
        assert_eq!(loaded.logits().unwrap(), session.logits().unwrap(), "{format:?}: exactly");
        assert_eq!(loaded.position(), session.position(), "{format:?}");
    }
}

#[test]
fn a_session_that_read_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (path, engine) = (file(&folder), small(7));
    engine.session().save(&path, StateFormat::Int8Scaled).unwrap();
    let mut loaded = engine.load_session(&path).unwrap();
    assert!(matches!(loaded.logits(), Err(Error::NoLogits)), "no logits");
    assert!(matches!(loaded.sample(&sampler()), Err(Error::NoLogits)), "no token");
    assert_eq!(loaded.position(), 0, "position");
    assert_eq!(loaded.step(3).unwrap(), engine.session().step(3).unwrap(), "from the beginning");
}

#[test]
fn another_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder);
    let (own, other) = (small(7), small(8));
    talked(&own).save(&path, StateFormat::F16).unwrap();
    assert_ne!(own.fingerprint(), other.fingerprint(), "of the same extents");
    let error = other.load_session(&path).unwrap_err();
    assert!(matches!(error, Error::OtherModel { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains(own.fingerprint()) && text.contains(other.fingerprint()), "{text}");
    assert!(text.starts_with(&path.display().to_string()), "{text}");
}

#[test]
fn another_tokenizer_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder);
    let bytes = safetensors(&random_model([1, 1, 64, 64, 300, 4], 1));
    let open = |tokenizer| engine(bytes.clone(), EngineOptions { tokenizer, ..options() });
    let world = |extra: &str| {
        let lines = (0..=255u8).map(|b| format!("{} b'\\x{b:02x}' 1\n", u32::from(b) + 1));
        let text = lines.collect::<String>() + extra;
        Some(Tokenizer::World(rwkv_model::tokenizer::World::parse(&text).unwrap()))
    };
    let engines = [open(None), open(Some(Tokenizer::Bytes)), open(world("")), open(world("270 'ab' 2\n"))];
    for (i, from) in engines.iter().enumerate() {
        let mut session = from.session();
        session.prefill(&[1]).unwrap();
        session.save(&path, StateFormat::F32).unwrap();
        for (j, to) in engines.iter().enumerate() {
            match to.load_session(&path) {
                Ok(_) => assert!(i == j || i == 0 || j == 0, "{i} to {j}: they differ"),
                Err(Error::OtherTokenizer { found, expected, .. }) => {
                    assert!(i != j && i != 0 && j != 0, "{i} to {j}: the same, or there is none");
                    assert_eq!(Some(found), from.tokenizer_fingerprint(), "the file's");
                    assert_eq!(Some(expected), to.tokenizer_fingerprint(), "the engine's");
                }
                Err(error) => panic!("{i} to {j}: {error}"),
            }
        }
    }
}

/// The same weights are the same model, however they are stored; other weights are another.
#[test]
fn fingerprints() {
    let weights: Vec<Tensor> = model(7).iter().map(|tensor| tensor.to("BF16")).collect();
    let of = |bytes| engine(bytes, options()).fingerprint().to_owned();
    let want = of(safetensors(&weights));
    let widened: Vec<Tensor> = weights.iter().map(|tensor| tensor.to("F32")).collect();
    assert_eq!(of(safetensors(&widened)), want, "widened");
    assert_eq!(of(pth(&weights)), want, "container");
    assert_eq!(of(safetensors(&as_web_rwkv(&weights))), want, "factors turned");
    assert_eq!(of(safetensors(&as_fla(&weights))), want, "dialect");
    assert_eq!(of(safetensors(&as_stacked_fla(&weights))), want, "mixes as one");
    // The first element of any tensor.
    for at in 0..weights.len() {
        let mut changed = weights.clone();
        let mut values = changed[at].values();
        values[0] += 1.0;
        changed[at] = Tensor::new(&changed[at].name, &changed[at].shape, &values);
        assert_ne!(of(safetensors(&changed)), want, "{}", changed[at].name);
    }
    // A number for all time and all machines: files refer to it.
    let bundled = Engine::open_with(BUNDLED, options(), &|_| {}).unwrap();
    assert_eq!(bundled.fingerprint(), "76c1097331fac87e", "the bundled model");
    assert_eq!(bundled.tokenizer_fingerprint().unwrap(), "0b15141f1739f025", "bytes");
}

/// Files that are whole and say they are of this model, and are not.
#[test]
fn what_contradicts_the_model_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (path, engine) = (file(&folder), small(7));
    talked(&engine).save(&path, StateFormat::F32).unwrap();
    let sound = Snapshot::load(&path).unwrap();
    let load = |edit: &dyn Fn(&mut Snapshot)| {
        let mut snapshot = sound.clone();
        edit(&mut snapshot);
        snapshot.save(&path).unwrap();
        engine.load_session(&path).map(|session| session.position())
    };
    assert_eq!(load(&|_| ()).unwrap(), 27, "sound");
    let logits = load(&|snapshot| snapshot.logits = Some(vec![0.0; VOCAB + 1]));
    assert!(matches!(logits, Err(Error::OtherVocabulary { found: 51, vocab: VOCAB, .. })), "{logits:?}");
    let token = load(&|snapshot| snapshot.counts.extend([(50, 1)]));
    assert!(matches!(token, Err(Error::OtherVocabulary { found: 50, vocab: VOCAB, .. })), "{token:?}");
    let often = load(&|snapshot| snapshot.counts.extend([(3, u32::MAX)]));
    assert!(often.is_ok(), "a token that was generated as often as can be counted: {often:?}");
    let other = small_of([1, 2, 64, 100, VOCAB, 6]).state_layout();
    let state = EncodedState::encode(&other, &vec![0.0; other.len()], StateFormat::F16).unwrap();
    let layout = load(&|snapshot| snapshot.state = state.clone());
    assert!(matches!(layout, Err(Error::OtherLayout { found, .. }) if found == other), "{layout:?}");

    // Damage, and no file at all.
    sound.save(&path).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let damaged = engine.load_session(&path).unwrap_err();
    assert!(
        matches!(&damaged, Error::Snapshot(error) if matches!(error.fault, Fault::Checksum { .. })),
        "{damaged}"
    );
    let none = engine.load_session(folder.path().join("none")).unwrap_err();
    assert!(matches!(&none, Error::Snapshot(error) if matches!(error.fault, Fault::Io(_))), "{none}");
}

fn small_of(sizes: [usize; 6]) -> Engine {
    engine(safetensors(&random_model(sizes, 7)), options())
}

/// From the CPU to the GPU and back: the file is the same on both, and each goes on from it.
#[test]
fn from_device_to_device() {
    if device_for_tests().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = file(&folder);
    // The GPU's weights are halves.
    let weights: Vec<Tensor> = model(7).iter().map(|tensor| tensor.to("F16")).collect();
    let open = |device| engine(safetensors(&weights), EngineOptions { device, ..options() });
    let [cpu, gpu] = [Device::Cpu, Device::Gpu(None)].map(open);
    assert_eq!(gpu.fingerprint(), cpu.fingerprint(), "the same model");
    let here = talked(&cpu);
    here.save(&path, StateFormat::F32).unwrap();
    let there = gpu.load_session(&path).unwrap();
    assert_eq!(there.state().unwrap(), here.state().unwrap(), "no bit changes on the way");
    assert_eq!(there.logits().unwrap(), here.logits().unwrap(), "logits");
    assert_eq!(there.position(), here.position(), "position");

    // Generates at once there, which chooses from the logits, also by forks and without a step before.
    let want = generate(&mut here.fork(), 12);
    assert_eq!(generate(&mut there.fork(), 12), want, "the same text");
    assert_eq!(generate(&mut there.fork(), 12), want, "and again");

    // Back, before and after a step there.
    there.save(&path, StateFormat::F32).unwrap();
    let mut back = cpu.load_session(&path).unwrap();
    assert_eq!(back.state().unwrap(), here.state().unwrap(), "there and back");
    assert_eq!(generate(&mut back, 12), want, "as if nothing had been");
    let (mut here, mut there) = (here, there);
    here.prefill(&[4, 5]).unwrap();
    there.prefill(&[4, 5]).unwrap();
    there.save(&path, StateFormat::F32).unwrap();
    let back = cpu.load_session(&path).unwrap();
    assert_eq!(back.logits().unwrap(), there.logits().unwrap(), "the device's logits");
    let close = |got: &[f32], want: &[f32], what: &str| {
        // Two layers of sums over at most 128 inputs, in another order: rounding, and nothing else.
        let want: Vec<f64> = want.iter().map(|&v| v.into()).collect();
        assert!(nmse(got, &want, 1e-10).is_ok(), "{what}: {:?}", nmse(got, &want, 1e-10));
    };
    close(&back.state().unwrap(), &here.state().unwrap(), "state");
    close(back.logits().unwrap(), here.logits().unwrap(), "logits");
}
