//! The figures as one picture: the price of every row, and what it retains.

use std::path::Path;

use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::rows::PLAIN;
use super::{Figures, UNREAD, sorted};
use crate::picture::{COLOURS, FONT, fail};

/// Changes up to this, in percent, are drawn to scale; beyond, the axis is logarithmic, to both sides.
const SMALL: f64 = 1e-3;

const GREY: RGBColor = RGBColor(0x77, 0x77, 0x77);

/// Width of the picture, and of a row.
const WIDTH: u32 = 1100;
const ROW: u32 = 24;

/// Height of what stands around the rows, and of the retention.
const AROUND: u32 = 130;
const RETENTION: u32 = 560;

/// Width of the names beside the retention.
const LEGEND: u32 = 170;

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// A linear axis with ticks where they are wanted.
struct Axis {
    from: f64,
    to: f64,
    /// Where, and what is written there.
    ticks: Vec<(f64, String)>,
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (low, high): (i32, i32)) -> i32 {
        RangedCoordf64::from(self.from..self.to).map(value, (low, high))
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.iter().map(|(at, _)| *at).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.from..self.to
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        let tick = self.ticks.iter().find(|(at, _)| at == value);
        tick.map_or_else(String::new, |(_, text)| text.clone())
    }
}

pub(super) fn draw(figures: &Figures, path: &Path) -> anyhow::Result<()> {
    let mut names: Vec<&str> = Vec::new();
    for of in figures.quality.iter().filter(|of| of.row != PLAIN) {
        if !names.contains(&&*of.row) {
            names.push(&of.row);
        }
    }
    let prices = AROUND + ROW * u32::try_from(names.len())?;
    let height = prices + if figures.retention.is_empty() { 0 } else { RETENTION };
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE).map_err(fail)?;
    let (above, below) = area.split_vertically(prices);
    price(&above, figures, &names)?;
    if !figures.retention.is_empty() {
        retention(&below, figures)?;
    }
    area.present().map_err(fail)
}

/// Where a change lies on the axis.
fn place(percent: f64) -> f64 {
    let size = percent.abs() / SMALL;
    percent.signum() * if size <= 1.0 { size } else { 1.0 + size.log10() }
}

/// The change that lies there.
fn percent_at(place: f64) -> f64 {
    let size = place.abs();
    place.signum() * SMALL * if size <= 1.0 { size } else { 10f64.powf(size - 1.0) }
}

fn price(area: &Area<'_>, figures: &Figures, names: &[&str]) -> anyhow::Result<()> {
    let places = figures.quality.iter().map(|of| place(of.change));
    let (low, high) = places.fold((-1f64, 2f64), |(low, high), at| (low.min(at), high.max(at)));
    let (low, high) = (low.floor(), high.ceil());
    let mut percents = Axis { from: low, to: high, ticks: Vec::new() };
    let mut tick = low;
    while tick <= high {
        // Without the digits that are rounding.
        let percent = (percent_at(tick) * 1e6).round() / 1e6;
        percents.ticks.push((tick, if tick == 0.0 { "0".to_owned() } else { format!("{percent:+}") }));
        tick += 1.0;
    }
    let rows = names.len() as f64;
    // The first row is the uppermost.
    let row_of = |name: &str| names.iter().position(|of| *of == name).map(|index| rows - index as f64);
    let ticks = names.iter().filter_map(|name| Some((row_of(name)?, (*name).to_owned()))).collect();
    let rows_axis = Axis { from: 0.4, to: rows + 0.6, ticks };
    let caption = format!(
        "Change of bits per byte against {PLAIN} (line at 0), on {} bytes of held-out text",
        figures.text_bytes
    );
    let mut chart = ChartBuilder::on(area)
        .caption(caption, (FONT, 19))
        .margin(12)
        .margin_right(30)
        .x_label_area_size(48)
        .y_label_area_size(150)
        .build_cartesian_2d(percents, rows_axis)
        .map_err(fail)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
        .x_desc("percent; logarithmic beyond 0.001")
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 14))
        .draw()
        .map_err(fail)?;
    chart
        .draw_series(LineSeries::new([(0.0, 0.4), (0.0, rows + 0.6)], BLACK.stroke_width(2)))
        .map_err(fail)?;
    let windows = sorted(figures.quality.iter().map(|of| of.window));
    for (index, &window) in windows.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        // Beside each other, where they would cover each other.
        let beside = (index as f64 - (windows.len() - 1) as f64 / 2.0) * -0.2;
        let of_window = figures.quality.iter().filter(|of| of.window == window);
        let points: Vec<(f64, f64, f64, f64)> = of_window
            .filter_map(|of| {
                let error = 2.0 * of.change_error.unwrap_or(0.0);
                let at = row_of(&of.row)? + beside;
                Some((place(of.change), at, place(of.change - error), place(of.change + error)))
            })
            .collect();
        let bars = points.iter().map(|&(_, at, from, to)| {
            PathElement::new([(from.clamp(low, high), at), (to.clamp(low, high), at)], colour.stroke_width(1))
        });
        chart.draw_series(bars).map_err(fail)?;
        chart
            .draw_series(points.iter().map(|&(x, at, ..)| Circle::new((x, at), 4, colour.filled())))
            .map_err(fail)?
            .label(format!("windows of {window}"))
            .legend(move |(x, y)| Circle::new((x + 10, y), 4, colour.filled()));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.9))
        .border_style(GREY)
        .label_font((FONT, 14))
        .draw()
        .map_err(fail)
}

fn retention(area: &Area<'_>, figures: &Figures) -> anyhow::Result<()> {
    let (area, legend) = area.split_horizontally(WIDTH - LEGEND);
    let distances = sorted(figures.retention.iter().map(|of| of.distance));
    let logarithm = |distance: usize| (distance.max(1) as f64).log2();
    let (first, last) = (distances.first().copied().unwrap_or(1), distances.last().copied().unwrap_or(2));
    let ticks = distances.iter().map(|&distance| (logarithm(distance), distance.to_string())).collect();
    let bytes = Axis { from: logarithm(first) - 0.3, to: logarithm(last) + 0.3, ticks };
    let gains = figures.retention.iter().map(|of| of.gain);
    let (low, high) = gains.fold((0f64, 0.1f64), |(low, high), gain| (low.min(gain), high.max(gain)));
    let mut chart = ChartBuilder::on(&area)
        .caption("Bits per byte gained on a passage that comes again", (FONT, 19))
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(80)
        .build_cartesian_2d(bytes, low - 0.02..high * 1.05)
        .map_err(fail)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
        .x_desc("bytes of other text between")
        .y_desc("bits per byte")
        .y_label_formatter(&|gain| format!("{gain:.2}"))
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 14))
        .draw()
        .map_err(fail)?;
    let mut names: Vec<&str> = Vec::new();
    for of in &figures.retention {
        if !names.contains(&&*of.row) {
            names.push(&of.row);
        }
    }
    // The line to compare with is drawn last, over the others.
    names.sort_by_key(|name| *name == PLAIN);
    for (index, name) in names.iter().enumerate() {
        let (colour, wide, hollow) = match *name {
            PLAIN => (BLACK, 3, false),
            UNREAD => (GREY, 3, true),
            // The colours come round, and the second time the points are hollow.
            _ => (COLOURS[index % COLOURS.len()], 1, index / COLOURS.len() % 2 == 1),
        };
        let of_row = figures.retention.iter().filter(|of| of.row == *name);
        let points: Vec<(f64, f64)> = of_row.map(|of| (logarithm(of.distance), of.gain)).collect();
        let point = if hollow { colour.stroke_width(2) } else { colour.filled() };
        chart
            .draw_series(LineSeries::new(points.iter().copied(), colour.stroke_width(wide)))
            .map_err(fail)?;
        chart.draw_series(points.iter().map(|&at| Circle::new(at, 4, point))).map_err(fail)?;
        let y = 50 + 20 * i32::try_from(index)?;
        legend.draw(&PathElement::new([(4, y), (30, y)], colour.stroke_width(wide))).map_err(fail)?;
        legend.draw(&Circle::new((17, y), 4, point)).map_err(fail)?;
        legend.draw(&Text::new((*name).to_owned(), (38, y - 7), (FONT, 14))).map_err(fail)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{percent_at, place};

    #[test]
    fn the_axis_leads_back() {
        for percent in [-120.0, -0.5, -0.0005, 0.0, 0.0002, 0.001, 3.0] {
            assert!((percent_at(place(percent)) - percent).abs() < 1e-9, "{percent}");
        }
    }
}
