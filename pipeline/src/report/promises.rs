//! The promises of a recipe, and whether the run kept them: the judgement at the head of the report.

use std::collections::BTreeMap;

use super::text::{count, number, percent, points};
use crate::algorithms::strata::Asked;
use crate::conf::Param;
use crate::directory::{RunManifest, Summary};
use crate::preview::Preview;

/// A domain's share is flagged if it differs from its target by more than this: 0.2 percentage points.
pub const FAR: f64 = 0.002;

/// The total meets the budget if it differs by at most this share of it.
const BUDGET_TOLERANCE: f64 = 0.001;

/// Whether a promise was kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Standing {
    Kept,
    /// Not what a reader may expect, but what the recipe asks for.
    Noted,
    Broken,
}

/// A promise and its outcome, as a sentence of plain text.
pub struct Promise {
    pub standing: Standing,
    pub text: String,
}

/// A stratum that was drawn with fewer or more tokens than the recipe asked for.
pub struct Short<'a> {
    pub domain: &'a str,
    pub stratum: &'a str,
    pub asked: u64,
    pub drawn: u64,
}

/// The strata whose drawn tokens differ from the tokens asked for.
pub fn short(summary: &Summary) -> Vec<Short<'_>> {
    let drawn = budgets(&summary.drawn);
    let asked = budgets(&summary.asked).into_iter().map(|((domain, stratum), asked)| {
        let drawn = drawn.get(&(domain, stratum)).copied().unwrap_or(0);
        Short { domain, stratum, asked, drawn }
    });
    asked.filter(|s| s.asked != s.drawn).collect()
}

/// Tokens by domain and stratum.
pub fn budgets(asked: &Asked) -> BTreeMap<(&str, &str), u64> {
    asked.strata.iter().map(|s| ((s.domain.as_str(), s.stratum.as_str()), s.budget)).collect()
}

/// All promises that a manifest can be judged by, the most serious ones first.
pub fn promises(manifest: &RunManifest, preview: &Preview) -> Vec<Promise> {
    let all =
        [budget(preview), to_the_token(manifest), shares(manifest, preview), long_share(manifest, preview)];
    all.into_iter().flatten().chain([accounts(manifest)]).collect()
}

fn broken_unless(kept: bool, text: String) -> Promise {
    Promise { standing: if kept { Standing::Kept } else { Standing::Broken }, text }
}

fn budget(preview: &Preview) -> Option<Promise> {
    let drawn: u64 = preview.domains.iter().map(|d| d.drawn).sum();
    let budget = preview.budget;
    let off = (drawn as f64 - budget as f64) / budget.max(1) as f64;
    let met = off.abs() <= BUDGET_TOLERANCE;
    let text = match () {
        () if drawn == budget => format!("The budget is met: {} tokens are drawn.", number(drawn)),
        () if met => format!("The budget is met: {} tokens are drawn of {}.", number(drawn), number(budget)),
        () => format!(
            "The budget is not met: {} tokens are drawn of {}, {}\u{a0}% of it.",
            number(drawn),
            number(budget),
            percent(1.0 + off)
        ),
    };
    Some(broken_unless(met, text))
}

fn to_the_token(manifest: &RunManifest) -> Option<Promise> {
    let (all, short) = (manifest.summary.asked.strata.len() as u64, short(&manifest.summary));
    let domains_only = manifest.summary.asked.strata.iter().all(|s| s.stratum.is_empty());
    let what = if domains_only { "domain" } else { "stratum of a domain" };
    let text = match short.as_slice() {
        [] => format!("Every {what} has the tokens that the recipe asked for, to the token."),
        [one] => {
            let stratum = if one.stratum.is_empty() { String::new() } else { format!(" ({})", one.stratum) };
            let (drawn, asked) = (number(one.drawn), number(one.asked));
            format!("{}{stratum} has {drawn} tokens, where the recipe asked for {asked}.", one.domain)
        }
        many => format!(
            "{} of {} parts of the mixture have other than the tokens that the recipe asked for.",
            number(many.len() as u64),
            number(all)
        ),
    };
    (all > 0).then(|| broken_unless(short.is_empty(), text))
}

/// The domain whose share is farthest from its target: its name, its share and its target.
fn farthest(preview: &Preview, share: impl Fn(&str) -> f64) -> Option<(&str, f64, f64)> {
    let all = preview.domains.iter().map(|d| (d.domain.as_str(), share(&d.domain), d.target));
    all.max_by(|a, b| (a.1 - a.2).abs().total_cmp(&(b.1 - b.2).abs()))
}

fn shares(manifest: &RunManifest, preview: &Preview) -> Option<Promise> {
    let mut asked: BTreeMap<&str, u64> = BTreeMap::new();
    for ((domain, _), tokens) in budgets(&manifest.summary.asked) {
        *asked.entry(domain).or_default() += tokens;
    }
    let all = asked.values().sum::<u64>().max(1) as f64;
    let drawn: BTreeMap<&str, f64> =
        preview.domains.iter().map(|d| (d.domain.as_str(), d.mixture_share)).collect();

    let by_recipe = farthest(preview, |domain| asked.get(domain).copied().unwrap_or(0) as f64 / all)?;
    let in_fact = farthest(preview, |domain| drawn[domain])?;
    let off = |(_, share, target): (&str, f64, f64)| share - target;
    let told = |(domain, share, target): (&str, f64, f64)| {
        format!(
            "the farthest, {domain}, has {}\u{a0}% where the target is {}\u{a0}%",
            percent(share),
            percent(target)
        )
    };
    let (standing, text) = if off(in_fact).abs() <= FAR {
        let (farthest, by) = (in_fact.0, points(off(in_fact)));
        let text = format!(
            "Domain shares are within 0.2 points of their targets: the farthest, {farthest}, by {by}."
        );
        (Standing::Kept, text)
    } else if off(by_recipe).abs() > FAR {
        (
            Standing::Noted,
            format!("The recipe itself asks for other shares than the targets: {}.", told(by_recipe)),
        )
    } else {
        (Standing::Broken, format!("Domain shares are not those of the targets: {}.", told(in_fact)))
    };
    Some(Promise { standing, text })
}

/// The promise of recipes with a `$long_share`, from the conf or the recipe's header. A lower share is only
/// noted, because the recipe decides whether it holds for each domain or for all of them, and `max_copies`
/// may limit it.
fn long_share(manifest: &RunManifest, preview: &Preview) -> Option<Promise> {
    let mixture = &manifest.conf.mixture;
    if mixture.params.contains_key("short_keep") {
        return None;
    }
    let goal = match mixture.params.get("long_share") {
        Some(Param::Float(share)) => *share,
        Some(Param::Int(share)) => *share as f64,
        Some(_) => return None,
        None => default_of(manifest.sql.get(&mixture.recipe)?, "$long_share")?,
    };
    let drawn: u64 = preview.domains.iter().map(|d| d.drawn).sum();
    let long: u64 = manifest.summary.drawn.strata.iter().map(|s| s.long).sum();
    let overall = long as f64 / drawn.max(1) as f64;
    let below: Vec<String> = preview
        .domains
        .iter()
        .filter(|d| d.drawn > 0 && d.long_after < goal - FAR)
        .map(|d| format!("{} ({}\u{a0}%)", d.domain, percent(d.long_after)))
        .collect();
    let (has, aim) = (percent(overall), percent(goal));
    let told = format!("Long documents have {has}\u{a0}% of all tokens; $long_share is {aim}\u{a0}%");
    let (standing, rest) = match below.as_slice() {
        [] => (Standing::Kept, "reached in every domain".to_owned()),
        named if named.len() <= 4 => (Standing::Noted, format!("less in {}", named.join(", "))),
        many => (Standing::Noted, format!("less in {}", count(many.len() as u64, "domain"))),
    };
    Some(Promise { standing, text: format!("{told}, {rest}.") })
}

/// The default of a parameter, read from a recipe's header: `--   $long_share   double = 0.70   …`.
fn default_of(sql: &str, parameter: &str) -> Option<f64> {
    let header = sql.lines().take_while(|line| line.starts_with("--"));
    let declared = header.filter_map(|line| line.trim_start_matches('-').trim().strip_prefix(parameter));
    declared.filter_map(|rest| rest.split_once('=')?.1.split_whitespace().next()?.parse().ok()).next()
}

fn accounts(manifest: &RunManifest) -> Promise {
    let drawn: u64 = manifest.summary.drawn.strata.iter().map(|s| s.budget).sum();
    let placed = &manifest.summary.planned.domains;
    let (packed, dropped) = placed.iter().fold((0, 0), |sum, d| (sum.0 + d.packed, sum.1 + d.dropped));
    let (p, d) = (number(packed), number(dropped));
    if packed + dropped == drawn {
        let text = format!(
            "Nothing is lost: {p} tokens are packed, {d} are the dropped tail, together all that is drawn."
        );
        return Promise { standing: Standing::Kept, text };
    }
    let text = format!("{p} tokens packed and {d} dropped are not the {} that are drawn.", number(drawn));
    Promise { standing: Standing::Broken, text }
}
