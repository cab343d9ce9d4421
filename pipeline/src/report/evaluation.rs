//! Results of evaluations: grids of scores in the colours of the paper's Figure 1, and losses by domain and
//! position.

use std::collections::BTreeSet;

use serde_json::Value;

use super::text::{Cell, escape, figure, number, percent, table, words};

/// An evaluation's heading and its result as HTML. `trained` is the number of tokens in a training sequence.
pub fn evaluation(name: &str, notes: &Value, trained: Option<u64>) -> (String, String) {
    match name {
        "needle" => ("Needle in a haystack".to_owned(), needle(notes, trained)),
        "loss" => ("Loss of held-out documents".to_owned(), loss(notes)),
        "retrieval" => ("Retrieval".to_owned(), retrieval(notes, trained)),
        "bookqa" => (
            "Questions about books".to_owned(),
            format!(
                "<p>F1 {} % of {} questions; of {} the book was cut in its middle.</p>\n",
                percent(real(&notes["f1"])),
                notes["questions"],
                notes["cut"]
            ),
        ),
        _ => (
            "Questions with choices".to_owned(),
            format!(
                "<p>{} of {} right: {} ± {} %.</p>\n",
                notes["right"],
                notes["questions"],
                percent(real(&notes["accuracy"])),
                percent(real(&notes["error"]))
            ),
        ),
    }
}

pub(super) fn real(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// The distinct lengths of all cells, in ascending order.
fn lengths(notes: &Value) -> Vec<u64> {
    let lengths: BTreeSet<u64> = cells(notes).iter().filter_map(|cell| cell["length"].as_u64()).collect();
    lengths.into_iter().collect()
}

/// The distinct values, in the order in which they first occur.
fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut once = vec![];
    for one in all {
        if !once.contains(&one) {
            once.push(one);
        }
    }
    once
}

fn cells(notes: &Value) -> &[Value] {
    notes["cells"].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// The colour of a score: the authors' red at 0, yellow at 0.5 and green at 1, interpolated.
pub(super) fn colour(score: f64) -> String {
    const COLOURS: [[f64; 3]; 3] = [[240.0, 73.0, 110.0], [235.0, 184.0, 57.0], [12.0, 215.0, 159.0]];
    let place = score.clamp(0.0, 1.0) * 2.0;
    let (from, share) = if place < 1.0 { (0, place) } else { (1, place - 1.0) };
    let mix = |i: usize| COLOURS[from][i] + (COLOURS[from + 1][i] - COLOURS[from][i]) * share;
    format!("rgb({:.0} {:.0} {:.0})", mix(0), mix(1), mix(2))
}

/// A grid of scores: one row per name, one column per length, in ascending order.
pub struct Grid {
    /// What the grid shows, and what its rows are.
    label: &'static str,
    corner: &'static str,
    pub rows: Vec<(String, Vec<Option<f64>>)>,
    pub lengths: Vec<u64>,
    /// The number of tokens in a training sequence.
    trained: Option<u64>,
}

impl Grid {
    /// The first column that is longer than the training sequences. The paper draws its white dashed line
    /// before it.
    pub fn beyond(&self) -> Option<usize> {
        let trained = self.trained?;
        self.lengths.iter().position(|length| *length > trained).filter(|beyond| *beyond > 0)
    }

    fn html(&self) -> String {
        let beyond = self.beyond();
        let class = |i: usize| if beyond == Some(i) { " class=\"beyond\"" } else { "" };
        let head: String = self
            .lengths
            .iter()
            .enumerate()
            .map(|(i, length)| format!("<th scope=\"col\"{}>{}</th>", class(i), number(*length)))
            .collect();
        let line = |(name, scores): &(String, Vec<Option<f64>>)| {
            let cell = |(i, score): (usize, &Option<f64>)| match score {
                Some(score) => {
                    format!(
                        "<td{} style=\"background:{}\">{:.0}</td>",
                        class(i),
                        colour(*score),
                        score * 100.0
                    )
                }
                None => "<td></td>".to_owned(),
            };
            let scores: String = scores.iter().enumerate().map(cell).collect();
            format!("<tr><th scope=\"row\">{}</th>{scores}</tr>\n", escape(name))
        };
        let body: String = self.rows.iter().map(line).collect();
        let said = match (beyond, self.trained) {
            (Some(_), Some(trained)) => format!(
                "<p class=\"soft\">Training's sequences had {} tokens: the dashed line.</p>\n",
                number(trained)
            ),
            _ => String::new(),
        };
        format!(
            "<div class=\"scroll\" role=\"region\" aria-label=\"{}\" tabindex=\"0\"><table class=\"heat\"><thead><tr>\
             <th scope=\"col\">{}</th>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n{said}",
            escape(self.label),
            self.corner
        )
    }
}

/// The grid of an evaluation's scores; `None` for evaluations without one.
pub fn heat(name: &str, notes: &Value, trained: Option<u64>) -> Option<Grid> {
    let lengths = lengths(notes);
    let row = |name: String, of: &dyn Fn(&Value) -> bool| {
        let score = |length: &u64| {
            let own = cells(notes).iter().find(|c| c["length"].as_u64() == Some(*length) && of(c));
            own.map(|cell| real(&cell["score"]))
        };
        (name, lengths.iter().map(score).collect())
    };
    match name {
        "needle" => {
            let mut depths: Vec<f64> = cells(notes).iter().map(|cell| real(&cell["depth"])).collect();
            depths.sort_by(f64::total_cmp);
            depths.dedup();
            let rows = depths.iter().map(|depth| row(format!("{depth} %"), &|c| real(&c["depth"]) == *depth));
            let rows = rows.collect();
            Some(Grid { label: "Score by depth and length", corner: "depth", rows, lengths, trained })
        }
        "retrieval" => {
            let tasks = distinct(cells(notes).iter().filter_map(|cell| cell["task"].as_str()));
            let rows = tasks.iter().map(|task| row((*task).to_owned(), &|c| c["task"] == **task)).collect();
            Some(Grid { label: "Score by task and length", corner: "task", rows, lengths, trained })
        }
        _ => None,
    }
}

fn needle(notes: &Value, trained: Option<u64>) -> String {
    let (read, reused) = (real(&notes["prompt_tokens"]), real(&notes["reused_tokens"]));
    format!(
        "<p>{} % of the answer's words on average, by depth of the needle and tokens of context (paper §5, Figure 1).</p>\n\
         {}<p class=\"soft\">{} % of the prompts' tokens had been read for a prompt before.</p>\n",
        percent(real(&notes["score"])),
        heat("needle", notes, trained).map_or(String::new(), |grid| grid.html()),
        percent(reused / read.max(1.0)),
    )
}

fn retrieval(notes: &Value, trained: Option<u64>) -> String {
    let samples = cells(notes).first().and_then(|cell| cell["samples"].as_u64()).unwrap_or(0);
    format!(
        "<p>{} % of what was asked for is in the replies, {samples} questions a cell, by task and tokens.</p>\n{}",
        percent(real(&notes["score"])),
        heat("retrieval", notes, trained).map_or(String::new(), |grid| grid.html()),
    )
}

/// A range of positions in words, such as "4K–128K".
pub fn positions(range: &Value) -> String {
    let kilo = |key: &str| range[key].as_u64().unwrap_or(0) >> 10;
    let from = kilo("from");
    if from == 0 { format!("0–{}K", kilo("until")) } else { format!("{from}K–{}K", kilo("until")) }
}

/// Losses with their standard errors: one row per domain, one column per range of positions.
pub struct Losses {
    pub ranges: Vec<String>,
    pub rows: Vec<(String, Vec<Option<(f64, Option<f64>)>>)>,
}

impl Losses {
    pub fn of(notes: &Value) -> Self {
        let ranges = distinct(cells(notes).iter().map(|cell| positions(&cell["positions"])));
        let domains = distinct(cells(notes).iter().map(|cell| cell["domain"].as_str()));
        let row = |domain: &Option<&str>| {
            let loss = |range: &String| {
                let own = cells(notes)
                    .iter()
                    .find(|c| c["domain"].as_str() == *domain && positions(&c["positions"]) == *range);
                own.map(|cell| (real(&cell["loss"]), cell["error"].as_f64()))
            };
            (domain.unwrap_or("all").to_owned(), ranges.iter().map(loss).collect())
        };
        let rows = domains.iter().map(row).collect();
        Self { ranges, rows }
    }
}

fn loss(notes: &Value) -> String {
    let losses = Losses::of(notes);
    let of = |cell: &Option<(f64, Option<f64>)>| {
        figure(cell.map_or(String::new(), |(loss, error)| {
            let error = error.map_or(String::new(), |e| format!(" <span class=\"soft\">±{e:.3}</span>"));
            format!("{loss:.3}{error}")
        }))
    };
    let row = |(domain, cells): &(String, Vec<_>)| -> Vec<Cell> {
        [words(domain)].into_iter().chain(cells.iter().map(of)).collect()
    };
    let rows: Vec<Vec<Cell>> = losses.rows.iter().map(row).collect();
    let headings: Vec<&str> =
        ["domain"].into_iter().chain(losses.ranges.iter().map(String::as_str)).collect();
    format!(
        "<p>Nats a token by domain and position in the document, with its standard error over documents; {} documents that no \
         recipe saw (paper §5, Table 5 and Figure 3).</p>\n{}",
        notes["documents"],
        table("Loss by domain and position", &headings, &rows, None),
    )
}
