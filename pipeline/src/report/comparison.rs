//! A comparison as an HTML page: differences of the confs, the mixtures (paper, Figure 2), losses (Table 5),
//! and results of evaluations.

use super::evaluation::{evaluation, positions};
use super::text::{Cell, code, escape, figure, percent, table, words};
use super::{curve, page, section};
use crate::compare::{COUNTS, Comparison, ENOUGH, LossRow, Shares, Side, firsts};

/// The HTML page of a comparison.
pub fn comparison(sides: &[Side], comparison: &Comparison) -> String {
    let head = format!(
        "<header>\n<p class=\"soft\">lengthwise compare</p>\n<h1>{}</h1>\n<p class=\"lead\">Compared with {}.</p>\n</header>\n",
        escape(&comparison.names.join(", ")),
        escape(comparison.names.first().map_or("", String::as_str)),
    );
    let sections = [
        section("What was asked", asked(comparison)),
        section("Shares of tokens by domain", shares(comparison, &comparison.domains, "domain")),
        section(
            "Shares of tokens by length of their document",
            shares(comparison, &comparison.lengths, "tokens"),
        ),
        section(
            "Shares of a domain's tokens in long documents",
            shares(comparison, &comparison.long, "domain"),
        ),
        section("Loss of held-out documents", loss(comparison)),
        section("Other evaluations", scores(comparison)),
        section("Training", training(&firsts(sides))),
        evaluations(&firsts(sides)),
        section("SQL", sql(comparison)),
    ];
    page(&comparison.names.join(", "), &(head + &sections.concat()))
}

fn headings<'a>(first: &[&'a str], names: &'a [String]) -> Vec<&'a str> {
    first.iter().copied().chain(names.iter().map(String::as_str)).collect()
}

fn asked(comparison: &Comparison) -> String {
    let runs = |values: Vec<&str>| values.into_iter().map(code).collect::<Vec<_>>();
    let joined: Vec<String> = comparison.runs.iter().map(|seeds| seeds.join(" ")).collect();
    let mut rows: Vec<Vec<Cell>> = vec![
        [vec![words("run")], runs(joined.iter().map(String::as_str).collect())].concat(),
        [
            vec![words("commit")],
            runs(
                comparison
                    .commits
                    .iter()
                    .map(|c| c.as_deref().map_or("", |c| &c[..c.len().min(12)]))
                    .collect(),
            ),
        ]
        .concat(),
    ];
    for (key, values) in &comparison.conf {
        rows.push([vec![code(key)], values.iter().map(|value| code(value)).collect()].concat());
    }
    table("Keys of the conf that differ", &headings(&["key"], &comparison.names), &rows, None)
}

/// A share as a number on top of a bar of that length.
fn bar(share: f64, most: f64) -> Cell {
    let length = share / most.max(1e-9) * 100.0;
    figure(format!("<span class=\"bar\" style=\"--length:{length:.1}%\">{}</span>", percent(share)))
}

fn shares(comparison: &Comparison, all: &[Shares], what: &str) -> String {
    let most = all.iter().flat_map(|s| s.sides.iter().chain([&s.corpus])).copied().fold(0.0, f64::max);
    let row = |shares: &Shares| {
        let sides = shares.sides.iter().map(|share| bar(*share, most));
        [words(&shares.name), bar(shares.corpus, most)].into_iter().chain(sides).collect()
    };
    let rows: Vec<Vec<Cell>> = all.iter().map(row).collect();
    table("Shares, in percent", &headings(&[what, "corpus"], &comparison.names), &rows, None)
}

fn loss(comparison: &Comparison) -> String {
    if comparison.loss.is_empty() {
        return String::new();
    }
    let number = |number: f64| format!("{number:+.3}").replace('-', "\u{2212}");
    let rows: Vec<Vec<Cell>> = comparison
        .loss
        .iter()
        .map(|row| {
            let differences = row.differences.iter().map(|difference| match difference {
                None => figure(""),
                Some(difference) => {
                    let error = difference
                        .error
                        .map_or(String::new(), |e| format!(" <span class=\"soft\">±{e:.3}</span>"));
                    let class = match difference.better() {
                        None => "",
                        Some(true) => "better",
                        Some(false) => "worse",
                    };
                    figure(format!("<span class=\"{class}\">{}</span>{error}", number(difference.mean)))
                }
            });
            [
                words(row.domain()),
                words(&positions(&row.positions)),
                figure(row.documents.to_string()),
                figure(format!("{:.3}", row.loss)),
            ]
            .into_iter()
            .chain(differences)
            .collect()
        })
        .collect();
    let seeds = match comparison.runs.first().map_or(1, Vec::len) {
        1 => String::new(),
        several => format!(" over documents and {several} seeds"),
    };
    format!(
        "<p>The first run's loss, and what the others' differ from it over the same documents, with the standard error of the \
         difference{} (paper §5.3, Table 5). Coloured: beyond ±{COUNTS} and beyond twice its error, of {ENOUGH} documents or more; <span class=\"better\">better</span>, \
         <span class=\"worse\">worse</span>.</p>\n{}",
        seeds,
        table(
            "Loss by domain and position",
            &headings(&["domain", "positions", "documents"], &comparison.names),
            &rows,
            None
        )
    )
}

fn scores(comparison: &Comparison) -> String {
    let score = |score: &Option<f64>| figure(score.map_or(String::new(), |score| percent(score) + " %"));
    let rows: Vec<Vec<Cell>> = comparison
        .scores
        .iter()
        .map(|(name, scores)| [words(name)].into_iter().chain(scores.iter().map(score)).collect())
        .collect();
    table("Scores", &headings(&["evaluation"], &comparison.names), &rows, None)
}

fn training(sides: &[&Side]) -> String {
    let curves = sides
        .iter()
        .map(|side| curve(&format!("{}: loss by tokens trained", side.name), "small", &side.training()));
    let curves: String = curves.collect();
    if curves.is_empty() { curves } else { format!("<div class=\"panels\">\n{curves}</div>\n") }
}

/// The runs' evaluations side by side, without the losses, which have their own section.
fn evaluations(sides: &[&Side]) -> String {
    let mut all = String::new();
    for name in ["needle", "retrieval"] {
        let mut heading = String::new();
        let panels: String = sides
            .iter()
            .filter_map(|side| {
                let notes = side.manifest.summary.evaluations.get(name)?;
                let trained = side.manifest.conf.pack.sequence_tokens.0;
                let body;
                (heading, body) = evaluation(name, notes, Some(trained));
                Some(format!("<figure><figcaption>{}</figcaption>{body}</figure>\n", escape(&side.name)))
            })
            .collect();
        if !panels.is_empty() {
            all += &section(&heading, format!("<div class=\"panels\">\n{panels}</div>\n"));
        }
    }
    all
}

fn sql(comparison: &Comparison) -> String {
    let diff = |sql: &crate::compare::SqlDiff| {
        format!(
            "<details><summary>{}: {}</summary><pre>{}</pre></details>\n",
            escape(&sql.name),
            escape(&sql.file),
            escape(&sql.diff)
        )
    };
    comparison.sql.iter().map(diff).collect()
}

/// A row's name, the first side's loss, and each other side's difference.
fn loss_line(row: &LossRow) -> (String, Vec<String>) {
    let differences = row.differences.iter().map(|difference| match difference {
        None => String::new(),
        Some(d) => {
            let error = d.error.map_or(String::new(), |error| format!(" ±{error:.3}"));
            format!("{:+.3}{error} ({}){}", d.mean, d.documents, if d.counts() { "*" } else { " " })
        }
    });
    let values = [format!("{:.3}", row.loss)].into_iter().chain(differences).collect();
    (format!("loss {} {}", row.domain(), positions(&row.positions)), values)
}

fn loss_legend() -> String {
    format!(
        "the first one's loss, and what the others' differ from it over the same documents, ± standard error; \
         (of so many documents); *: beyond {COUNTS} and twice its error, of {ENOUGH} documents or more"
    )
}

/// The width of a terminal's columns for these texts: at least the width of a difference.
fn width<'a>(texts: impl Iterator<Item = &'a String>) -> usize {
    texts.map(|text| text.chars().count()).max().unwrap_or(0).max(18) + 2
}

/// One line of a table on a terminal.
fn line(name: &str, values: &[String], width: usize) -> String {
    let values: String = values.iter().map(|value| format!("{value:>width$}")).collect();
    format!("{name:<34}{values}")
}

/// The losses side by side, as text for a terminal.
pub fn losses(names: &[String], rows: &[LossRow]) -> String {
    let width = width(names.iter());
    let mut lines = vec![line("", names, width)];
    for row in rows {
        let (name, values) = loss_line(row);
        lines.push(line(&name, &values, width));
    }
    lines.push(loss_legend());
    lines.join("\n")
}

/// The comparison as text for a terminal.
pub fn text(comparison: &Comparison) -> String {
    let mut lines = vec![];
    let values = comparison.conf.iter().flat_map(|(_, values)| values);
    let width = width(comparison.names.iter().chain(values));
    let row = |name: &str, values: Vec<String>| line(name, &values, width);
    lines.push(row("", comparison.names.clone()));
    for (key, values) in &comparison.conf {
        lines.push(row(key, values.clone()));
    }
    for (what, all) in [("", &comparison.domains), ("long of ", &comparison.long), ("", &comparison.lengths)]
    {
        lines.push(String::new());
        for shares in all {
            let values = shares.sides.iter().map(|share| format!("{} %", percent(*share))).collect();
            lines.push(row(&format!("{what}{}", shares.name), values));
        }
    }
    if !comparison.loss.is_empty() {
        lines.push(String::new());
    }
    for of in &comparison.loss {
        let (name, values) = loss_line(of);
        lines.push(row(&name, values));
    }
    if !comparison.loss.is_empty() {
        lines.push(loss_legend());
    }
    for (name, scores) in &comparison.scores {
        let score = |score: &Option<f64>| score.map_or(String::new(), |score| percent(score) + " %");
        lines.push(row(name, scores.iter().map(score).collect()));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::Difference;

    #[test]
    fn a_terminal_shows_each_difference_with_its_error_and_marks_what_counts() {
        let difference = |mean, error, documents| Some(Difference { mean, error, documents });
        let names: Vec<String> = ["old", "new", "other", "none"].map(str::to_owned).into();
        let compared = Comparison {
            runs: vec![vec![]; 4],
            commits: vec![None; 4],
            names,
            conf: vec![],
            sql: vec![],
            domains: vec![],
            lengths: vec![],
            long: vec![],
            loss: vec![LossRow {
                domain: None,
                positions: serde_json::json!({ "from": 0, "until": 4096 }),
                documents: 3,
                loss: 2.5,
                differences: vec![
                    difference(-0.2, Some(0.05), 9),
                    difference(-0.3, Some(0.05), 2),
                    difference(-0.4, None, 1),
                ],
            }],
            scores: vec![],
            training: vec![None; 4],
        };
        let text = text(&compared);
        let row = text.lines().find(|line| line.starts_with("loss all")).expect("a row of losses");
        assert!(row.contains("-0.200 ±0.050 (9)* ") && row.contains("-0.300 ±0.050 (2) "), "{row}");
        assert!(row.contains("2.500") && row.trim_end().ends_with("-0.400 (1)"), "{row}");
        assert!(text.contains("*: beyond 0.01 and twice its error"), "{text}");
    }
}
