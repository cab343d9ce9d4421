//! preview: the mixture that a recipe makes of the corpus, before anything is drawn.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use indicatif::HumanCount;
use serde::Serialize;

use crate::algorithms::strata::{Asked, Repeated, Stratum};
use crate::conf::Mixture;
use crate::stages::domains::Domain;
use crate::stages::mixture::{left_out, shortfalls};
use crate::tables::LENGTH_BUCKET_NAMES;

/// A mixture, and the corpus that it is made from.
#[derive(Clone, Debug, Serialize)]
pub struct Preview {
    pub recipe: String,
    pub budget: u64,
    pub long_tokens: u64,
    pub domains: Vec<Mixed>,
    /// Shares of tokens by the paper's length buckets (Figure 2), in the corpus and in the mixture.
    pub lengths_before: Vec<f64>,
    pub lengths_after: Vec<f64>,
    pub most_copies: Vec<Repeated>,
    /// The strata and domains that fall short, one line each.
    pub shortfalls: Vec<String>,
    /// The domains that the conf leaves out, one line each.
    pub left_out: Vec<String>,
}

/// How many domains are listed by name in texts for people; the others are summed.
pub const NAMED: usize = 100;

/// The name of the line that sums the other domains.
const OTHERS: &str = "(all others)";

/// A domain in the corpus and in the mixture.
#[derive(Clone, Debug, Serialize)]
pub struct Mixed {
    pub domain: String,
    pub documents: u64,
    pub tokens: u64,
    /// The domain's share of the tokens: of the corpus, of the target, of the mixture.
    pub share: f64,
    pub target: f64,
    pub mixture_share: f64,
    /// Expected tokens in the mixture.
    pub drawn: u64,
    /// Expected tokens drawn per token of the domain.
    pub epochs: f64,
    /// Share of the domain's tokens that lie in long documents, in the corpus and in the mixture.
    pub long_before: f64,
    pub long_after: f64,
    /// Shares of the domain's tokens by length bucket, in the corpus and in the mixture.
    pub lengths_before: Vec<f64>,
    pub lengths_after: Vec<f64>,
}

impl Mixed {
    /// Sums several domains into one.
    fn sum(domains: &[Mixed]) -> Self {
        let add = |of: fn(&Mixed) -> f64| domains.iter().map(of).sum::<f64>();
        let (tokens, drawn) = (add(|d| d.tokens as f64).max(1.0), add(|d| d.drawn as f64).max(1.0));
        let lengths = |of: fn(&Mixed) -> &Vec<f64>, weight: fn(&Mixed) -> f64, sum: f64| {
            let at = |i: usize| domains.iter().map(|d| of(d)[i] * weight(d)).sum::<f64>() / sum;
            (0..LENGTH_BUCKET_NAMES.len()).map(at).collect()
        };
        Self {
            domain: OTHERS.to_owned(),
            documents: domains.iter().map(|d| d.documents).sum(),
            tokens: domains.iter().map(|d| d.tokens).sum(),
            share: add(|d| d.share),
            target: add(|d| d.target),
            mixture_share: add(|d| d.mixture_share),
            drawn: domains.iter().map(|d| d.drawn).sum(),
            epochs: drawn / tokens,
            long_before: add(|d| d.long_before * d.tokens as f64) / tokens,
            long_after: add(|d| d.long_after * d.drawn as f64) / drawn,
            lengths_before: lengths(|d| &d.lengths_before, |d| d.tokens as f64, tokens),
            lengths_after: lengths(|d| &d.lengths_after, |d| d.drawn as f64, drawn),
        }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn shares(parts: &[u64]) -> Vec<f64> {
    let whole = parts.iter().sum();
    parts.iter().map(|part| share(*part, whole)).collect()
}

fn sum_by_length<'a>(lists: impl Iterator<Item = &'a Vec<u64>>) -> Vec<u64> {
    lists.fold(vec![0; LENGTH_BUCKET_NAMES.len()], |sum, list| {
        sum.iter().zip(list).map(|(a, b)| a + b).collect()
    })
}

impl Preview {
    pub fn new(mixture: &Mixture, domains: &[Domain], asked: &Asked) -> Self {
        let budget = mixture.budget.0;
        let all: u64 = asked.strata.iter().flat_map(|s| &s.by_length).sum();
        let mut by_domain: BTreeMap<&str, Vec<&Stratum>> = BTreeMap::new();
        for stratum in &asked.strata {
            by_domain.entry(&stratum.domain).or_default().push(stratum);
        }
        let mixed = domains.iter().map(|domain| {
            let strata = by_domain.remove(domain.domain.as_str()).unwrap_or_default();
            let by_length = sum_by_length(strata.iter().map(|s| &s.by_length));
            let drawn: u64 = by_length.iter().sum();
            Mixed {
                domain: domain.domain.clone(),
                documents: domain.documents,
                tokens: domain.tokens,
                share: domain.share,
                target: domain.target,
                mixture_share: share(drawn, all),
                drawn,
                epochs: share(drawn, domain.tokens),
                long_before: share(domain.long_tokens, domain.tokens),
                long_after: share(strata.iter().map(|s| s.long).sum(), drawn),
                lengths_before: shares(&domain.tokens_by_length),
                lengths_after: shares(&by_length),
            }
        });
        Self {
            recipe: mixture.recipe.clone(),
            budget,
            long_tokens: mixture.long_tokens.0,
            domains: mixed.collect(),
            lengths_before: shares(&sum_by_length(domains.iter().map(|d| &d.tokens_by_length))),
            lengths_after: shares(&sum_by_length(asked.strata.iter().map(|s| &s.by_length))),
            most_copies: asked.most_copies.clone(),
            shortfalls: shortfalls(asked, domains, budget, mixture.max_copies),
            left_out: left_out(domains, &mixture.shares).into_iter().collect(),
        }
    }

    /// The names of the domains with the most tokens.
    pub fn largest(&self) -> BTreeSet<String> {
        let mut domains: Vec<&Mixed> = self.domains.iter().collect();
        domains.sort_by(|a, b| b.tokens.cmp(&a.tokens).then_with(|| a.domain.cmp(&b.domain)));
        domains.iter().take(NAMED).map(|mixed| mixed.domain.clone()).collect()
    }

    /// The same preview with only these domains named, and one line that sums the others.
    pub fn only(&self, names: &BTreeSet<String>) -> Self {
        let (mut domains, others): (Vec<Mixed>, Vec<Mixed>) =
            self.domains.iter().cloned().partition(|mixed| names.contains(&mixed.domain));
        domains.extend((!others.is_empty()).then(|| Mixed::sum(&others)));
        Self { domains, ..self.clone() }
    }

    /// The preview as text for a terminal.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let shown = self.only(&self.largest()).domains;
        let (documents, tokens) =
            self.domains.iter().fold((0, 0), |(d, t), domain| (d + domain.documents, t + domain.tokens));
        let _ = writeln!(
            out,
            "{}: {} tokens asked, {} drawn, from {} documents of {} tokens\n",
            self.recipe,
            HumanCount(self.budget),
            HumanCount(self.domains.iter().map(|domain| domain.drawn).sum()),
            HumanCount(documents),
            HumanCount(tokens)
        );
        let width = shown.iter().map(|d| d.domain.chars().count()).max().unwrap_or(0).max("domain".len());
        let long = format!("long (>{})", self.long_tokens);
        let _ = writeln!(
            out,
            "{:width$}  {:>10}  {:>14}  {:>23}  {:>12}  {:>6}  {long:>17}",
            "domain", "documents", "tokens", "share → target → mix", "drawn", "epochs"
        );
        for d in &shown {
            let _ = writeln!(
                out,
                "{:width$}  {:>10}  {:>14}  {:>5.1} → {:>5.1} → {:>5.1} %  {:>12}  {:>6.2}  {:>5.1} → {:>5.1} %",
                d.domain,
                HumanCount(d.documents).to_string(),
                HumanCount(d.tokens).to_string(),
                d.share * 100.0,
                d.target * 100.0,
                d.mixture_share * 100.0,
                HumanCount(d.drawn).to_string(),
                d.epochs,
                d.long_before * 100.0,
                d.long_after * 100.0,
            );
        }
        let line = |out: &mut String, name: &str, shares: &[f64]| {
            let cells: String = shares.iter().map(|s| format!("{:>8.1}", s * 100.0)).collect();
            let _ = writeln!(out, "{name:width$}{cells}");
        };
        let heads: String = LENGTH_BUCKET_NAMES.iter().map(|name| format!("{name:>8}")).collect();
        let _ = writeln!(out, "\n{:width$}{heads}   % of tokens by document length", "");
        line(&mut out, "corpus", &self.lengths_before);
        line(&mut out, "mixture", &self.lengths_after);
        for d in shown.iter().filter(|d| d.drawn > 0) {
            line(&mut out, &d.domain, &d.lengths_after);
        }
        let repeated: Vec<&Repeated> = self.most_copies.iter().filter(|r| r.copies > 1.0).collect();
        if !repeated.is_empty() {
            let _ = writeln!(out, "\nrepeated most");
            for r in repeated {
                let _ = writeln!(
                    out,
                    "  {:>5.2} copies  {}  {} tokens  {}",
                    r.copies,
                    r.doc_id,
                    HumanCount(r.tokens as u64),
                    r.domain
                );
            }
        }
        for (heading, lines) in [("falls short", &self.shortfalls), ("left out", &self.left_out)] {
            if !lines.is_empty() {
                let _ = writeln!(out, "\n{heading}");
            }
            for line in lines {
                let _ = writeln!(out, "  {line}");
            }
        }
        out
    }
}

/// Two mixtures side by side, with their differences in percentage points.
pub fn against(a: (&str, &Preview), b: (&str, &Preview)) -> String {
    let mut out = String::new();
    let named: BTreeSet<String> = a.1.largest().into_iter().chain(b.1.largest()).collect();
    let (shown_a, shown_b) = (a.1.only(&named), b.1.only(&named));
    let (a, b) = ((a.0, &shown_a), (b.0, &shown_b));
    let all = a.1.domains.iter().chain(&b.1.domains).map(|d| d.domain.as_str());
    let names: BTreeSet<&str> = all.collect();
    let width = names.iter().map(|n| n.chars().count()).max().unwrap_or(0).max(8);
    let find = |p: &'_ Preview, name: &str| p.domains.iter().find(|d| d.domain == name).cloned();
    let _ = writeln!(out, "a  {}  {}, {} tokens", a.0, a.1.recipe, HumanCount(a.1.budget));
    let _ = writeln!(out, "b  {}  {}, {} tokens\n", b.0, b.1.recipe, HumanCount(b.1.budget));
    let _ = writeln!(
        out,
        "{:width$}  {:>24}  {:>24}  {:>16}",
        "domain", "share a → b (points)", "long a → b (points)", "epochs a → b"
    );
    for name in names {
        let (x, y) = (find(a.1, name), find(b.1, name));
        let get = |d: &Option<Mixed>, f: fn(&Mixed) -> f64| d.as_ref().map_or(0.0, f);
        let (sx, sy) = (get(&x, |d| d.mixture_share) * 100.0, get(&y, |d| d.mixture_share) * 100.0);
        let (lx, ly) = (get(&x, |d| d.long_after) * 100.0, get(&y, |d| d.long_after) * 100.0);
        let (ex, ey) = (get(&x, |d| d.epochs), get(&y, |d| d.epochs));
        let _ = writeln!(
            out,
            "{name:width$}  {sx:>6.1} → {sy:>5.1} ({:>+6.1})  {lx:>6.1} → {ly:>5.1} ({:>+6.1})  {ex:>6.2} → {ey:>6.2}",
            sy - sx,
            ly - lx
        );
    }
    let heads: String = LENGTH_BUCKET_NAMES.iter().map(|name| format!("{name:>8}")).collect();
    let _ = writeln!(out, "\n{:width$}{heads}   % of tokens by document length", "");
    for (name, shares) in [("a", &a.1.lengths_after), ("b", &b.1.lengths_after)] {
        let cells: String = shares.iter().map(|s| format!("{:>8.1}", s * 100.0)).collect();
        let _ = writeln!(out, "{name:width$}{cells}");
    }
    let points: String =
        a.1.lengths_after
            .iter()
            .zip(&b.1.lengths_after)
            .map(|(x, y)| format!("{:>+8.1}", (y - x) * 100.0))
            .collect();
    let _ = writeln!(out, "{:width$}{points}", "points");
    for (name, preview) in [("a", a.1), ("b", b.1)] {
        for line in preview.shortfalls.iter().chain(&preview.left_out) {
            let _ = writeln!(out, "{name}: {line}");
        }
    }
    out
}
