//! The numerics contract, and that a caller's mistake harms nothing.
//!
//! On the CPU it holds to the bit, and so it does on a GPU that is batch-invariant: a session's results are its own,
//! whatever runs beside it, however its tokens are split over calls and passes, on any number of threads. Every test
//! runs on both, where there is a GPU, but for those of the CPU's own options.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::num::NonZeroUsize;
use std::sync::OnceLock;

use proptest::prelude::*;
use rwkv_core::rng::SplitMix64;
use rwkv_model::{Engine, EngineOptions, Error, FinishReason, Sampler, Session, TextOptions, Tokenizer};
use support::{BUNDLED, alone, engine, on_cpu, on_gpu, random_model, safetensors, shown, together};

const VOCAB: usize = 52;
/// The least that is no token of it.
const NO_TOKEN: u32 = 52;

/// Where the contract holds: on the CPU, and on the GPU if there is one.
fn setups() -> Vec<EngineOptions> {
    let setup = |options| EngineOptions { pass_tokens: 16, batch_invariant: true, ..options };
    [Some(on_cpu()), on_gpu()].into_iter().flatten().map(setup).collect()
}

fn small(options: EngineOptions) -> Engine {
    engine(safetensors(&random_model([2, 2, 64, 104, VOCAB, 8], 7)), options)
}

/// The small model in all setups, for the tests to share.
fn smalls() -> &'static [Engine] {
    static ENGINES: OnceLock<Vec<Engine>> = OnceLock::new();
    ENGINES.get_or_init(|| setups().into_iter().map(small).collect())
}

/// The small model in passes of some lengths: for each of [`smalls`] some.
fn small_passes() -> &'static [Vec<Engine>] {
    static ENGINES: OnceLock<Vec<Vec<Engine>>> = OnceLock::new();
    let passes = |setup: EngineOptions| {
        let of = |pass_tokens| small(EngineOptions { pass_tokens, ..setup.clone() });
        [1, 7, 33, 65, 100].map(of).into()
    };
    ENGINES.get_or_init(|| setups().into_iter().map(passes).collect())
}

/// The bundled model in all setups.
fn bundled() -> &'static [Engine] {
    static ENGINES: OnceLock<Vec<Engine>> = OnceLock::new();
    let open = |setup| Engine::open_with(BUNDLED, EngineOptions { pass_tokens: 512, ..setup }, &|_| {});
    ENGINES.get_or_init(|| setups().into_iter().map(|setup| open(setup).unwrap()).collect())
}

/// Prompts of the given lengths.
fn prompts(lengths: &[usize], seed: u64) -> Vec<Vec<u32>> {
    let mut rng = SplitMix64::new(seed);
    let token = |rng: &mut SplitMix64| u32::try_from(rng.next_u64() % VOCAB as u64).unwrap();
    lengths.iter().map(|&n| (0..n).map(|_| token(&mut rng)).collect()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn sessions_side_by_side_are_as_alone(lengths in prop::collection::vec(1usize..40, 1..9), seed: u64) {
        let prompts = prompts(&lengths, seed);
        for engine in smalls() {
            for (session, prompt) in together(engine, &prompts).iter().zip(&prompts) {
                prop_assert_eq!(shown(session), shown(&alone(engine, prompt)), "bits");
            }
        }
    }

    #[test]
    fn order_does_not_matter(lengths in prop::collection::vec(1usize..20, 2..7), turn in 1usize..6, seed: u64) {
        let prompts = prompts(&lengths, seed);
        let mut turned = prompts.clone();
        let turn = turn % prompts.len();
        turned.rotate_left(turn);
        for engine in smalls() {
            let mut first: Vec<_> = together(engine, &prompts).iter().map(shown).collect();
            first.rotate_left(turn);
            let second: Vec<_> = together(engine, &turned).iter().map(shown).collect();
            prop_assert_eq!(first, second, "turned by {}", turn);
        }
    }

    /// However the tokens are split over calls, and the calls over passes.
    #[test]
    fn splits_do_not_matter(length in 1usize..110, cuts in prop::collection::vec(1usize..110, 0..5), pass in 0usize..5) {
        let prompt = prompts(&[length], 1).remove(0);
        for (whole, passes) in smalls().iter().zip(small_passes()) {
            let whole = alone(whole, &prompt);
            let mut session = passes[pass].session();
            let mut rest = prompt.as_slice();
            for cut in cuts.iter().copied().chain([length]) {
                let now = rest.split_off(..cut.min(rest.len())).unwrap_or_default();
                if !now.is_empty() {
                    session.prefill(now).unwrap();
                }
            }
            prop_assert_eq!(shown(&session), shown(&whole), "bits");
        }
    }
}

#[test]
fn threads_and_skipped_zeros_do_not_matter() {
    let prompt = &prompts(&[45], 3)[0];
    let options = || EngineOptions { pass_tokens: 16, ..on_cpu() };
    let want = shown(&alone(&small(options()), prompt));
    for threads in [1, 2, 3, 7].map(NonZeroUsize::new) {
        let engine = small(EngineOptions { threads, ..options() });
        assert_eq!(shown(&alone(&engine, prompt)), want, "{threads:?} threads");
    }
    for pass_tokens in [1, 2, 512] {
        let engine = small(EngineOptions { skip_zeros: false, pass_tokens, ..options() });
        assert_eq!(shown(&alone(&engine, prompt)), want, "zeros multiplied, passes of {pass_tokens}");
    }
    let (engine, halves) = (small(EngineOptions { wide_adapters: true, ..options() }), small(options()));
    assert_eq!(shown(&alone(&engine, prompt)), want, "wide adapters");
    assert!(engine.weight_bytes() >= halves.weight_bytes(), "of no less bytes");
}

/// 300 sessions in a step, decoding and reading prompts in any mix.
#[test]
fn many_sessions() {
    let lengths: Vec<usize> = (0..300).map(|i| if i % 10 == 0 { 21 } else { 1 }).collect();
    let prompts = prompts(&lengths, 9);
    for engine in small_passes().iter().filter_map(|passes| passes.last()) {
        for (index, (session, prompt)) in together(engine, &prompts).iter().zip(&prompts).enumerate() {
            if index % 37 == 0 || prompt.len() > 1 && index % 50 == 0 {
                assert_eq!(shown(session), shown(&alone(engine, prompt)), "session {index}");
            }
        }
    }
}

#[test]
fn logits_of_every_position_are_those_of_every_step() {
    for engine in smalls() {
        let prompt = &prompts(&[40], 4)[0];
        let (mut steps, mut whole) = (engine.session(), engine.session());
        let one_by_one: Vec<f32> = prompt.iter().flat_map(|&t| steps.step(t).unwrap().to_vec()).collect();
        assert_eq!(whole.logits_of(prompt).unwrap(), one_by_one, "bits");
        assert_eq!(shown(&whole), shown(&steps), "and the session stands where it should");
        // scores follow from them, in an empty session and in one that has read something
        let scores = engine.session().score(prompt).unwrap();
        assert_eq!(scores.len(), 39, "the first token follows nothing");
        let mut later = alone(engine, &prompt[..10]);
        assert_eq!(later.score(&prompt[10..]).unwrap(), scores[9..], "from the middle");
    }
}

#[test]
fn forks_and_snapshots_go_on_bit_equal() {
    for engine in smalls() {
        let prompts = prompts(&[30, 12], 5);
        let mut session = alone(engine, &prompts[0]);
        let snapshot = session.snapshot();
        let mut fork = session.fork();
        let sampler =
            Sampler { presence_penalty: 0.5, frequency_penalty: 0.2, top_p: 1.0, ..Sampler::default() };
        let first: Vec<u32> = session.generate(sampler).take(20).map(Result::unwrap).collect();
        let end = shown(&session);
        let forked: Vec<u32> = fork.generate(sampler).take(20).map(Result::unwrap).collect();
        assert_eq!((&forked, shown(&fork)), (&first, end.clone()), "fork");

        session.prefill(&prompts[1]).unwrap();
        session.restore(&snapshot).unwrap();
        let again: Vec<u32> = session.generate(sampler).take(20).map(Result::unwrap).collect();
        assert_eq!((again, shown(&session)), (first, end), "restored, with its penalties and its noise");

        // a state alone: the same future, but nothing is known of the past
        let mut state = engine.session();
        state.start_from(&snapshot_state(engine, &prompts[0])).unwrap();
        assert_eq!((state.position(), state.logits().is_err()), (0, true), "no past");
        let mut whole = alone(engine, &prompts[0]);
        assert_eq!(state.step(1).unwrap(), whole.step(1).unwrap(), "the same future");
    }
}

fn snapshot_state(engine: &Engine, prompt: &[u32]) -> Vec<f32> {
    alone(engine, prompt).state().unwrap()
}

/// What a caller gets wrong is a typed error; no session changes, and the engine works on.
#[test]
fn mistakes_harm_nothing() {
    for (engine, setup) in smalls().iter().zip(setups()) {
        let prompt = &prompts(&[9], 6)[0];
        let mut session = alone(engine, prompt);
        let before = shown(&session);

        let outside = session.prefill(&[1, 2, NO_TOKEN]).unwrap_err();
        assert!(matches!(outside, Error::Token { token: NO_TOKEN, index: 2, vocab: VOCAB }), "{outside}");
        assert!(matches!(session.step(u32::MAX), Err(Error::Token { token: u32::MAX, .. })), "far outside");
        assert!(matches!(session.prefill(&[]), Err(Error::NoTokens)), "no tokens");
        assert!(matches!(session.score(&[]), Err(Error::NoTokens)), "no tokens");
        assert!(matches!(session.logits_of(&[99]), Err(Error::Token { .. })), "outside");
        assert!(matches!(session.accept(77), Err(Error::Token { .. })), "outside");
        assert!(matches!(session.start_from(&[0.0; 3]), Err(Error::State(_))), "another state");
        let mut other = small(setup).session();
        assert!(matches!(other.restore(&session.snapshot()), Err(Error::ForeignSnapshot)), "another engine");
        let mut fresh = engine.session();
        assert!(matches!(fresh.logits(), Err(Error::NoLogits)), "nothing read");
        assert!(
            matches!(fresh.generate(Sampler::default()).next(), Some(Err(Error::NoLogits))),
            "nothing read"
        );
        let hot = Sampler { temperature: f32::NAN, ..Sampler::default() };
        let tokens: Vec<_> = session.generate(hot).take(5).collect();
        assert!(matches!(tokens[..], [Err(Error::Sample(_))]), "one error, then none");
        assert!(
            matches!(session.text(TextOptions::default()), Err(Error::NoTokenizer { vocab: VOCAB })),
            "no vocabulary"
        );

        // one bad request among good ones
        let mut neighbour = engine.session();
        let mut batch = [(&mut session, &[1, 2][..]), (&mut neighbour, &[3, NO_TOKEN])];
        assert!(matches!(engine.step(&mut batch), Err(Error::Token { .. })), "the second is bad");
        let mut batch = [(&mut session, &[1, 2][..]), (&mut other, &[3])];
        assert!(
            matches!(engine.step(&mut batch), Err(Error::ForeignSession { index: 1 })),
            "of another engine"
        );
        let mut batch = [(&mut session, &[1, 2][..]), (&mut neighbour, &[])];
        assert!(matches!(engine.step(&mut batch), Err(Error::NoTokens)), "nothing to read");
        engine.step(&mut []).unwrap();

        assert_eq!((shown(&session), neighbour.position()), (before, 0), "as before");
        session.step(4).unwrap();
        let mut want = alone(engine, prompt);
        want.step(4).unwrap();
        assert_eq!(shown(&session), shown(&want), "and works on");
    }
}

#[test]
fn options_that_do_not_go_with_the_model() {
    let checkpoint = support::open(safetensors(&random_model([1, 1, 64, 16, 50, 4], 7)), None).unwrap();
    for setup in setups() {
        let with = EngineOptions { tokenizer: Some(Tokenizer::Bytes), ..setup };
        let error = Engine::new(&checkpoint, with, &|_| {}).unwrap_err();
        assert!(matches!(error, Error::TokenizerTooLarge { tokenizer: 256, model: 50 }), "{error}");
    }
    let with = EngineOptions { threads: NonZeroUsize::new(100_000), ..on_cpu() };
    let error = Engine::new(&checkpoint, with, &|_| {}).unwrap_err();
    assert!(matches!(error, Error::Threads { threads: 100_000, .. }), "{error}");
}

#[test]
fn loading_tells_how_far_it_is() {
    let checkpoint = support::open(safetensors(&random_model([2, 1, 64, 16, 50, 4], 7)), None).unwrap();
    for setup in setups() {
        let seen = std::sync::Mutex::new(Vec::new());
        let engine = Engine::new(&checkpoint, setup, &|progress| seen.lock().unwrap().push(progress));
        assert!(engine.is_ok(), "loads");
        let seen = seen.into_inner().unwrap();
        assert!(seen.iter().all(|p| p.done <= p.total && p.total == checkpoint.bytes()), "{seen:?}");
        assert_eq!(seen.iter().map(|p| p.done).max(), Some(checkpoint.bytes()), "every byte, once");
    }
}

fn text(engine: &Engine, prompt: &str, options: TextOptions) -> (String, FinishReason, usize) {
    let mut session = alone(engine, &engine.tokenizer().unwrap().encode(prompt));
    let mut text = session.text(options).unwrap();
    let whole: String = text.by_ref().map(Result::unwrap).collect();
    let (reason, tokens) = (text.finish_reason().unwrap(), text.tokens());
    assert_eq!(session.position(), (prompt.len() + tokens) as u64, "every token was read");
    (whole, reason, tokens)
}

/// The bundled model continues a text in its own tongue, the same way each time, and stops where it is told.
#[test]
fn the_bundled_model_writes() {
    for engine in bundled() {
        let greedy = |max_tokens, stop: &[&str]| TextOptions {
            sampler: Sampler::greedy(),
            max_tokens,
            stop: stop.iter().map(|&s| s.to_owned()).collect(),
        };
        let (whole, reason, tokens) = text(engine, "It was", greedy(60, &[]));
        assert_eq!((reason, tokens, whole.len()), (FinishReason::Length, 60, 60), "{whole:?}");
        assert!(
            whole.bytes().all(|b| b.is_ascii_alphanumeric() || b" .,;:'\"!?-\n".contains(&b)),
            "{whole:?}"
        );
        assert!(whole.contains(" the "), "English: {whole:?}");
        let (stopped, reason, tokens) = text(engine, "It was", greedy(60, &["zebra", " the "]));
        assert_eq!(reason, FinishReason::Stop(1), "{stopped:?}");
        assert_eq!(whole.find(" the "), Some(stopped.len()), "all before the stop, and nothing of it");
        assert_eq!(tokens, stopped.len() + " the ".len(), "the stop was generated");
        assert!(whole.starts_with(&stopped), "the same text");
        let (empty, reason, _) = text(engine, "It was", greedy(0, &[]));
        assert_eq!((empty.as_str(), reason), ("", FinishReason::Length), "no tokens");
        let mut session = alone(engine, &[65]);
        assert!(matches!(session.text(greedy(5, &[""])), Err(Error::Tokenizer(_))), "an empty stop sequence");
    }
}

/// Released models have more tokens than their tokenizer, to a round number: text never has those.
#[test]
fn tokens_without_bytes_are_never_chosen() {
    for setup in setups() {
        let model = safetensors(&random_model([1, 1, 64, 16, 400, 4], 7));
        let engine = engine(model, EngineOptions { tokenizer: Some(Tokenizer::Bytes), ..setup });
        let hot = Sampler { temperature: 50.0, top_p: 1.0, ..Sampler::default() };
        let mut session = alone(&engine, &[1]);
        let beyond = session.fork().generate(hot).take(200).filter(|t| *t.as_ref().unwrap() > 255).count();
        assert!(beyond > 20, "of 200 tokens, only {beyond} have no bytes: this tests nothing");
        let mut text = session.text(TextOptions { sampler: hot, max_tokens: 200, stop: vec![] }).unwrap();
        text.by_ref().for_each(|piece| assert!(piece.is_ok(), "{piece:?}"));
        assert_eq!((text.finish_reason(), text.tokens()), (Some(FinishReason::Length), 200), "to the end");
    }
}

/// Bytes that are no UTF-8 are tokens like others, and a character split over tokens comes out once, whole.
#[test]
fn bytes_that_are_no_text() {
    for engine in bundled() {
        let bytes: Vec<u8> = (0..=255).chain([0xff, 0xfe, 0xc3]).collect();
        let session = alone(engine, &engine.tokenizer().unwrap().encode(&bytes));
        assert!(session.logits().unwrap().iter().all(|l| l.is_finite()), "read all the same");
        let mut decoder = rwkv_model::tokenizer::Decoder::new(engine.tokenizer().unwrap());
        let pieces: Vec<String> =
            "na\u{ef}ve \u{1f999}".bytes().map(|b| decoder.push(u32::from(b)).unwrap().to_owned()).collect();
        let spoken: Vec<&str> = pieces.iter().map(String::as_str).filter(|p| !p.is_empty()).collect();
        assert_eq!(spoken, ["n", "a", "\u{ef}", "v", "e", " ", "\u{1f999}"], "whole characters");
    }
}

/// A state alone brings nothing of what the session did before.
#[test]
fn a_state_replaces_all_that_was() {
    for engine in smalls() {
        let state = snapshot_state(engine, &prompts(&[30], 5)[0]);
        let sampler =
            Sampler { presence_penalty: 3.0, frequency_penalty: 1.0, top_p: 1.0, ..Sampler::default() };
        let mut used = alone(engine, &prompts(&[12], 6)[0]);
        assert_eq!(used.generate(sampler).take(40).filter(Result::is_ok).count(), 40, "generates");
        let mut fresh = engine.session();
        for session in [&mut used, &mut fresh] {
            session.start_from(&state).unwrap();
            assert_eq!((session.position(), session.logits().is_err()), (0, true), "no past");
            session.step(1).unwrap();
        }
        let rest = |session: &mut Session| {
            session.generate(sampler).take(20).map(Result::unwrap).collect::<Vec<_>>()
        };
        assert_eq!(rest(&mut used), rest(&mut fresh), "nor penalties for it");
    }
}

/// A session samples by its own logits and position, and by how often it generated each token.
#[test]
fn sampling_knows_position_and_counts() {
    for engine in smalls() {
        let mut session = alone(engine, &prompts(&[8], 2)[0]);
        let sampler =
            Sampler { presence_penalty: 1.0, frequency_penalty: 0.5, top_p: 1.0, ..Sampler::default() };
        let mut counts = rwkv_model::sample::Counts::default();
        for _ in 0..30 {
            let want = sampler.sample(session.logits().unwrap(), &counts, session.position()).unwrap();
            assert_eq!(session.sample(&sampler).unwrap(), want, "at {}", session.position());
            session.accept(want).unwrap();
            counts.add(want);
        }
        // what was read and not generated does not count
        session.step(3).unwrap();
        let want = sampler.sample(session.logits().unwrap(), &counts, session.position()).unwrap();
        assert_eq!(session.sample(&sampler).unwrap(), want, "after a token that was read");
    }
}

#[test]
fn passes_of_no_tokens_are_passes_of_one() {
    let prompt = &prompts(&[5], 3)[0];
    for (engine, setup) in smalls().iter().zip(setups()) {
        let none = small(EngineOptions { pass_tokens: 0, ..setup });
        assert_eq!(shown(&alone(&none, prompt)), shown(&alone(engine, prompt)), "bits");
    }
}

#[test]
fn only_256_tokens_are_bytes() {
    for (vocab, setup) in
        [255, 257].into_iter().flat_map(|vocab| setups().into_iter().map(move |s| (vocab, s)))
    {
        let engine = engine(safetensors(&random_model([1, 1, 64, 16, vocab, 4], 7)), setup);
        assert!(matches!(engine.tokenizer(), Err(Error::NoTokenizer { vocab: v }) if v == vocab), "{vocab}");
    }
}

/// A model that only ever says the tokens given, the first a little rather than the next, whatever it reads.
fn parrot(vocab: usize, tokens: &[usize]) -> Vec<support::Tensor> {
    let mut model = random_model([1, 1, 64, 16, vocab, 4], 1);
    let mut head = vec![0.0; vocab * 64];
    for (&token, weight) in tokens.iter().zip([1.0 / 8.0, 0.875 / 8.0]) {
        head[token * 64..][..64].fill(weight); // logits of 8 and 7, all others 0
    }
    for t in &mut model {
        let values = match t.name.as_str() {
            "ln_out.weight" => vec![0.0; 64],
            "ln_out.bias" => vec![1.0; 64],
            "head.weight" => head.clone(),
            _ => continue,
        };
        *t = support::Tensor::new(&t.name.clone(), &t.shape.clone(), &values);
    }
    model
}

fn greedy(max_tokens: usize, stop: &str) -> TextOptions {
    TextOptions { sampler: Sampler::greedy(), max_tokens, stop: vec![stop.to_owned()] }
}

/// What might have become a stop sequence is given out in the end, and so is a character that never ended.
#[test]
fn what_was_held_back_comes_in_the_end() {
    for setup in setups() {
        let a = engine(safetensors(&parrot(256, &[97])), setup.clone());
        assert_eq!(text(&a, "x", greedy(3, "aaaaa")), ("aaa".to_owned(), FinishReason::Length, 3), "no stop");
        let broken = engine(safetensors(&parrot(256, &[0xc3])), setup);
        let want = ("\u{fffd}".to_owned(), FinishReason::Length, 1);
        assert_eq!(text(&broken, "x", greedy(1, "zz")), want, "half a character");
    }
}

#[test]
fn text_knows_its_penalties() {
    for setup in setups() {
        let engine = engine(safetensors(&parrot(256, &[97, 98])), setup);
        let sampler = Sampler { frequency_penalty: 2.0, ..Sampler::greedy() };
        let options = TextOptions { sampler, max_tokens: 6, stop: Vec::new() };
        assert_eq!(text(&engine, "x", options).0, "ababab", "8, 7, 6, 5, 4, 3");
    }
}

#[test]
fn text_ends_where_the_model_ends_it() {
    let lines: String = (0..256).map(|b| format!("{} b'\\x{b:02x}' 1\n", b + 1)).collect();
    let world = Tokenizer::World(rwkv_model::tokenizer::World::parse(&lines).unwrap());
    for setup in setups() {
        let with = EngineOptions { tokenizer: Some(world.clone()), ..setup };
        let mut session = alone(&engine(safetensors(&parrot(260, &[0])), with), &[5]);
        let mut text = session.text(greedy(5, "zz")).unwrap();
        assert!(text.next().is_none(), "nothing");
        assert_eq!((text.finish_reason(), text.tokens()), (Some(FinishReason::EndOfText), 0), "at once");
        assert_eq!(session.position(), 1, "the end of text is not read");
    }
}

/// Logits that are none, since their sums overflow: an error, which leaves the session as it was. Cooperative matrices hold what
/// they read at the largest half, so that their sums do not.
#[test]
fn text_ends_where_logits_are_no_numbers() {
    for setup in setups() {
        let setup = EngineOptions { portable: true, ..setup };
        let mut model = parrot(256, &[97]);
        let bias = model.iter_mut().find(|t| t.name == "ln_out.bias").unwrap();
        *bias = support::Tensor::new("ln_out.bias", &[64], &[3e38; 64]);
        let mut session = alone(&engine(safetensors(&model), setup), &[5]);
        let before = session.state().unwrap();
        let mut text = session.text(greedy(5, "zz")).unwrap();
        let error = text.next();
        assert!(matches!(error, Some(Err(Error::Sample(_)))), "infinite logits: {error:?}");
        assert!(text.next().is_none(), "and no more");
        assert_eq!((text.finish_reason(), text.tokens()), (Some(FinishReason::Error), 0), "an error");
        assert_eq!((session.position(), session.state().unwrap()), (1, before), "as it was");
        let tokens: Vec<_> = session.generate(Sampler::default()).take(3).collect();
        assert!(matches!(tokens[..], [Err(Error::Sample(_))]), "one error, then none: {tokens:?}");
    }
}

#[test]
fn text_is_refused_before_it_begins() {
    for engine in bundled() {
        assert!(
            matches!(engine.session().text(TextOptions::default()), Err(Error::NoLogits)),
            "nothing read"
        );
        let sampler = Sampler { temperature: f32::NAN, ..Sampler::default() };
        let mut session = alone(engine, &[65]);
        assert!(
            matches!(session.text(TextOptions { sampler, ..greedy(5, "zz") }), Err(Error::Sample(_))),
            "no setting"
        );
    }
}

/// A file may write an extent of one where another file has none: no shape that is accepted may end in a panic.
#[test]
fn axes_of_one_in_adapters() {
    let shapes: [(usize, &str, &[usize]); 5] = [
        (4, "blocks.1.att.w1", &[1, 64, 4]),
        (4, "blocks.0.att.w2", &[1, 4, 64]),
        (1, "blocks.1.att.w1", &[64]),
        (1, "blocks.1.att.g2", &[64]),
        (1, "blocks.1.att.w1", &[1, 64]),
    ];
    for setup in setups() {
        for (rank, name, shape) in shapes {
            let mut model = random_model([2, 1, 64, 24, 20, rank], 1);
            let logits = |engine: &Engine| engine.session().logits_of(&[1, 2]).unwrap();
            let want = logits(&engine(safetensors(&model), setup.clone()));
            model.iter_mut().find(|t| t.name == name).unwrap().shape = shape.to_vec();
            let Ok(engine) = support::try_engine(safetensors(&model), setup.clone()) else { continue };
            assert_eq!(logits(&engine), want, "{name} {shape:?}, rank {rank}");
        }
    }
}
