//! What each optimisation brings in speed and costs in quality, on the model and the machine at hand, beside what was
//! promised of it.
//!
//! Every way to run the engine is first checked against the reference; then the device is kept busy for half a second; then
//! the engine without the optimisation and the engine with it are timed in turn, with a copy or a product of matrices
//! beside them. [`rows`] lists the optimisations: one is added there.

pub(crate) mod ceiling;
mod html;
mod measure;
mod report;
mod rows;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::slice;
use std::time::{Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use clap::Args;
use indicatif::ProgressBar;
use rwkv_core::fast::linear::Packed;
use rwkv_core::model::{Compute, SkipPart, WkvSegment};
use rwkv_core::ops::wkv7::{Dims, Inputs};
use rwkv_core::ops::wkv7_lazy::ENTRY;
use rwkv_core::rng::SplitMix64;
use rwkv_model::engine::Device;
use rwkv_model::quality::{self, Score, SideBySide};
use rwkv_model::skip::{self, Contribution, LayerCost, Skipping};
use rwkv_model::{Checkpoint, Engine, EngineOptions, ModelConfig, Resident, StateFormat, Wkv};
use rwkv_state::EncodedState;
use serde::Deserialize;

use self::ceiling::Controls;
use self::measure::{Effort, Load, Reference, Side, case};
use self::report::{Figure, Form, PeerCase, Quality, Report, Share, moved};
use self::rows::{On, Row, Way};
use crate::assets::{self, ModelArgs};
use crate::gpu::rounds_to_halves;
use crate::random_model::{self, shape_of};
use crate::states::changes;
use crate::states::rows::{held_bytes, named};
use crate::{machine, progress};

/// Measures what each optimisation brings and costs.
#[derive(Args)]
pub(crate) struct OptimisationArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Random weights of a released shape instead of a model: 0.4B, 1.5B, 2.9B, 7.2B. Written to the folder of the report,
    /// and deleted again. Of its speed alone.
    #[arg(long, conflicts_with_all = ["model", "tokenizer"])]
    shape: Option<String>,
    /// What it runs on: auto, cpu, gpu or gpu:NAME.
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Only rows of these names, or that begin with them up to a hyphen; all by default.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Sequences of the large batch; by default 8 on the CPU and 128 on a GPU.
    #[arg(long)]
    batch: Option<usize>,
    /// Tokens of a prompt.
    #[arg(long, default_value_t = 512)]
    length: usize,
    /// Tokens of the two windows that quality is measured in.
    #[arg(long, value_delimiter = ',', default_value = "1024,8192")]
    windows: Vec<usize>,
    /// Measure quality on so much of the text.
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    bytes: usize,
    /// Fewer rounds and little text, to see that all works.
    #[arg(long)]
    quick: bool,
    /// Another engine to measure beside, in its own process: web-rwkv, whose program is `web-rwkv-bench` on the path, or
    /// that program.
    #[arg(long, value_name = "PEER")]
    peer: Option<String>,
    /// An earlier report: tells which rows moved beyond noise.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Show this report, and compare it, rather than measure.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Where report.html and report.json go.
    #[arg(long, value_name = "FOLDER", default_value = "target/bench")]
    out: PathBuf,
    /// Print the tables as markdown.
    #[arg(long)]
    markdown: bool,
}

/// Bytes of text and tokens of windows of a quick run.
const QUICK: (usize, [usize; 2]) = (4096, [256, 1024]);

/// Sequences of the large batch, on the CPU and on a GPU.
const BATCH: [usize; 2] = [8, 128];

/// Bytes at the beginning of the text that layers are ranked on, and of its end that shares of them are measured on.
const RANKED: usize = 4096;

/// Bytes at the beginning of the text that rows are priced on of which single tokens alone tell, and of a quick run.
const TOKEN_BY_TOKEN: [usize; 2] = [1024, 64];

/// Sequences side by side where quality is measured.
const SESSIONS: usize = 16;

#[expect(clippy::print_stdout, reason = "the report")]
pub(crate) fn run(args: &OptimisationArgs) -> anyhow::Result<()> {
    // What cannot be is told before anything takes time.
    let old: Option<Report> = args.compare.as_deref().map(read).transpose()?;
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let report = match (&args.report, &args.shape) {
        (Some(path), _) => read(path)?,
        (None, None) => measure(args, &args.model)?,
        (None, Some(name)) => {
            let of = |path: &Path| measure(args, &args.model.on(path.to_owned()));
            random_model::with(shape_of(name)?, &args.out, of)?
        }
    };
    for line in report.heading() {
        println!("{line}");
    }
    for (caption, table) in report.tables() {
        println!("\n{caption}\n\n{}", table.text(args.markdown));
    }
    write(&args.out.join("report.json"), &serde_json::to_vec_pretty(&report)?)?;
    write(&args.out.join("report.html"), html::page(&report)?.as_bytes())?;
    for (name, plot) in html::plots(&report)? {
        write(&args.out.join(format!("{name}.svg")), plot.as_bytes())?;
    }
    println!("report {}", args.out.join("report.html").display());
    if let Some(old) = &old {
        for line in compared(old, &report) {
            println!("{line}");
        }
    }
    Ok(())
}

/// What is to be said of a run beside an earlier one.
fn compared(old: &Report, new: &Report) -> Vec<String> {
    let all = moved(old, new);
    let alike = (&old.model, &old.device, &old.machine) == (&new.model, &new.device, &new.machine);
    let mut lines = Vec::new();
    if !alike {
        lines.push(format!("the earlier report is of {}, on {}, {}", old.model, old.device, old.machine));
    }
    if all.is_empty() {
        lines.push(format!("nothing moved beyond noise since commit {}, {}", old.commit, old.date));
    }
    lines.extend(all.iter().map(|of| {
        let percent = 100.0 * (of.ratio - 1.0);
        let (what, noise) = (of.row.as_deref(), 100.0 * of.noise);
        let what = what.map_or_else(|| "the plain engine".to_owned(), |row| format!("the gain of {row}"));
        format!("moved: {what}, {}: {percent:+.1} %, noise up to {noise:+.1} %", of.case)
    }));
    lines
}

fn read(path: &Path) -> anyhow::Result<Report> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&bytes).with_context(|| format!("{}: no report", path.display()))
}

/// Writes a file as a whole or not at all.
fn write(path: &Path, contents: &[u8]) -> anyhow::Result<()> {
    let partial = path.with_extension("partial");
    let written = std::fs::write(&partial, contents).and_then(|()| std::fs::rename(&partial, path));
    written.with_context(|| path.display().to_string())
}

/// All that a run shares.
struct Bench<'a> {
    args: &'a OptimisationArgs,
    model: &'a ModelArgs,
    checkpoint: Checkpoint,
    options: EngineOptions,
    text: Vec<u8>,
    windows: Vec<usize>,
    effort: Effort,
    /// As by default.
    plain: Engine,
    gpu: bool,
    controls: Controls,
    reference: Reference,
    /// Of the plain engine, by window: the scores of each.
    scores: Vec<Vec<Score>>,
    /// What layers cost, once it is known.
    costs: Vec<LayerCost>,
    bar: ProgressBar,
}

fn measure(args: &OptimisationArgs, model: &ModelArgs) -> anyhow::Result<Report> {
    let (checkpoint, mut text) = (model.checkpoint()?, model.text()?);
    let (bytes, mut windows) = match args.quick {
        true => (QUICK.0.min(args.bytes), QUICK.1.to_vec()),
        false => (args.bytes, args.windows.clone()),
    };
    text.truncate(bytes);
    let options = EngineOptions {
        device: args.device.clone(),
        // As prompts are by default, and so many sequences as there are.
        pass_tokens: EngineOptions::default().pass_tokens.max(args.batch.unwrap_or(0)),
        sessions: args.batch.unwrap_or(SESSIONS),
        ..model.options()?
    };
    let plain = Engine::new(&checkpoint, options.clone(), &|_| {})?;
    let found = plain.report()?;
    let gpu = !found.kernels.is_empty();
    if let Some(peer) = &args.peer {
        ensure!(gpu, "--peer {peer}: it runs on GPUs, and this run is on the CPU");
    }
    let adapter = if let Device::Gpu(adapter) = &args.device { adapter.clone() } else { None };
    let controls =
        if gpu { Controls::gpu(adapter)? } else { Controls::cpu(2 * plain.config().streamed_params())? };
    let (mut rows, mut left_out) = chosen(&args.rows, gpu)?;
    if let Err(why) = plain.tokenizer() {
        windows.clear();
        left_out.push(("quality".to_owned(), why.to_string()));
        let ranks = |row: &Row| row.needs_costs().then(|| (row.name.to_owned(), why.to_string()));
        left_out.extend(rows.iter().filter_map(ranks));
        rows.retain(|row| !row.needs_costs());
    }
    let bar = progress::bar("{bar:40} {pos}/{len} {msg} ({elapsed})", rows.len() as u64 + 3);
    bar.set_message("the reference");
    let mut bench = Bench {
        reference: Reference::new(&checkpoint, &options, None, rounds_to_halves(&plain)?)?,
        args,
        model,
        checkpoint,
        options,
        text,
        windows,
        effort: if args.quick { Effort::QUICK } else { Effort::FULL },
        plain,
        gpu,
        controls,
        scores: Vec::new(),
        costs: Vec::new(),
        bar,
    };
    let mut report = Report {
        machine: machine::describe(),
        device: found.device,
        model: model.name(),
        commit: option_env!("RWKV_COMMIT").unwrap_or("unknown").to_owned(),
        date: today(),
        command: std::env::args().skip(1).fold("rwkv-bench".to_owned(), |line, word| line + " " + &word),
        text_bytes: bench.text.len(),
        left_out,
        ..Report::default()
    };
    bench.all(&rows, &mut report)?;
    bench.bar.finish_and_clear();
    Ok(report)
}

/// Rows by name, and why they are not measured.
type LeftOut = Vec<(String, String)>;

/// The rows that are asked for and can be measured, and the others with the reason.
fn chosen(names: &[String], gpu: bool) -> anyhow::Result<(Vec<Row>, LeftOut)> {
    let unknown = |name: &&String| !rows::all().iter().any(|row| named(row.name, slice::from_ref(name)));
    if let Some(name) = names.iter().find(unknown) {
        let all: Vec<&str> = rows::all().iter().map(|row| row.name).collect();
        bail!("no row {name}; there are {}", all.join(", "));
    }
    let (mut rows, mut left_out) = (Vec::new(), LeftOut::new());
    for row in rows::all() {
        if !names.is_empty() && !named(row.name, names) {
            continue;
        }
        match row.on {
            On::Cpu(why) if gpu => left_out.push((row.name.to_owned(), why.to_owned())),
            On::Gpu(why) if !gpu => left_out.push((row.name.to_owned(), why.to_owned())),
            _ => rows.push(row),
        }
    }
    Ok((rows, left_out))
}

/// The day, in UTC, as the calendar has it: Howard Hinnant's `civil_from_days`.
fn today() -> String {
    let seconds = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    date(seconds / 86_400)
}

/// The date so many days after 1970-01-01.
fn date(days: u64) -> String {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

impl Bench<'_> {
    fn say(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    fn all(&mut self, rows: &[Row], report: &mut Report) -> anyhow::Result<()> {
        self.say("the plain engine");
        let plain = self.plain_side();
        self.reference.check(&plain, 0.0).context("the plain engine")?;
        for &window in &self.windows {
            self.scores.push(side_by_side(&self.plain, &self.text, window, None)?);
        }
        self.bar.inc(1);
        if rows.iter().any(Row::needs_costs) {
            self.say("what each layer costs");
            self.costs = self.contributions(SkipPart::Layer)?;
            report.shares = self.shares()?;
        }
        self.bar.inc(1);
        for row in rows {
            self.say(row.name);
            report.rows.push(self.row(row).with_context(|| row.name.to_owned())?);
            self.bar.inc(1);
        }
        if rows.iter().any(|row| row.name.starts_with("chunked")) {
            self.say("forms of the state update");
            report.forms = self.forms()?;
            if let Some(said) = bound(&report.forms) {
                let chunked = report.rows.iter_mut().filter(|row| row.name.starts_with("chunked"));
                chunked.for_each(|row| row.said = format!("{} {said}", row.said));
            }
        }
        let figure = |control: &mut ceiling::Control| {
            let rates = (0..self.effort.rounds).map(|_| control.rate());
            anyhow::Ok(Figure::new(rates.collect::<Result<_, _>>()?))
        };
        report.copy = figure(&mut self.controls.copy)?;
        report.matmul = figure(&mut self.controls.matmul)?;
        if let Some(name) = &self.args.peer {
            self.say(name);
            report.peer = self.peer(name)?;
        }
        Ok(())
    }

    fn plain_side(&self) -> Side {
        Side { engine: self.plain.clone(), rest: StateFormat::F32 }
    }

    /// A way to run the engine, and what it leaves out.
    fn side(&self, way: Way) -> anyhow::Result<Side> {
        let mut rest = StateFormat::F32;
        let engine = match way {
            Way::Plain => self.plain.clone(),
            Way::Options(_) => Engine::new(&self.checkpoint, self.options_of(way), &|_| {})?,
            Way::Skip(skip) => self.plain.skipping(Some(skip(&self.costs)))?,
            Way::Rest(of) => {
                rest = of.format;
                self.plain.clone()
            }
        };
        Ok(Side { engine, rest })
    }

    /// What an engine is opened with that runs so.
    fn options_of(&self, way: Way) -> EngineOptions {
        let mut options = self.options.clone();
        if let Way::Options(change) = way {
            change(&mut options);
        }
        options
    }

    /// Measures a row.
    fn row(&mut self, row: &Row) -> anyhow::Result<report::Row> {
        let (without, with) = (self.side(row.without)?, self.side(row.with)?);
        let (options, skips) = (self.options_of(row.with), with.engine.skips());
        let own;
        let reference = if skips.is_some() || options.weights != self.options.weights {
            own = Reference::new(&self.checkpoint, &options, skips, rounds_to_halves(&with.engine)?)?;
            &own
        } else {
            &self.reference
        };
        self.reference.check(&without, 0.0).context("without it")?;
        let error = reference.check(&with, row.limit).context("with it")?.sqrt();

        let batch = self.args.batch.unwrap_or(BATCH[usize::from(self.gpu)]);
        let loads = match row.at_rest() {
            true => vec![Load::Rest],
            false => vec![Load::Decode(1), Load::Decode(batch), Load::Prefill(self.args.length)],
        };
        let mut cases = Vec::new();
        for load in loads {
            let work = [&without, &with].map(|side| work(load, side));
            let control = match load {
                Load::Prefill(_) => &mut self.controls.matmul,
                _ => &mut self.controls.copy,
            };
            cases.push(case(load, [&without, &with], control, work, self.effort)?);
        }

        let mut quality = Vec::new();
        for (at, &window) in self.windows.iter().enumerate() {
            let score = |way, engine: &Engine| match way {
                _ if row.is_of_single_tokens() => {
                    let bytes = TOKEN_BY_TOKEN[usize::from(self.args.quick)].min(self.text.len());
                    token_by_token(engine, &self.text[..bytes], window)
                }
                Way::Plain => Ok(self.scores[at].clone()),
                Way::Rest(rest) => side_by_side(engine, &self.text, window, Some(rest)),
                Way::Options(_) | Way::Skip(_) => side_by_side(engine, &self.text, window, None),
            };
            let before = match row.without {
                // At rest in single precision a state is what it was.
                Way::Rest(of) if of.format == StateFormat::F32 => self.scores[at].clone(),
                way => score(way, &without.engine)?,
            };
            let after = score(row.with, &with.engine)?;
            let nats = |of: &[Score]| of.iter().map(|of| of.nats).collect::<Vec<_>>();
            let (change, change_error) = changes(&nats(&after), &nats(&before));
            let [without, with] = [before, after].map(|of| of.into_iter().sum::<Score>().bits_per_byte());
            quality.push(Quality { window, without, with, change, change_error });
        }
        let [promised_speed, promised_quality] = row.promised.map(str::to_owned);
        Ok(report::Row {
            name: row.name.to_owned(),
            title: row.title.to_owned(),
            promised_speed,
            promised_quality,
            error,
            plain: [row.without, row.with].map(|way| matches!(way, Way::Plain)),
            weights: [&without, &with].map(|side| side.engine.weight_bytes()),
            state: [self.state_bytes(row.without, &without)?, self.state_bytes(row.with, &with)?],
            pending: [&without, &with]
                .map(|side| held_bytes(side.engine.config(), side.engine.resident(), None).1 as u64),
            cases,
            quality,
            said: row.said.to_owned(),
        })
    }

    /// Bytes of a sequence's state: as it is written while it runs; or of one that rests, after the beginning of the text or,
    /// where there is no tokenizer, of any tokens.
    fn state_bytes(&self, way: Way, side: &Side) -> anyhow::Result<u64> {
        let engine = &side.engine;
        let Way::Rest(quality::Rest { format, every }) = way else {
            return Ok(held_bytes(engine.config(), engine.resident(), None).0 as u64);
        };
        let text = &self.text[..every.min(self.text.len())];
        let any = || (0..every).map(|index| measure::token(engine, index)).collect();
        let tokens = engine.tokenizer().map_or_else(|_| any(), |tokenizer| tokenizer.encode(text));
        let mut session = engine.session();
        session.prefill(&tokens)?;
        let encoded = EncodedState::encode(&engine.state_layout(), &session.state()?, format)?;
        Ok(encoded.as_bytes().len() as u64)
    }

    fn ranked(&self) -> (&[u8], &[u8], SideBySide) {
        let each = RANKED.min(self.text.len() / 2);
        let windows = SideBySide { window: 1024.min(each.max(2) / 2), sessions: SESSIONS, rest: None };
        (&self.text[..each], &self.text[self.text.len() - each..], windows)
    }

    fn contributions(&self, part: SkipPart) -> anyhow::Result<Vec<LayerCost>> {
        let (text, _, windows) = self.ranked();
        Ok(skip::contributions(&self.plain, text, part, windows, |_| {})?)
    }

    /// Bits per byte with more and more layers left out, whole or their channel mixes.
    fn shares(&self) -> anyhow::Result<Vec<Share>> {
        let (_, text, windows) = self.ranked();
        let layers = self.plain.config().n_layers;
        let mut shares = Vec::new();
        for (name, part, costs) in [
            ("layer", SkipPart::Layer, self.costs.clone()),
            ("ffn", SkipPart::ChannelMix, self.contributions(SkipPart::ChannelMix)?),
        ] {
            // About a dozen points, whatever the depth.
            for out in (0..=costs.len()).step_by(costs.len().div_ceil(12).max(1)) {
                let policy = Contribution { costs: costs.clone(), share: out as f64 / layers as f64 };
                let skipping = Skipping { part, prefill: true, ..Skipping::new(policy) };
                let engine = self.plain.skipping(Some(skipping))?;
                let score: Score = quality::side_by_side(&engine, text, windows, |_| {})?.into_iter().sum();
                let share = out as f64 / layers as f64;
                shares.push(Share {
                    part: name.to_owned(),
                    layers: out,
                    share,
                    bits_per_byte: score.bits_per_byte(),
                });
            }
        }
        Ok(shares)
    }

    /// Prompts by the form of the state update and their length; on the CPU, the state update alone too.
    fn forms(&mut self) -> anyhow::Result<Vec<Form>> {
        let forms = [Wkv::Sequential, Wkv::Chunked(16), Wkv::Chunked(32), Wkv::Chunked(64)];
        let named = |form: Wkv| match form {
            Wkv::Sequential => "sequential".to_owned(),
            Wkv::Chunked(chunk) => format!("chunks of {chunk}"),
        };
        let lengths: &[usize] = if self.args.quick { &[16, 64] } else { &[16, 64, 256, 1024] };
        let mut all = Vec::new();
        let side = |form| {
            let options = EngineOptions { wkv: Some(form), ..self.options.clone() };
            let engine = Engine::new(&self.checkpoint, options, &|_| {})?;
            anyhow::Ok(Side { engine, rest: StateFormat::F32 })
        };
        // A device has room for a few engines, perhaps not for one of every form.
        let sequential = side(Wkv::Sequential)?;
        for form in forms {
            let side = if form == Wkv::Sequential { None } else { Some(side(form)?) };
            let side = side.as_ref().unwrap_or(&sequential);
            for &tokens in lengths {
                let load = Load::Prefill(tokens);
                let work = [work(load, side); 2];
                let of = case(load, [&sequential, side], &mut self.controls.matmul, work, self.effort)?;
                all.push(Form { form: named(form), of: "prompt".to_owned(), tokens, rate: of.with });
            }
        }
        if !self.gpu {
            for (batch, of) in [(1, "state update"), (BATCH[0], "state update of 8")] {
                for &tokens in lengths {
                    let rates = state_updates(self.plain.config(), [batch, tokens], &forms, self.effort);
                    all.extend(forms.into_iter().zip(rates).map(|(form, rate)| Form {
                        form: named(form),
                        of: of.to_owned(),
                        tokens,
                        rate,
                    }));
                }
            }
        }
        Ok(all)
    }

    /// The peer's figures, in a process of its own on the same model, beside ours.
    fn peer(&mut self, name: &str) -> anyhow::Result<Vec<PeerCase>> {
        let program = if name == "web-rwkv" { "web-rwkv-bench" } else { name };
        let own = self.args.out.join("model.safetensors");
        let model = match self.model.path() {
            Some(path) => path,
            None => {
                std::fs::write(&own, assets::MODEL)?;
                &own
            }
        };
        let converted = self.args.out.join("model.st");
        told(Command::new(program).arg("convert").args([model, &converted]))?;
        let batch = self.args.batch.unwrap_or(BATCH[1]);
        let [tokens, windows] = if self.args.quick { ["8", "3"] } else { ["64", "5"] };
        let mut command = Command::new(program);
        command.arg(&converted).args(["--json", "--decode", tokens, "--windows", windows]);
        command.args(["--batch", "1", &batch.to_string(), "--prefill", &self.args.length.to_string()]);
        if self.model.path().is_none() {
            // Activations of books-10m are beyond halves.
            command.args(["--precision", "f32"]);
        }
        if let Device::Gpu(Some(adapter)) = &self.args.device {
            command.args(["--adapter", adapter]);
        }
        let said = told(&mut command)?;
        for file in [&own, &converted] {
            let _ = std::fs::remove_file(file); // the one may not be there, the other only takes room
        }
        let side = self.plain_side();
        let mut all = Vec::new();
        for (engine, load, peer) in loads(&said).with_context(|| program.to_owned())? {
            let own = case(load, [&side, &side], &mut self.controls.copy, [0.0; 2], self.effort)?;
            all.push(PeerCase { engine, case: load.name(), peer, ours: own.with.median });
        }
        Ok(all)
    }
}

/// What a program says, once it is done.
fn told(command: &mut Command) -> anyhow::Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{program}: rwkv-bench/web-rwkv/README.md says how to build it"))?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{program}: {}: {}", done.status, said.trim());
    String::from_utf8(done.stdout).with_context(|| program)
}

/// The cases that the peer's program says it timed: what ran it, in what precision; the load; and tokens a second.
fn loads(said: &str) -> anyhow::Result<Vec<(String, Load, f64)>> {
    /// One of a load, of which alone there is a rate.
    #[derive(Deserialize)]
    struct Line {
        engine: String,
        case: String,
        precision: Option<String>,
        batch: Option<usize>,
        tokens: Option<usize>,
        tokens_per_second: Option<f64>,
    }
    let mut all = Vec::new();
    for line in said.lines() {
        let Line { engine, case, precision, batch, tokens, tokens_per_second } =
            serde_json::from_str(line).with_context(|| line.to_owned())?;
        let load = match (case.as_str(), batch, tokens) {
            ("decode", Some(batch), _) => Load::Decode(batch),
            ("prefill", _, Some(tokens)) => Load::Prefill(tokens),
            ("load", ..) => continue,
            _ => bail!("{line}: neither decode nor prefill"),
        };
        let rate =
            tokens_per_second.filter(|rate| *rate > 0.0).with_context(|| format!("{line}: no rate"))?;
        all.push((precision.into_iter().fold(engine, |engine, of| format!("{engine}, {of}")), load, rate));
    }
    ensure!(!all.is_empty(), "it timed nothing");
    Ok(all)
}

/// Scores a text in windows, side by side, as prompts.
fn side_by_side(
    engine: &Engine,
    text: &[u8],
    window: usize,
    rest: Option<quality::Rest>,
) -> anyhow::Result<Vec<Score>> {
    let options = SideBySide { window, sessions: SESSIONS, rest };
    let scores = quality::side_by_side(engine, text, options, |_| {})?;
    ensure!(!scores.is_empty(), "a text of less than two tokens predicts nothing");
    Ok(scores)
}

/// Scores a text in windows, one after the other, a token a call.
fn token_by_token(engine: &Engine, text: &[u8], window: usize) -> anyhow::Result<Vec<Score>> {
    let tokenizer = engine.tokenizer()?;
    let tokens = tokenizer.encode(text);
    let starts = (0..tokens.len().saturating_sub(1)).step_by(window.max(1));
    let scores = starts.map(|start| {
        let own = &tokens[start..tokens.len().min(start.saturating_add(window.max(1)).saturating_add(1))];
        let (mut session, mut score) = (engine.session(), Score::default());
        for &token in own {
            let found = session.score(&[token])?;
            score.nats -= found.iter().sum::<f64>();
            score.tokens += found.len();
        }
        score.bytes = tokenizer.decode(&own[1..])?.len();
        anyhow::Ok(score)
    });
    let scores = scores.collect::<anyhow::Result<Vec<_>>>()?;
    ensure!(!scores.is_empty(), "a text of less than two tokens predicts nothing");
    Ok(scores)
}

/// How much faster prompts could be at most, if the state update took no time, of the longest that were timed both ways.
fn bound(forms: &[Form]) -> Option<String> {
    let of = |part: &str| {
        let alone = forms.iter().filter(|of| of.of == part && of.form == "sequential");
        alone.max_by_key(|of| of.tokens).map(|of| of.rate.median)
    };
    let share = of("prompt")? / of("state update")?;
    let (percent, most) = (100.0 * share, 100.0 * share / (1.0 - share));
    Some(format!(
        "Token by token the update takes {percent:.0} % of a prompt's time: no form could gain more than {most:.0} %."
    ))
}

/// What a run under a load reads and writes at most, in bytes, or computes, in operations.
fn work(load: Load, side: &Side) -> f64 {
    let config = side.engine.config();
    // Any token but the first ones.
    let skips = side.engine.skips().map(|of| (of.layers(config.n_layers, 1 << 20), of.part));
    let ModelConfig { width, hidden, n_layers, vocab, ranks, .. } = *config;
    let mut params = config.streamed_params();
    if let Some((layers, part)) = skips {
        let out = layers.iter().filter(|out| **out).count();
        let low = 2 * width * (ranks.w + ranks.a + ranks.v + ranks.g);
        params -= out
            * match part {
                SkipPart::ChannelMix => 2 * width * hidden,
                SkipPart::Layer => 2 * width * hidden + 4 * width * width + low,
            };
    }
    match load {
        Load::Decode(n) => {
            let states = n * n_layers * state_bytes(config, side.engine.resident());
            // What is left out has its share of the matrices, in whatever they are.
            let share = params as f64 / config.streamed_params() as f64;
            side.engine.weight_bytes() as f64 * share + states as f64
        }
        Load::Prefill(n) => 2.0 * ((params - vocab * width) * n + vocab * width) as f64,
        Load::Rest => 0.0,
    }
}

/// What a token reads and writes of a layer's state, on average.
fn state_bytes(config: &ModelConfig, resident: Resident) -> usize {
    let element = match resident.format {
        StateFormat::F32 => 4,
        StateFormat::F16 => 2,
        _ => 1,
    };
    let base = element * config.wkv_len();
    match resident.capacity {
        0 => 2 * base,
        // Read at each, written at one; the entries of those before.
        capacity => base + base / capacity + ENTRY * 4 * config.width * capacity.div_ceil(2),
    }
}

/// Tokens a second of the CPU's state update alone, in the heads of all layers, of so many sequences of so many tokens, by
/// form.
fn state_updates(
    config: &ModelConfig,
    [batch, tokens]: [usize; 2],
    forms: &[Wkv],
    effort: Effort,
) -> Vec<Figure> {
    let dims = Dims { tokens, heads: config.n_heads, head_size: config.head_size };
    let mut rng = SplitMix64::new(7);
    let mut draw = |low: f32, high: f32| -> Vec<f32> {
        (0..dims.vector_len()).map(|_| rng.uniform(low, high)).collect()
    };
    let scale = (config.head_size as f32).sqrt().recip();
    let (r, k, v) = (draw(-1.0, 1.0), draw(-scale, scale), draw(-1.0, 1.0));
    let (lw, a, b) = (draw(-0.6, 0.0), draw(-scale, scale), draw(-scale, scale));
    let inputs = Inputs { r: &r, lw: &lw, k: &k, v: &v, a: &a, b: &b };
    let (mut states, mut y) = (vec![0.0; batch * dims.state_len()], vec![0.0; batch * dims.vector_len()]);
    let mut update = |form: Wkv| {
        let each = states.chunks_exact_mut(dims.state_len()).zip(y.chunks_exact_mut(dims.vector_len()));
        let mut segments: Vec<_> = each.map(|(state, y)| WkvSegment { dims, inputs, state, y }).collect();
        let begun = Instant::now();
        Packed::wkv7(form, &mut segments);
        begun.elapsed().as_secs_f64()
    };
    let mut rates = vec![Vec::new(); forms.len()];
    for round in 0..=effort.rounds {
        for (&form, rates) in forms.iter().zip(&mut rates) {
            let seconds = update(form);
            if round > 0 {
                rates.push((batch * tokens) as f64 / seconds / config.n_layers as f64);
            }
        }
    }
    rates.into_iter().map(Figure::new).collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use std::process::Command;

    use super::{
        Engine, EngineOptions, Figure, Form, Load, OptimisationArgs, bound, chosen, compared, date, html,
        loads, measure, read, side_by_side, token_by_token, told, write,
    };

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        args: OptimisationArgs,
    }

    fn measured(args: &OptimisationArgs) -> anyhow::Result<super::Report> {
        measure(args, &args.model)
    }

    fn quick(more: &[&str]) -> OptimisationArgs {
        let args = ["bench", "--quick", "--bytes", "1200", "--batch", "2", "--length", "32"];
        Program::parse_from(args.iter().chain(more)).args
    }

    #[test]
    fn days() {
        for (days, text) in
            [(0, "1970-01-01"), (59, "1970-03-01"), (11_016, "2000-02-29"), (20_784, "2026-11-27")]
        {
            assert_eq!(date(days), text, "{days}");
        }
    }

    #[test]
    fn rows_are_named() {
        let names = |of: &[&str], gpu| {
            let names: Vec<String> = of.iter().map(|&of| of.to_owned()).collect();
            let (rows, left_out) = chosen(&names, gpu).unwrap();
            (rows.iter().map(|row| row.name).collect::<Vec<_>>(), left_out.len())
        };
        assert_eq!(names(&["lazy", "skip"], false).0.len(), 5, "one, and all that skip");
        assert_eq!(names(&["fused"], false), (vec![], 1), "not on the CPU");
        assert_eq!(names(&["fused"], true), (vec!["fused"], 0), "on a GPU");
        let error = chosen(&["slow".to_owned()], true).map(|_| ()).unwrap_err().to_string();
        assert!(error.starts_with("no row slow; there are fused,"), "{error}");
    }

    #[test]
    fn no_form_gains_more_than_all_the_time_there_is() {
        let form = |of: &str, tokens, rate| Form {
            form: "sequential".to_owned(),
            of: of.to_owned(),
            tokens,
            rate: Figure::new(vec![rate]),
        };
        let forms = [form("prompt", 16, 1.0), form("prompt", 64, 2.0), form("state update", 64, 10.0)];
        let said = bound(&forms).unwrap();
        assert!(said.contains("20 % of a prompt's time") && said.ends_with("more than 25 %."), "{said}");
        assert_eq!(bound(&forms[..2]), None, "only where both were timed");
    }

    /// Rows of every kind are checked, timed and priced, and the report says so: as a file, as a page, and beside itself.
    #[test]
    fn a_report() {
        let rows = "lazy,skip-middle,skip-least,chunked-16,sparse-rest,ffn-sparsity,int8-weights";
        let report = measured(&quick(&["--device", "cpu", "--rows", rows])).unwrap();
        assert_eq!(report.rows.len(), 7, "rows");
        for row in &report.rows {
            assert!(row.error.is_finite() && row.error < 0.01, "{row:?}");
            let loads = if row.name == "sparse-rest" { 1 } else { 3 };
            assert_eq!((row.cases.len(), row.quality.len()), (loads, 2), "{}", row.name);
            for case in &row.cases {
                for figure in [case.without, case.with, case.ratio, case.ceiling] {
                    assert!(
                        figure.median.is_finite() && figure.median > 0.0 && figure.count == 5,
                        "{case:?}"
                    );
                }
            }
        }
        let change = |name: &str| report.rows.iter().find(|row| row.name == name).unwrap().quality[0].change;
        assert!(
            change("skip-middle") > 10.0 && change("lazy").abs() < 1e-3,
            "skipping costs, being lazy does not"
        );
        assert!(change("ffn-sparsity").abs() < 1e-3, "but for rounding");
        let memory = |name: &str| {
            let row = report.rows.iter().find(|row| row.name == name).unwrap();
            let [weights, state] =
                [row.weights, row.state].map(|[without, with]| with as f64 / without as f64);
            (weights, state, row.pending[1])
        };
        // Blocks of 8.5 bits for halves, but for adapters and the head.
        let (weights, state, pending) = memory("int8-weights");
        assert!((0.53..0.7).contains(&weights) && (state, pending) == (1.0, 0), "{weights} of the weights");
        let (weights, state, pending) = memory("lazy");
        assert!((weights, state) == (1.0, 1.0) && pending > 0, "{pending} bytes of pending tokens");
        let (_, at_rest, _) = memory("sparse-rest");
        assert!((0.1..0.9).contains(&at_rest), "{at_rest} of a state at rest");
        assert!(report.shares.len() > 10 && report.forms.len() == 24, "plots");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("report.json");
        write(&path, &serde_json::to_vec(&report).unwrap()).unwrap();
        let again = read(&path).unwrap();
        let [line] = &compared(&again, &report)[..] else { panic!("one line") };
        assert!(line.starts_with("nothing moved"), "{line}");
        let page = html::page(&report).unwrap();
        assert_eq!(page.matches("<svg").count(), 3, "plots");
        assert!(page.contains("<td>skip-middle</td>") && !page.contains("src="), "one file");
    }

    /// A text costs the same token by token as all at once, but for rounding.
    #[test]
    fn token_by_token_is_the_same() {
        let args = quick(&["--device", "cpu"]);
        let options = EngineOptions { device: args.device.clone(), ..EngineOptions::default() };
        let engine = Engine::new(&args.model.checkpoint().unwrap(), options, &|_| {}).unwrap();
        let text = &args.model.text().unwrap()[..100];
        for window in [1, 33, 200] {
            let [one, all] =
                [token_by_token(&engine, text, window), side_by_side(&engine, text, window, None)]
                    .map(Result::unwrap);
            assert_eq!(one.len(), all.len(), "windows of {window}");
            for (one, all) in one.iter().zip(&all) {
                assert_eq!((one.tokens, one.bytes), (all.tokens, all.bytes), "windows of {window}");
                assert!((one.nats - all.nats).abs() < 1e-4 * all.nats, "{one:?} for {all:?}");
            }
        }
        assert!(token_by_token(&engine, b"a", 4).is_err(), "nothing is predicted");
    }

    #[test]
    fn what_a_peer_says() {
        let said = r#"{"engine":"peer 1","adapter":"A","case":"load","seconds":0.1}
{"engine":"peer 1","adapter":"A","precision":"f32","case":"decode","batch":8,"tokens":64,"tokens_per_second":12.5}
{"engine":"peer 1","adapter":"A","case":"prefill","batch":1,"tokens":512,"tokens_per_second":2.5}"#;
        let want = [
            ("peer 1, f32".to_owned(), Load::Decode(8), 12.5),
            ("peer 1".to_owned(), Load::Prefill(512), 2.5),
        ];
        assert_eq!(loads(said).unwrap(), want, "cases");
        for bad in [
            "",
            "no JSON",
            r#"{"engine":"peer 1","case":"load","seconds":0.1}"#,
            r#"{"engine":"peer 1","case":"decode","tokens":64,"tokens_per_second":12.5}"#,
            r#"{"engine":"peer 1","case":"prefill","tokens":64,"tokens_per_second":null}"#,
            r#"{"engine":"peer 1","case":"sleep","tokens":64,"tokens_per_second":12.5}"#,
        ] {
            assert!(loads(bad).is_err(), "{bad}");
        }
        let error = told(&mut Command::new("no-such-peer")).unwrap_err().to_string();
        assert!(error.contains("no-such-peer") && error.contains("README.md says how"), "{error}");
    }

    #[test]
    fn a_peer_needs_a_gpu() {
        let error = measured(&quick(&["--device", "cpu", "--peer", "web-rwkv"])).unwrap_err().to_string();
        assert!(error.contains("runs on GPUs") && error.contains("on the CPU"), "{error}");
    }
}
