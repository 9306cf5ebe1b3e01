//! `quality`: how well a model predicts, in any way to run it.
//!
//! | figure | what it is |
//! |---|---|
//! | bits per byte | of a text in windows, each from an empty state; the change against the plain engine, with its standard error over windows |
//! | last words | of texts in JSON lines, `{"text": ..}` each: how many last words were the most probable, and how improbable they were |
//! | layers | what the absence of each costs: [`skip::contributions`] |
//! | gain | how much better a passage is predicted the second time, so many tokens later: [`retention`](crate::retention) |

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::Args;
use rwkv_model::engine::Device;
use rwkv_model::quality::{self, LastWord, Score, SideBySide};
use rwkv_model::skip;
use rwkv_model::{Engine, EngineOptions, SkipPart};
use serde::{Deserialize, Serialize};

use crate::assets::ModelArgs;
use crate::progress;
use crate::retention::Passages;
use crate::states::changes;
use crate::table::Table;
use crate::variant::{GRAMMAR, Variant};

/// Measures how well a model predicts, and what ways to run it cost in that.
#[derive(Args)]
pub(crate) struct QualityArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// What it runs on: auto, cpu, gpu or gpu:NAME.
    #[arg(long, default_value = "auto")]
    device: Device,
    /// A way to run it, beside the plain one; may be given again.
    #[arg(long = "with", value_name = "SETTINGS", long_help = GRAMMAR)]
    variants: Vec<Variant>,
    /// Tokens of a window.
    #[arg(long, value_delimiter = ',', default_value = "1024,8192")]
    windows: Vec<usize>,
    /// Read only so much of the text.
    #[arg(long, value_name = "N", default_value_t = 131_072)]
    bytes: usize,
    /// Texts whose last words are to be predicted, a JSON object with `text` a line.
    #[arg(long, value_name = "FILE")]
    last_words: Option<PathBuf>,
    /// Only the first so many of them.
    #[arg(long, value_name = "N")]
    texts: Option<usize>,
    /// Tokens between a passage and itself.
    #[arg(long, value_delimiter = ',', default_value = "256,4096")]
    distances: Vec<usize>,
    /// Passages that are repeated; 0 for none.
    #[arg(long, default_value_t = 16)]
    passages: usize,
    /// Measure what the absence of each layer costs too, on the plain engine, in windows of the first length.
    #[arg(long)]
    layers: bool,
    /// Sequences side by side.
    #[arg(long, default_value_t = 32)]
    sessions: usize,
    /// Print the tables as markdown.
    #[arg(long)]
    markdown: bool,
    /// Where the figures go.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What was measured of a way to run the model.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
struct Figures {
    variant: String,
    device: String,
    windows: Vec<Window>,
    last_words: Option<LastWords>,
    gains: Vec<Gain>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Window {
    tokens: usize,
    bits_per_byte: f64,
    /// Against the plain engine, in percent.
    change: f64,
    change_error: Option<f64>,
    /// Of each window.
    nats: Vec<f64>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct LastWords {
    texts: usize,
    /// How many were right.
    right: usize,
    /// Of one word.
    perplexity: f64,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Gain {
    distance: usize,
    bits_per_byte: f64,
    error: f64,
}

/// A line of a file of texts.
#[derive(Deserialize)]
struct Line {
    text: String,
}

/// The texts of a file of JSON lines.
fn texts(path: &Path, most: Option<usize>) -> anyhow::Result<Vec<String>> {
    let file = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let lines = (1..).zip(file.lines()).filter(|(_, line)| !line.trim().is_empty());
    let text = |(number, line): (usize, &str)| {
        let line: Line =
            serde_json::from_str(line).with_context(|| format!("{}, line {number}", path.display()))?;
        Ok(line.text)
    };
    lines.take(most.unwrap_or(usize::MAX)).map(text).collect()
}

#[expect(clippy::print_stdout, reason = "the report")]
pub(crate) fn report(args: &QualityArgs) -> anyhow::Result<()> {
    let all = measure(args)?;
    let device = all.first().map_or("", |of| &of.device);
    println!("model   {}, on {device}\n", args.model.name());
    tables(&all, args.markdown, |text| println!("{text}"));
    if args.layers {
        println!("{}", layers(args)?.text(args.markdown));
    }
    if let Some(path) = &args.json {
        std::fs::write(path, serde_json::to_vec_pretty(&all)?).with_context(|| path.display().to_string())?;
        println!("figures {}", path.display());
    }
    Ok(())
}

fn measure(args: &QualityArgs) -> anyhow::Result<Vec<Figures>> {
    let (checkpoint, mut text) = (args.model.checkpoint()?, args.model.text()?);
    text.truncate(args.bytes);
    let texts = args.last_words.as_deref().map(|path| texts(path, args.texts)).transpose()?;
    let options = EngineOptions { device: args.device.clone(), pass_tokens: 1024, ..args.model.options()? };
    let variants = std::iter::once(Variant::plain()).chain(args.variants.iter().cloned());
    let mut all: Vec<Figures> = Vec::new();
    let bar = progress::bar("{bar:40} {pos}/{len} {msg}", 1 + args.variants.len() as u64);
    for variant in variants {
        bar.set_message(variant.name.clone());
        let engine = Engine::new(&checkpoint, variant.apply(options.clone()), &|_| {})
            .with_context(|| variant.name.clone())?;
        let figures = one(args, &variant, &engine, &text, texts.as_deref(), all.first())
            .with_context(|| variant.name.clone())?;
        all.push(figures);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(all)
}

/// Measures a way to run the model.
fn one(
    args: &QualityArgs,
    variant: &Variant,
    engine: &Engine,
    text: &[u8],
    texts: Option<&[String]>,
    plain: Option<&Figures>,
) -> anyhow::Result<Figures> {
    let mut figures =
        Figures { variant: variant.name.clone(), device: engine.report()?.device, ..Figures::default() };
    for (at, &window) in args.windows.iter().enumerate() {
        let options = SideBySide { window, sessions: args.sessions, rest: variant.rest };
        let scores = quality::side_by_side(engine, text, options, |_| {})?;
        ensure!(!scores.is_empty(), "a text of less than two tokens predicts nothing");
        let nats: Vec<f64> = scores.iter().map(|of| of.nats).collect();
        let (change, change_error) = changes(&nats, plain.map_or(&nats, |plain| &plain.windows[at].nats));
        let bits_per_byte = scores.into_iter().sum::<Score>().bits_per_byte();
        figures.windows.push(Window { tokens: window, bits_per_byte, change, change_error, nats });
    }
    if let Some(texts) = texts {
        let words = texts.iter().map(|text| quality::last_word(engine, text));
        let words: Vec<LastWord> = words.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
        ensure!(!words.is_empty(), "no text has a last word after others");
        figures.last_words = Some(LastWords {
            texts: words.len(),
            right: words.iter().filter(|of| of.right).count(),
            perplexity: (words.iter().map(|of| of.nats).sum::<f64>() / words.len() as f64).exp(),
        });
    }
    let tokens = engine.tokenizer()?.encode(text);
    let mut distances: Vec<usize> =
        args.distances.iter().copied().filter(|&of| Passages::fits(&tokens, of)).collect();
    distances.sort_unstable();
    if args.passages > 0 && !distances.is_empty() {
        let passages = Passages { tokens: &tokens, count: args.passages, distances: &distances };
        // States that rest do so once, before the passage comes again.
        let way = variant.rest.map(|rest| rest.format);
        let gains = passages.gains(engine, &[way], true, args.sessions)?.remove(0);
        figures.gains = distances
            .iter()
            .zip(gains)
            .map(|(&distance, of)| Gain { distance, bits_per_byte: of.mean, error: of.error })
            .collect();
    }
    Ok(figures)
}

/// What the absence of each layer costs, of its channel mix and of all of it, the least missed first.
fn layers(args: &QualityArgs) -> anyhow::Result<Table> {
    let mut text = args.model.text()?;
    text.truncate(args.bytes);
    let options = EngineOptions { device: args.device.clone(), ..args.model.options()? };
    let engine = Engine::new(&args.model.checkpoint()?, options, &|_| {})?;
    let window = args.windows.first().copied().unwrap_or(1024);
    let windows = SideBySide { window, sessions: args.sessions, rest: None };
    let bar = progress::bar("{bar:40} {pos}/{len} layers", 2 * engine.config().n_layers as u64);
    let [mut whole, ffn] = [SkipPart::Layer, SkipPart::ChannelMix]
        .map(|part| skip::contributions(&engine, &text, part, windows, |_| bar.inc(1)));
    bar.finish_and_clear();
    if let Ok(costs) = &mut whole {
        costs.sort_by(|a, b| a.bits_per_byte.total_cmp(&b.bits_per_byte));
    }
    let (whole, ffn) = (whole?, ffn?);
    let mut table = Table::new(&["layer", "bits/byte more without it", "without its channel mix"]);
    for of in &whole {
        let of_ffn = ffn.iter().find(|ffn| ffn.layer == of.layer);
        table.push(vec![
            of.layer.to_string(),
            format!("{:+.4}", of.bits_per_byte),
            of_ffn.map_or_else(String::new, |of| format!("{:+.4}", of.bits_per_byte)),
        ]);
    }
    Ok(table)
}

fn tables(all: &[Figures], markdown: bool, mut show: impl FnMut(&str)) {
    let Some(plain) = all.first() else { return };
    let mut head = vec!["".to_owned()];
    head.extend(plain.windows.iter().map(|of| format!("bits/byte in {}", of.tokens)));
    if plain.last_words.is_some() {
        head.extend(["last words".to_owned(), "perplexity".to_owned()]);
    }
    head.extend(plain.gains.iter().map(|of| format!("gain after {}", of.distance)));
    let mut table = Table::new(&head.iter().map(String::as_str).collect::<Vec<_>>());
    for of in all {
        let mut row = vec![of.variant.clone()];
        row.extend(of.windows.iter().map(|window| {
            let error = window.change_error.map_or_else(String::new, |error| format!(" ({error:.4})"));
            let change = format!(" {:+.4}{error} %", window.change);
            format!("{:.5}{}", window.bits_per_byte, if of.variant == plain.variant { "" } else { &change })
        }));
        if let Some(LastWords { texts, right, perplexity }) = &of.last_words {
            let share = 100.0 * *right as f64 / *texts as f64;
            row.extend([format!("{share:.2} % of {texts}"), format!("{perplexity:.2}")]);
        }
        row.extend(of.gains.iter().map(|of| format!("{:.4} ({:.4})", of.bits_per_byte, of.error)));
        table.push(row);
    }
    show(&table.text(markdown));
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{QualityArgs, layers, measure, tables, texts};

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        args: QualityArgs,
    }

    /// Every figure is measured; a setting that changes nothing gives the plain ones, and one that changes something others.
    #[test]
    fn every_figure_of_every_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("words.jsonl");
        std::fs::write(
            &path,
            "{\"text\": \"It was the best of times, it was the worst of\"}\n\n{\"text\": \"word\"}\n",
        )
        .unwrap();
        let file = path.to_str().unwrap();
        let args = Program::parse_from([
            "quality",
            "--device",
            "cpu",
            "--bytes",
            "1500",
            "--windows",
            "256",
            "--last-words",
            file,
            "--passages",
            "2",
            "--distances",
            "64",
            "--with",
            "state=f32-c8",
            "--with",
            "skip=middle",
        ]);
        let all = measure(&args.args).unwrap();
        let [plain, lazy, skip] = &all[..] else { panic!("{all:?}") };
        assert!((plain.windows[0].bits_per_byte - 1.6).abs() < 0.4, "{plain:?}");
        assert!(lazy.windows[0].change.abs() < 1e-3 && skip.windows[0].change > 1.0, "{all:?}");
        let words = plain.last_words.as_ref().unwrap();
        assert_eq!(words.texts, 1, "a word alone has nothing before it");
        assert!(words.perplexity.is_finite() && words.right <= 1, "{words:?}");
        assert!(plain.gains[0].bits_per_byte.is_finite() && plain.gains.len() == 1, "{plain:?}");
        let shown = layers(&args.args).unwrap().text(true);
        assert_eq!(shown.lines().count(), 12, "a head, a rule and ten layers: {shown}");
        let mut shown = String::new();
        tables(&all, true, |text| shown += text);
        assert!(shown.contains("skip=middle") && shown.contains("gain after 64"), "{shown}");
    }

    #[test]
    fn a_line_that_is_no_text_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("words.jsonl");
        std::fs::write(&path, "{\"text\": \"a b\"}\n{\"words\": 1}\n").unwrap();
        let error = format!("{:#}", texts(&path, None).unwrap_err());
        assert!(error.contains("line 2") && error.contains("text"), "{error}");
        assert_eq!(texts(&path, Some(1)).unwrap(), ["a b"], "only the first");
    }
}
