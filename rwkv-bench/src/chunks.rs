//! Where chunks in the state update are faster than one token after another: prompts by their length and number.
//!
//! Every form's logits are first compared with those of one token after another, then each case is run until the device is
//! warm, and timed. Sequences go side by side, as many tokens of each in a pass as it has room for. On a GPU with timestamps
//! the state update is timed by itself too.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::*;
use rwkv_core::compare::nmse;
use rwkv_model::engine::Device;
use rwkv_model::{Checkpoint, Engine, EngineOptions, Session, Wkv};

use crate::gpu::{limit, token_of, windows};
use crate::picture::{COLOURS, FONT, fail, place};
use crate::random_model::{self, shape_of};
use crate::table::Table;

/// Measures forms of the state update over prompts.
#[derive(Args)]
pub(crate) struct ChunksArgs {
    /// Random weights of this shape, by name.
    #[arg(long, default_value = "0.4B")]
    shape: String,
    /// The checkpoint instead.
    #[arg(long, conflicts_with = "shape")]
    model: Option<PathBuf>,
    /// Where the random model is written, and deleted again.
    #[arg(long, default_value = "target/bench")]
    scratch: PathBuf,
    /// What it runs on: auto, cpu, gpu, or gpu:NAME.
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Sequences side by side.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    batch: Vec<usize>,
    /// Tokens of each.
    #[arg(long, value_delimiter = ',', default_value = "64,128,256,512,1024,2048,4096")]
    length: Vec<usize>,
    /// Tokens of a pass, of all sequences together.
    #[arg(long, default_value_t = 8192)]
    pass_tokens: usize,
    /// How often each is timed.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Print the tables as markdown.
    #[arg(long)]
    markdown: bool,
    /// Where the picture goes.
    #[arg(long, value_name = "FILE", default_value = "target/chunks.svg")]
    plot: PathBuf,
}

/// The forms, the one to compare with first, and what the engine does by itself last.
const FORMS: [Option<Wkv>; 5] =
    [Some(Wkv::Sequential), Some(Wkv::Chunked(16)), Some(Wkv::Chunked(32)), Some(Wkv::Chunked(64)), None];

fn name(form: Option<Wkv>) -> String {
    match form {
        Some(Wkv::Sequential) => "token by token".to_owned(),
        Some(Wkv::Chunked(chunk)) => format!("chunks of {chunk}"),
        None => "by default".to_owned(),
    }
}

/// How long something takes.
#[derive(Clone, Copy)]
struct Time {
    /// Microseconds of a prompt's token.
    token: f64,
    /// Of the state update over it in a layer, if it could be timed.
    update: Option<f64>,
}

pub(crate) fn report(args: &ChunksArgs) -> anyhow::Result<()> {
    match &args.model {
        Some(path) => measure_all(args, path),
        None => random_model::with(shape_of(&args.shape)?, &args.scratch, |path| measure_all(args, path)),
    }
}

#[expect(clippy::print_stdout, reason = "the report")]
fn measure_all(args: &ChunksArgs, path: &Path) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(path)?;
    let cases = || args.batch.iter().flat_map(|&batch| args.length.iter().map(move |&n| [batch, n]));
    let (mut reference, mut all, mut title) = (Vec::new(), Vec::new(), String::new());
    for form in FORMS {
        let options = EngineOptions {
            device: args.device.clone(),
            wkv: form,
            pass_tokens: args.pass_tokens,
            sessions: args.batch.iter().copied().max().unwrap_or(1),
            timestamps: true,
            ..EngineOptions::default()
        };
        let engine = Engine::new(&checkpoint, options, &|_| {}).with_context(|| name(form))?;
        if all.is_empty() {
            let model =
                args.model.as_ref().map_or_else(|| args.shape.clone(), |path| path.display().to_string());
            title = format!("{model} on {}", engine.report()?.device);
            println!("{title}");
        }
        let logits = verify(&engine, args.pass_tokens)?;
        if reference.is_empty() {
            reference = logits.iter().copied().map(f64::from).collect();
        }
        let error = nmse(&logits, &reference, limit(&engine)?).with_context(|| name(form))?;
        println!("{}: logits {:.1e} from those token by token", name(form), error.sqrt());
        all.push(cases().map(|case| measure(&engine, args, case)).collect::<anyhow::Result<Vec<_>>>()?);
    }
    let updates = |of: &Time| of.update;
    let prompts = |of: &Time| Some(of.token);
    for (what, of) in [
        ("us of a prompt's token", &prompts as &dyn Fn(&Time) -> Option<f64>),
        ("us of the state update over a token in a layer", &updates),
    ] {
        println!("\n{what}");
        let names = FORMS.map(name);
        let head: Vec<_> =
            ["sequences", "tokens"].into_iter().chain(names.iter().map(String::as_str)).collect();
        let mut table = Table::new(&[&head[..], &["fastest"]].concat());
        for (at, [batch, tokens]) in cases().enumerate() {
            let times: Option<Vec<f64>> = all.iter().map(|form| of(&form[at])).collect();
            let Some(times) = times else { continue };
            let fastest = (0..times.len()).min_by(|&a, &b| times[a].total_cmp(&times[b])).unwrap_or_default();
            let change = |us: f64| format!("{us:.3} ({:+.0} %)", 100.0 * (times[0] / us - 1.0));
            let mut row = vec![batch.to_string(), tokens.to_string(), format!("{:.3}", times[0])];
            row.extend(times[1..].iter().map(|&us| change(us)));
            row.push(names[fastest].clone());
            table.push(row);
        }
        println!("{}", table.text(args.markdown));
    }
    if let Some(folder) = args.plot.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    draw(args, &title, &all).with_context(|| args.plot.display().to_string())?;
    println!("plot    {}", args.plot.display());
    Ok(())
}

/// Runs sequences over so many tokens of each, side by side.
fn run(engine: &Engine, pass: usize, prompts: &[Vec<u32>]) -> anyhow::Result<Vec<Session>> {
    let mut sessions: Vec<Session> = prompts.iter().map(|_| engine.session()).collect();
    let mut rest: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let each = (pass / prompts.len().max(1)).max(1);
    while rest.iter().any(|tokens| !tokens.is_empty()) {
        let mut batch = Vec::new();
        for (session, rest) in sessions.iter_mut().zip(&mut rest) {
            let (now, later) = rest.split_at(each.min(rest.len()));
            *rest = later;
            batch.extend((!now.is_empty()).then_some((session, now)));
        }
        engine.step(&mut batch)?;
    }
    engine.wait()?;
    Ok(sessions)
}

/// Logits of prompts that end inside a chunk and at its end, alone and side by side, and after a few tokens more.
fn verify(engine: &Engine, pass: usize) -> anyhow::Result<Vec<f32>> {
    let mut all = Vec::new();
    for lengths in [&[200][..], &[64, 9, 130, 47]] {
        let prompts: Vec<Vec<u32>> =
            lengths.iter().map(|&n| (0..n).map(|at| token_of(engine, at + 31 * n)).collect()).collect();
        for mut session in run(engine, pass, &prompts)? {
            all.extend_from_slice(session.logits()?);
            all.extend_from_slice(session.step(token_of(engine, 5))?);
        }
    }
    Ok(all)
}

fn measure(engine: &Engine, args: &ChunksArgs, [batch, tokens]: [usize; 2]) -> anyhow::Result<Time> {
    let prompts: Vec<Vec<u32>> =
        (0..batch).map(|i| (0..tokens).map(|at| token_of(engine, at + 17 * i)).collect()).collect();
    let read = || run(engine, args.pass_tokens, &prompts).map(drop);
    let times = windows(engine, args.repeats.max(1), read)?;
    let all = (batch * tokens) as f64;
    engine.profile()?;
    read()?;
    let profile = engine.profile()?;
    // The device keeps some thousand timestamps: of more passes, the first are told.
    let parts = ["factors", "heads"].map(|name| {
        let own = || profile.dispatches.iter().filter(|of| of.part == name);
        (own().count(), own().map(|of| of.ns).sum::<f64>())
    });
    let each: f64 = parts.iter().filter(|(count, _)| *count > 0).map(|&(count, ns)| ns / count as f64).sum();
    let passes = tokens.div_ceil((args.pass_tokens / batch.max(1)).max(1)) as f64;
    let update = (parts[1].0 > 0).then(|| each * passes / all / 1e3);
    Ok(Time { token: 1e6 * times.median / all, update })
}

/// The time of a token by the length of a prompt, for each number of sequences: of the state update, or else of all.
fn draw(args: &ChunksArgs, title: &str, all: &[Vec<Time>]) -> anyhow::Result<()> {
    let area = SVGBackend::new(&args.plot, (1200, 440)).into_drawing_area();
    area.fill(&WHITE).map_err(fail)?;
    let area = area.titled(title, (FONT, 19)).map_err(fail)?;
    let shown = |of: &Time| of.update.unwrap_or(of.token);
    let values = || all.iter().flatten().map(shown);
    let (low, high) = (values().fold(f64::INFINITY, f64::min) / 1.3, values().fold(0.0, f64::max) * 1.3);
    let ends = (args.length.iter().min().copied(), args.length.iter().max().copied());
    let ((Some(first), Some(last)), true) = (ends, high > 0.0) else { return Ok(()) };
    let by_update = all.iter().flatten().all(|of| of.update.is_some());
    let y = if by_update { "us of the state update over a token in a layer" } else { "us of a token" };
    let parts = area.split_evenly((1, args.batch.len()));
    for ((at, batch), part) in args.batch.iter().enumerate().zip(&parts) {
        let mut chart = ChartBuilder::on(part)
            .margin(12)
            .x_label_area_size(48)
            .y_label_area_size(70)
            .caption(format!("{batch} side by side"), (FONT, 15))
            .build_cartesian_2d((first as f64 / 1.2..last as f64 * 1.2).log_scale(), (low..high).log_scale())
            .map_err(fail)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
            .x_desc("tokens of each")
            .y_desc(y)
            .x_label_formatter(&|n| format!("{n:.0}"))
            .y_label_formatter(&place)
            .label_style((FONT, 13))
            .axis_desc_style((FONT, 13))
            .draw()
            .map_err(fail)?;
        for ((form, times), colour) in FORMS.into_iter().zip(all).zip(COLOURS) {
            let own = &times[at * args.length.len()..][..args.length.len()];
            let mut points: Vec<(f64, f64)> =
                args.length.iter().zip(own).map(|(&n, of)| (n as f64, shown(of))).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            chart
                .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))
                .map_err(fail)?
                .label(name(form))
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2)));
            chart.draw_series(points.iter().map(|&at| Circle::new(at, 3, colour.filled()))).map_err(fail)?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.9))
            .border_style(RGBColor(0x77, 0x77, 0x77))
            .label_font((FONT, 13))
            .draw()
            .map_err(fail)?;
    }
    area.present().map_err(fail)
}
