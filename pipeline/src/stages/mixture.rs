//! mixture: the analyst's recipe, run and checked row by row against the catalog.
//!
//! The recipe's rows come sorted by `doc_id`, as the catalog's do, so the two are woven together in one pass
//! and nothing of the corpus's size is held in memory.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{
    Array, ArrayRef, AsArray, FixedSizeBinaryBuilder, Float64Builder, Int64Builder, RecordBatch,
    StringBuilder,
};
use arrow::datatypes::{Float64Type, Int64Type};
use datafusion::common::ScalarValue;
use datafusion::common::runtime::SpawnedTask;
use datafusion::logical_expr::LogicalPlanBuilder;
use datafusion::prelude::{DataFrame, col};
use futures::{Stream, StreamExt};
use hashbrown::HashMap;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::catalog::register_documents;
use super::domains::{self, Domain};
use super::expected::Spans;
use crate::conf::{Param, Shares, Shortfall};
use crate::engine::{TableWriter, query, scan};
use crate::hash::hex;
use crate::progress::Bar;
use crate::recipe::{Bound, Recipe};
use crate::run::{Run, Stage, ingredients};
use crate::sql::scalar_json;
use crate::stage::{Output, Published};
use crate::{Error, Result, tables};

const VERSION: u32 = 3;

/// Fixed-point one: `copies` are multiples of 2⁻³².
pub const ONE: u64 = 1 << 32;

/// A recipe that has not ended by then is taken for one that never does.
const MOST_SECONDS: u64 = 6 * 3600;

/// More expected copies of one span than this are a mistake, whatever `max_copies` says.
const MOST_COPIES: f64 = 1e6;

/// One row of a recipe's result, with what the catalog knows of its document.
pub struct Span<'a> {
    pub doc_id: &'a [u8; 16],
    pub start: i64,
    pub stop: i64,
    /// Expected copies, in units of 2⁻³².
    pub copies: u64,
    pub stratum: &'a str,
    pub domain: &'a str,
    /// Tokens of the whole document.
    pub tokens: i64,
}

/// A stream of record batches.
pub type Batches = Pin<Box<dyn Stream<Item = Result<RecordBatch>> + Send>>;

/// A table sorted by `doc_id`, its first column, in which documents are looked up in ascending order.
struct Sorted {
    rows: Batches,
    batch: Option<RecordBatch>,
    at: usize,
}

impl Sorted {
    fn new(rows: Batches) -> Self {
        Self { rows, batch: None, at: 0 }
    }

    /// The batch and row of a document; `None` where it isn't there.
    async fn find(&mut self, doc_id: &[u8; 16]) -> Result<Option<(&RecordBatch, usize)>> {
        loop {
            if let Some(batch) = &self.batch {
                let ids = batch.column(0).as_fixed_size_binary();
                while self.at < ids.len() && ids.value(self.at) < doc_id.as_slice() {
                    self.at += 1;
                }
                if self.at < ids.len() {
                    break;
                }
            }
            match self.rows.next().await {
                Some(batch) => (self.batch, self.at) = (Some(batch?), 0),
                None => return Ok(None),
            }
        }
        let found = self.batch.as_ref().map(|batch| (batch, self.at));
        Ok(found.filter(|(batch, at)| batch.column(0).as_fixed_size_binary().value(*at) == doc_id))
    }
}

/// The documents that a recipe may draw from.
struct Catalog {
    all: Sorted,
    heldout: Option<Sorted>,
}

impl Catalog {
    /// Domain and tokens of a document; `None` where the catalog hasn't got it, or it is held out.
    async fn find(&mut self, doc_id: &[u8; 16]) -> Result<Option<(&str, i64)>> {
        if let Some(heldout) = &mut self.heldout
            && heldout.find(doc_id).await?.is_some()
        {
            return Ok(None);
        }
        let Some((batch, at)) = self.all.find(doc_id).await? else { return Ok(None) };
        let tokens = batch.column(2).as_primitive::<Int64Type>().value(at);
        Ok(Some((batch.column(1).as_string::<i32>().value(at), tokens)))
    }
}

/// The rows of one document, nearly always one.
#[derive(Default)]
struct Document {
    doc_id: Option<[u8; 16]>,
    /// start, stop, copies, stratum
    spans: Vec<(i64, i64, u64, String)>,
}

impl Document {
    /// Checks the spans of a document that is complete and hands them on, by `start`.
    async fn settle(
        &mut self,
        recipe: &str,
        max_span: i64,
        catalog: &mut Catalog,
        each: &mut impl FnMut(Span<'_>) -> Result<()>,
    ) -> Result<()> {
        let Some(doc_id) = self.doc_id.take() else { return Ok(()) };
        let Some((domain, tokens)) = catalog.find(&doc_id).await? else {
            return Err(wrong(
                recipe,
                &doc_id,
                "it is not in `documents`",
                "return doc_id as `documents` has it",
            ));
        };
        self.spans.sort_by_key(|span| span.0);
        let mut before: Option<(i64, i64)> = None;
        for (start, stop, copies, stratum) in self.spans.drain(..) {
            if start < 0 || start >= stop || stop > tokens {
                let what = format!("the span [{start}, {stop}) is not inside its {tokens} tokens");
                return Err(wrong(
                    recipe,
                    &doc_id,
                    what,
                    "0 <= start < stop <= tokens has to hold: write `least(start + $max_span, tokens) as stop`",
                ));
            }
            if stop - start > max_span {
                let what = format!("the span [{start}, {stop}) is longer than max_span, {max_span} tokens");
                let cure = "write a row for each `unnest(range(0, tokens, $max_span)) as start`, with \
                            `least(start + $max_span, tokens) as stop`, or raise `mixture.max_span`";
                return Err(wrong(recipe, &doc_id, what, cure));
            }
            if let Some((first, end)) = before.replace((start, stop))
                && start < end
            {
                let what = match first == start {
                    true => format!("two rows begin at token {start}"),
                    false => format!("the spans [{first}, {end}) and [{start}, {stop}) overlap"),
                };
                let cure = "return a token once: add up the copies, or look for a join that multiplies rows";
                return Err(wrong(recipe, &doc_id, what, cure));
            }
            if copies > 0 {
                each(Span { doc_id: &doc_id, start, stop, copies, stratum: &stratum, domain, tokens })?;
            }
        }
        Ok(())
    }
}

fn wrong(recipe: &str, doc_id: &[u8], what: impl std::fmt::Display, cure: &str) -> Error {
    Error::data(format!("{recipe}: document {}: {what}", hex(doc_id)), cure)
}

/// Weaves a recipe's rows (`doc_id, start, stop, copies, stratum`) with the catalog's (`doc_id, domain, tokens`), both
/// and what is held out (`doc_id`), all sorted by doc_id, and checks every row.
pub struct Weaver {
    recipe: String,
    max_span: i64,
    rows: Batches,
    catalog: Catalog,
    document: Document,
}

impl Weaver {
    pub fn new(
        recipe: &str,
        max_span: u64,
        rows: Batches,
        catalog: Batches,
        heldout: Option<Batches>,
    ) -> Self {
        let catalog = Catalog { all: Sorted::new(catalog), heldout: heldout.map(Sorted::new) };
        let max_span = i64::try_from(max_span).unwrap_or(i64::MAX);
        Self { recipe: recipe.to_owned(), max_span, rows, catalog, document: Document::default() }
    }

    /// Goes through one batch of the recipe's rows and hands on those with copies, by `doc_id, start`.
    /// False when there are no more.
    pub async fn step(&mut self, each: &mut impl FnMut(Span<'_>) -> Result<()>) -> Result<bool> {
        let Some(batch) = self.rows.next().await else {
            self.document.settle(&self.recipe, self.max_span, &mut self.catalog, each).await?;
            return Ok(false);
        };
        let batch = batch?;
        let ids = batch.column(0).as_fixed_size_binary();
        let starts = batch.column(1).as_primitive::<Int64Type>();
        let stops = batch.column(2).as_primitive::<Int64Type>();
        let copies = batch.column(3).as_primitive::<Float64Type>();
        let strata = batch.column(4).as_string::<i32>();
        for row in 0..batch.num_rows() {
            if ids.is_null(row) {
                return Err(Error::data(
                    format!("{}: a row has no doc_id", self.recipe),
                    "look for an outer join",
                ));
            }
            let doc_id: [u8; 16] = ids.value(row).try_into().expect("16 bytes");
            if self.document.doc_id != Some(doc_id) {
                self.document.settle(&self.recipe, self.max_span, &mut self.catalog, each).await?;
                self.document.doc_id = Some(doc_id);
            }
            if (1..4).any(|column| batch.column(column).is_null(row)) {
                let cure = "look for an outer join that finds nothing, a sum of no rows, or 0 / 0, which is null; coalesce(…, 0) as copies draws nothing there";
                return Err(wrong(&self.recipe, &doc_id, "start, stop or copies is null", cure));
            }
            let value = copies.value(row);
            if !(0.0..=MOST_COPIES).contains(&value) {
                let cure = match value {
                    _ if !value.is_finite() => {
                        "it is divided by zero: look for a sum of no rows, or write nullif(…, 0)"
                    }
                    _ if value < 0.0 => "a weight, or 1 minus a share, is below zero: write greatest(…, 0)",
                    _ => {
                        "more than 1,000,000 copies are no sample: `mixture.budget` may be far beyond what there is to draw from, or a weight is not divided by the sum of the weights"
                    }
                };
                return Err(wrong(&self.recipe, &doc_id, format!("copies is {value}"), cure));
            }
            let fixed = (value * ONE as f64).round() as u64;
            self.document.spans.push((
                starts.value(row),
                stops.value(row),
                fixed,
                strata.value(row).to_owned(),
            ));
        }
        Ok(true)
    }
}

/// What a recipe asks for, by domain and stratum and by length: the preview, and the accounts of the draw.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Asked {
    pub strata: Vec<Stratum>,
    /// The documents with the most expected copies of a span, most first.
    pub most_copies: Vec<Repeated>,
}

/// What a recipe asks of one stratum of a domain.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Stratum {
    pub domain: String,
    pub stratum: String,
    pub spans: u64,
    /// Tokens of the spans that may be drawn from, each once.
    pub available: u64,
    /// Tokens to draw: Σ copies × length, rounded so that the strata's sum is that of the whole mixture.
    pub budget: u64,
    /// Expected tokens drawn, by length of the document (the buckets of Figure 2). Their sum is what is drawn: the budget,
    /// or what `max_copies` leaves of it.
    pub by_length: Vec<u64>,
    /// … of which are in long documents.
    pub long: u64,
}

impl Stratum {
    /// Adds what there is elsewhere of the same stratum.
    pub fn add(&mut self, other: &Stratum) {
        self.spans += other.spans;
        self.available += other.available;
        self.budget += other.budget;
        self.long += other.long;
        self.by_length.iter_mut().zip(&other.by_length).for_each(|(sum, n)| *sum += n);
    }

    /// Tokens that the budget asks for beyond `max_copies` of every span.
    pub fn shortfall(&self, max_copies: u32) -> u64 {
        self.budget.saturating_sub(self.available * max_copies as u64)
    }
}

/// A document that a recipe repeats.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct Repeated {
    pub doc_id: String,
    pub domain: String,
    pub tokens: i64,
    pub copies: f64,
}

/// Adds up what a recipe asks for.
pub struct Sums {
    long_tokens: i64,
    max_copies: u32,
    /// By domain, then by stratum.
    strata: HashMap<String, HashMap<String, Sum>>,
    spans: Spans,
    most: Vec<Most>,
}

#[derive(Default)]
struct Sum {
    /// In the order that strata came.
    number: usize,
    spans: u64,
    available: u64,
    budget: u128,
}

/// A document of which a span has many copies.
struct Most {
    copies: u64,
    doc_id: [u8; 16],
    tokens: i64,
    domain: String,
    stratum: usize,
}

/// How many of the most repeated documents are named.
const MOST_NAMED: usize = 5;

/// How many domains a message names.
const MOST_DOMAINS: usize = 20;

impl Sums {
    pub fn new(long_tokens: u64, max_copies: u32) -> Self {
        Self {
            long_tokens: long_tokens as i64,
            max_copies,
            strata: HashMap::new(),
            spans: Spans::default(),
            most: vec![],
        }
    }

    pub fn add(&mut self, span: &Span<'_>) {
        let length = (span.stop - span.start) as u64;
        let new = Sum { number: self.spans.strata(), ..Sum::default() };
        let domain = self.strata.entry_ref(span.domain).or_default();
        let sum = domain.entry_ref(span.stratum).or_insert(new);
        sum.spans += 1;
        sum.available += length;
        sum.budget += span.copies as u128 * length as u128;
        let (bucket, long) = (tables::length_bucket(span.tokens), span.tokens > self.long_tokens);
        self.spans.add(sum.number, bucket, long, span.copies, length);
        if self.most.len() < MOST_NAMED || span.copies > self.most[MOST_NAMED - 1].copies {
            self.most.retain(|m| m.doc_id != *span.doc_id || m.copies > span.copies);
            if !self.most.iter().any(|m| m.doc_id == *span.doc_id) {
                let (domain, stratum) = (span.domain.to_owned(), sum.number);
                let (copies, doc_id, tokens) = (span.copies, *span.doc_id, span.tokens);
                self.most.push(Most { copies, doc_id, tokens, domain, stratum });
            }
            self.most.sort_by(|a, b| b.copies.cmp(&a.copies).then(a.doc_id.cmp(&b.doc_id)));
            self.most.truncate(MOST_NAMED);
        }
    }

    pub fn asked(self) -> Asked {
        let round = |fixed: u128| ((fixed + ONE as u128 / 2) / ONE as u128) as u64;
        let flat = self.strata.into_iter().flat_map(|(domain, strata)| {
            strata.into_iter().map(move |(stratum, sum)| ((domain.clone(), stratum), sum))
        });
        let sorted: BTreeMap<_, _> = flat.collect();
        // where one budget ends the next one begins, so that however many are rounded, their sum is
        let mut so_far = 0;
        let mut budget = |sum: u128| {
            let before = round(so_far);
            so_far += sum;
            round(so_far) - before
        };
        let mut spans = self.spans.by_stratum();
        let mut keys = vec![1.0; spans.len()];
        let strata = sorted.into_iter().map(|((domain, stratum), sum)| {
            let Sum { number, spans: count, available, budget: asked } = sum;
            let mut stratum = Stratum {
                domain,
                stratum,
                spans: count,
                available,
                budget: budget(asked),
                ..Stratum::default()
            };
            let drawn = stratum.budget - stratum.shortfall(self.max_copies);
            let expected = std::mem::take(&mut spans[number]).expected(drawn, self.max_copies);
            (stratum.by_length, stratum.long) = (expected.by_length, expected.long);
            keys[number] = expected.key;
            stratum
        });
        let strata = strata.collect();
        let most_copies = self.most.into_iter().map(|most| Repeated {
            doc_id: hex(&most.doc_id),
            domain: most.domain,
            tokens: most.tokens,
            copies: (most.copies as f64 / ONE as f64 * keys[most.stratum]).min(f64::from(self.max_copies)),
        });
        Asked { strata, most_copies: most_copies.collect() }
    }
}

/// The conf's recipe with its parameters.
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

/// Starts the recipe: what both the stage and the preview do.
pub async fn weaver(run: &Run, catalog: &Published, domains: &Published, bound: &Bound) -> Result<Weaver> {
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
    // a clock counts no further than some centuries
    let seconds = run.conf.engine.recipe_seconds.unwrap_or(MOST_SECONDS).min(1 << 32);
    let rows = bounded(frame, bar, recipe.clone(), Duration::from_secs(seconds));
    let known =
        scan(catalog.folder.clone(), catalog.table("catalog"), Some(vec!["doc_id", "domain", "tokens"]));
    let heldout = catalog.table("heldout");
    let heldout = (heldout.rows > 0)
        .then(|| Box::pin(scan(catalog.folder.clone(), heldout, Some(vec!["doc_id"]))) as Batches);
    Ok(Weaver::new(recipe, run.conf.mixture.max_span.0, Box::pin(rows), Box::pin(known), heldout))
}

/// That the domain which a recipe's parameter names is there.
fn check_domain(run: &Run, parameter: &str, name: &str, domains: &[Domain]) -> Result<()> {
    if domains.iter().any(|domain| domain.domain == name && domain.documents > 0) {
        return Ok(());
    }
    let message = format!("there are no documents of domain `{name}`");
    let help = format!("domains are {}", listed(domains.iter().filter(|d| d.documents > 0)));
    Err(run.conf.wrong(&["mixture", "params", parameter], message, "this domain", Some(help)))
}

/// The rows of a query that may take so long. It runs on a thread of its own: one that is busy with a single batch for
/// years keeps nobody from hearing the clock, or a signal.
fn bounded(frame: DataFrame, bar: Bar, recipe: String, most: Duration) -> Batches {
    let deadline = Instant::now() + most;
    let (send, rows) = mpsc::channel(1);
    // it ends with whoever waits for its rows
    let running = SpawnedTask::spawn(async move {
        let mut rows = match frame.execute_stream().await {
            Ok(rows) => bar.watch(rows),
            Err(error) => return drop(send.send(Err(error)).await),
        };
        while let Some(batch) = rows.next().await {
            // nobody waits for more
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
                // it has ended, or fallen
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

/// Table `mixture`; its notes are what the recipe asks for, as [`Asked`].
pub async fn obtain(run: &Run, catalog: &Published, domains: &Published) -> Result<Published> {
    let (recipe, bound) = recipe(run)?;
    let mixture = &run.conf.mixture;
    let values: BTreeMap<_, _> =
        bound.values.iter().map(|(name, value)| (name, scalar_json(value))).collect();
    // `version` is that of the functions of recipes, too; max_span is what rows are checked against, and long_tokens and
    // max_copies are what the notes are computed with, whether or not the recipe uses them
    let list = ingredients([
        ("version", json!(VERSION)),
        ("catalog", catalog.digest("catalog")),
        ("heldout", catalog.digest("heldout")),
        ("domains", domains.digest("domains")),
        ("shares", domains.digest("shares")),
        ("recipe", json!(recipe.key)),
        ("parameters", json!(values)),
        ("long_tokens", json!(mixture.long_tokens.0)),
        ("max_span", json!(mixture.max_span.0)),
        ("max_copies", json!(mixture.max_copies)),
    ]);
    run.obtain(Stage::Mixture, list, async |draft| {
        let mut weaver = weaver(run, catalog, domains, &bound).await?;
        let mut sums = Sums::new(mixture.long_tokens.0, mixture.max_copies);
        let mut writer = TableWriter::new(&draft.folder, "mixture", tables::mixture());
        let mut rows = Rows::default();
        while weaver
            .step(&mut |span| {
                sums.add(&span);
                rows.push(&span);
                Ok(())
            })
            .await?
        {
            writer.write(std::mem::take(&mut rows).finish()).await?;
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

/// Rows of `mixture` being made.
pub(super) struct Rows {
    doc_id: FixedSizeBinaryBuilder,
    /// start, stop, tokens
    numbers: [Int64Builder; 3],
    copies: Float64Builder,
    /// stratum, domain
    names: [StringBuilder; 2],
}

impl Default for Rows {
    fn default() -> Self {
        let (numbers, copies, names) = Default::default();
        Self { doc_id: FixedSizeBinaryBuilder::new(16), numbers, copies, names }
    }
}

impl Rows {
    pub(super) fn push(&mut self, span: &Span<'_>) {
        self.doc_id.append_value(span.doc_id).expect("16 bytes");
        let numbers = [span.start, span.stop, span.tokens];
        self.numbers.iter_mut().zip(numbers).for_each(|(column, n)| column.append_value(n));
        self.copies.append_value(span.copies as f64 / ONE as f64);
        self.names[0].append_value(span.stratum);
        self.names[1].append_value(span.domain);
    }

    pub(super) fn finish(mut self) -> RecordBatch {
        let [start, stop, tokens] =
            self.numbers.each_mut().map(|column| Arc::new(column.finish()) as ArrayRef);
        let [stratum, domain] = self.names.each_mut().map(|column| Arc::new(column.finish()) as ArrayRef);
        let (doc_id, copies) = (Arc::new(self.doc_id.finish()), Arc::new(self.copies.finish()));
        let columns: Vec<ArrayRef> = vec![doc_id, start, stop, copies, stratum, domain, tokens];
        RecordBatch::try_new(tables::mixture(), columns).expect("columns as the table has them")
    }
}

/// Whether the run may go on with what a recipe asks for.
///
/// # Errors
/// The budgets don't sum to the conf's budget within 0.1 %, or a domain asks for more than `max_copies` of all it has,
/// unless the conf allows a shortfall.
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

/// The names of domains, as far as one reads them.
fn listed<'a>(domains: impl Iterator<Item = &'a Domain>) -> String {
    let names: Vec<&str> = domains.map(|domain| domain.domain.as_str()).collect();
    let more = match names.len().saturating_sub(MOST_DOMAINS) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    names[..names.len().min(MOST_DOMAINS)].join(", ") + &more
}

/// What no target share names, in a line: it is easily forgotten, or misspelt. A share of 0 is a word, too.
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

/// What falls short, a line each.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog(documents: &[(u8, &str, i64)]) -> Batches {
        let mut ids = FixedSizeBinaryBuilder::new(16);
        let (mut domains, mut tokens) = (StringBuilder::new(), Int64Builder::new());
        for (doc, domain, count) in documents {
            ids.append_value([*doc; 16]).unwrap();
            domains.append_value(domain);
            tokens.append_value(*count);
        }
        let columns: [(&str, ArrayRef); 3] = [
            ("doc_id", Arc::new(ids.finish())),
            ("domain", Arc::new(domains.finish())),
            ("tokens", Arc::new(tokens.finish())),
        ];
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        // batches of any size
        Box::pin(futures::stream::iter([Ok(batch.slice(0, 1)), Ok(batch.slice(1, batch.num_rows() - 1))]))
    }

    fn rows(spans: &[(u8, Option<i64>, i64, f64)]) -> Batches {
        let mut ids = FixedSizeBinaryBuilder::new(16);
        spans.iter().for_each(|span| ids.append_value([span.0; 16]).unwrap());
        let columns: [(&str, ArrayRef); 5] = [
            ("doc_id", Arc::new(ids.finish())),
            ("start", Arc::new(arrow::array::Int64Array::from_iter(spans.iter().map(|span| span.1)))),
            ("stop", Arc::new(arrow::array::Int64Array::from_iter_values(spans.iter().map(|span| span.2)))),
            (
                "copies",
                Arc::new(arrow::array::Float64Array::from_iter_values(spans.iter().map(|span| span.3))),
            ),
            ("stratum", Arc::new(arrow::array::StringArray::from_iter_values(spans.iter().map(|_| "")))),
        ];
        let batch =
            RecordBatch::try_from_iter_with_nullable(columns.map(|(name, column)| (name, column, true)))
                .unwrap();
        let cut = batch.num_rows() / 2;
        Box::pin(futures::stream::iter([
            Ok(batch.slice(0, cut)),
            Ok(batch.slice(cut, batch.num_rows() - cut)),
        ]))
    }

    /// Weaves rows with documents of 100, 200, 300, 400 and 500 tokens; that of 400 is held out.
    async fn woven(spans: &[(u8, Option<i64>, i64, f64)]) -> Result<Vec<(u8, i64, i64, u64, String, i64)>> {
        let all = [(1, "a", 100), (2, "b", 200), (3, "a", 300), (4, "b", 400), (5, "b", 500)];
        let heldout = Some(catalog(&all[3..4]));
        let mut weaver = Weaver::new("r.sql", 250, rows(spans), catalog(&all), heldout);
        let mut out = vec![];
        while weaver
            .step(&mut |s| {
                out.push((s.doc_id[0], s.start, s.stop, s.copies, s.domain.to_owned(), s.tokens));
                Ok(())
            })
            .await?
        {}
        Ok(out)
    }

    #[tokio::test]
    async fn a_recipe_s_rows_find_their_documents_and_come_sorted_by_start() {
        let spans = [
            (1, Some(0), 100, 0.5),
            (3, Some(200), 300, 1.0),
            (3, Some(0), 200, 2.0),
            (5, Some(0), 250, 0.0),
        ];
        let want = [
            (1, 0, 100, ONE / 2, "a".to_owned(), 100),
            (3, 0, 200, 2 * ONE, "a".to_owned(), 300),
            (3, 200, 300, ONE, "a".to_owned(), 300),
        ];
        assert_eq!(woven(&spans).await.unwrap(), want);
    }

    #[tokio::test]
    async fn a_row_that_cannot_be_drawn_from_is_named_with_the_cure() {
        for (spans, message) in [
            (vec![(4, Some(0), 400, 1.0), (5, Some(0), 9, 1.0)], "it is not in `documents`"),
            (vec![(2, Some(0), 201, 1.0)], "the span [0, 201) is not inside its 200 tokens"),
            (vec![(2, Some(5), 5, 1.0)], "the span [5, 5) is not inside its 200 tokens"),
            (vec![(2, Some(-1), 5, 1.0)], "the span [-1, 5) is not inside its 200 tokens"),
            (vec![(2, Some(0), 9, 1.0), (2, Some(0), 7, 1.0)], "two rows begin at token 0"),
            (vec![(2, Some(8), 20, 1.0), (2, Some(0), 9, 1.0)], "the spans [0, 9) and [8, 20) overlap"),
            (vec![(5, Some(0), 251, 1.0)], "the span [0, 251) is longer than max_span, 250 tokens"),
            (vec![(2, Some(0), 9, f64::NAN)], "copies is NaN"),
            (vec![(2, Some(0), 9, -1.0)], "copies is -1"),
            (vec![(2, Some(0), 9, f64::INFINITY)], "copies is inf"),
            (vec![(2, Some(0), 9, 3e7)], "copies is 30000000"),
            (vec![(2, None, 9, 1.0)], "start, stop or copies is null"),
            (vec![(4, Some(0), 9, 1.0)], "it is not in `documents`"),
        ] {
            let error = woven(&spans).await.unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert!(matches!(error, Error::Data { help: Some(_), .. }));
        }
    }
}
