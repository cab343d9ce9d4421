//! report.html: one offline file that says what a run is, and whether it did what its recipe promised.

use std::fmt::Write;

use serde_json::Value;

use crate::preview::Preview;
use crate::publish::{Attempt, RunManifest};
use crate::stages::mixture::Stratum;
use crate::tables::LENGTH_BUCKET_NAMES;

const STYLE: &str = include_str!("report.css");

/// A domain's share is flagged where it is so many points from its target.
const FAR: f64 = 0.2;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// With thin spaces between thousands.
fn number(n: u64) -> String {
    let digits = n.to_string();
    let grouped: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    grouped.join("\u{202f}")
}

fn percent(share: f64) -> String {
    format!("{:.1}", share * 100.0)
}

/// The report of a run, from its manifest, the attempt that made it, and the lines of its metrics.jsonl.
pub fn html(manifest: &RunManifest, attempt: &Attempt, metrics: &[Value]) -> String {
    let mixture = &manifest.conf.mixture;
    let summary = &manifest.summary;
    let preview = Preview::new(
        &mixture.recipe,
        mixture.budget.0,
        mixture.long_tokens.0,
        mixture.max_copies,
        &summary.domains,
        &summary.drawn,
    );
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{}</title><style>{STYLE}</style></head><body>\n",
        escape(&manifest.run)
    );
    head(&mut out, manifest);
    shortfalls(&mut out, manifest);
    out.push_str("<h2>What the mixture is</h2>\n<div class=\"panels\">\n");
    domain_panel(&mut out, &preview);
    length_panel(&mut out, &preview);
    out.push_str("</div>\n");
    domain_table(&mut out, manifest, &preview);
    repeated(&mut out, &preview);
    lineage(&mut out, attempt);
    losses(&mut out, metrics);
    sources(&mut out, manifest);
    out.push_str("</body></html>\n");
    out
}

fn head(out: &mut String, manifest: &RunManifest) {
    let (conf, summary) = (&manifest.conf, &manifest.summary);
    let commit = match &manifest.commit {
        Some(commit) if manifest.dirty => format!("commit {commit} with uncommitted changes"),
        Some(commit) => format!("commit {commit}"),
        None => "not in a git repository".to_owned(),
    };
    let _ = writeln!(
        out,
        "<header><h1>{}</h1><p>{}: {} tokens in sequences of {}</p><p class=\"soft\">{}, seed {}, {}, lengthwise {}</p></header>",
        escape(&manifest.run),
        escape(&conf.mixture.recipe),
        number(conf.mixture.budget.0),
        number(conf.pack.sequence_tokens.0),
        escape(&manifest.conf_file),
        conf.run.seed,
        escape(&commit),
        escape(&manifest.lengthwise)
    );
    let count = |name: &str| summary.counts.get(name).copied().unwrap_or(0);
    let packed: u64 = summary.planned.domains.iter().map(|d| d.packed).sum();
    let dropped: u64 = summary.planned.domains.iter().map(|d| d.dropped).sum();
    let mut facts = vec![
        ("documents", number(count("distinct_documents"))),
        ("tokens", number(count("tokens"))),
        ("duplicates dropped", number(count("duplicates"))),
        ("rows rejected", number(count("rejects"))),
        ("documents held out", number(count("heldout_documents"))),
        ("sequences", number(summary.planned.sequences)),
        ("tokens packed", number(packed)),
        ("tokens of the dropped tail", number(dropped)),
    ];
    if summary.planned.padding > 0 {
        facts.push(("padding", number(summary.planned.padding)));
    }
    facts.push(("tokenizer", manifest.tokenizer.to_string()[..12].to_owned()));
    out.push_str("<dl class=\"facts\">");
    for (name, value) in facts {
        let _ = write!(out, "<div><dt>{name}</dt><dd>{value}</dd></div>");
    }
    out.push_str("</dl>\n");
}

fn shortfalls(out: &mut String, manifest: &RunManifest) {
    let mixture = &manifest.conf.mixture;
    let short = crate::stages::mixture::shortfalls(
        &manifest.summary.asked,
        &manifest.summary.domains,
        mixture.budget.0,
        mixture.max_copies,
    );
    if short.is_empty() {
        return;
    }
    out.push_str("<h2 class=\"wrong\">What fell short</h2>\n<ul>");
    for line in short {
        let _ = write!(out, "<li>{}</li>", escape(&line));
    }
    out.push_str("</ul>\n");
}

/// Bars of pairs, before and after, one row a name. `marks` are targets.
fn bars(out: &mut String, title: &str, caption: &str, rows: &[(String, f64, f64, Option<f64>)]) {
    let most = rows.iter().flat_map(|(_, a, b, t)| [*a, *b, t.unwrap_or(0.0)]).fold(0.01, f64::max);
    let (left, width, pitch) = (130.0, 260.0, 34.0);
    let height = rows.len() as f64 * pitch + 4.0;
    let scale = |share: f64| share / most * width;
    let _ = write!(
        out,
        "<figure><figcaption><b>{title}</b><br>{caption}</figcaption><svg viewBox=\"0 0 480 {height}\" role=\"img\" aria-label=\"{title}\">"
    );
    for (i, (name, before, after, target)) in rows.iter().enumerate() {
        let y = i as f64 * pitch + 4.0;
        let shown: String = if name.chars().count() > 20 {
            name.chars().take(19).chain(['…']).collect()
        } else {
            name.clone()
        };
        let _ = write!(
            out,
            "<text x=\"0\" y=\"{:.1}\">{}<title>{}</title></text>\
             <rect class=\"before\" x=\"{left}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"11\"><title>{}: corpus {} %</title></rect>\
             <rect class=\"after\" x=\"{left}\" y=\"{:.1}\" width=\"{:.1}\" height=\"11\"><title>{}: mixture {} %</title></rect>\
             <text class=\"soft\" x=\"{:.1}\" y=\"{:.1}\">{} → {} %</text>",
            y + 16.0,
            escape(&shown),
            escape(name),
            scale(*before),
            escape(name),
            percent(*before),
            y + 12.0,
            scale(*after),
            escape(name),
            percent(*after),
            left + scale(before.max(*after)) + 6.0,
            y + 16.0,
            percent(*before),
            percent(*after),
        );
        if let Some(target) = target {
            let x = left + scale(*target);
            let _ = write!(
                out,
                "<line class=\"target\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{y:.1}\" y2=\"{:.1}\"><title>{}: target {} %</title></line>",
                y + 23.0,
                escape(name),
                percent(*target)
            );
        }
    }
    out.push_str("</svg></figure>\n");
}

fn domain_panel(out: &mut String, preview: &Preview) {
    let rows: Vec<_> = preview
        .domains
        .iter()
        .map(|d| (d.domain.clone(), d.share, d.mixture_share, Some(d.target)))
        .collect();
    bars(out, "Tokens by domain", "% of all tokens: corpus (grey), mixture (blue), target (line)", &rows);
}

fn length_panel(out: &mut String, preview: &Preview) {
    let names = LENGTH_BUCKET_NAMES.iter();
    let shares = preview.lengths_before.iter().zip(&preview.lengths_after);
    let rows: Vec<_> = names.zip(shares).map(|(name, (a, b))| ((*name).to_owned(), *a, *b, None)).collect();
    bars(
        out,
        "Tokens by length of their document",
        "% of all tokens, in the buckets of the paper's Figure 2",
        &rows,
    );
}

fn domain_table(out: &mut String, manifest: &RunManifest, preview: &Preview) {
    let _ = write!(
        out,
        "<h2>Domains</h2>\n<div class=\"scroll\"><table><thead><tr><th>domain</th><th>documents</th><th>tokens</th><th>share</th><th>target</th>\
         <th>mixture</th><th>points</th><th>drawn</th><th>epochs</th><th>long (&gt;{}) before</th><th>after</th><th>packed</th><th>dropped</th></tr></thead><tbody>",
        number(preview.long_tokens)
    );
    let mut totals = [0; 5];
    for d in &preview.domains {
        let placed = manifest.summary.planned.domains.iter().find(|p| p.domain == d.domain);
        let (packed, dropped) = placed.map_or((0, 0), |p| (p.packed, p.dropped));
        let points = (d.mixture_share - d.target) * 100.0;
        let class = if points.abs() > FAR { " class=\"wrong\"" } else { "" };
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td{class}>{points:+.2}</td><td>{}</td><td>{:.2}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(&d.domain),
            number(d.documents),
            number(d.tokens),
            percent(d.share),
            percent(d.target),
            percent(d.mixture_share),
            number(d.drawn),
            d.epochs,
            percent(d.long_before),
            percent(d.long_after),
            number(packed),
            number(dropped)
        );
        let own = [d.documents, d.tokens, d.drawn, packed, dropped];
        totals.iter_mut().zip(own).for_each(|(total, n)| *total += n);
    }
    let [documents, tokens, drawn, packed, dropped] = totals.map(number);
    let _ = writeln!(
        out,
        "</tbody><tfoot><tr><td>all</td><td>{documents}</td><td>{tokens}</td><td></td><td></td><td></td><td></td><td>{drawn}</td><td></td><td></td><td></td><td>{packed}</td><td>{dropped}</td></tr></tfoot></table></div>\
         <p class=\"soft\">Shares in %. Epochs: how often a domain's tokens are gone through.</p>"
    );
    let strata: Vec<&Stratum> =
        manifest.summary.drawn.strata.iter().filter(|s| !s.stratum.is_empty()).collect();
    if strata.is_empty() {
        return;
    }
    out.push_str("<h2>Strata</h2>\n<div class=\"scroll\"><table><thead><tr><th>domain</th><th>stratum</th><th>spans drawn</th><th>tokens asked</th><th>tokens drawn</th></tr></thead><tbody>");
    for s in strata {
        let asked =
            manifest.summary.asked.strata.iter().find(|a| a.domain == s.domain && a.stratum == s.stratum);
        let asked = asked.map_or(0, |a| a.budget);
        let class = if asked != s.budget { " class=\"wrong\"" } else { "" };
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td{class}>{}</td></tr>",
            escape(&s.domain),
            escape(&s.stratum),
            number(s.spans),
            number(asked),
            number(s.budget)
        );
    }
    out.push_str("</tbody></table></div>\n");
}

fn repeated(out: &mut String, preview: &Preview) {
    let rows: Vec<_> = preview.most_copies.iter().filter(|r| r.copies > 1.0).collect();
    if rows.is_empty() {
        return;
    }
    out.push_str("<h2>Documents repeated most</h2>\n<div class=\"scroll\"><table><thead><tr><th>document</th><th>domain</th><th>tokens</th><th>expected copies</th></tr></thead><tbody>");
    for r in rows {
        let (id, domain) = (escape(&r.doc_id), escape(&r.domain));
        let _ = write!(
            out,
            "<tr><td>{id}</td><td>{domain}</td><td>{}</td><td>{:.2}</td></tr>",
            number(r.tokens as u64),
            r.copies
        );
    }
    out.push_str("</tbody></table></div>\n");
}

fn lineage(out: &mut String, attempt: &Attempt) {
    if attempt.steps.is_empty() {
        return;
    }
    let _ = write!(
        out,
        "<h2>Lineage</h2>\n<p class=\"soft\">started {}, {:.1} s on {} cores</p><div class=\"scroll\"><table><thead><tr><th>stage</th><th>key</th><th></th><th>seconds</th><th>counted</th></tr></thead><tbody>",
        escape(&attempt.started),
        attempt.seconds,
        attempt.cores
    );
    for step in &attempt.steps {
        let counts: Vec<String> = step
            .counts
            .iter()
            .filter(|(_, n)| **n > 0)
            .map(|(name, n)| format!("{} {}", number(*n), escape(name)))
            .collect();
        let how = if step.cached { "was there" } else { "computed" };
        let key: String = step.key.chars().take(12).collect();
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{how}</td><td>{:.1}</td><td>{}</td></tr>",
            escape(&step.stage),
            escape(&key),
            step.seconds,
            counts.join(", ")
        );
    }
    out.push_str("</tbody></table></div>\n");
}

fn losses(out: &mut String, metrics: &[Value]) {
    let read = |key: &str| -> Vec<f64> { metrics.iter().filter_map(|line| line[key].as_f64()).collect() };
    let (steps, loss) = (read("step"), read("loss"));
    let (Some(first), Some(last)) = (loss.first(), loss.last()) else { return };
    if steps.len() != loss.len() {
        return;
    }
    let speeds = read("tokens_per_second");
    let speed = speeds.iter().sum::<f64>() / speeds.len().max(1) as f64;
    let (low, high) =
        loss.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), l| (low.min(*l), high.max(*l)));
    let span = (high - low).max(1e-9);
    let most = steps.last().copied().unwrap_or(1.0).max(1.0);
    let (width, height, left) = (560.0, 160.0, 44.0);
    let place = |step: f64, l: f64| {
        format!("{:.1},{:.1}", left + step / most * width, 10.0 + (high - l) / span * height)
    };
    let points: Vec<String> = steps.iter().zip(&loss).map(|(step, l)| place(*step, *l)).collect();
    let _ = writeln!(
        out,
        "<h2>Loss</h2>\n<figure><figcaption>{first:.3} at the first step, {last:.3} at step {most:.0}; {} tokens a second</figcaption>\
         <svg viewBox=\"0 0 640 205\" role=\"img\" aria-label=\"loss by step\"><line class=\"grid\" x1=\"{left}\" x2=\"604\" y1=\"10\" y2=\"10\"/>\
         <line class=\"grid\" x1=\"{left}\" x2=\"604\" y1=\"170\" y2=\"170\"/><text class=\"soft\" x=\"0\" y=\"14\">{high:.2}</text>\
         <text class=\"soft\" x=\"0\" y=\"174\">{low:.2}</text><text class=\"soft\" x=\"{left}\" y=\"192\">step 0</text>\
         <text class=\"soft\" x=\"604\" y=\"192\" text-anchor=\"end\">step {most:.0}</text><polyline class=\"curve\" points=\"{}\"/></svg></figure>",
        number(speed as u64),
        points.join(" ")
    );
}

fn sources(out: &mut String, manifest: &RunManifest) {
    let bytes: u64 = manifest.inputs.iter().map(|input| input.bytes).sum();
    out.push_str("<h2>What it was made of</h2>\n");
    let _ = write!(
        out,
        "<details><summary>{} source files, {} bytes</summary><pre>",
        number(manifest.inputs.len() as u64),
        number(bytes)
    );
    for input in manifest.inputs.iter().take(20) {
        let _ = writeln!(
            out,
            "{}  {}  {}",
            &input.blake3.to_string()[..16],
            number(input.bytes),
            escape(&input.url)
        );
    }
    if manifest.inputs.len() > 20 {
        let _ = writeln!(out, "… and {} more, in manifest.json", number(manifest.inputs.len() as u64 - 20));
    }
    out.push_str("</pre></details>\n");
    let _ = writeln!(
        out,
        "<details><summary>the conf, with defaults</summary><pre>{}</pre></details>",
        escape(&manifest.conf.to_toml())
    );
    for (file, text) in &manifest.sql {
        let _ = writeln!(
            out,
            "<details><summary>{}</summary><pre>{}</pre></details>",
            escape(file),
            escape(text)
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conf::Conf;
    use crate::hash::Digest;
    use crate::publish::Summary;
    use crate::run::Step;
    use crate::stages::domains::Domain;
    use crate::stages::mixture::{Asked, Repeated};
    use crate::stages::shuffle::{Placed, Planned};

    fn manifest() -> RunManifest {
        let conf = r#"
            run = { name = "r", output = "out" }
            tokenizer = { url = "t.json" }
            mixture = { recipe = "r.sql", budget = 300 }
            pack = { sequence_tokens = 100 }
            [[source]]
            url = "a.jsonl"
            format = "jsonl"
            domain = "d"
        "#;
        let mut by_length = vec![0; 9];
        by_length[3] = 300;
        let domain = Domain {
            domain: "<b>ook".into(),
            documents: 7,
            tokens: 1234,
            share: 1.0,
            target: 1.0,
            tokens_by_length: by_length.clone(),
            ..Default::default()
        };
        let stratum = Stratum {
            domain: "<b>ook".into(),
            stratum: "long".into(),
            budget: 300,
            available: 300,
            by_length,
            long: 300,
            spans: 3,
        };
        let drawn = Asked {
            strata: vec![stratum],
            most_copies: vec![Repeated {
                doc_id: "ff00".into(),
                domain: "<b>ook".into(),
                tokens: 12,
                copies: 2.5,
            }],
        };
        let placed = Placed { domain: "<b>ook".into(), packed: 290, dropped: 10 };
        RunManifest {
            run: "r-123".into(),
            lengthwise: "0".into(),
            commit: None,
            dirty: false,
            conf_file: "r.toml".into(),
            conf: Conf::parse(conf, "r.toml", &[], &|_| None).unwrap(),
            sql: [("r.sql".to_owned(), "select 1 < 2".to_owned())].into(),
            inputs: vec![],
            tokenizer: Digest::of(b""),
            stages: vec![],
            files: vec![],
            tables: Default::default(),
            summary: Summary {
                counts: Default::default(),
                domains: vec![domain],
                asked: drawn.clone(),
                drawn,
                planned: Planned { sequences: 3, files: 1, padding: 0, domains: vec![placed] },
            },
        }
    }

    fn attempt() -> Attempt {
        let step = Step {
            stage: "tokens".into(),
            key: "abc".into(),
            cached: true,
            seconds: 0.1,
            counts: [("rows".to_owned(), 9)].into(),
            ingredients: Default::default(),
        };
        Attempt { started: "now".into(), seconds: 1.0, host: "h".into(), cores: 2, steps: vec![step] }
    }

    #[test]
    fn what_the_data_says_is_escaped() {
        let html = html(&manifest(), &attempt(), &[]);
        assert!(html.contains("&lt;b&gt;ook") && !html.contains("<b>ook"));
        assert!(html.contains("select 1 &lt; 2"));
    }

    #[test]
    fn a_section_without_data_is_not_there() {
        let mut manifest = manifest();
        let full = html(
            &manifest,
            &attempt(),
            &[serde_json::json!({ "step": 1, "loss": 2.5, "tokens_per_second": 10.0 })],
        );
        for section in ["<h2>Loss", "<h2>Strata", "<h2>Documents repeated most", "<h2>Lineage"] {
            assert!(full.contains(section), "{section}");
        }
        manifest.summary.drawn.strata[0].stratum.clear();
        manifest.summary.drawn.most_copies.clear();
        let bare = html(&manifest, &Attempt { steps: vec![], ..attempt() }, &[]);
        for section in ["<h2>Loss", "<h2>Strata", "<h2>Documents repeated most", "<h2>Lineage", "fell short"]
        {
            assert!(!bare.contains(section), "{section}");
        }
    }

    #[test]
    fn the_report_is_one_whole_file_that_fetches_nothing() {
        let html = html(&manifest(), &attempt(), &[]);
        for tag in ["svg", "table", "details", "figure", "div", "pre", "html"] {
            let opened =
                html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, html.matches(&format!("</{tag}>")).count(), "{tag}");
        }
        assert!(!html.contains("http") && !html.contains("<script") && !html.contains("@import"));
        for shown in ["1\u{202f}234", "290", "r-123", "2.50"] {
            assert!(html.contains(shown), "{shown}");
        }
    }
}
