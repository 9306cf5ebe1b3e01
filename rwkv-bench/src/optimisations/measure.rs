//! Two ways to run an engine, checked and then timed in turn.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rwkv_core::compare::nmse;
use rwkv_core::model::{Logits, Model, Options, Segment, Skip, State};
use rwkv_core::ops::linear::Matrix;
use rwkv_model::engine::Device;
use rwkv_model::quality::put_to_rest;
use rwkv_model::skip::Skipping;
use rwkv_model::{Checkpoint, Engine, EngineOptions, Sampler, Session, StateFormat};

use super::ceiling::Control;
use super::report::{Case, Figure};

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
const CHECKED: [usize; 2] = [34, 2];

/// What is right: the logits after a prompt, and after each of the tokens that follow.
pub(crate) struct Reference {
    tokens: Vec<u32>,
    logits: Vec<Vec<f64>>,
}

/// Models of so many parameters are run by the reference in `f64`; larger ones by the CPU executor, which was checked so.
const SMALL: usize = 50_000_000;

impl Reference {
    pub(crate) fn new(
        checkpoint: &Checkpoint,
        options: &EngineOptions,
        skip: Option<&Skipping>,
    ) -> anyhow::Result<Self> {
        let [prompt, steps] = CHECKED;
        let config = checkpoint.config();
        let any = |index: usize| u32::try_from(index * 7919 % config.vocab).unwrap_or_default();
        let tokens: Vec<u32> = (0..prompt + steps).map(any).collect();
        let mut logits = Vec::new();
        if config.streamed_params() <= SMALL {
            let model: Model<f64, Matrix<f32>> = checkpoint.load_with(&options.weights, &|_| {})?;
            let mut state = State::new(config);
            for (at, token) in tokens.iter().enumerate() {
                let out = skip.filter(|of| of.prefill || at >= prompt);
                let layers = out.map(|of| of.layers(config.n_layers, at as u64)).unwrap_or_default();
                let (part, shifts) = out.map(|of| (of.part, of.shifts)).unwrap_or_default();
                let options = Options { skip: Skip { layers: &layers, part, shifts }, ..Options::default() };
                let segment =
                    Segment { tokens: std::slice::from_ref(token), state: &mut state, logits: Logits::Last };
                let row = model.forward(&mut [segment], options);
                if at + 1 >= prompt {
                    logits.push(row);
                }
            }
        } else {
            let cpu = EngineOptions { device: Device::Cpu, skip: skip.cloned(), ..options.clone() };
            let mut session = Engine::new(checkpoint, cpu, &|_| {})?.session();
            session.prefill(&tokens[..prompt])?;
            let wide = |row: &[f32]| row.iter().copied().map(f64::from).collect();
            logits.push(wide(session.logits()?));
            for &token in &tokens[prompt..] {
                logits.push(wide(session.step(token)?));
            }
        }
        Ok(Self { tokens, logits })
    }

    /// How far an engine's logits are off, as a mean square of their size: alone, and of three side by side.
    pub(crate) fn check(&self, side: &Side, limit: f64) -> anyhow::Result<f64> {
        let ([prompt, _], mut worst) = (CHECKED, 0f64);
        let mut sessions: Vec<Session> = (0..3).map(|_| side.engine.session()).collect();
        let mut check = |session: &Session, at: usize| {
            let off = nmse(session.logits()?, &self.logits[at], limit);
            worst = worst.max(off.with_context(|| format!("the logits after {} tokens", prompt + at))?);
            anyhow::Ok(())
        };
        sessions[0].prefill(&self.tokens[..prompt])?;
        check(&sessions[0], 0)?;
        for session in &mut sessions[1..] {
            session.prefill(&self.tokens[..prompt])?;
        }
        if side.rest != StateFormat::F32 {
            put_to_rest(&mut sessions[0], side.rest)?;
        }
        for (at, token) in (1..).zip(&self.tokens[prompt..]) {
            sessions[0].step(*token)?;
            let tokens = [*token];
            let mut batch: Vec<_> = sessions[1..].iter_mut().map(|of| (of, &tokens[..])).collect();
            side.engine.step(&mut batch)?;
            sessions.iter().try_for_each(|session| check(session, at))?;
        }
        ensure!(worst.is_finite(), "the logits are not finite");
        Ok(worst)
    }
}
