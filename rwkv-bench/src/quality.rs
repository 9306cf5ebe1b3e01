//! Quality of the bundled model on its held-out text, against the figures recorded when it was trained.

use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use rwkv_model::engine::Device;
use rwkv_model::{Engine, EngineOptions, quality};

/// Bytes predicted in a window, and the bits per byte recorded for windows of that length (assets/books-10m/README.md).
const RECORDED: [(usize, f64); 2] = [(1024, 1.49342), (8192, 1.46826)];

/// The first so many bytes, and their bits per byte.
const FIRST: (usize, f64) = (4096, 1.43256);

/// Within so much a figure is the recorded one.
const TOLERANCE: f64 = 0.0005;

#[expect(clippy::print_stdout, reason = "the report")]
pub(crate) fn report(assets: &Path, quick: bool) -> anyhow::Result<bool> {
    let path = assets.join("valid.txt");
    let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    let on_cpu = EngineOptions { device: Device::Cpu, ..EngineOptions::default() };
    let engine = Engine::open_with(assets.join("model.safetensors"), on_cpu, &|_| {})?;
    println!("books-10m on its held-out text, bits per byte");
    let mut reached = true;
    let first = &text[..FIRST.0.min(text.len())];
    let whole = RECORDED.iter().filter(|_| !quick).map(|&(window, recorded)| (&text[..], window, recorded));
    for (text, window, recorded) in std::iter::once((first, FIRST.0, FIRST.1)).chain(whole) {
        let begun = Instant::now();
        let score = quality::windows(&engine, text, window, |_| {})?;
        let bits = score.bits_per_byte();
        let good = (bits - recorded).abs() <= TOLERANCE;
        reached &= good;
        let verdict = if good { "as recorded" } else { "NOT as recorded" };
        println!(
            "  {:7} bytes in windows of {window}: {bits:.5}, recorded {recorded:.5}: {verdict} ({:.0} tokens/s)",
            text.len(),
            score.tokens as f64 / begun.elapsed().as_secs_f64(),
        );
    }
    Ok(reached)
}
