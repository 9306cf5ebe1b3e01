//! What quantised weights cost in quality and take in memory, on the bundled model and its held-out text.

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use plotters::prelude::*;
use rwkv_model::engine::Device;
use rwkv_model::{Checkpoint, Engine, EngineOptions, Recipe, quality};

use crate::picture::{COLOURS, fail};
use crate::table::Table;

/// What must be reached (the project's targets): recipes, and percent of the bits per byte of halves.
const TARGETS: [(&str, f64); 3] = [("int8", 0.1), ("int8,head=int8", 0.1), ("int4", 2.0)];

/// What is measured by default, beside halves.
const RECIPES: &str = "int8;int8,head=int8;int4;int4,head=int8;int4,head=int4;int8,ffn.key=int4,ffn.value=int4;\
    f16,ffn.key=int4,ffn.value=int4";

/// Measures what quantised weights cost.
#[derive(Args)]
pub(crate) struct WeightsArgs {
    /// What it runs on: auto, cpu, gpu or gpu:NAME.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// Read only so much of the text.
    #[arg(long, value_name = "N")]
    bytes: Option<usize>,
    /// Tokens of a window.
    #[arg(long, default_value_t = 1024)]
    window: usize,
    /// The recipes, beside halves.
    #[arg(long, value_delimiter = ';', default_value = RECIPES)]
    recipes: Vec<Recipe>,
    /// Print the table as markdown.
    #[arg(long)]
    markdown: bool,
    /// Where the picture goes.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// The bundled model and its held-out text.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../rwkv-model/assets/books-10m"))]
    assets: PathBuf,
}

/// What was measured of a recipe.
struct Row {
    name: String,
    bits_per_byte: f64,
    /// Of matrices, adapters and the head.
    bytes: u64,
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the report, and how far it is")]
pub(crate) fn report(args: &WeightsArgs) -> anyhow::Result<()> {
    let path = args.assets.join("valid.txt");
    let mut text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    text.truncate(args.bytes.unwrap_or(usize::MAX));
    let checkpoint = Checkpoint::open(args.assets.join("model.safetensors"))?;
    let mut rows = Vec::new();
    for recipe in [Recipe::default()].iter().chain(&args.recipes) {
        let options = EngineOptions {
            device: args.device.clone(),
            weights: recipe.clone(),
            ..EngineOptions::default()
        };
        let engine = Engine::new(&checkpoint, options, &|_| {})?;
        let score = quality::windows(&engine, &text, args.window, |_| {})?;
        ensure!(score.tokens > 0, "a text of less than two tokens predicts nothing");
        let row = Row {
            name: recipe.to_string(),
            bits_per_byte: score.bits_per_byte(),
            bytes: engine.weight_bytes(),
        };
        eprintln!("{}: {:.5} bits per byte", row.name, row.bits_per_byte);
        rows.push(row);
    }
    let change = |of: &Row| 100.0 * (of.bits_per_byte / rows[0].bits_per_byte - 1.0);
    let mut table = Table::new(&["weights", "bits per byte", "change", "MB", "of halves"]);
    for of in &rows {
        table.push(vec![
            of.name.clone(),
            format!("{:.5}", of.bits_per_byte),
            format!("{:+.3} %", change(of)),
            format!("{:.2}", of.bytes as f64 / 1e6),
            format!("{:.3}", of.bytes as f64 / rows[0].bytes as f64),
        ]);
    }
    println!("{} bytes of held-out text in windows of {}\n", text.len(), args.window);
    println!("{}", table.text(args.markdown));
    if let Some(path) = &args.plot {
        draw(&rows, text.len(), path)?;
    }
    let missed = rows.iter().filter(|of| {
        let target = TARGETS.iter().find(|(name, _)| *name == of.name);
        target.is_some_and(|(_, most)| change(of) > *most)
    });
    let missed: Vec<&str> = missed.map(|of| &*of.name).collect();
    ensure!(missed.is_empty(), "not within their targets: {}", missed.join(" "));
    Ok(())
}

/// The price in quality of every recipe, by what it takes.
fn draw(rows: &[Row], text_bytes: usize, path: &Path) -> anyhow::Result<()> {
    let point = |of: &Row| {
        let change = 100.0 * (of.bits_per_byte / rows[0].bits_per_byte - 1.0);
        (of.bytes as f64 / rows[0].bytes as f64, change)
    };
    let most = rows.iter().map(|of| point(of).1).fold(0.1, f64::max);
    let area = SVGBackend::new(path, (1000, 560)).into_drawing_area();
    area.fill(&WHITE).map_err(fail)?;
    let caption = format!("Change of bits per byte against halves, on {text_bytes} bytes of held-out text");
    let mut chart = ChartBuilder::on(&area)
        .caption(caption, ("sans-serif", 19))
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(70)
        .build_cartesian_2d(0.2..1.25, -0.1 * most..1.15 * most)
        .map_err(fail)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
        .x_desc("bytes of the matrices, of those in halves")
        .y_desc("percent")
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 14))
        .draw()
        .map_err(fail)?;
    let blue = COLOURS[0];
    chart
        .draw_series(rows.iter().enumerate().map(|(i, of)| {
            // Below the names that would be in its way.
            let near = |other: &&Row| {
                let ((x, y), (other_x, other_y)) = (point(of), point(other));
                (x - other_x).abs() < 0.2 && (y - other_y).abs() < 0.03 * most
            };
            let y = rows[..i].iter().filter(near).fold(-7, |y, _| y + 14);
            EmptyElement::at(point(of))
                + Circle::new((0, 0), 4, blue.filled())
                + Text::new(of.name.clone(), (8, y), ("sans-serif", 14))
        }))
        .map_err(fail)?;
    area.present().map_err(fail)
}
