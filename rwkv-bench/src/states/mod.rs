//! What every way to hold a state costs in quality, on the bundled model and its held-out text.
//!
//! | figure | what it is |
//! |---|---|
//! | bits per byte | of the text in windows, each from an empty state |
//! | change | against states in single precision, and the standard error of that over windows |
//! | gain | how much better a passage is predicted the second time, so many tokens later: [`retention`](crate::retention) |

mod plot;
pub(crate) mod rows;

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, ensure};
use clap::Args;
use rwkv_model::engine::Device;
use rwkv_model::quality::{self, Score, SideBySide};
use rwkv_model::{Engine, EngineOptions, Resident, gpu};
use serde::{Deserialize, Serialize};

use self::rows::{PLAIN, Row, at_rest, named};
use crate::machine;
use crate::retention::{PASSAGE, Passages, UNREAD};
use crate::table::Table;

/// What must be reached (the project's targets): rows, in windows of so many bytes, and percent of the bits per byte of
/// single precision.
const TARGETS: [(&str, usize, f64); 5] = [
    ("f16-c16", 32768, 0.1),
    ("int8-c16", 32768, 1.0),
    ("int8-c32", 32768, 1.0),
    ("rest-f16-512", 8192, 0.2),
    ("rest-int8-512", 8192, 0.2),
];

/// Bytes, window, rows, and passages of a quick run.
const QUICK: (usize, usize, [&str; 4], usize) = (16384, 1024, [PLAIN, "f32-c8", "f16-c16", "rest-int8-1"], 4);

/// Measures what every way to hold a state costs in quality.
#[derive(Args, Clone)]
pub(crate) struct StatesArgs {
    /// What sequences run on: auto, cpu, gpu or gpu:NAME.
    #[arg(long, default_value = "cpu")]
    device: Device,
    /// What those run on whose states rest on the way; by default the same.
    #[arg(long, value_name = "DEVICE")]
    rest_device: Option<Device>,
    /// Read only so much of the text.
    #[arg(long, value_name = "N")]
    bytes: Option<usize>,
    /// Bytes of a window.
    #[arg(long, value_delimiter = ',', default_value = "1024,8192,32768")]
    windows: Vec<usize>,
    /// Only rows of these names, or that begin with them up to a hyphen, beside f32; by default all, and few in windows
    /// longer than 8192.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Bytes between a passage and itself.
    #[arg(long, value_delimiter = ',', default_value = "256,1024,4096,16384")]
    distances: Vec<usize>,
    /// Passages that are repeated; 0 for none.
    #[arg(long, default_value_t = 64)]
    passages: usize,
    /// Sequences side by side.
    #[arg(long, default_value_t = 32)]
    sessions: usize,
    /// Tokens in a pass.
    #[arg(long, default_value_t = 1024)]
    pass_tokens: usize,
    /// A few rows on a few bytes, in seconds.
    #[arg(long)]
    quick: bool,
    /// Print the tables as markdown.
    #[arg(long)]
    markdown: bool,
    /// Where the figures go, after each row.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Keep the figures of this text and these devices that the file of --json has, and measure what is missing.
    #[arg(long, requires = "json")]
    resume: bool,
    /// Where a plot goes, as SVG.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// The bundled model and its held-out text.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../rwkv-model/assets/books-10m"))]
    assets: PathBuf,
}

/// What was measured.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
struct Figures {
    machine: String,
    /// Bytes of the text that were read.
    text_bytes: usize,
    quality: Vec<Quality>,
    retention: Vec<Retention>,
    /// Rows that the device does not have, and why.
    left_out: Vec<(String, String)>,
}

/// A row, in windows of one length.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Quality {
    row: String,
    device: String,
    window: usize,
    bits_per_byte: f64,
    /// Against single precision on the same device, in percent.
    change: f64,
    /// Standard error of that, over windows; there is none of one window.
    change_error: Option<f64>,
    /// Written, or at rest; of a sparse format, at most.
    state_bytes: usize,
    /// Of pending tokens, at most.
    pending_bytes: usize,
    tokens_per_second: f64,
    /// Of each window, to compare with: of single precision alone.
    nats: Vec<f64>,
}

/// A row, at one distance.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Retention {
    row: String,
    device: String,
    passages: usize,
    distance: usize,
    /// Bits per byte.
    gain: f64,
    /// Standard error of that, over passages.
    gain_error: f64,
}

#[expect(clippy::print_stdout, reason = "the report")]
pub(crate) fn report(args: &StatesArgs) -> anyhow::Result<()> {
    let figures = measure(args)?;
    let reached = tables(&figures, args.markdown, |text| println!("{text}"));
    if let Some(path) = &args.plot {
        plot::draw(&figures, path)?;
        println!("plot    {}", path.display());
    }
    if let Some(path) = &args.json {
        println!("figures {}", path.display());
    }
    ensure!(reached, "not everything was reached: see above");
    Ok(())
}

/// The engines of a run: one for each device and way to hold states.
struct Bench {
    args: StatesArgs,
    text: Vec<u8>,
    engines: HashMap<(String, Resident), Result<Engine, String>>,
    figures: Figures,
}

fn measure(args: &StatesArgs) -> anyhow::Result<Figures> {
    let mut args = args.clone();
    if args.quick {
        let (bytes, window, rows, passages) = QUICK;
        args.bytes = Some(args.bytes.unwrap_or(bytes));
        (args.windows, args.distances, args.passages) = (vec![window], vec![PASSAGE], passages);
        args.rows = rows.map(str::to_owned).into();
    }
    args.distances.sort_unstable();
    let path = args.assets.join("valid.txt");
    let mut text = std::fs::read(&path).with_context(|| path.display().to_string())?;
    text.truncate(args.bytes.unwrap_or(usize::MAX));
    let mut figures = Figures { machine: machine::describe(), text_bytes: text.len(), ..Figures::default() };
    if let Some(path) = args.json.as_deref().filter(|path| args.resume && path.exists()) {
        let before: Figures = serde_json::from_slice(&std::fs::read(path)?)
            .with_context(|| format!("{}: no figures", path.display()))?;
        ensure!(
            before.text_bytes == text.len(),
            "{}: of {} bytes of text",
            path.display(),
            before.text_bytes
        );
        figures = before;
        figures.left_out.clear();
    }
    let mut bench = Bench { args, text, engines: HashMap::new(), figures };
    bench.quality()?;
    bench.retention()?;
    Ok(bench.figures)
}

impl Bench {
    /// An engine whose states are held so, or why there is none.
    fn engine(&mut self, device: &Device, state: Resident) -> anyhow::Result<Result<Engine, String>> {
        let key = (format!("{device:?}"), state);
        if let Some(engine) = self.engines.get(&key) {
            return Ok(engine.clone());
        }
        let options = EngineOptions {
            device: device.clone(),
            state,
            pass_tokens: self.args.pass_tokens,
            ..EngineOptions::default()
        };
        let engine = match Engine::open_with(self.args.assets.join("model.safetensors"), options, &|_| {}) {
            Ok(engine) => Ok(engine),
            Err(rwkv_model::Error::Gpu(gpu::Error::Resident(_, why))) => Err(why.to_owned()),
            Err(error) => return Err(error.into()),
        };
        self.engines.insert(key, engine.clone());
        Ok(engine)
    }

    /// The engine of a row; none, with a note, if the device cannot hold states so.
    fn engine_of(&mut self, row: &str, device: &Device, state: Resident) -> anyhow::Result<Option<Engine>> {
        match self.engine(device, state)? {
            Ok(engine) => Ok(Some(engine)),
            Err(why) => {
                if !self.figures.left_out.iter().any(|(name, _)| name == row) {
                    self.figures.left_out.push((row.to_owned(), why));
                }
                Ok(None)
            }
        }
    }

    fn rest_device(&self) -> Device {
        self.args.rest_device.clone().unwrap_or_else(|| self.args.device.clone())
    }

    fn quality(&mut self) -> anyhow::Result<()> {
        let rows = rows::all();
        for window in self.args.windows.clone() {
            for row in &rows {
                let device = if row.rest.is_some() { self.rest_device() } else { self.args.device.clone() };
                let plain = row.name == PLAIN;
                if plain || row.wanted(window, &self.args.rows) {
                    // What it is compared with, if it is not there yet.
                    self.score(&rows[0], &device, window)?;
                    if !plain {
                        self.score(row, &device, window)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Measures a row in windows of one length, if it was not.
    fn score(&mut self, row: &Row, device: &Device, window: usize) -> anyhow::Result<()> {
        let Some(engine) = self.engine_of(&row.name, device, row.state)? else { return Ok(()) };
        let device = engine.report()?.device;
        let found = |name: &str, figures: &Figures| {
            let is = |of: &&Quality| of.row == name && of.window == window && of.device == device;
            figures.quality.iter().find(is).cloned()
        };
        if found(&row.name, &self.figures).is_some() {
            return Ok(());
        }
        let begun = Instant::now();
        let options = SideBySide { window, sessions: self.args.sessions, rest: row.rest };
        let scores = quality::side_by_side(&engine, &self.text, options, |_| {})?;
        let seconds = begun.elapsed().as_secs_f64();
        let score: Score = scores.iter().copied().sum();
        let nats: Vec<f64> = scores.iter().map(|of| of.nats).collect();
        let plain = found(PLAIN, &self.figures).map_or_else(|| nats.clone(), |plain| plain.nats);
        let (change, change_error) = changes(&nats, &plain);
        let (state_bytes, pending_bytes) = rows::held_bytes(engine.config(), row.state, row.rest);
        self.figures.quality.push(Quality {
            row: row.name.clone(),
            device,
            window,
            bits_per_byte: score.bits_per_byte(),
            change,
            change_error,
            state_bytes,
            pending_bytes,
            tokens_per_second: score.tokens as f64 / seconds,
            nats: if row.name == PLAIN { nats } else { Vec::new() },
        });
        self.save(&format!(
            "{} in windows of {window}: {:.5}, {seconds:.0} s",
            row.name,
            score.bits_per_byte()
        ))
    }

    fn retention(&mut self) -> anyhow::Result<()> {
        let distances = self.args.distances.clone();
        // The bundled model's tokens are bytes.
        let tokens: Vec<u32> = self.text.iter().map(|&byte| byte.into()).collect();
        let fits = |of: &usize| Passages::fits(&tokens, *of);
        let distances: Vec<usize> = distances.into_iter().filter(fits).collect();
        if self.args.passages == 0 || distances.is_empty() {
            return Ok(());
        }
        let wanted = |name: &str, names: &[String]| names.is_empty() || named(name, names);
        let device = self.args.device.clone();
        for row in rows::all().into_iter().filter(|row| row.rest.is_none()) {
            if row.name == PLAIN || wanted(&row.name, &self.args.rows) {
                self.gains(&[(&row.name, None)], &device, row.state, &distances)?;
            }
        }
        self.gains(&[(UNREAD, None)], &device, Resident::default(), &distances)?;
        // A row of `rest-f16-1` asks for `rest-f16` too.
        let names = self.args.rows.clone();
        let asked = |name: &str| wanted(name, &names) || names.iter().any(|of| named(of, &[name.to_owned()]));
        let ways: Vec<_> = at_rest()
            .into_iter()
            .filter(|(name, _)| asked(name))
            .map(|(name, way)| (name, Some(way)))
            .collect();
        let rest_device = self.rest_device();
        self.gains(&ways, &rest_device, Resident::default(), &distances)
    }

    /// Measures the gains of rows that share an engine, if they were not.
    fn gains(
        &mut self,
        rows: &[(&str, Option<rwkv_model::StateFormat>)],
        device: &Device,
        state: Resident,
        distances: &[usize],
    ) -> anyhow::Result<()> {
        let Some(&(name, _)) = rows.first() else { return Ok(()) };
        let Some(engine) = self.engine_of(name, device, state)? else { return Ok(()) };
        let (device, count) = (engine.report()?.device, self.args.passages);
        let there = |row: &str, distance: usize| {
            let mut all = self.figures.retention.iter();
            all.any(|of| (&*of.row, &of.device, of.passages, of.distance) == (row, &device, count, distance))
        };
        if rows.iter().all(|(row, _)| distances.iter().all(|&distance| there(row, distance))) {
            return Ok(());
        }
        let begun = Instant::now();
        let ways: Vec<_> = rows.iter().map(|(_, way)| *way).collect();
        let tokens: Vec<u32> = self.text.iter().map(|&byte| byte.into()).collect();
        let passages = Passages { tokens: &tokens, count, distances };
        let gains = passages.gains(&engine, &ways, name != UNREAD, self.args.sessions)?;
        for ((row, _), gains) in rows.iter().zip(gains) {
            self.figures.retention.retain(|of| of.row != *row || of.device != device);
            self.figures.retention.extend(distances.iter().zip(gains).map(|(&distance, gain)| Retention {
                row: (*row).to_owned(),
                device: device.clone(),
                passages: count,
                distance,
                gain: gain.mean,
                gain_error: gain.error,
            }));
        }
        let names: Vec<&str> = rows.iter().map(|(row, _)| *row).collect();
        self.save(&format!(
            "{} on repeated passages: {:.0} s",
            names.join(", "),
            begun.elapsed().as_secs_f64()
        ))
    }

    /// Writes down what there is, and says what is new.
    #[expect(clippy::print_stderr, reason = "how it goes, beside the report")]
    fn save(&self, what: &str) -> anyhow::Result<()> {
        eprintln!("{what}");
        let Some(path) = &self.args.json else { return Ok(()) };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        std::fs::write(path, serde_json::to_vec_pretty(&self.figures)?)
            .with_context(|| path.display().to_string())
    }
}

/// The change of a sum in percent, and its standard error over the terms.
pub(crate) fn changes(nats: &[f64], plain: &[f64]) -> (f64, Option<f64>) {
    let (n, total) = (nats.len() as f64, plain.iter().sum::<f64>());
    let changes: Vec<f64> = nats.iter().zip(plain).map(|(nats, plain)| nats - plain).collect();
    let mean = changes.iter().sum::<f64>() / n;
    let squares: f64 = changes.iter().map(|change| (change - mean).powi(2)).sum();
    let percent = |nats: f64| 100.0 * nats / total;
    (percent(mean * n), (nats.len() > 1).then(|| percent((squares * n / (n - 1.0)).sqrt())))
}

/// Numbers that occur, ascending.
fn sorted(numbers: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut numbers: Vec<usize> = numbers.collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
}

/// Shows the tables and the targets, and tells whether all that were measured were reached.
fn tables(figures: &Figures, markdown: bool, mut show: impl FnMut(&str)) -> bool {
    for window in sorted(figures.quality.iter().map(|of| of.window)) {
        show(&format!("{} bytes of held-out text in windows of {window}\n", figures.text_bytes));
        let head = ["state", "bits/byte", "change, %", "+-", "bytes", "pending", "tokens/s", "device"];
        let mut table = Table::new(&head);
        for of in figures.quality.iter().filter(|of| of.window == window) {
            let plain = of.row == PLAIN;
            table.push(vec![
                of.row.clone(),
                format!("{:.5}", of.bits_per_byte),
                if plain { String::new() } else { format!("{:+.5}", of.change) },
                of.change_error.filter(|_| !plain).map_or_else(String::new, |error| format!("{error:.5}")),
                of.state_bytes.to_string(),
                of.pending_bytes.to_string(),
                format!("{:.0}", of.tokens_per_second),
                of.device.clone(),
            ]);
        }
        show(&table.text(markdown));
    }
    let distances = sorted(figures.retention.iter().map(|of| of.distance));
    if let Some(first) = figures.retention.first() {
        show(&format!(
            "Bits per byte gained on a passage of {PASSAGE} bytes that comes again, of {} passages (standard error), after\n",
            first.passages
        ));
        let bytes: Vec<String> = distances.iter().map(|distance| format!("{distance} bytes")).collect();
        let mut table =
            Table::new(&std::iter::once("state").chain(bytes.iter().map(String::as_str)).collect::<Vec<_>>());
        let mut names: Vec<(&str, &str)> =
            figures.retention.iter().map(|of| (&*of.row, &*of.device)).collect();
        names.dedup();
        for (row, device) in names {
            let gain = |&distance: &usize| {
                let is = |of: &&Retention| of.row == row && of.device == device && of.distance == distance;
                let of = figures.retention.iter().find(is);
                of.map_or_else(String::new, |of| format!("{:.4} ({:.4})", of.gain, of.gain_error))
            };
            table.push(std::iter::once(row.to_owned()).chain(distances.iter().map(gain)).collect());
        }
        show(&table.text(markdown));
    }
    for (row, why) in &figures.left_out {
        show(&format!("without {row}: {why}"));
    }
    let mut reached = true;
    let mut table = Table::new(&["target: change within", "%", "measured, %", ""]);
    for (row, window, limit) in TARGETS {
        let found = figures.quality.iter().find(|of| of.row == row && of.window == window);
        let good = found.is_none_or(|of| of.change.abs() <= limit);
        reached &= good;
        let verdict = match found {
            None => "not measured",
            Some(_) if good => "reached",
            Some(_) => "NOT reached",
        };
        table.push(vec![
            format!("{row}, windows of {window}"),
            limit.to_string(),
            found.map_or_else(String::new, |of| format!("{:+.4}", of.change)),
            verdict.to_owned(),
        ]);
    }
    show(&table.text(markdown));
    reached
}

/// As [`StatesArgs`] for a device and little text.
#[cfg(test)]
fn quick(device: Device, bytes: usize) -> StatesArgs {
    StatesArgs {
        device,
        rest_device: None,
        bytes: Some(bytes),
        windows: Vec::new(),
        rows: Vec::new(),
        distances: Vec::new(),
        passages: 0,
        sessions: 32,
        pass_tokens: 512,
        quick: true,
        markdown: false,
        json: None,
        resume: false,
        plot: None,
        assets: concat!(env!("CARGO_MANIFEST_DIR"), "/../rwkv-model/assets/books-10m").into(),
    }
}

#[cfg(test)]
mod tests {
    use rwkv_model::engine::Device;

    use super::{Figures, changes, measure, plot, quick, tables};

    #[test]
    fn changes_of_sums() {
        let (change, error) = changes(&[11.0, 9.0], &[10.0, 10.0]);
        assert_eq!(change, 0.0, "one more, one less");
        assert!((error.unwrap() - 10.0).abs() < 1e-12, "two of 20, give or take: {error:?}");
        assert_eq!(changes(&[11.0], &[10.0]), (10.0, None), "one window");
    }

    /// Deferred writes change nothing, bytes at every token do, and every figure is a number.
    #[test]
    fn quick_run() {
        let folder = tempfile::tempdir().unwrap();
        let mut args = quick(Device::Cpu, 3000);
        args.json = Some(folder.path().join("figures.json"));
        let figures = measure(&args).unwrap();
        let of = |row: &str| figures.quality.iter().find(|of| of.row == row).unwrap();
        let (plain, lazy, int8) = (of("f32"), of("f32-c8"), of("rest-int8-1"));
        assert!((plain.bits_per_byte - lazy.bits_per_byte).abs() < 1e-4, "{plain:?} {lazy:?}");
        assert!(int8.change.is_finite() && int8.change.abs() > 1e-3, "{int8:?}");
        assert!(int8.state_bytes < plain.state_bytes / 3, "{int8:?}");
        assert_eq!(figures.quality.len(), 4, "rows");
        assert!(figures.retention.len() >= 4, "{:?}", figures.retention);
        for of in &figures.retention {
            assert!(of.gain.is_finite() && of.gain_error.is_finite(), "{of:?}");
        }

        // What was measured is kept.
        args.resume = true;
        let again = measure(&args).unwrap();
        let rates = |figures: &Figures| -> Vec<f64> {
            figures.quality.iter().map(|of| of.tokens_per_second).collect()
        };
        assert_eq!(rates(&again), rates(&figures), "not measured again");

        let mut text = String::new();
        assert!(tables(&figures, true, |part| text += part), "no target is of so short windows");
        assert!(text.contains("| rest-int8-1 |") && text.contains("not measured"), "{text}");
        let picture = folder.path().join("plot.svg");
        plot::draw(&figures, &picture).unwrap();
        assert!(std::fs::read_to_string(picture).unwrap().contains("rest-int8-1"), "a row's name");
    }
}
