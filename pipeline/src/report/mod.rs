//! report.html: one self-contained file that describes a run and judges whether it kept the promises of its
//! recipe.
//!
//! ```text
//! head: what the run is, whether it kept its promises (promises), its numbers, what it was made from
//! sections: lengths and domains before and after (charts) · domains · strata · what fell short · repeats
//!           training · evaluations · lineage · inputs, conf and SQL          empty sections are left out
//! ```

mod charts;
pub mod comparison;
mod evaluation;
mod promises;
pub mod slide;
#[cfg(test)]
mod tests;
mod text;

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::algorithms::strata::Stratum;
use crate::directory::{Attempt, RunManifest};
use crate::preview::{Mixed, NAMED, Preview};
use crate::stages::shuffle::Placed;
use crate::tables::LENGTH_BUCKET_NAMES;
use charts::{Axis, curve, legend, sparkline};
use promises::{FAR, Promise, Short, Standing, budgets, promises, short as short_strata};
use text::{
    Cell, bytes, code, count, drawing, duration, escape, figure, flagged, number, percent, points, short,
    table, words,
};

const STYLE: &str = include_str!("report.css");

/// How many source files are listed by name.
const FILES_LISTED: usize = 20;

/// The report of a run as HTML: from its manifest, the attempt that made it, and the lines of its
/// metrics.jsonl, which are empty if nothing was trained. The results of evaluations are in the manifest.
pub fn html(manifest: &RunManifest, attempt: &Attempt, metrics: &[Value]) -> String {
    let mixture = &manifest.conf.mixture;
    let mut preview = Preview::new(mixture, &manifest.summary.domains, &manifest.summary.drawn);
    // charts and tables list the largest domain first
    preview.domains.sort_by(|a, b| b.tokens.cmp(&a.tokens).then_with(|| a.domain.cmp(&b.domain)));
    let shown = preview.only(&preview.largest());

    let sections = [
        section("Before and after", shares_and_lengths(&shown)),
        section("Domains", domains(manifest, &shown)),
        section("Strata", strata(manifest)),
        section("What fell short", fell_short(manifest)),
        section("Documents repeated most", repeated(&preview)),
        section("Training", training(metrics)),
        evaluations(manifest),
        section("Lineage", lineage(attempt)),
        section("Inputs, conf and SQL", sources(manifest)),
    ];
    page(&manifest.run, &format!("{}{}", head(manifest, &preview), sections.concat()))
}

/// A page for a single evaluation; `of` names what was evaluated.
pub fn evaluation_page(name: &str, of: &str, notes: &Value) -> String {
    let (heading, body) = evaluation::evaluation(name, notes, None);
    let head = format!(
        "<header>\n<p class=\"soft\">lengthwise eval {name}</p>\n<h1>{}</h1>\n</header>\n",
        escape(of)
    );
    page(of, &(head + &section(&heading, body)))
}

fn page(title: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n<title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n\
         <body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escape(title),
    )
}

/// One section per evaluation.
fn evaluations(manifest: &RunManifest) -> String {
    let trained = manifest.conf.pack.sequence_tokens.0;
    let one = |(name, notes): (&String, &Value)| {
        let (heading, body) = evaluation::evaluation(name, notes, Some(trained));
        section(&heading, body)
    };
    manifest.summary.evaluations.iter().map(one).collect()
}

/// A section with its heading; empty if its body is empty.
fn section(title: &str, body: String) -> String {
    if body.is_empty() {
        return body;
    }
    format!("<section>\n<h2>{title}</h2>\n{body}</section>\n")
}

/// The first screen: what this run is, and whether it did what the recipe promised.
fn head(manifest: &RunManifest, preview: &Preview) -> String {
    format!(
        "<header>\n<p class=\"soft\">lengthwise run</p>\n<h1>{}</h1>\n<p class=\"lead\">{}</p>\n{}{}{}{}</header>\n",
        escape(&manifest.run),
        lead(manifest, preview),
        description(manifest),
        verdict(&promises(manifest, preview)),
        numbers(manifest, preview),
        made_by(manifest),
    )
}

/// A summary of the run in two sentences.
fn lead(manifest: &RunManifest, preview: &Preview) -> String {
    let (conf, planned) = (&manifest.conf, &manifest.summary.planned);
    let total = total(preview);
    let recipe = Path::new(&conf.mixture.recipe).file_stem().unwrap_or_default().to_string_lossy();
    format!(
        "<b>{}</b> drew {} tokens from {} in {}, packed into {} of {} tokens. Long documents, of more than {} tokens, \
         hold {}\u{a0}% of the tokens drawn; in the corpus they hold {}\u{a0}%.",
        escape(&recipe),
        number(total.drawn),
        count(total.documents, "document"),
        count(preview.domains.len() as u64, "domain"),
        count(planned.sequences, "sequence"),
        number(conf.pack.sequence_tokens.0),
        number(preview.long_tokens),
        percent(total.long_after),
        percent(total.long_before),
    )
}

/// The recipe's description: the first line of its header.
fn description(manifest: &RunManifest) -> String {
    let text = manifest.sql.get(&manifest.conf.mixture.recipe).and_then(|sql| sql.lines().next());
    match text.and_then(|line| line.strip_prefix("--")) {
        Some(line) => format!("<p class=\"soft\">{}</p>\n", escape(line.trim())),
        None => String::new(),
    }
}

fn verdict(promises: &[Promise]) -> String {
    let line = |promise: &Promise| {
        let (class, mark) = match promise.standing {
            Standing::Kept => ("kept", "kept"),
            Standing::Noted => ("noted", "note"),
            Standing::Broken => ("broken", "broken"),
        };
        format!(
            "<li class=\"{class}\"><span class=\"mark\">{mark}</span> <span>{}</span></li>\n",
            escape(&promise.text)
        )
    };
    let (class, title) = match promises.iter().any(|p| p.standing == Standing::Broken) {
        true => ("broken", "It did not do all that the recipe asked"),
        false => ("kept", "It did what the recipe asked"),
    };
    let lines: String = promises.iter().map(line).collect();
    format!("<div class=\"verdict {class}\">\n<h2>{title}</h2>\n<ul>\n{lines}</ul>\n</div>\n")
}

fn numbers(manifest: &RunManifest, preview: &Preview) -> String {
    let (conf, summary) = (&manifest.conf, &manifest.summary);
    let counted = |name: &str| number(summary.counts.get(name).copied().unwrap_or(0));
    let (packed, dropped) = placed(manifest);
    let total = total(preview);
    let mut facts = vec![
        ("budget", number(conf.mixture.budget.0), "tokens"),
        ("drawn", number(total.drawn), "tokens"),
        ("packed", number(packed), "tokens"),
        ("dropped", number(dropped), "tokens, the last sequence"),
    ];
    let length = format!("× {} tokens", number(conf.pack.sequence_tokens.0));
    facts.push(("sequences", number(summary.planned.sequences), &length));
    let tokens = format!("with {} tokens", number(total.tokens));
    facts.extend([
        ("documents", number(total.documents), tokens.as_str()),
        ("duplicates", counted("duplicates"), "documents, left out"),
        ("rejects", counted("rejects"), "source rows"),
        ("held out", counted("heldout_documents"), "documents"),
    ]);
    if summary.planned.padding > 0 {
        facts.push(("padding", number(summary.planned.padding), "ids"));
    }
    let facts = facts.iter().map(|(name, value, unit)| {
        format!("<div><dt>{name}</dt><dd>{value} <span class=\"soft\">{unit}</span></dd></div>\n")
    });
    format!("<dl class=\"facts\">\n{}</dl>\n", facts.collect::<String>())
}

/// Everything that is needed to repeat the run.
fn made_by(manifest: &RunManifest) -> String {
    let commit = match &manifest.commit {
        Some(commit) if manifest.dirty => format!("{} with uncommitted changes", short(commit)),
        Some(commit) => short(commit),
        None => "not in a git repository".to_owned(),
    };
    let facts = [
        ("recipe", escape(&manifest.conf.mixture.recipe)),
        ("conf", escape(&manifest.conf_file)),
        ("commit", commit),
        ("seed", manifest.conf.run.seed.to_string()),
        ("tokenizer", short(&manifest.tokenizer.to_string())),
        ("lengthwise", escape(&manifest.build.lengthwise)),
    ];
    let facts = facts.iter().map(|(name, value)| format!("<div><dt>{name}</dt><dd>{value}</dd></div>\n"));
    format!("<dl class=\"made\">\n{}</dl>\n", facts.collect::<String>())
}

/// Sums over all domains.
struct Total {
    documents: u64,
    tokens: u64,
    drawn: u64,
    long_before: f64,
    long_after: f64,
}

fn total(preview: &Preview) -> Total {
    let sum = |of: fn(&Mixed) -> u64| preview.domains.iter().map(of).sum::<u64>();
    let (tokens, drawn) = (sum(|d| d.tokens), sum(|d| d.drawn));
    let long = |share: fn(&Mixed) -> f64, weight: fn(&Mixed) -> u64, all: u64| {
        preview.domains.iter().map(|d| share(d) * weight(d) as f64).sum::<f64>() / all.max(1) as f64
    };
    Total {
        documents: sum(|d| d.documents),
        tokens,
        drawn,
        long_before: long(|d| d.long_before, |d| d.tokens, tokens),
        long_after: long(|d| d.long_after, |d| d.drawn, drawn),
    }
}

/// Tokens packed and tokens dropped, over all domains.
fn placed(manifest: &RunManifest) -> (u64, u64) {
    let domains = manifest.summary.planned.domains.iter();
    domains.fold((0, 0), |(packed, dropped), d| (packed + d.packed, dropped + d.dropped))
}

/// The two panels of the paper's Figure 2.
fn shares_and_lengths(preview: &Preview) -> String {
    let domains = &preview.domains;
    let axis = Axis::of(domains.iter().flat_map(|d| [d.share, d.target, d.mixture_share]));
    let rows: Vec<Vec<Cell>> = domains
        .iter()
        .map(|d| {
            vec![
                words(&d.domain),
                drawing(axis.bars(&d.domain, d.share, d.mixture_share, Some(d.target))),
                figure(percent(d.share)),
                figure(percent(d.target)),
                figure(percent(d.mixture_share)),
            ]
        })
        .collect();
    let foot = vec![words(""), drawing(axis.labels()), figure(""), figure(""), figure("")];
    let headings = ["domain", "% of tokens", "before", "target", "after"];
    let by_domain = panel(
        "by-domain",
        "Share of tokens by domain",
        legend(true) + &table("Share of tokens by domain", &headings, &rows, Some(foot)),
    );

    let lengths = || preview.lengths_before.iter().zip(&preview.lengths_after);
    let axis = Axis::of(lengths().flat_map(|(before, after)| [*before, *after]));
    let rows: Vec<Vec<Cell>> = LENGTH_BUCKET_NAMES
        .iter()
        .zip(lengths())
        .map(|(bucket, (before, after))| {
            vec![
                words(bucket),
                drawing(axis.bars(bucket, *before, *after, None)),
                figure(percent(*before)),
                figure(percent(*after)),
            ]
        })
        .collect();
    let foot = vec![words(""), drawing(axis.labels()), figure(""), figure("")];
    let headings = ["tokens", "% of tokens", "before", "after"];
    let by_length = panel(
        "by-length",
        "Share of tokens by length of their document",
        legend(false) + &table("Share of tokens by length of their document", &headings, &rows, Some(foot)),
    );
    if domains.is_empty() {
        String::new()
    } else {
        format!("<div class=\"panels\">\n{by_domain}{by_length}</div>\n")
    }
}

fn panel(class: &str, title: &str, body: String) -> String {
    format!("<figure class=\"shares {class}\"><figcaption>{title}</figcaption>\n{body}</figure>\n")
}

fn domains(manifest: &RunManifest, preview: &Preview) -> String {
    let headings = [
        "domain",
        "documents",
        "tokens",
        "by length",
        "share",
        "target",
        "drawn share",
        "points",
        "long before",
        "long after",
        "epochs",
        "drawn",
        "packed",
        "dropped",
    ];
    let domains = &manifest.summary.planned.domains;
    let by_name: BTreeMap<&str, &Placed> = domains.iter().map(|d| (d.domain.as_str(), d)).collect();
    // the row of the other domains gets what the named ones leave
    let (all_packed, all_dropped) = placed(manifest);
    let named = preview.domains.iter().filter_map(|d| by_name.get(d.domain.as_str()));
    let others = named.fold((all_packed, all_dropped), |(p, d), of| (p - of.packed, d - of.dropped));
    let is_domain = |name: &str| manifest.summary.domains.iter().any(|d| d.domain == name);
    let rows: Vec<Vec<Cell>> = preview
        .domains
        .iter()
        .map(|d| {
            let (packed, dropped) = match by_name.get(d.domain.as_str()) {
                Some(placed) => (placed.packed, placed.dropped),
                None if is_domain(&d.domain) => (0, 0),
                None => others,
            };
            let off = d.mixture_share - d.target;
            let off = if off.abs() > FAR { flagged(points(off)) } else { figure(points(off)) };
            vec![
                words(&d.domain),
                figure(number(d.documents)),
                figure(number(d.tokens)),
                drawing(sparkline(&d.domain, &LENGTH_BUCKET_NAMES, &d.lengths_before, &d.lengths_after)),
                figure(percent(d.share)),
                figure(percent(d.target)),
                figure(percent(d.mixture_share)),
                off,
                figure(percent(d.long_before)),
                figure(percent(d.long_after)),
                figure(format!("{:.2}", d.epochs)),
                figure(number(d.drawn)),
                figure(number(packed)),
                figure(number(dropped)),
            ]
        })
        .collect();
    let (all, packed, dropped) = (total(preview), all_packed, all_dropped);
    let share = |of: fn(&Mixed) -> f64| percent(preview.domains.iter().map(of).sum());
    let foot = vec![
        words("all"),
        figure(number(all.documents)),
        figure(number(all.tokens)),
        drawing(sparkline("all", &LENGTH_BUCKET_NAMES, &preview.lengths_before, &preview.lengths_after)),
        figure(share(|d| d.share)),
        figure(share(|d| d.target)),
        figure(share(|d| d.mixture_share)),
        figure(""),
        figure(percent(all.long_before)),
        figure(percent(all.long_after)),
        figure(format!("{:.2}", all.drawn as f64 / all.tokens.max(1) as f64)),
        figure(number(all.drawn)),
        figure(number(packed)),
        figure(number(dropped)),
    ];
    let table = table("Domains", &headings, &rows, Some(foot));
    if table.is_empty() {
        return table;
    }
    let note = format!(
        "Shares in % of tokens. Points: the drawn share less its target, marked where they are more than 0.2 apart. \
         Long: share of tokens in documents of more than {} tokens. Epochs: tokens drawn for each token there is. \
         Dropped: of the last, incomplete sequence.",
        number(preview.long_tokens)
    );
    format!("{table}<p class=\"soft\">{note}</p>\n")
}

fn strata(manifest: &RunManifest) -> String {
    let asked = budgets(&manifest.summary.asked);
    let with_names = manifest.summary.drawn.strata.iter().filter(|s| !s.stratum.is_empty());
    let mut named: Vec<&Stratum> = with_names.collect();
    let others = largest(&mut named, |s| (s.budget, &s.domain, &s.stratum));
    let foot = (!others.is_empty()).then(|| {
        let sum = |of: fn(&Stratum) -> u64| figure(number(others.iter().map(|s| of(s)).sum()));
        let asked = |s: &Stratum| asked.get(&(s.domain.as_str(), s.stratum.as_str())).copied().unwrap_or(0);
        let asked = figure(number(others.iter().map(|s| asked(s)).sum()));
        let name = format!("{} others", number(others.len() as u64));
        vec![words(&name), words(""), sum(|s| s.spans), asked, sum(|s| s.budget)]
    });
    let rows: Vec<Vec<Cell>> = named
        .iter()
        .map(|s| {
            let asked = asked.get(&(s.domain.as_str(), s.stratum.as_str())).copied().unwrap_or(0);
            let drawn = number(s.budget);
            let drawn = if asked == s.budget { figure(drawn) } else { flagged(drawn) };
            vec![words(&s.domain), words(&s.stratum), figure(number(s.spans)), figure(number(asked)), drawn]
        })
        .collect();
    table("Strata", &["domain", "stratum", "spans drawn", "tokens asked", "tokens drawn"], &rows, foot)
}

/// Shortens a list that is too long to read to its largest elements, in their order, and returns the others.
fn largest<'a, T, K: Ord>(all: &mut Vec<&'a T>, size: impl Fn(&'a T) -> K) -> Vec<&'a T> {
    if all.len() <= NAMED {
        return vec![];
    }
    let mut sizes: Vec<K> = all.iter().map(|one| size(one)).collect();
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let least = sizes.swap_remove(NAMED - 1);
    let (kept, others) = all.iter().partition(|one| size(one) >= least);
    *all = kept;
    others
}

/// Strata that did not get the tokens that the recipe asked for, and domains that have a share but no
/// documents.
fn fell_short(manifest: &RunManifest) -> String {
    let short = short_strata(&manifest.summary);
    let mut named: Vec<&Short> = short.iter().collect();
    let others = largest(&mut named, |s| (s.asked.abs_diff(s.drawn), s.domain, s.stratum));
    let rows: Vec<Vec<Cell>> = named
        .iter()
        .map(|s| {
            vec![
                words(s.domain),
                words(s.stratum),
                figure(number(s.asked)),
                figure(number(s.drawn)),
                figure(percent(s.drawn as f64 / s.asked.max(1) as f64)),
            ]
        })
        .collect();
    let (asked, drawn) = short.iter().fold((0, 0), |sum, s| (sum.0 + s.asked, sum.1 + s.drawn));
    let reached = percent(drawn as f64 / asked.max(1) as f64);
    let these = match others.len() {
        0 => "all of these".to_owned(),
        more => format!("all of these and {} others", number(more as u64)),
    };
    let foot = vec![words(&these), words(""), figure(number(asked)), figure(number(drawn)), figure(reached)];
    let headings = ["domain", "stratum", "tokens asked", "tokens drawn", "% of what was asked"];

    let mut body = table("What fell short", &headings, &rows, Some(foot));
    if !body.is_empty() {
        let copies = manifest.conf.mixture.max_copies;
        body += &format!("<p class=\"soft\">No span is drawn more than {copies} times (max_copies).</p>\n");
    }
    let absent = || manifest.summary.domains.iter().filter(|d| d.target > 0.0 && d.tokens == 0);
    for domain in absent().take(NAMED) {
        let (name, target) = (escape(&domain.domain), percent(domain.target));
        body += &format!("<p>{name} should have {target}\u{a0}% of the tokens, but has no documents.</p>\n");
    }
    if let Some(more @ 1..) = absent().count().checked_sub(NAMED) {
        body += &format!("<p>So it is with {} others.</p>\n", number(more as u64));
    }
    body
}

fn repeated(preview: &Preview) -> String {
    let rows: Vec<Vec<Cell>> = preview
        .most_copies
        .iter()
        .filter(|r| r.copies > 1.0)
        .map(|r| {
            let tokens = number(r.tokens.unsigned_abs());
            vec![code(&r.doc_id), words(&r.domain), figure(tokens), figure(format!("{:.2}", r.copies))]
        })
        .collect();
    table("Documents repeated most", &["document", "domain", "tokens", "copies expected"], &rows, None)
}

fn training(metrics: &[Value]) -> String {
    let (Some(first), Some(last)) = (metrics.first(), metrics.last()) else { return String::new() };
    let series = |key: &str| -> Vec<(f64, f64)> {
        metrics.iter().filter_map(|line| Some((line["step"].as_f64()?, line[key].as_f64()?))).collect()
    };
    // JSON has no NaN: a loss that is not finite is null
    let loss_of = |line: &Value| match line["loss"].as_f64() {
        Some(loss) => format!("{loss:.3}"),
        None => "<span class=\"far\">not a number</span>".to_owned(),
    };
    let from = format!("nats a token, from {}", loss_of(first));
    let mut facts = vec![
        ("final loss", loss_of(last), from.as_str()),
        ("steps", number(last["step"].as_u64().unwrap_or(metrics.len() as u64)), ""),
    ];
    if let Some(tokens) = last["tokens"].as_u64() {
        facts.push(("trained on", number(tokens), "tokens"));
    }
    let mut speeds: Vec<f64> = series("tokens_per_second").into_iter().map(|(_, speed)| speed).collect();
    speeds.sort_by(f64::total_cmp);
    if let Some(median) = speeds.get(speeds.len() / 2) {
        facts.push(("speed", number(median.round() as u64), "tokens/s, median"));
    }
    if let Some(rate) = last["learning_rate"].as_f64() {
        facts.push(("learning rate", format!("{rate:e}"), "at the end"));
    }
    let facts = facts.iter().map(|(name, value, unit)| {
        format!("<div><dt>{name}</dt><dd>{value} <span class=\"soft\">{unit}</span></dd></div>\n")
    });
    format!(
        "<dl class=\"facts\">\n{}</dl>\n{}{}",
        facts.collect::<String>(),
        curve("Loss, nats a token", "large", &series("loss")),
        curve("Norm of the gradient", "small", &series("grad_norm")),
    )
}

fn lineage(attempt: &Attempt) -> String {
    if attempt.steps.is_empty() {
        return String::new();
    }
    let cached = attempt.steps.iter().filter(|step| step.cached).count() as u64;
    let flow: String = attempt
        .steps
        .iter()
        .map(|step| {
            let (class, how) =
                if step.cached { ("cached", "cached".into()) } else { ("computed", duration(step.seconds)) };
            format!("<li class=\"{class}\">{} <span class=\"soft\">{how}</span></li>\n", escape(&step.stage))
        })
        .collect();
    let rows: Vec<Vec<Cell>> = attempt
        .steps
        .iter()
        .map(|step| {
            let counts = step.counts.iter().filter(|(_, n)| **n > 0);
            let counts: Vec<String> =
                counts.map(|(name, n)| format!("{} {}", number(*n), name.replace('_', " "))).collect();
            vec![
                words(&step.stage),
                code(&step.key.chars().take(12).collect::<String>()),
                words(if step.cached { "cached" } else { "computed" }),
                figure(duration(step.seconds)),
                words(&counts.join(", ")),
            ]
        })
        .collect();
    format!(
        "<p>Started {}, {} in all on {} of {}; {} of {} cached.</p>\n<ol class=\"flow\">\n{flow}</ol>\n{}",
        escape(&clock(&attempt.started)),
        duration(attempt.seconds),
        count(attempt.cores as u64, "core"),
        escape(&attempt.host),
        number(cached),
        count(attempt.steps.len() as u64, "stage"),
        table("Lineage", &["stage", "key", "", "time", "counted"], &rows, None),
    )
}

/// A time without fractions of a second: 2026-11-23 15:33:17 UTC.
fn clock(time: &str) -> String {
    match time.split_once('T').zip(time.strip_suffix('Z')) {
        Some(((day, time), _)) => format!("{day} {} UTC", time.chars().take(8).collect::<String>()),
        None => time.to_owned(),
    }
}

fn sources(manifest: &RunManifest) -> String {
    let details =
        |title: String, body: String| format!("<details><summary>{title}</summary>\n{body}</details>\n");
    let listing = |text: &str| format!("<pre tabindex=\"0\"><code>{}</code></pre>\n", escape(text));
    let mut body = String::new();

    let (files, size) = (manifest.inputs.len() as u64, manifest.inputs.iter().map(|input| input.bytes).sum());
    if files > 0 {
        let rows: Vec<Vec<Cell>> = manifest
            .inputs
            .iter()
            .take(FILES_LISTED)
            .map(|input| {
                let hash: String = input.blake3.to_string().chars().take(12).collect();
                vec![words(&input.url), figure(number(input.bytes)), code(&hash)]
            })
            .collect();
        let mut list = table("Source files", &["file", "bytes", "BLAKE3"], &rows, None);
        if let Some(more) = files.checked_sub(FILES_LISTED as u64).filter(|more| *more > 0) {
            list += &format!("<p class=\"soft\">and {} more, in manifest.json</p>\n", number(more));
        }
        body += &details(format!("{}, {}", count(files, "source file"), bytes(size)), list);
    }
    body += &details("The conf, with defaults".to_owned(), listing(&manifest.conf.to_toml()));
    for (file, text) in &manifest.sql {
        body += &details(escape(file), listing(text));
    }
    body
}
