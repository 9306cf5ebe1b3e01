//! Two ways to run an engine, checked and then timed in turn.

use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use half::f16;
use rayon::prelude::*;
use rwkv_core::compare::nmse;
use rwkv_core::model::{Compute, Logits, Model, Options, Segment, Skip, State, Wkv, WkvSegment};
use rwkv_core::ops::linear::{Linear, Matrix};
use rwkv_core::{ElementType, Elements, quant};
use rwkv_model::checkpoint::LoadMatrix;
use rwkv_model::engine::Device;
use rwkv_model::quality::put_to_rest;
use rwkv_model::skip::Skipping;
use rwkv_model::{Checkpoint, Engine, EngineOptions, Recipe, Sampler, Session, StateFormat};

use super::ceiling::Control;
use super::report::{Case, Figure};
use crate::gpu::{limit, rounds_to_halves};

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Load {
    /// A token of each of so many sequences.
    Decode(usize),
    /// A prompt of so many tokens.
    Prefill(usize),
    /// A state of one sequence, put to rest and taken up again.
    Rest,
}

impl Load {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Decode(n) => format!("decode, batch {n}"),
            Self::Prefill(n) => format!("prefill {n}"),
            Self::Rest => "at rest and back".to_owned(),
        }
    }

    /// Tokens, or states, of one run.
    pub(crate) const fn units(self) -> usize {
        match self {
            Self::Decode(n) | Self::Prefill(n) => n,
            Self::Rest => 1,
        }
    }
}

/// A way to run an engine.
#[derive(Clone, Debug)]
pub(crate) struct Side {
    pub(crate) engine: Engine,
    /// What states rest in.
    pub(crate) rest: StateFormat,
}

/// A token of those there are.
pub(crate) fn token(engine: &Engine, index: usize) -> u32 {
    u32::try_from(index * 7919 % engine.config().vocab).unwrap_or_default()
}

/// A way to run an engine under a load.
struct Run<'a> {
    side: &'a Side,
    load: Load,
    sessions: Vec<Session>,
    prompt: Vec<u32>,
    at: usize,
}

impl<'a> Run<'a> {
    fn new(side: &'a Side, load: Load) -> anyhow::Result<Self> {
        let (engine, n) = (&side.engine, if let Load::Decode(n) = load { n } else { 1 });
        let prompt: Vec<u32> = (0..load.units().max(32)).map(|at| token(engine, at)).collect();
        let mut sessions: Vec<Session> = (0..n).map(|_| engine.session()).collect();
        for session in &mut sessions {
            session.prefill(&prompt[..32])?;
        }
        engine.wait()?;
        Ok(Self { side, load, sessions, prompt, at: 0 })
    }

    /// Runs it so often, and says how many seconds one took.
    fn time(&mut self, times: usize) -> anyhow::Result<f64> {
        let engine = &self.side.engine;
        let begun = Instant::now();
        match self.load {
            Load::Decode(1) => {
                for token in self.sessions[0].generate(Sampler::greedy()).take(times) {
                    token?;
                }
            }
            Load::Decode(_) => {
                for _ in 0..times {
                    let tokens = [token(engine, self.at)];
                    let mut batch: Vec<_> = self.sessions.iter_mut().map(|of| (of, &tokens[..])).collect();
                    engine.step(&mut batch)?;
                    self.at += 1;
                }
            }
            Load::Prefill(n) => {
                for _ in 0..times {
                    engine.session().prefill(&self.prompt[..n])?;
                }
            }
            Load::Rest => {
                for _ in 0..times {
                    put_to_rest(&mut self.sessions[0], self.side.rest)?;
                }
            }
        }
        engine.wait()?;
        Ok(begun.elapsed().as_secs_f64() / times as f64)
    }
}

/// How thoroughly cases are timed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// How often each way is timed.
    pub(crate) rounds: usize,
    /// How long each time, at least.
    pub(crate) window: Duration,
    /// How long the device is kept busy before: an idle one is clocked down.
    pub(crate) busy: Duration,
}

impl Effort {
    pub(crate) const FULL: Self =
        Self { rounds: 11, window: Duration::from_millis(60), busy: Duration::from_millis(500) };
    pub(crate) const QUICK: Self =
        Self { rounds: 5, window: Duration::from_millis(15), busy: Duration::from_millis(100) };

    /// As many runs of so many seconds as take a window.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "within the bounds of the clamp"
    )]
    fn runs(self, seconds: f64) -> usize {
        (self.window.as_secs_f64() / seconds).ceil().clamp(1.0, 1e6) as usize
    }
}

/// Times two ways under a load, in turn, with a control beside them. `work` is what one run reads and writes, or computes.
pub(crate) fn case(
    load: Load,
    [without, with]: [&Side; 2],
    control: &mut Control,
    [work_without, work_with]: [f64; 2],
    effort: Effort,
) -> anyhow::Result<Case> {
    let mut runs = [Run::new(without, load)?, Run::new(with, load)?];
    let mut times = [1; 2];
    let begun = Instant::now();
    // Kernels are compiled and memory is made at the first.
    for run in &mut runs {
        run.time(1)?;
    }
    while begun.elapsed() < effort.busy {
        for (run, times) in runs.iter_mut().zip(&mut times) {
            let seconds = run.time(*times)?;
            *times = effort.runs(seconds);
        }
    }
    let [mut seconds_without, mut seconds_with, mut ratios, mut rates] = [const { Vec::new() }; 4];
    for round in 0..effort.rounds {
        rates.push(control.rate()?);
        // The one first and the other first, in turn.
        let mut seconds = [0.0; 2];
        for at in [round % 2, 1 - round % 2] {
            seconds[at] = runs[at].time(times[at])?;
        }
        ratios.push(seconds[0] / seconds[1]);
        seconds_without.push(seconds[0]);
        seconds_with.push(seconds[1]);
    }
    let units = load.units() as f64;
    let rate = |seconds: Vec<f64>| Figure::new(seconds.into_iter().map(|of| units / of).collect());
    let (without, with, ceiling) = (rate(seconds_without), rate(seconds_with), Figure::new(rates));
    let done = |of: &Figure, work: f64| work * of.median / units;
    Ok(Case {
        name: load.name(),
        ratio: Figure::new(ratios),
        work: [done(&without, work_without), done(&with, work_with)],
        ceiling,
        without,
        with,
    })
}

/// Tokens of the prompt that results are checked on, and of single tokens after it.
const CHECKED: [usize; 2] = [34, 6];

/// What is right: the logits after each token, `[T, V]`.
pub(crate) struct Reference {
    tokens: Vec<u32>,
    vocab: usize,
    logits: Vec<f64>,
    /// How far off each of [`Reference::parts`] is, as a mean square, where products are of halves, if that is known.
    of_halves: Option<[f64; 2]>,
}

/// How far engines whose products are of halves may be off, in units of [`Reference::of_halves`]: twice as far as the farthest of
/// several references that round so too. What rounding does to logits is by chance: a row of books-10m was off by 2e-7 to 9e-6
/// of its size, depending on what inputs were scaled by before they were rounded, all rows of a prompt together by 1e-7 to 4e-7.
const AS_FAR: f64 = 4.0;

/// A matrix as cooperative matrices multiply it: its weights, of blocks for instance, are rounded to halves, and its inputs to
/// halves of what a unit divides: a power of two, as the engine does, or another, which rounds otherwise. It is large enough for
/// the hidden units of the channel mix.
struct Halved<const UNIT: u32>(Matrix<f32>);

impl<const UNIT: u32> Halved<UNIT> {
    fn new(exact: &Matrix<f32>) -> Self {
        let halves = exact.weights().iter().map(|&weight| f16::from_f32(weight).to_f32());
        Self(Matrix::new(Linear::<f64>::inputs(exact), halves.collect()))
    }
}

impl<const UNIT: u32> Linear<f64> for Halved<UNIT> {
    fn inputs(&self) -> usize {
        Linear::<f64>::inputs(&self.0)
    }

    fn outputs(&self) -> usize {
        Linear::<f64>::outputs(&self.0)
    }

    fn apply(&self, x: &[f64], y: &mut [f64]) {
        let unit = f64::from(UNIT);
        let halves: Vec<f64> = x.iter().map(|x| unit * f16::from_f64(x / unit).to_f64()).collect();
        self.0.apply(&halves, y);
    }
}

impl<const UNIT: u32> Compute<f64> for Halved<UNIT> {
    fn wkv7(form: Wkv, segments: &mut [WkvSegment<'_, f64>]) {
        Matrix::<f32>::wkv7(form, segments);
    }
}

impl<const UNIT: u32> LoadMatrix for Halved<UNIT> {
    fn load<E: Send>(
        inputs: usize,
        outputs: usize,
        kind: ElementType,
        read: impl Fn(Range<usize>) -> Result<Elements, E> + Sync,
    ) -> Result<Self, E> {
        Matrix::load(inputs, outputs, kind, read).map(|exact| Self::new(&exact))
    }

    fn load_blocks<E: Send>(
        format: quant::Format,
        inputs: usize,
        outputs: usize,
        read: impl Fn(Range<usize>) -> Result<quant::Blocks, E> + Sync,
    ) -> Result<Self, E> {
        Matrix::load_blocks(format, inputs, outputs, read).map(|exact| Self::new(&exact))
    }

    fn of_hidden_major(blocks: &quant::Blocks) -> Self {
        Self::new(&Matrix::of_hidden_major(blocks))
    }
}

/// The logits after each token, in plain loops.
fn logits_of<M: Compute<f64> + LoadMatrix>(
    checkpoint: &Checkpoint,
    weights: &Recipe,
    tokens: &[u32],
    skip: Option<&Skipping>,
) -> anyhow::Result<Vec<f64>> {
    let model: Model<f64, M> = checkpoint.load_with(weights, &|_| {})?;
    let ([prompt, _], n_layers) = (CHECKED, model.config.n_layers);
    let (mut state, mut logits) = (State::new(&model.config), Vec::new());
    for (at, token) in tokens.iter().enumerate() {
        let out = skip.filter(|of| of.prefill || at >= prompt);
        let layers = out.map(|of| of.layers(n_layers, at as u64)).unwrap_or_default();
        let (part, shifts) = out.map(|of| (of.part, of.shifts)).unwrap_or_default();
        let options = Options { skip: Skip { layers: &layers, part, shifts }, ..Options::default() };
        let segment =
            Segment { tokens: std::slice::from_ref(token), state: &mut state, logits: Logits::Last };
        logits.extend(model.forward(&mut [segment], options));
    }
    Ok(logits)
}

/// Models of so many parameters are run by the reference in `f64`; larger ones by the CPU executor, which was checked so.
const SMALL: usize = 50_000_000;

impl Reference {
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        options: &EngineOptions,
        skip: Option<&Skipping>,
        halves: bool,
    ) -> anyhow::Result<Self> {
        let [prompt, steps] = CHECKED;
        let config = checkpoint.config();
        let any = |index: usize| u32::try_from(index * 7919 % config.vocab).unwrap_or_default();
        let tokens: Vec<u32> = (0..prompt + steps).map(any).collect();
        let mut reference = Self { tokens, vocab: config.vocab, logits: Vec::new(), of_halves: None };
        let tokens = &reference.tokens;
        if config.streamed_params() <= SMALL {
            let forms = [
                logits_of::<Matrix<f32>>,
                logits_of::<Halved<256>>,
                logits_of::<Halved<282>>,
                logits_of::<Halved<311>>,
            ];
            let forms = &forms[..if halves { forms.len() } else { 1 }];
            let all = forms.par_iter().map(|form| form(checkpoint, &options.weights, tokens, skip));
            let mut all = all.collect::<anyhow::Result<Vec<_>>>()?;
            reference.logits = all.remove(0);
            for halved in &all {
                let parts = reference.parts();
                let of_halves = reference.of_halves.get_or_insert_default();
                for (part, worst) in parts.into_iter().zip(of_halves) {
                    let off = nmse(&halved[part.clone()], &reference.logits[part], f64::INFINITY)?;
                    *worst = worst.max(off);
                }
            }
        } else {
            let cpu = EngineOptions { device: Device::Cpu, skip: skip.cloned(), ..options.clone() };
            let mut session = Engine::new(checkpoint, cpu, &|_| {})?.session();
            let mut logits = session.logits_of(&tokens[..prompt])?;
            for &token in &tokens[prompt..] {
                logits.extend_from_slice(session.step(token)?);
            }
            reference.logits = logits.into_iter().map(f64::from).collect();
        }
        Ok(reference)
    }

    /// The logits that are compared together: of a prompt; and of its last token and those that follow one by one.
    fn parts(&self) -> [Range<usize>; 2] {
        let ([prompt, steps], vocab) = (CHECKED, self.vocab);
        [0..prompt * vocab, (prompt - 1) * vocab..(prompt + steps) * vocab]
    }

    /// How far an engine's logits are off, as a mean square of their size: alone, and of three side by side. So much more than
    /// rounding explains is let pass.
    pub(crate) fn check(&self, side: &Side, more: f64) -> anyhow::Result<f64> {
        let of_halves = if rounds_to_halves(&side.engine)? { self.of_halves } else { None };
        let limits = match of_halves {
            Some(of) => of.map(|of| AS_FAR * of),
            None => [limit(&side.engine)?; 2],
        };
        let ([prompt, _], mut worst) = (CHECKED, 0f64);
        let mut check = |part: usize, got: &[f32]| {
            let off = nmse(got, &self.logits[self.parts()[part].clone()], limits[part] + more);
            worst = worst.max(off.context(["the logits of a prompt", "the logits token by token"][part])?);
            anyhow::Ok(())
        };
        let (first, rest) = self.tokens.split_at(prompt);
        let mut sessions: Vec<Session> = (0..3).map(|_| side.engine.session()).collect();
        check(0, &sessions[0].logits_of(first)?)?;
        for session in &mut sessions[1..] {
            session.prefill(first)?;
        }
        let last = |session: &Session| anyhow::Ok(session.logits()?.to_vec());
        let mut rows = sessions.iter().map(last).collect::<anyhow::Result<Vec<_>>>()?;
        if side.rest != StateFormat::F32 {
            put_to_rest(&mut sessions[0], side.rest)?;
        }
        for token in rest {
            sessions[0].step(*token)?;
            let tokens = [*token];
            let mut batch: Vec<_> = sessions[1..].iter_mut().map(|of| (of, &tokens[..])).collect();
            side.engine.step(&mut batch)?;
            for (session, rows) in sessions.iter().zip(&mut rows) {
                rows.extend(last(session)?);
            }
        }
        rows.iter().try_for_each(|rows| check(1, rows))?;
        ensure!(worst.is_finite(), "the logits are not finite");
        Ok(worst)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use rwkv_model::{EngineOptions, Recipe, WeightFormat};

    use super::Reference;
    use crate::assets::ModelArgs;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        model: ModelArgs,
    }

    /// Halves move the logits of the bundled model by about a thousandth of their size, whatever its weights are in; of engines
    /// that do not round so nothing is said.
    #[test]
    fn what_halves_do() {
        let checkpoint = Program::parse_from(["bench"]).model.checkpoint().unwrap();
        for weights in [Recipe::default(), Recipe::layers(WeightFormat::Int8)] {
            let options = EngineOptions { weights, ..EngineOptions::default() };
            let [exact, halves] =
                [false, true].map(|of| Reference::new(&checkpoint, &options, None, of).unwrap());
            assert_eq!((exact.of_halves, &exact.logits), (None, &halves.logits), "{}", options.weights);
            for off in halves.of_halves.unwrap().map(f64::sqrt) {
                assert!((1e-4..1e-2).contains(&off), "{}: {off}", options.weights);
            }
        }
    }
}
