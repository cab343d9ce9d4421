//! mixture: runs the analyst's recipe and checks it row by row against the catalog.
//!
//! The recipe's rows come sorted by `doc_id`, as the catalog's do, so one pass joins the two, and nothing of
//! the corpus's size is held in memory.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{FixedSizeBinaryBuilder, Float64Builder, Int64Builder, RecordBatch, StringBuilder};
use datafusion::common::ScalarValue;
use datafusion::common::runtime::SpawnedTask;
use datafusion::logical_expr::LogicalPlanBuilder;
use datafusion::prelude::{DataFrame, col};
use futures::StreamExt;
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::catalog::register_documents;
use super::domains::{self, Domain};
use crate::algorithms::spans::{Batches, SpanJoin};
use crate::algorithms::strata::{Asked, Span, Sums};
use crate::conf::{Param, Shares, Shortfall};
use crate::output::{Output, Published};
use crate::progress::Bar;
use crate::run::{Run, ingredients};
use crate::sql::engine::{TableWriter, query, scan};
use crate::sql::recipe::{Bound, Recipe};
use crate::sql::scalar_json;
use crate::stage::Stage;
use crate::tables::ONE;
use crate::{Error, Result, tables};

/// The default time limit of a recipe. One that takes longer is taken for one that never ends.
const MAX_SECONDS: u64 = 6 * 3600;

/// How many domains a message names.
const MAX_DOMAINS: usize = 20;

/// Reads the conf's recipe and binds its parameters.
///
/// # Errors
/// The recipe cannot be read or parsed, or the parameters are not those that it declares.
pub fn recipe(run: &Run) -> Result<(Recipe, Bound)> {
    let mixture = &run.conf.mixture;
    let text = run.files.read(&mixture.recipe).map_err(|e| {
        let help = miette::Diagnostic::help(&e).map(|help| help.to_string());
        run.conf.wrong(&["mixture", "recipe"], e.to_string(), "this file", help)
    })?;
    run.sql.lock().expect("no panic while held").insert(mixture.recipe.clone(), text.clone());
    let recipe = Recipe::parse(&mixture.recipe, &text)?;
    let number = |n: u64| ScalarValue::Int64(Some(n as i64));
    let builtin = BTreeMap::from([
        ("budget".to_owned(), number(mixture.budget.0)),
        ("long_tokens".to_owned(), number(mixture.long_tokens.0)),
        ("max_span".to_owned(), number(mixture.max_span.0)),
        ("max_copies".to_owned(), number(mixture.max_copies as u64)),
        ("seed".to_owned(), number(run.conf.run.seed)),
    ]);
    let given = mixture.params.iter().map(|(name, value)| {
        let value = match value {
            Param::Bool(v) => ScalarValue::Boolean(Some(*v)),
            Param::Int(v) => ScalarValue::Int64(Some(*v)),
            Param::Float(v) => ScalarValue::Float64(Some(*v)),
            Param::Text(v) => ScalarValue::Utf8(Some(v.clone())),
        };
        (name.clone(), value)
    });
    let bound = recipe.bind(&builtin, &given.collect())?;
    Ok((recipe, bound))
}

/// Starts the recipe. Both the stage and the preview use it.
///
/// # Errors
/// The recipe cannot be planned, or one of its parameters names a domain without documents.
pub async fn span_join(
    run: &Run,
    catalog: &Published,
    domains: &Published,
    bound: &Bound,
) -> Result<SpanJoin> {
    let recipe = &run.conf.mixture.recipe;
    let failed = |e| query(&format!("{recipe} cannot be run"), e);
    let session = run.engine.session();
    register_documents(run, &session, catalog).await?;
    for (name, schema) in [("domains", tables::domains()), ("shares", tables::shares())] {
        let table = domains.table(name);
        run.engine.register(&session, name, schema, &[(&domains.folder, &table)], &[]).await?;
    }
    for (parameter, name) in bound.domains() {
        check_domain(run, parameter, name, &domains::read(domains).await?)?;
    }
    let plan = bound.plan(&session).await?;
    let sorted =
        LogicalPlanBuilder::from(plan).sort([col("doc_id").sort(true, false)]).and_then(|b| b.build());
    let frame = session.execute_logical_plan(sorted.map_err(failed)?).await.map_err(failed)?;
    let bar = run.progress.stage("mixture", catalog.count("documents"));
    // a clock overflows after some centuries
    let seconds = run.conf.engine.recipe_seconds.unwrap_or(MAX_SECONDS).min(1 << 32);
    let rows = bounded(frame, bar, recipe.clone(), Duration::from_secs(seconds));
    let known =
        scan(catalog.folder.clone(), catalog.table("catalog"), Some(vec!["doc_id", "domain", "tokens"]));
    let heldout = catalog.table("heldout");
    let heldout = (heldout.rows > 0)
        .then(|| Box::pin(scan(catalog.folder.clone(), heldout, Some(vec!["doc_id"]))) as Batches);
    Ok(SpanJoin::new(recipe, run.conf.mixture.max_span.0, Box::pin(rows), Box::pin(known), heldout))
}

/// Checks that the domain named by a recipe's parameter has documents.
fn check_domain(run: &Run, parameter: &str, name: &str, domains: &[Domain]) -> Result<()> {
    if domains.iter().any(|domain| domain.domain == name && domain.documents > 0) {
        return Ok(());
    }
    let message = format!("there are no documents of domain `{name}`");
    let help = format!("domains are {}", listed(domains.iter().filter(|d| d.documents > 0)));
    Err(run.conf.wrong(&["mixture", "params", parameter], message, "this domain", Some(help)))
}

/// The rows of a query that is stopped after the time `most`. The query runs as a task of its own, so that
/// the time limit and signals are noticed even while it is busy with a single batch.
fn bounded(frame: DataFrame, bar: Bar, recipe: String, most: Duration) -> Batches {
    let deadline = Instant::now() + most;
    let (send, rows) = mpsc::channel(1);
    // the query is cancelled when the stream of its rows is dropped
    let running = SpawnedTask::spawn(async move {
        let mut rows = match frame.execute_stream().await {
            Ok(rows) => bar.watch(rows),
            Err(error) => return drop(send.send(Err(error)).await),
        };
        while let Some(batch) = rows.next().await {
            // the receiver was dropped
            if send.send(batch).await.is_err() {
                return;
            }
        }
    });
    let next = move |(mut rows, running): (mpsc::Receiver<_>, SpawnedTask<()>)| {
        let failed = format!("{recipe} failed while it ran");
        let endless = format!("{recipe} has run for {} seconds and is not done", most.as_secs());
        async move {
            match timeout_at(deadline, rows.recv()).await {
                Ok(Some(Ok(batch))) => Ok(Some((batch, (rows, running)))),
                Ok(Some(Err(error))) => Err(query(&failed, error)),
                // the query has ended, or its task has panicked
                Ok(None) => match running.join().await {
                    Ok(()) => Ok(None),
                    Err(panic) => {
                        Err(Error::data(format!("{failed}: {panic}"), "is it a bug of DataFusion's?"))
                    }
                },
                Err(_) => Err(Error::data(
                    endless,
                    "does it join documents with each other, or call itself without end? If it takes long for good \
                     reason, set engine.recipe_seconds",
                )),
            }
        }
    };
    Box::pin(futures::stream::try_unfold((rows, running), next))
}

/// Table `mixture`. The notes are what the recipe asks for, as [`Asked`].
pub async fn obtain(run: &Run, catalog: &Published, domains: &Published) -> Result<Published> {
    let (recipe, bound) = recipe(run)?;
    let mixture = &run.conf.mixture;
    let values: BTreeMap<_, _> =
        bound.values.iter().map(|(name, value)| (name, scalar_json(value))).collect();
    // the stage's `version` covers the SQL functions of recipes too; rows are checked against max_span, and
    // the notes depend on long_tokens and max_copies, whether or not the recipe uses them
    let list = ingredients(
        Stage::Mixture,
        [
            ("catalog", catalog.digest("catalog")),
            ("heldout", catalog.digest("heldout")),
            ("domains", domains.digest("domains")),
            ("shares", domains.digest("shares")),
            ("recipe", json!(recipe.key)),
            ("parameters", json!(values)),
            ("long_tokens", json!(mixture.long_tokens.0)),
            ("max_span", json!(mixture.max_span.0)),
            ("max_copies", json!(mixture.max_copies)),
        ],
    );
    run.obtain(Stage::Mixture, list, async |draft| {
        let mut span_join = span_join(run, catalog, domains, &bound).await?;
        let mut sums = Sums::new(mixture.long_tokens.0, mixture.max_copies);
        let mut writer = TableWriter::new(&draft.folder, "mixture", tables::mixture());
        let mut rows = MixtureRows::new();
        while span_join
            .step(&mut |span| {
                sums.add(&span);
                rows.push(&span);
                Ok(())
            })
            .await?
        {
            writer.write(std::mem::replace(&mut rows, MixtureRows::new()).finish()).await?;
        }
        writer.write(rows.finish()).await?;

        let asked = sums.asked();
        let mut output = Output::default();
        let table = writer.finish().await?;
        let session = run.engine.session();
        run.engine
            .register(&session, "mixture", tables::mixture(), &[(&draft.folder, &table)], &["doc_id"])
            .await?;
        run.check(Stage::Mixture, &session).await?;
        output.table("mixture", table);
        output.count("spans", asked.strata.iter().map(|s| s.spans).sum());
        output.count("tokens", asked.strata.iter().map(|s| s.budget).sum());
        output.notes = serde_json::to_value(asked).expect("plain numbers");
        Ok(output)
    })
    .await
}

/// Builds rows of table `mixture`.
pub(super) struct MixtureRows {
    doc_id: FixedSizeBinaryBuilder,
    start: Int64Builder,
    stop: Int64Builder,
    copies: Float64Builder,
    stratum: StringBuilder,
    domain: StringBuilder,
    tokens: Int64Builder,
}

impl MixtureRows {
    pub(super) fn new() -> Self {
        let (start, stop, copies, stratum, domain, tokens) = Default::default();
        Self { doc_id: FixedSizeBinaryBuilder::new(16), start, stop, copies, stratum, domain, tokens }
    }

    pub(super) fn push(&mut self, span: &Span<'_>) {
        self.doc_id.append_value(span.doc_id).expect("16 bytes");
        self.start.append_value(span.start);
        self.stop.append_value(span.stop);
        self.copies.append_value(span.copies as f64 / ONE as f64);
        self.stratum.append_value(span.stratum);
        self.domain.append_value(span.domain);
        self.tokens.append_value(span.tokens);
    }

    pub(super) fn finish(mut self) -> RecordBatch {
        tables::rows(
            tables::mixture(),
            [
                ("doc_id", Arc::new(self.doc_id.finish())),
                ("start", Arc::new(self.start.finish())),
                ("stop", Arc::new(self.stop.finish())),
                ("copies", Arc::new(self.copies.finish())),
                ("stratum", Arc::new(self.stratum.finish())),
                ("domain", Arc::new(self.domain.finish())),
                ("tokens", Arc::new(self.tokens.finish())),
            ],
        )
    }
}

/// Checks that the run may go on with what a recipe asks for.
///
/// # Errors
/// There are no documents, nothing is to be drawn, or the strata's budgets sum to more than 1.001 of the
/// conf's. Unless the conf allows a shortfall, also: they sum to less than 0.999 of it, or a stratum asks for
/// more than `max_copies` of all its tokens.
pub fn check_budget(run: &Run, asked: &Asked, domains: &[Domain]) -> Result<()> {
    let mixture = &run.conf.mixture;
    if domains.iter().all(|domain| domain.tokens == 0) {
        let help = "`lengthwise sql CONF \"select reason, count(*) from rejects group by reason\"` says why rows were rejected; a large `mixture.holdout` may have taken the rest";
        return Err(Error::data("the sources have no document to draw from", help));
    }
    if let Some(line) = left_out(domains, &mixture.shares) {
        tracing::warn!("{line}");
    }
    let short = shortfalls(asked, domains, mixture.budget.0, mixture.max_copies);
    let total: u64 = asked.strata.iter().map(|s| s.budget).sum();
    if total as f64 > mixture.budget.0 as f64 * 1.001 {
        let message = format!(
            "{}: copies × length sum to {total} tokens, more than the budget of {}",
            mixture.recipe, mixture.budget.0
        );
        return Err(Error::data(
            message,
            "divide by the sum of the weights: `weight * $budget / total` is the usual form",
        ));
    }
    if total == 0 {
        let help = format!("does its `where` leave anything? Domains are {}", listed(domains.iter()));
        return Err(Error::data(format!("{}: nothing is to be drawn", mixture.recipe), help));
    }
    if short.is_empty() || mixture.shortfall == Shortfall::Allow {
        for line in &short {
            tracing::warn!("{line}");
        }
        return Ok(());
    }
    let help = "lower `mixture.budget`, raise `mixture.max_copies`, change the shares, or set `mixture.shortfall = \"allow\"` to go on with less";
    Err(Error::data(format!("{} cannot reach the budget:\n  {}", mixture.recipe, short.join("\n  ")), help))
}

/// The names of domains, at most [`MAX_DOMAINS`] of them.
fn listed<'a>(domains: impl Iterator<Item = &'a Domain>) -> String {
    let names: Vec<&str> = domains.map(|domain| domain.domain.as_str()).collect();
    let more = match names.len().saturating_sub(MAX_DOMAINS) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    names[..names.len().min(MAX_DOMAINS)].join(", ") + &more
}

/// A warning that names the domains without a target share, because they are easily forgotten or misspelt. A
/// share of 0 is explicit, so it is not reported.
pub fn left_out(domains: &[Domain], shares: &Shares) -> Option<String> {
    let named = shares.targets()?;
    let is_out = |d: &&Domain| d.tokens > 0 && !named.contains_key(&d.domain);
    let mut out: Vec<&Domain> = domains.iter().filter(is_out).collect();
    out.sort_by(|a, b| b.tokens.cmp(&a.tokens).then_with(|| a.domain.cmp(&b.domain)));
    (!out.is_empty()).then(|| {
        format!(
            "`mixture.shares` gives no share to {}: {:.1} % of the corpus's tokens",
            listed(out.iter().copied()),
            100.0 * out.iter().map(|domain| domain.share).sum::<f64>()
        )
    })
}

/// One line for each stratum that falls short of its budget, and more if the total is below `budget`.
pub fn shortfalls(asked: &Asked, domains: &[Domain], budget: u64, max_copies: u32) -> Vec<String> {
    let mut lines = vec![];
    for stratum in &asked.strata {
        let short = stratum.shortfall(max_copies);
        if short > 0 {
            let name = match stratum.stratum.as_str() {
                "" => stratum.domain.clone(),
                name => format!("{} ({name})", stratum.domain),
            };
            lines.push(format!(
                "{name}: {} tokens are asked of {} ({:.1} copies of each); max_copies = {max_copies} leaves {short} short",
                stratum.budget,
                stratum.available,
                stratum.budget as f64 / stratum.available.max(1) as f64
            ));
        }
    }
    let total: u64 = asked.strata.iter().map(|s| s.budget).sum();
    if (total as f64) < budget as f64 * 0.999 {
        lines.push(format!("copies × length sum to {total} tokens of {budget}"));
        for domain in domains.iter().filter(|d| d.target > 0.0 && d.tokens == 0) {
            lines.push(format!(
                "{}: a share of {:.4} is asked, but there are no documents",
                domain.domain, domain.target
            ));
        }
    }
    lines
}
