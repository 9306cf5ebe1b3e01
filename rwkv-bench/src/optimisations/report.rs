//! What was measured, as it is written down, shown on a terminal, and compared with an earlier run.

use serde::{Deserialize, Serialize};

use crate::table::Table;

/// A figure that was taken several times: its median, and where that of all there could be lies with a confidence of
/// [`CONFIDENCE`], whatever their distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
pub(crate) struct Figure {
    pub(crate) median: f64,
    /// At least there.
    pub(crate) low: f64,
    /// At most there.
    pub(crate) high: f64,
    pub(crate) count: usize,
}

/// How sure [`Figure::low`] and [`Figure::high`] are, of five times or more: of fewer, the least and the most say less.
const CONFIDENCE: f64 = 0.9;

impl Figure {
    /// Of what was taken.
    pub(crate) fn new(mut taken: Vec<f64>) -> Self {
        taken.sort_by(f64::total_cmp);
        let (count, at) = (taken.len(), |index: usize| taken.get(index).copied().unwrap_or(f64::NAN));
        let out = beyond(count);
        let last = count.saturating_sub(1);
        Self { median: at(count / 2), low: at(out), high: at(last - out), count }
    }

    /// From the one to the other, relative to the median.
    pub(crate) fn spread(&self) -> f64 {
        (self.high - self.low) / self.median
    }
}

/// Of so many values in order, how many at each end can be left out so that the median is among the others with a
/// confidence of [`CONFIDENCE`]. Each value is below the median with a probability of one half, so that `k` of `n` are with
/// one of `binomial(n, k) / 2^n`.
fn beyond(n: usize) -> usize {
    let (mut ways, mut outside) = ((-(n as f64)).exp2(), 0.0);
    for k in 0..n / 2 {
        outside += 2.0 * ways;
        if outside > 1.0 - CONFIDENCE {
            return k.saturating_sub(1);
        }
        ways *= (n - k) as f64 / (k + 1) as f64;
    }
    0
}

/// What was measured.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub(crate) struct Report {
    pub(crate) machine: String,
    pub(crate) device: String,
    pub(crate) model: String,
    /// Of the program, where it was known when that was built.
    pub(crate) commit: String,
    /// Day of the run, in UTC.
    pub(crate) date: String,
    pub(crate) command: String,
    /// Bytes of the text that quality was measured on.
    pub(crate) text_bytes: usize,
    /// GB read and written a second.
    pub(crate) copy: Figure,
    /// GFLOP a second.
    pub(crate) matmul: Figure,
    pub(crate) rows: Vec<Row>,
    /// Rows that were not measured, and why.
    pub(crate) left_out: Vec<(String, String)>,
    /// Tokens a second of prompts, by the form of the state update and the length.
    pub(crate) forms: Vec<Form>,
    /// Bits per byte, by the share of layers left out.
    pub(crate) shares: Vec<Share>,
    pub(crate) peer: Vec<PeerCase>,
}

/// An optimisation.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) title: String,
    pub(crate) promised_speed: String,
    pub(crate) promised_quality: String,
    /// How far its logits were off from the reference's, as a root mean square relative to their size.
    pub(crate) error: f64,
    /// Whether it is the plain engine that runs, without and with.
    #[serde(default)]
    pub(crate) plain: [bool; 2],
    /// Bytes of the weights, without and with.
    #[serde(default)]
    pub(crate) weights: [u64; 2],
    /// Bytes of a sequence's state, likewise, as it is written or at rest; and, while it runs, of tokens that may be pending.
    #[serde(default)]
    pub(crate) state: [u64; 2],
    #[serde(default)]
    pub(crate) pending: [u64; 2],
    pub(crate) cases: Vec<Case>,
    pub(crate) quality: Vec<Quality>,
    /// What is to be said of it.
    pub(crate) said: String,
}

/// A load, without the optimisation and with it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub(crate) struct Case {
    pub(crate) name: String,
    /// Tokens a second.
    pub(crate) without: Figure,
    pub(crate) with: Figure,
    /// How many times as fast, round by round.
    pub(crate) ratio: Figure,
    /// Bytes or operations a second, without and with.
    pub(crate) work: [f64; 2],
    /// The same of the copy or the product, beside it.
    pub(crate) ceiling: Figure,
}

/// A text in windows, without the optimisation and with it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub(crate) struct Quality {
    pub(crate) window: usize,
    /// Bits per byte.
    pub(crate) without: f64,
    pub(crate) with: f64,
    /// In percent.
    pub(crate) change: f64,
    pub(crate) change_error: Option<f64>,
}

/// Prompts, with a form of the state update.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub(crate) struct Form {
    pub(crate) form: String,
    /// `prompt` of the whole engine, or `state update` alone.
    pub(crate) of: String,
    pub(crate) tokens: usize,
    /// Tokens a second.
    pub(crate) rate: Figure,
}

/// Layers that are left out at every token, those first that cost least.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub(crate) struct Share {
    /// `layer` or `ffn`.
    pub(crate) part: String,
    pub(crate) layers: usize,
    /// Of all layers.
    pub(crate) share: f64,
    pub(crate) bits_per_byte: f64,
}

/// A case of the peer.
#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
pub(crate) struct PeerCase {
    pub(crate) engine: String,
    pub(crate) case: String,
    /// Tokens a second, the peer's and ours.
    pub(crate) peer: f64,
    pub(crate) ours: f64,
}

impl Case {
    /// Percent more tokens a second.
    pub(crate) fn gain(&self) -> f64 {
        100.0 * (self.ratio.median - 1.0)
    }

    /// What the ratio may be off, in percent to both sides.
    pub(crate) fn gain_spread(&self) -> f64 {
        100.0 * (self.ratio.high - self.ratio.low) / 2.0
    }

    /// Of the ceiling, without and with, in percent.
    pub(crate) fn shares(&self) -> [f64; 2] {
        self.work.map(|work| 100.0 * work / self.ceiling.median)
    }

    /// Whether it reads and writes rather than computes.
    pub(crate) fn is_memory(&self) -> bool {
        !self.name.starts_with("prefill")
    }

    /// Its work a second, with the unit, and the share of the ceiling.
    pub(crate) fn work_text(&self) -> String {
        let [_, with] = self.work;
        let [_, share] = self.shares();
        let unit = if self.is_memory() { "GB/s" } else { "GFLOP/s" };
        format!("{:.1} {unit}, {share:.0} %", with / 1e9)
    }
}

impl Row {
    /// The gain under each load, as text.
    fn gains(&self) -> String {
        let gain = |of: &Case| format!("{}: {:+.1} ({:.1}) %", of.name, of.gain(), of.gain_spread());
        self.cases.iter().map(gain).collect::<Vec<_>>().join(", ")
    }

    /// What changes of the memory of weights and of a state, as text.
    fn memory(&self) -> String {
        let changed =
            [("weights", self.weights), ("a state", self.state), ("its pending tokens", self.pending)];
        let changed = changed.into_iter().filter(|(_, [without, with])| without != with);
        let text = |(of, bytes): (&str, [u64; 2])| {
            let [without, with] = bytes.map(|bytes| bytes as f64 / 1e6);
            format!("{of} {without:.2} to {with:.2} MB")
        };
        changed.map(text).collect::<Vec<_>>().join(", ")
    }
}

impl Quality {
    /// The change, as text.
    pub(crate) fn text(&self) -> String {
        let error = self.change_error.map_or_else(String::new, |error| format!(" ({error:.4})"));
        format!("{:+.4}{error} %", self.change)
    }
}

impl Report {
    /// What the machine is and what it gave.
    pub(crate) fn heading(&self) -> Vec<String> {
        vec![
            format!("{}, on {}", self.model, self.device),
            self.machine.clone(),
            format!("commit {}, {}, `{}`", self.commit, self.date, self.command),
            format!(
                "ceilings: copy {:.1} GB/s (spread {:.0} %), matmul {:.1} GFLOP/s (spread {:.0} %)",
                self.copy.median / 1e9,
                100.0 * self.copy.spread(),
                self.matmul.median / 1e9,
                100.0 * self.matmul.spread()
            ),
        ]
    }

    /// The tables, with their captions.
    pub(crate) fn tables(&self) -> Vec<(String, Table)> {
        let mut head = vec!["optimisation", "promised", "measured speed", "memory", "promised"];
        let windows: Vec<String> = self.rows.first().map_or_else(Vec::new, |row| {
            row.quality.iter().map(|of| format!("bits/byte, windows of {}", of.window)).collect()
        });
        head.extend(windows.iter().map(String::as_str));
        let mut main = Table::new(&head);
        for row in &self.rows {
            let mut cells = vec![
                row.title.clone(),
                row.promised_speed.clone(),
                row.gains(),
                row.memory(),
                row.promised_quality.clone(),
            ];
            cells.extend(row.quality.iter().map(Quality::text));
            main.push(cells);
        }
        let mut details = Table::new(&[
            "optimisation",
            "load",
            "without, /s",
            "with, /s",
            "spread",
            "gain",
            "work, share of the ceiling",
            "ceiling's spread",
        ]);
        for (row, case) in self.rows.iter().flat_map(|row| row.cases.iter().map(move |case| (row, case))) {
            details.push(vec![
                row.name.clone(),
                case.name.clone(),
                format!("{:.1}", case.without.median),
                format!("{:.1}", case.with.median),
                format!("{:.1} %", 100.0 * case.with.spread()),
                format!("{:+.1} ({:.1}) %", case.gain(), case.gain_spread()),
                if case.name.starts_with("at rest") { String::new() } else { case.work_text() },
                format!("{:.1} %", 100.0 * case.ceiling.spread()),
            ]);
        }
        let mut said = Table::new(&["optimisation", "off from the reference", ""]);
        for row in &self.rows {
            said.push(vec![row.name.clone(), format!("{:.1e}", row.error), row.said.clone()]);
        }
        let mut tables = vec![
            (
                format!(
                    "Gains in tokens a second (half of what the median may be off, with 90 % confidence), and changes of bits per byte on {} bytes (standard error)",
                    self.text_bytes
                ),
                main,
            ),
            ("Under each load".to_owned(), details),
            ("What is to be said".to_owned(), said),
        ];
        if !self.forms.is_empty() {
            let mut forms = Table::new(&["state update", "of", "tokens", "tokens/s", "spread"]);
            for of in &self.forms {
                forms.push(vec![
                    of.form.clone(),
                    of.of.clone(),
                    of.tokens.to_string(),
                    format!("{:.0}", of.rate.median),
                    format!("{:.1} %", 100.0 * of.rate.spread()),
                ]);
            }
            tables.push(("Forms of the state update over prompts".to_owned(), forms));
        }
        if !self.shares.is_empty() {
            let mut shares = Table::new(&["left out", "layers", "share", "bits/byte"]);
            for of in &self.shares {
                shares.push(vec![
                    of.part.clone(),
                    of.layers.to_string(),
                    format!("{:.0} %", 100.0 * of.share),
                    format!("{:.4}", of.bits_per_byte),
                ]);
            }
            tables.push(("Layers left out at every token, the least missed first".to_owned(), shares));
        }
        if !self.peer.is_empty() {
            let mut peer = Table::new(&["peer", "load", "its tokens/s", "ours", "ratio"]);
            for of in &self.peer {
                peer.push(vec![
                    of.engine.clone(),
                    of.case.clone(),
                    format!("{:.1}", of.peer),
                    format!("{:.1}", of.ours),
                    format!("{:.2}", of.ours / of.peer),
                ]);
            }
            tables.push(("Beside the peer".to_owned(), peer));
        }
        if !self.left_out.is_empty() {
            let mut left = Table::new(&["left out", "why"]);
            self.left_out.iter().for_each(|(row, why)| left.push(vec![row.clone(), why.clone()]));
            tables.push(("Not measured".to_owned(), left));
        }
        tables
    }
}

/// What is faster or slower than it was under a load, beyond noise.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Moved {
    /// A row's gain: how many times as fast as without the optimisation, timed in turn, so that what else the machine did
    /// counts for nothing. Or, of no row, the plain engine's tokens a second.
    pub(crate) row: Option<String>,
    pub(crate) case: String,
    /// How many times as much as it was.
    pub(crate) ratio: f64,
    /// What is put down to noise, as a logarithm of that: both runs' spreads and, of the engine, the change of the control.
    pub(crate) noise: f64,
}

/// What no run tells apart from noise, whatever its spread: on an H100 two engines of the same kernels were up to 1 % apart.
const LEAST_NOISE: f64 = 0.03;

/// The cases of both reports that moved, and the loads under which the plain engine did.
pub(crate) fn moved(old: &Report, new: &Report) -> Vec<Moved> {
    let mut all = Vec::new();
    let mut compare = |row: Option<&str>, case: &str, [old, new]: [f64; 2], noise: f64| {
        let (ratio, noise) = (new / old, noise.max(LEAST_NOISE));
        if ratio.ln().abs() > noise {
            all.push(Moved { row: row.map(str::to_owned), case: case.to_owned(), ratio, noise });
        }
    };
    let mut loads: Vec<&str> = Vec::new();
    for (row, case) in new.cases() {
        if !loads.contains(&case.name.as_str()) {
            loads.push(&case.name);
        }
        let same = |(of, before): &(&Row, &Case)| of.name == row.name && before.name == case.name;
        if let Some((_, before)) = old.cases().find(same) {
            let noise = before.ratio.spread() + case.ratio.spread();
            compare(Some(&row.name), &case.name, [before.ratio.median, case.ratio.median], noise);
        }
    }
    for load in loads {
        if let (Some(before), Some(now)) = (old.plain(load), new.plain(load)) {
            let control = (now.control / before.control).ln().abs();
            compare(None, load, [before.median, now.median], before.spread + now.spread + control);
        }
    }
    all
}

/// The plain engine under a load, in all rows.
struct Plain {
    /// Tokens a second, and how far that may be off relative to it.
    median: f64,
    spread: f64,
    control: f64,
}

impl Report {
    fn cases(&self) -> impl Iterator<Item = (&Row, &Case)> {
        self.rows.iter().flat_map(|row| row.cases.iter().map(move |case| (row, case)))
    }

    /// What all rows say of the plain engine under a load. What the host does besides lasts longer than a case is timed: on an H100,
    /// one token after another, rows were up to 9 % apart of which each was within 1 or 3 % of itself. So they are what the
    /// spread is of, unless there are too few to tell.
    fn plain(&self, load: &str) -> Option<Plain> {
        let own = |(row, case): (&Row, &Case)| {
            let figures = [case.without, case.with].into_iter().zip(row.plain);
            let plain = figures.filter(|(_, plain)| *plain).map(|(figure, _)| figure);
            plain.map(|figure| (figure, case.ceiling.median)).collect::<Vec<_>>()
        };
        let all: Vec<_> = self.cases().filter(|(_, case)| case.name == load).flat_map(own).collect();
        let over = |of: &dyn Fn(&(Figure, f64)) -> f64| Figure::new(all.iter().map(of).collect());
        let (rows, each) = (over(&|(of, _)| of.median), over(&|(of, _)| of.spread()));
        let spread = rows.spread().max(each.median);
        let control = over(&|(_, control)| *control).median;
        (!all.is_empty()).then_some(Plain { median: rows.median, spread, control })
    }
}

#[cfg(test)]
mod tests {
    use rwkv_core::rng::SplitMix64;

    use super::{CONFIDENCE, Case, Figure, Moved, Report, Row, moved};

    fn figure(median: f64, spread: f64) -> Figure {
        Figure { median, low: median * (1.0 - spread / 2.0), high: median * (1.0 + spread / 2.0), count: 9 }
    }

    fn report(without: f64, with: f64, spread: f64, ceiling: f64) -> Report {
        let case = Case {
            name: "decode, batch 1".to_owned(),
            without: figure(without, spread),
            with: figure(with, spread),
            ratio: figure(with / without, spread),
            ceiling: figure(ceiling, 0.01),
            ..Case::default()
        };
        let row = Row { name: "skip".to_owned(), plain: [true, false], cases: vec![case], ..Row::default() };
        Report { rows: vec![row], ..Report::default() }
    }

    #[test]
    fn figures_are_medians_and_what_they_may_be_off() {
        let of = Figure::new(vec![9.0, 1.0, 5.0, 3.0, 7.0]);
        assert_eq!((of.low, of.median, of.high, of.count), (1.0, 5.0, 9.0, 5), "five");
        let one = Figure::new(vec![2.0]);
        assert_eq!((one.low, one.median, one.high, one.spread()), (2.0, 2.0, 2.0, 0.0), "one");
        assert!(Figure::new(Vec::new()).median.is_nan(), "none");
    }

    /// The median of what is drawn, of a lopsided distribution too, is where it is said to be as often as that says.
    #[test]
    fn the_median_is_where_it_is_said_to_be() {
        const DRAWS: usize = 4000;
        let mut rng = SplitMix64::new(11);
        for count in [5, 9, 11, 30] {
            let found = (0..DRAWS).filter(|_| {
                // u^2 is at most 1 for half of u in [-1, 3].
                let drawn = (0..count).map(|_| f64::from(rng.uniform(-1.0, 3.0)).powi(2).exp()).collect();
                let of = Figure::new(drawn);
                (of.low..=of.high).contains(&1f64.exp())
            });
            let share = found.count() as f64 / DRAWS as f64;
            // Three standard deviations of a share of 0.9 are 0.014.
            assert!(share > CONFIDENCE - 0.014 && share < 0.99, "{share} of {count}");
        }
    }

    #[test]
    fn a_run_is_what_it_is() {
        let of = report(100.0, 120.0, 0.02, 10.0);
        assert_eq!(moved(&of, &of), [], "itself");
        assert_eq!(moved(&of, &report(102.0, 119.0, 0.02, 10.0)), [], "within its spread");
    }

    #[test]
    fn what_was_slowed_is_reported() {
        let of = report(100.0, 120.0, 0.02, 10.0);
        let slowed = moved(&of, &report(100.0, 90.0, 0.02, 10.0));
        let [Moved { row, case, ratio, .. }] = &slowed[..] else { panic!("{slowed:?}") };
        assert_eq!((row.as_deref(), case.as_str(), *ratio), (Some("skip"), "decode, batch 1", 0.75), "it");
        assert_eq!(moved(&of, &report(100.0, 90.0, 0.3, 10.0)), [], "not told from noise");
        assert_eq!(moved(&of, &report(75.0, 90.0, 0.02, 7.5)), [], "the machine was slower by as much");
        let [Moved { row: None, .. }] = &moved(&of, &report(50.0, 60.0, 0.02, 10.0))[..] else {
            panic!("all of the engine, and not the row")
        };
        assert_eq!(moved(&Report::default(), &of), [], "a row that is new");
    }

    /// The plain engine is what all rows say of it: one that fell into a bad moment says nothing, all together do, and their
    /// spread is what they are apart.
    #[test]
    fn the_engine_is_of_all_rows() {
        let of = |rates: [f64; 5]| {
            let rows = rates.map(|rate| report(rate, 1.2 * rate, 0.01, 10.0).rows.remove(0));
            Report { rows: rows.to_vec(), ..Report::default() }
        };
        let usual = of([100.0, 101.0, 100.5, 99.5, 99.0]);
        assert_eq!(moved(&usual, &of([100.0, 101.0, 90.0, 99.5, 99.0])), [], "one row");
        let [Moved { row: None, ratio, .. }] = &moved(&usual, &of([90.0, 91.0, 90.5, 89.5, 89.0]))[..] else {
            panic!("all of them, once")
        };
        assert!((ratio - 0.9).abs() < 1e-9, "{ratio}");
        assert_eq!(moved(&usual, &of([93.0, 108.0, 94.0, 109.0, 92.0])), [], "as far apart as that");
    }
}
