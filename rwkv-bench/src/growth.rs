//! How time grows with sequences side by side, and with the length of a prompt: as tables, and as a picture.
//!
//! First, sequences side by side are compared with the same ones alone, and prompts in pieces with whole ones: on the CPU
//! they give the same bits, on a GPU the same but for rounding. Then each case is run until the device is warm, and timed.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use plotters::coord::combinators::IntoLogRange;
use plotters::prelude::*;
use rwkv_core::compare::nmse;
use rwkv_model::engine::Device;
use rwkv_model::{Engine, EngineOptions, Session};

use crate::gpu::{limit, token_of, windows};
use crate::picture::{FONT, fail, place};
use crate::random_model::{self, shape_of};

/// Measures how time grows.
#[derive(Args)]
pub(crate) struct GrowthArgs {
    /// The checkpoint.
    #[arg(
        long,
        default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../rwkv-model/assets/books-10m/model.safetensors")
    )]
    model: PathBuf,
    /// Random weights of this shape instead, by name.
    #[arg(long, conflicts_with = "model")]
    shape: Option<String>,
    /// Where the random model is written, and deleted again.
    #[arg(long, default_value = "target/bench")]
    scratch: PathBuf,
    /// What it runs on: auto, cpu, gpu, or gpu:NAME.
    #[arg(long, default_value = "auto")]
    device: Device,
    /// Sequences side by side, a token of each at a time.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128,256,512,1024")]
    batch: Vec<usize>,
    /// Tokens of a prompt.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64,256,1024,4096,16384,65536")]
    length: Vec<usize>,
    /// How often each is timed.
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Where the picture goes.
    #[arg(long, value_name = "FILE", default_value = "target/growth.svg")]
    plot: PathBuf,
}

/// Steps that are timed at once.
const STEPS: usize = 8;

/// Seconds by what they grow with.
type Curve = Vec<(usize, f64)>;

#[expect(clippy::print_stdout, reason = "the report")]
pub(crate) fn report(args: &GrowthArgs) -> anyhow::Result<()> {
    let most = args.batch.iter().copied().max().unwrap_or(1);
    let defaults = EngineOptions::default();
    let options = EngineOptions {
        device: args.device.clone(),
        pass_tokens: most.max(defaults.pass_tokens),
        sessions: most,
        ..defaults
    };
    let open = |path: &Path| Ok(Engine::open_with(path, options, &|_| {})?);
    let engine = match &args.shape {
        None => open(&args.model)?,
        Some(name) => random_model::with(shape_of(name)?, &args.scratch, open)?,
    };
    let name = args.shape.clone().unwrap_or_else(|| args.model.display().to_string());
    let title = format!("{name} on {}", engine.report()?.device);
    println!("{title}");
    println!("{}", verify(&engine)?);

    println!("\n sequences    ms a step    tokens/s    us a token");
    let batch = curve(&args.batch, |n| {
        let (mut sessions, mut at): (Vec<Session>, _) = ((0..n).map(|_| engine.session()).collect(), 0);
        let times = windows(&engine, args.repeats, || {
            for _ in 0..STEPS {
                let tokens: Vec<[u32; 1]> = (0..n).map(|i| [token_of(&engine, 17 * i + at)]).collect();
                let mut batch: Vec<_> = sessions.iter_mut().zip(&tokens).map(|(s, t)| (s, &t[..])).collect();
                engine.step(&mut batch)?;
                at += 1;
            }
            Ok(engine.wait()?)
        })?;
        let seconds = times.median / STEPS as f64;
        let rate = n as f64 / seconds;
        println!("{n:>10} {:>12.3} {rate:>11.0} {:>13.2}   {times}", 1e3 * seconds, 1e6 / rate);
        Ok(seconds)
    })?;

    println!(
        "\n    tokens   ms a prompt    tokens/s    us a token   bytes of the state   peak of the process"
    );
    let length = curve(&args.length, |n| {
        let prompt: Vec<u32> = (0..n).map(|i| token_of(&engine, i)).collect();
        let mut session = engine.session();
        let times = windows(&engine, args.repeats, || {
            session = engine.session();
            session.prefill(&prompt)?;
            Ok(engine.wait()?)
        })?;
        let (seconds, rate) = (times.median, n as f64 / times.median);
        let state = size_of_val(&session.state()?[..]);
        let peak = peak().map_or_else(|| "unknown".to_owned(), |kib| format!("{} MiB", kib / 1024));
        println!(
            "{n:>10} {:>13.3} {rate:>11.0} {:>13.2} {state:>20} {peak:>21}   {times}",
            1e3 * seconds,
            1e6 / rate
        );
        Ok(seconds)
    })?;
    if let Some(folder) = args.plot.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    draw(&args.plot, &title, &batch, &length).with_context(|| args.plot.display().to_string())?;
    println!("\nplot    {}", args.plot.display());
    Ok(())
}

fn curve(at: &[usize], mut time: impl FnMut(usize) -> anyhow::Result<f64>) -> anyhow::Result<Curve> {
    at.iter().filter(|&&n| n > 0).map(|&n| Ok((n, time(n)?))).collect()
}

/// Compares sequences side by side with the same ones alone, and a prompt in pieces with a whole one.
fn verify(engine: &Engine) -> anyhow::Result<String> {
    let report = engine.report()?;
    let limit = if report.kernels.is_empty() { 0.0 } else { limit(engine)? };
    let mut worst = 0f64;
    let mut compare = |got: &Session, want: &Session, what: &str| {
        let want: Vec<f64> = want.logits()?.iter().copied().map(f64::from).collect();
        worst = worst.max(nmse(got.logits()?, &want, limit).with_context(|| what.to_owned())?);
        anyhow::Ok(())
    };
    for n in [2, 9, 40] {
        let mut sessions: Vec<Session> = (0..n).map(|_| engine.session()).collect();
        // Prompts of several lengths at once, then a token of each.
        let prompts: Vec<Vec<u32>> =
            (0..n).map(|i| (0..1 + 5 * i % 23).map(|at| token_of(engine, at + 31 * i)).collect()).collect();
        let mut alone = sessions.clone();
        for token in [None, Some(3), Some(8)] {
            let tokens =
                |i: usize| token.map_or_else(|| prompts[i].clone(), |at| vec![token_of(engine, i + at)]);
            let tokens: Vec<Vec<u32>> = (0..n).map(tokens).collect();
            let mut batch: Vec<_> = sessions.iter_mut().zip(&tokens).map(|(s, t)| (s, &t[..])).collect();
            engine.step(&mut batch)?;
            for (session, tokens) in alone.iter_mut().zip(&tokens) {
                session.prefill(tokens)?;
            }
        }
        for (side_by_side, alone) in sessions.iter().zip(&alone) {
            compare(side_by_side, alone, &format!("{n} sequences against each alone"))?;
        }
    }
    let prompt: Vec<u32> = (0..700).map(|at| token_of(engine, at)).collect();
    let (mut whole, mut pieces) = (engine.session(), engine.session());
    whole.prefill(&prompt)?;
    prompt.chunks(97).try_for_each(|piece| pieces.prefill(piece))?;
    compare(&pieces, &whole, "a prompt in pieces against the whole")?;
    ensure!(worst <= limit, "off by {worst:e}");
    Ok(match limit {
        0.0 => "side by side and in pieces: the same bits as alone and whole".to_owned(),
        _ => format!("side by side and in pieces: {:.1e} from alone and whole", worst.sqrt()),
    })
}

/// The most memory that the process had, in KiB, where the system says.
fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

/// Both curves, on logarithmic axes, beside lines that are proportional and end where the curves do.
fn draw(path: &Path, title: &str, batch: &Curve, length: &Curve) -> anyhow::Result<()> {
    let area = SVGBackend::new(path, (1100, 460)).into_drawing_area();
    area.fill(&WHITE).map_err(fail)?;
    let area = area.titled(title, (FONT, 19)).map_err(fail)?;
    let parts = area.split_evenly((1, 2));
    let charts = [
        (batch, "sequences side by side", "milliseconds of a step", "a token of each"),
        (length, "tokens of a prompt", "milliseconds of the prompt", "one prompt"),
    ];
    for (part, (curve, x, y, label)) in parts.iter().zip(charts) {
        let points: Vec<(f64, f64)> = curve.iter().map(|&(n, seconds)| (n as f64, 1e3 * seconds)).collect();
        let (Some(&first), Some(&last)) = (points.first(), points.last()) else { continue };
        let proportional = points.iter().map(|&(n, _)| (n, last.1 * n / last.0));
        let all = || points.iter().copied().chain([(last.0, last.1)]);
        let low = all().fold(f64::INFINITY, |low, (_, y)| low.min(y)) / 2.0;
        let high = all().fold(0.0, |high: f64, (_, y)| high.max(y)) * 2.0;
        let mut chart = ChartBuilder::on(part)
            .margin(12)
            .x_label_area_size(48)
            .y_label_area_size(80)
            .build_cartesian_2d((first.0 / 1.2..last.0 * 1.2).log_scale(), (low..high).log_scale())
            .map_err(fail)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
            .x_desc(x)
            .y_desc(y)
            .x_label_formatter(&|n| format!("{n:.0}"))
            .y_label_formatter(&place)
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 14))
            .draw()
            .map_err(fail)?;
        let (colour, grey) = (RGBColor(0x1f, 0x77, 0xb4), RGBColor(0x77, 0x77, 0x77));
        let legend =
            |colour: RGBColor| move |(x, y)| PathElement::new([(x, y), (x + 20, y)], colour.stroke_width(2));
        // What lies below the axis is not drawn.
        let shown = proportional.filter(|(_, y)| *y >= low);
        chart
            .draw_series(LineSeries::new(shown, grey.stroke_width(1)))
            .map_err(fail)?
            .label("proportional")
            .legend(legend(grey));
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(2)))
            .map_err(fail)?
            .label(label)
            .legend(legend(colour));
        chart.draw_series(points.iter().map(|&at| Circle::new(at, 4, colour.filled()))).map_err(fail)?;
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.9))
            .border_style(grey)
            .label_font((FONT, 14))
            .draw()
            .map_err(fail)?;
    }
    area.present().map_err(fail)
}
