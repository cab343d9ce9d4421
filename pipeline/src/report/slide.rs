//! Comparisons and evaluations as a picture for a slide: one SVG with a grid of panels.

use serde_json::Value;

use super::charts::{thinned, tick_label, ticks};
use super::evaluation::{Grid, Losses, colour, heat, positions, real};
use super::text::{escape, number, percent};
use crate::compare::{Comparison, LossRow, Side, firsts};
use crate::{Error, Result};

const WIDTH: f64 = 1920.0;
const HEIGHT: f64 = 1080.0;
const MARGIN: f64 = 48.0;
const INK: &str = "#1d2430";
const SOFT: &str = "#667085";
const RULE: &str = "#d5dae1";
const BETTER: &str = "#0a7d4f";
const WORSE: &str = "#b3261e";
/// Colours of the series: those of Okabe and Ito, which people with colour blindness can tell apart, and some
/// more. The corpus is grey.
const SERIES: [&str; 11] = [
    "#9aa3af", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#1d2430",
    "#8c564b", "#b5bd3a",
];
/// DejaVu Sans and Verdana have letters of the same width, and one of them is installed nearly everywhere.
const FONTS: &str = "DejaVu Sans, Verdana, sans-serif";
/// The average width of a letter, relative to the font size.
const LETTER: f64 = 0.6;
/// More points than this are not visible in a line.
const MAX_POINTS: usize = 200;
/// More rows than this cannot be read from afar.
const MAX_ROWS: usize = 20;

/// One panel of the picture.
pub struct Panel {
    title: String,
    body: Body,
}

enum Body {
    Heat(Grid),
    Numbers { head: Vec<String>, rows: Vec<Vec<(String, &'static str)>> },
    Bars { names: Vec<String>, groups: Vec<(String, Vec<f64>)> },
    Lines(Vec<(String, Vec<(f64, f64)>)>),
}

/// The panels of an evaluation; empty if its result is a single number.
pub fn evaluation(name: &str, notes: &Value) -> Vec<Panel> {
    if let Some(grid) = heat(name, notes, None) {
        let title = format!("{name}: {} % on average", percent(real(&notes["score"])));
        return vec![Panel { title, body: Body::Heat(grid) }];
    }
    if name != "loss" {
        return vec![];
    }
    let losses = Losses::of(notes);
    let row = |(domain, cells): &(String, Vec<Option<(f64, Option<f64>)>>)| {
        let cell = |cell: &Option<(f64, Option<f64>)>| match cell {
            None => (String::new(), INK),
            Some((loss, None)) => (format!("{loss:.3}"), INK),
            Some((loss, Some(error))) => (format!("{loss:.3} ±{error:.3}"), INK),
        };
        [(domain.clone(), INK)].into_iter().chain(cells.iter().map(cell)).collect()
    };
    let head = [String::new()].into_iter().chain(losses.ranges).collect();
    let rows = losses.rows.iter().map(row).collect();
    vec![Panel { title: "Loss, nats a token".into(), body: Body::Numbers { head, rows } }]
}

/// The panels of a comparison: the tokens drawn (paper, Figure 2), losses (Table 5), training losses, and
/// grids of scores (Figure 3).
pub fn comparison(sides: &[Side], compared: &Comparison) -> Vec<Panel> {
    let (mut panels, sides) = (vec![], firsts(sides));
    let names: Vec<String> = ["corpus".to_owned()].into_iter().chain(compared.names.clone()).collect();
    for (title, all) in [
        ("Tokens by length of their document, %", &compared.lengths),
        ("Tokens by domain, %", &compared.domains),
    ] {
        let groups = all.iter().map(|shares| {
            (shares.name.clone(), [shares.corpus].iter().chain(&shares.sides).map(|s| s * 100.0).collect())
        });
        let body = Body::Bars { names: names.clone(), groups: groups.collect() };
        panels.push(Panel { title: title.into(), body });
    }
    if !compared.loss.is_empty() {
        let row = |row: &LossRow| {
            let name = format!("{} {}", row.domain(), positions(&row.positions));
            let differences = row.differences.iter().map(|difference| match difference {
                None => (String::new(), INK),
                Some(d) => {
                    let tone = match d.better() {
                        None => SOFT,
                        Some(true) => BETTER,
                        Some(false) => WORSE,
                    };
                    let error = d.error.map_or(String::new(), |error| format!(" ±{error:.3}"));
                    (format!("{:+.3}{error}", d.mean), tone)
                }
            });
            [(name, INK), (format!("{:.3}", row.loss), INK)].into_iter().chain(differences).collect()
        };
        let head = [String::new()].into_iter().chain(compared.names.clone()).collect();
        // the ranges of the paper's Table 5
        let few = compared.loss.len() <= MAX_ROWS;
        let shown = |row: &&LossRow| few || ["0–4K", "4K–128K"].contains(&positions(&row.positions).as_str());
        let rows = compared.loss.iter().filter(shown).map(row).collect();
        let body = Body::Numbers { head, rows };
        let title = "Loss, and the others' difference; coloured where it counts".into();
        panels.push(Panel { title, body });
    }
    let lines = sides.iter().map(|side| (side.name.clone(), side.training()));
    let lines: Vec<_> = lines.filter(|(_, points)| points.len() > 1).collect();
    if !lines.is_empty() {
        panels.push(Panel { title: "Loss by tokens trained".into(), body: Body::Lines(lines) });
    }
    for name in ["needle", "retrieval"] {
        for side in &sides {
            let trained = side.manifest.conf.pack.sequence_tokens.0;
            let notes = side.manifest.summary.evaluations.get(name);
            if let Some((notes, grid)) = notes.and_then(|n| Some((n, heat(name, n, Some(trained))?))) {
                let score = percent(real(&notes["score"]));
                panels.push(Panel {
                    title: format!("{}: {name} {score} %", side.name),
                    body: Body::Heat(grid),
                });
            }
        }
    }
    panels
}

/// The rectangle that something is drawn in.
#[derive(Clone, Copy)]
struct Area {
    x: f64,
    y: f64,
    width: f64,
    height: f64,
}

/// The picture as SVG, 1,920 by 1,080 pixels.
///
/// # Errors
/// [`Error::Usage`] if there are no panels.
pub fn svg(title: &str, panels: &[Panel]) -> Result<String> {
    if panels.is_empty() {
        return Err(Error::usage("there is nothing to draw", "use --html or --json for single numbers"));
    }
    let mut draw = Drawing(String::new());
    draw.text(MARGIN, 76.0, 36.0, Anchor::Start, INK, true, title, WIDTH - 2.0 * MARGIN);
    let columns = (panels.len() as f64).sqrt().ceil().max(1.0);
    let rows = (panels.len() as f64 / columns).ceil();
    let (left, top) = (MARGIN, 110.0);
    let (wide, tall) = ((WIDTH - 2.0 * left) / columns, (HEIGHT - top - 24.0) / rows);
    for (i, panel) in panels.iter().enumerate() {
        let (row, column) = ((i as f64 / columns).floor(), i as f64 % columns);
        let area =
            Area { x: left + column * wide, y: top + row * tall, width: wide - 32.0, height: tall - 24.0 };
        draw.panel(panel, area);
    }
    Ok(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"{FONTS}\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n{}</svg>\n",
        draw.0
    ))
}

#[derive(Clone, Copy)]
enum Anchor {
    Start,
    Middle,
    End,
}

struct Drawing(String);

impl Drawing {
    fn rect(&mut self, area: Area, fill: &str) {
        let Area { x, y, width, height } = area;
        self.0 += &format!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{fill}\"/>\n"
        );
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), style: &str) {
        let ((x1, y1), (x2, y2)) = (from, to);
        self.0 += &format!("<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" {style}/>\n");
    }

    /// A line of text. If it is wider than `room` its middle is left out, because names that begin alike
    /// differ at their ends.
    #[allow(clippy::too_many_arguments)]
    fn text(
        &mut self,
        x: f64,
        y: f64,
        size: f64,
        anchor: Anchor,
        fill: &str,
        bold: bool,
        text: &str,
        room: f64,
    ) {
        let (fits, long) = (((room / (size * LETTER)) as usize).max(1), text.chars().count());
        let text: String = match fits < long {
            false => text.to_owned(),
            true => text
                .chars()
                .take(fits / 2)
                .chain(['…'])
                .chain(text.chars().skip(long - (fits - 1) / 2))
                .collect(),
        };
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let weight = if bold { " font-weight=\"bold\"" } else { "" };
        self.0 += &format!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size:.1}\" text-anchor=\"{anchor}\" fill=\"{fill}\"{weight}>{}</text>\n",
            escape(&text)
        );
    }

    fn panel(&mut self, panel: &Panel, area: Area) {
        self.text(area.x, area.y + 24.0, 20.0, Anchor::Start, INK, true, &panel.title, area.width);
        let inside = Area { y: area.y + 40.0, height: area.height - 40.0, ..area };
        match &panel.body {
            Body::Heat(grid) => self.heat(grid, inside),
            Body::Numbers { head, rows } => self.numbers(head, rows, inside),
            Body::Bars { names, groups } => self.bars(names, groups, inside),
            Body::Lines(lines) => self.lines(lines, inside),
        }
    }

    /// A grid of scores as in the paper's Figure 1: red to green, with a white dashed line at the length of
    /// the training sequences.
    fn heat(&mut self, grid: &Grid, area: Area) {
        let names = grid.rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0) as f64;
        let left = (names * 15.0 * LETTER + 12.0).min(area.width / 3.0);
        let wide = (area.width - left) / grid.lengths.len().max(1) as f64;
        let tall = (area.height - 28.0) / grid.rows.len().max(1) as f64;
        for (row, (name, scores)) in grid.rows.iter().enumerate() {
            let y = area.y + row as f64 * tall;
            self.text(area.x + left - 8.0, y + tall / 2.0 + 5.0, 15.0, Anchor::End, SOFT, false, name, left);
            for (column, score) in scores.iter().enumerate() {
                let Some(score) = score else { continue };
                let x = area.x + left + column as f64 * wide;
                let cell = Area { x, y, width: wide - 1.0, height: tall - 1.0 };
                self.rect(cell, &colour(*score).replace(' ', ","));
                if wide >= 26.0 && tall >= 14.0 {
                    let (score, middle) = (format!("{:.0}", score * 100.0), x + wide / 2.0);
                    let size = (tall * 0.5).clamp(10.0, 18.0);
                    self.text(
                        middle,
                        y + tall / 2.0 + size * 0.36,
                        size,
                        Anchor::Middle,
                        INK,
                        false,
                        &score,
                        wide,
                    );
                }
            }
        }
        let bottom = area.y + grid.rows.len() as f64 * tall;
        // label as many lengths as there is room for
        let every = ((7.0 * 14.0 * LETTER) / wide).ceil().max(1.0) as usize;
        for (column, length) in grid.lengths.iter().enumerate().step_by(every) {
            let x = area.x + left + (column as f64 + 0.5) * wide;
            self.text(
                x,
                bottom + 20.0,
                14.0,
                Anchor::Middle,
                SOFT,
                false,
                &number(*length),
                wide * every as f64,
            );
        }
        if let Some(beyond) = grid.beyond() {
            let x = area.x + left + beyond as f64 * wide;
            let style = "stroke=\"#ffffff\" stroke-width=\"5\" stroke-dasharray=\"12 8\"";
            self.line((x, area.y), (x, bottom), style);
        }
    }

    fn numbers(&mut self, head: &[String], rows: &[Vec<(String, &'static str)>], area: Area) {
        let tall = (area.height / (rows.len() + 1) as f64).min(40.0);
        let size = (tall * 0.58).min(17.0);
        // names take two columns
        let wide = area.width / (head.len() + 1) as f64;
        let head: Vec<(String, &'static str)> = head.iter().map(|name| (name.clone(), SOFT)).collect();
        let letters = (wide * 0.96 / (size * LETTER)) as usize;
        let crowded =
            rows.iter().flat_map(|row| row.iter().skip(1)).any(|(text, _)| text.chars().count() > letters);
        for (i, row) in [&head].into_iter().chain(rows).enumerate() {
            let y = area.y + (i as f64 + 0.7) * tall;
            for (column, (text, tone)) in row.iter().enumerate() {
                match column {
                    0 => self.text(area.x, y, size, Anchor::Start, tone, false, text, wide * 1.9),
                    _ => {
                        let x = area.x + (column + 2) as f64 * wide;
                        // where the columns are too narrow, the errors are left out
                        let text = text
                            .split_once(" ±")
                            .filter(|_| crowded)
                            .map_or(text.as_str(), |(number, _)| number);
                        self.text(x, y, size, Anchor::End, tone, false, text, wide * 0.96);
                    }
                }
            }
            let below = area.y + (i + 1) as f64 * tall;
            self.line((area.x, below), (area.x + area.width, below), &format!("stroke=\"{RULE}\""));
        }
    }

    /// Draws the legend at the top, and returns the area that is left.
    fn legend<'a>(&mut self, names: impl Iterator<Item = (usize, &'a String)>, area: Area) -> Area {
        let (mut x, mut y) = (area.x, area.y + 14.0);
        for (i, name) in names {
            let wide = name.chars().count() as f64 * 14.0 * LETTER + 34.0;
            if x > area.x && x + wide > area.x + area.width {
                (x, y) = (area.x, y + 20.0);
            }
            self.rect(Area { x, y: y - 11.0, width: 12.0, height: 12.0 }, SERIES[i % SERIES.len()]);
            self.text(x + 18.0, y, 14.0, Anchor::Start, SOFT, false, name, area.width);
            x += wide;
        }
        let top = y + 14.0;
        Area { y: top, height: area.y + area.height - top, ..area }
    }

    /// Draws the axis with its values on the left, and returns the area that is left, with the axis's limits.
    fn axis(&mut self, area: Area, low: f64, high: f64) -> (Area, f64, f64) {
        let ticks = ticks(low, high, 4);
        let (low, high) = (ticks[0], ticks[ticks.len() - 1]);
        let inside = Area { x: area.x + 52.0, width: area.width - 52.0, height: area.height - 28.0, ..area };
        for tick in ticks {
            let y = inside.y + (high - tick) / (high - low) * inside.height;
            self.line((inside.x, y), (inside.x + inside.width, y), &format!("stroke=\"{RULE}\""));
            self.text(inside.x - 8.0, y + 5.0, 14.0, Anchor::End, SOFT, false, &tick_label(tick), 52.0);
        }
        (inside, low, high)
    }

    fn bars(&mut self, names: &[String], groups: &[(String, Vec<f64>)], area: Area) {
        let area = self.legend(names.iter().enumerate(), area);
        let most = groups.iter().flat_map(|(_, values)| values).copied().fold(0.1, f64::max);
        let (inside, _, high) = self.axis(area, 0.0, most);
        let wide = inside.width / groups.len().max(1) as f64;
        let bar = wide * 0.86 / names.len().max(1) as f64;
        for (group, (name, values)) in groups.iter().enumerate() {
            let left = inside.x + group as f64 * wide;
            for (i, value) in values.iter().enumerate() {
                let tall = value / high * inside.height;
                let y = inside.y + inside.height - tall;
                let own = Area { x: left + wide * 0.07 + i as f64 * bar, y, width: bar * 0.92, height: tall };
                self.rect(own, SERIES[i % SERIES.len()]);
            }
            let bottom = inside.y + inside.height + 20.0;
            self.text(left + wide / 2.0, bottom, 13.0, Anchor::Middle, SOFT, false, name, wide);
        }
    }

    fn lines(&mut self, lines: &[(String, Vec<(f64, f64)>)], area: Area) {
        // the corpus has the first colour
        let area = self.legend(lines.iter().enumerate().map(|(i, (name, _))| (i + 1, name)), area);
        let lines: Vec<Vec<(f64, f64)>> =
            lines.iter().map(|(_, points)| thinned(points, MAX_POINTS).1).collect();
        let all = || lines.iter().flatten();
        let low = all().map(|p| p.1).fold(f64::INFINITY, f64::min);
        let (most, high) = all().fold((1.0, low), |(x, y), p| (p.0.max(x), p.1.max(y)));
        let (inside, low, high) = self.axis(area, low, high);
        let place = |(x, y): &(f64, f64)| {
            let (x, y) = (x / most * inside.width, (high - y) / (high - low) * inside.height);
            format!("{:.1},{:.1}", inside.x + x, inside.y + y)
        };
        for (i, points) in lines.iter().enumerate() {
            let points: Vec<String> = points.iter().map(place).collect();
            self.0 += &format!(
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"2.5\"/>\n",
                points.join(" "),
                SERIES[(i + 1) % SERIES.len()]
            );
        }
        for tick in ticks(0.0, most, 5).into_iter().filter(|tick| *tick <= most) {
            let x = inside.x + tick / most * inside.width;
            let bottom = inside.y + inside.height + 20.0;
            self.text(x, bottom, 14.0, Anchor::Middle, SOFT, false, &number(tick as u64), 120.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn needle() -> Value {
        let cell =
            |length: u64, depth: f64, score: f64| json!({ "length": length, "depth": depth, "score": score });
        json!({ "score": 0.75, "cells": [
            cell(1024, 0.0, 1.0), cell(1024, 100.0, 1.0), cell(2048, 0.0, 0.0), cell(2048, 100.0, 1.0),
        ] })
    }

    #[test]
    fn a_grid_is_red_and_green_where_its_scores_are_and_has_the_dashed_line() {
        let grid = heat("needle", &needle(), Some(1024)).unwrap();
        let svg = svg("a model", &[Panel { title: "needle".into(), body: Body::Heat(grid) }]).unwrap();
        // two rows of 427 from y = 150; the left column is 1,024 tokens, the right one 2,048
        let (green, red) = ("rgb(12,215,159)", "rgb(240,73,110)");
        let cells: Vec<&str> = svg.lines().filter(|line| line.contains("fill=\"rgb(")).collect();
        for (cell, (y, fill)) in
            cells.iter().zip([("150.0", green), ("150.0", red), ("577.0", green), ("577.0", green)])
        {
            assert!(cell.contains(&format!("y=\"{y}\"")) && cell.contains(fill), "{cell}");
        }
        assert_eq!(cells.len(), 4);
        let x = cells[1].split('"').nth(1).unwrap();
        let line = format!("<line x1=\"{x}\" y1=\"150.0\" x2=\"{x}\" y2=\"1004.0\" stroke=\"#ffffff\"");
        assert!(svg.contains(&line), "no white line between the columns: {svg}");
    }

    #[test]
    fn one_number_is_no_picture() {
        let error = svg("x", &evaluation("bookqa", &json!({ "f1": 0.5 }))).unwrap_err().to_string();
        assert!(error.contains("nothing to draw"), "{error}");
    }

    #[test]
    fn a_name_is_text_and_no_markup() {
        let svg = svg("a < b & \"c\"\u{0}\u{ffff}", &evaluation("needle", &needle())).unwrap();
        assert!(svg.contains("a &lt; b &amp; ") && !svg.contains(['\u{0}', '\u{ffff}']), "{svg}");
    }
}
