//! The report as one file that opens without a network: tables, and plots as SVG.

use std::fmt::Write as _;

use plotters::prelude::*;

use super::report::Report;
use crate::picture::{COLOURS, FONT, fail};

const STYLE: &str = "body{font:15px/1.45 sans-serif;margin:2em auto;max-width:1200px;padding:0 1em}\
    table{border-collapse:collapse;margin:1em 0}td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left;vertical-align:top}\
    th{background:#f3f3f3}code{background:#f3f3f3}svg{max-width:100%;height:auto}";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The whole page.
pub(super) fn page(report: &Report) -> anyhow::Result<String> {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>rwkv: {}</title><style>{STYLE}</style></head><body>\n<h1>What each optimisation brings, and what it costs</h1>\n",
        escaped(&report.model)
    );
    for line in report.heading() {
        writeln!(page, "<p>{}</p>", escaped(&line))?;
    }
    for (name, plot) in plots(report)? {
        writeln!(page, "<figure id=\"{name}\">{plot}</figure>")?;
    }
    for (caption, table) in report.tables() {
        writeln!(page, "<h2>{}</h2>\n<table>", escaped(&caption))?;
        for (index, row) in table.rows().iter().enumerate() {
            let tag = if index == 0 { "th" } else { "td" };
            let cells = row.iter().map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell)));
            writeln!(page, "<tr>{}</tr>", cells.collect::<String>())?;
        }
        page += "</table>\n";
    }
    page += "</body></html>\n";
    Ok(page)
}

/// The plots for which there are figures, by name.
pub(super) fn plots(report: &Report) -> anyhow::Result<Vec<(&'static str, String)>> {
    let mut plots = Vec::new();
    if report.rows.iter().any(|row| !row.cases.is_empty()) {
        plots.push(("gains", gains(report)?));
    }
    if !report.shares.is_empty() {
        plots.push(("layers", shares(report)?));
    }
    if !report.forms.is_empty() {
        plots.push(("forms", forms(report)?));
    }
    Ok(plots)
}

/// Percent beyond which bars are cut off: what is ten times as fast would leave nothing to be seen of the others.
const MOST: f64 = 150.0;

/// Percent gained, a bar for each load of each row.
#[expect(clippy::cast_possible_truncation, reason = "places within a picture")]
fn gains(report: &Report) -> anyhow::Result<String> {
    const BAR: i32 = 18;
    const NAMES: i32 = 290;
    let cases: Vec<_> =
        report.rows.iter().flat_map(|row| row.cases.iter().map(move |of| (row, of))).collect();
    let ends = cases.iter().flat_map(|(_, of)| [of.ratio.low, of.ratio.high].map(|of| 100.0 * (of - 1.0)));
    let (low, high) = ends.fold((-5.0f64, 5.0f64), |(low, high), of| (low.min(of), high.max(of)));
    let (low, high) = (low * 1.1, high.min(MOST) * 1.1);
    let (width, height) = (1100, 60 + BAR * i32::try_from(cases.len())?);
    let place = |percent: f64| {
        NAMES + ((percent.min(high) - low) / (high - low) * f64::from(width - NAMES - 80)).round() as i32
    };
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (u32::try_from(width)?, u32::try_from(height)?))
            .into_drawing_area();
        area.fill(&WHITE).map_err(fail)?;
        let title = format!(
            "Tokens a second gained, in percent, bars cut off beyond {MOST}; lines are what medians may be off"
        );
        area.draw(&Text::new(title, (12, 8), (FONT, 18))).map_err(fail)?;
        let bottom = height - 16;
        area.draw(&PathElement::new([(place(0.0), 34), (place(0.0), bottom)], BLACK)).map_err(fail)?;
        for (index, (row, case)) in (0..).zip(&cases) {
            let y = 38 + BAR * index;
            let colour = COLOURS[match case.name.as_str() {
                "decode, batch 1" => 0,
                name if name.starts_with("decode") => 1,
                name if name.starts_with("prefill") => 2,
                _ => 3,
            }];
            let text = format!("{}: {}", row.name, case.name);
            area.draw(&Text::new(text, (12, y), (FONT, 13))).map_err(fail)?;
            let corners = [(place(0.0), y), (place(case.gain()), y + BAR - 5)];
            area.draw(&Rectangle::new(corners, colour.filled())).map_err(fail)?;
            let ends =
                [case.ratio.low, case.ratio.high].map(|of| (place(100.0 * (of - 1.0)), y + BAR / 2 - 3));
            area.draw(&PathElement::new(ends, BLACK.stroke_width(2))).map_err(fail)?;
            let at = (place(case.gain().max(100.0 * (case.ratio.high - 1.0)).max(0.0)) + 6, y);
            area.draw(&Text::new(format!("{:+.1}", case.gain()), at, (FONT, 13))).map_err(fail)?;
        }
        area.present().map_err(fail)?;
    }
    Ok(svg)
}

/// A line of a plot.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// Lines over a horizontal axis, whose places are labelled by `label`.
fn lines(
    title: &str,
    [x_name, y_name]: [&str; 2],
    all: &[Line],
    label: &dyn Fn(&f64) -> String,
) -> anyhow::Result<String> {
    let points = || all.iter().flat_map(|line| &line.points);
    let range = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), of| (low.min(of), high.max(of)))
    };
    let (left, right) = range(&mut points().map(|of| of.0));
    let (low, high) = range(&mut points().map(|of| of.1));
    let margin = (high - low).max(1e-9) * 0.06;
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (1100, 480)).into_drawing_area();
        area.fill(&WHITE).map_err(fail)?;
        let mut chart = ChartBuilder::on(&area)
            .caption(title, (FONT, 18))
            .margin(12)
            .x_label_area_size(46)
            .y_label_area_size(84)
            .build_cartesian_2d(left..right.max(left + 1e-9), low - margin..high + margin)
            .map_err(fail)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(0xdd, 0xdd, 0xdd))
            .x_desc(x_name)
            .y_desc(y_name)
            .x_label_formatter(label)
            .label_style((FONT, 14))
            .axis_desc_style((FONT, 14))
            .draw()
            .map_err(fail)?;
        for (index, line) in all.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            chart
                .draw_series(LineSeries::new(line.points.iter().copied(), colour.stroke_width(2)))
                .map_err(fail)?
                .label(line.name.clone())
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
            chart
                .draw_series(line.points.iter().map(|&at| Circle::new(at, 3, colour.filled())))
                .map_err(fail)?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .background_style(WHITE.mix(0.9))
            .border_style(RGBColor(0x77, 0x77, 0x77))
            .label_font((FONT, 14))
            .draw()
            .map_err(fail)?;
        area.present().map_err(fail)?;
    }
    Ok(svg)
}

/// Names that occur, in the order of their first.
fn names(all: impl Iterator<Item = String>) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for name in all {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn shares(report: &Report) -> anyhow::Result<String> {
    let line = |part: String| {
        let of_part = report.shares.iter().filter(|of| of.part == part);
        let points = of_part.map(|of| (100.0 * of.share, of.bits_per_byte)).collect();
        Line {
            name: if part == "ffn" { "channel mixes".to_owned() } else { "whole layers".to_owned() },
            points,
        }
    };
    let all: Vec<Line> =
        names(report.shares.iter().map(|of| of.part.clone())).into_iter().map(line).collect();
    let title = "Quality over the share of layers left out at every token, the least missed first";
    lines(title, ["percent of the layers", "bits per byte"], &all, &|share| format!("{share:.0}"))
}

fn forms(report: &Report) -> anyhow::Result<String> {
    let of_update = report.forms.iter().filter(|of| of.of == "state update");
    let of = if of_update.clone().next().is_some() { "state update" } else { "prompt" };
    let line = |form: String| {
        let of_form = report.forms.iter().filter(|row| row.form == form && row.of == of);
        let points = of_form.map(|of| ((of.tokens as f64).log2(), of.rate.median)).collect();
        Line { name: form, points }
    };
    let all: Vec<Line> = names(report.forms.iter().map(|of| of.form.clone())).into_iter().map(line).collect();
    let title = format!("Forms of the state update over the length of a prompt: {of}");
    lines(&title, ["tokens", "tokens a second"], &all, &|log| format!("{:.0}", log.exp2()))
}

#[cfg(test)]
mod tests {
    use super::super::report::{Case, Figure, Report, Row};
    use super::gains;

    /// What is a hundred times as fast is cut off within the picture, says so, and leaves the others to be seen.
    #[test]
    fn bars_are_cut_off() {
        let case = |ratio| Case {
            name: "decode, batch 1".to_owned(),
            ratio: Figure::new(vec![ratio]),
            ..Case::default()
        };
        let row = Row { cases: vec![case(1.2), case(100.0)], ..Row::default() };
        let svg = gains(&Report { rows: vec![row], ..Report::default() }).unwrap();
        let width = |bar: &str| bar.split("width=\"").nth(1)?.split('"').next()?.parse::<u32>().ok();
        let bars: Vec<u32> =
            svg.lines().filter(|of| of.contains("height=\"13\"")).filter_map(width).collect();
        assert!(matches!(bars[..], [50..200, 500..800]), "{bars:?}");
        assert!(svg.contains("+9900.0"), "what it is");
    }
}
