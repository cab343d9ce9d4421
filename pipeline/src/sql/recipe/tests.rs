//! Compares the recipes of `sql/mixtures/` with an independent calculation, and snapshots every message that
//! an analyst can get.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use arrow::array::{AsArray, FixedSizeBinaryArray, Float64Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema, SchemaRef};
use datafusion::common::ScalarValue;
use datafusion::datasource::MemTable;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::ListingOptions;
use datafusion::logical_expr::{LogicalPlan, LogicalPlanBuilder};
use datafusion::physical_plan::displayable;
use datafusion::prelude::{SessionConfig, SessionContext, col};
use miette::{GraphicalReportHandler, GraphicalTheme};
use proptest::prelude::*;

use super::*;

/// The names of the built-in recipes.
fn names() -> Vec<&'static str> {
    let name = |(path, _): (&'static str, _)| path.strip_prefix("sql/mixtures/")?.strip_suffix(".sql");
    let names: Vec<_> = crate::sql::recipes().filter_map(name).collect();
    assert!(names.contains(&"per_source"));
    names
}

fn text_of(name: &str) -> &'static str {
    let path = format!("sql/mixtures/{name}.sql");
    crate::sql::recipes().find(|(recipe, _)| *recipe == path).unwrap().1
}

fn recipe(name: &str) -> Recipe {
    shown_error(Recipe::parse(&format!("sql/mixtures/{name}.sql"), text_of(name)))
}

/// Unwraps a result; a panic shows the message as an analyst sees it.
fn shown_error<T>(result: Result<T>) -> T {
    result.unwrap_or_else(|error| panic!("{}", rendered(error)))
}

fn rendered(error: crate::Error) -> String {
    let mut text = String::new();
    let handler = GraphicalReportHandler::new_themed(GraphicalTheme::unicode_nocolor()).with_width(100);
    handler.render_report(&mut text, &error).unwrap();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

// ---- a small corpus, and what the recipes should make of it ----

const LONG: i64 = 40;
const SPAN: i64 = 100;
const MAX_COPIES: f64 = 4.0;

#[derive(Clone, Debug)]
struct Document {
    domain: usize,
    tokens: i64,
}

#[derive(Clone, Debug)]
struct Corpus {
    documents: Vec<Document>,
    /// Target shares of the domains, which sum to 1.
    shares: Vec<f64>,
    budget: i64,
}

impl Corpus {
    /// Tokens in the documents of a domain that satisfy `which`.
    fn tokens(&self, domain: usize, which: impl Fn(&Document) -> bool) -> f64 {
        let documents = self.documents.iter().filter(|d| d.domain == domain && which(d));
        documents.map(|d| d.tokens).sum::<i64>() as f64
    }

    fn all(&self, domain: usize) -> f64 {
        self.tokens(domain, |_| true)
    }

    fn long(&self, domain: usize) -> f64 {
        self.tokens(domain, is_long)
    }

    fn domain_budget(&self, domain: usize) -> f64 {
        self.shares[domain] * self.budget as f64
    }

    /// Whether every domain with a share has tokens; otherwise the budget cannot be met.
    fn supplies_all(&self) -> bool {
        (0..self.shares.len()).all(|d| self.shares[d] == 0.0 || self.all(d) > 0.0)
    }

    fn id(&self, document: usize) -> [u8; 16] {
        let mut id = [7; 16];
        id[..4].copy_from_slice(&(document as u32 * 3).to_be_bytes());
        id
    }

    /// Documents sorted by doc_id.
    fn documents_batch(&self) -> RecordBatch {
        let ids = (0..self.documents.len()).map(|i| self.id(i));
        let ids = FixedSizeBinaryArray::try_from_iter(ids).unwrap();
        let domains = self.documents.iter().map(|d| format!("d{}", d.domain));
        let tokens: Vec<i64> = self.documents.iter().map(|d| d.tokens).collect();
        let bytes: Vec<i64> = tokens.iter().map(|t| t * 4).collect();
        let origins = vec!["test"; tokens.len()];
        RecordBatch::try_new(
            documents_schema(),
            vec![
                Arc::new(ids),
                Arc::new(StringArray::from_iter_values(domains)),
                Arc::new(Int64Array::from(tokens)),
                Arc::new(Int64Array::from(bytes)),
                Arc::new(StringArray::from(origins)),
            ],
        )
        .unwrap()
    }

    /// Registers `domains` and `shares`. Domains without documents have a share, too.
    fn register_domains(&self, session: &SessionContext) {
        let there: Vec<usize> =
            (0..self.shares.len()).filter(|d| self.documents.iter().any(|doc| doc.domain == *d)).collect();
        let name = |d: &usize| format!("d{d}");
        let count = |d: usize, which: fn(&Document) -> bool| {
            self.documents.iter().filter(|doc| doc.domain == d && which(doc)).count() as i64
        };
        let sum: f64 = there.iter().map(|d| self.all(*d)).sum();
        let integers =
            |of: &dyn Fn(usize) -> i64| Arc::new(Int64Array::from_iter_values(there.iter().map(|d| of(*d))));
        let domains = RecordBatch::try_new(
            Arc::new(Schema::new(vec![
                Field::new("domain", DataType::Utf8, false),
                Field::new("documents", DataType::Int64, false),
                Field::new("tokens", DataType::Int64, false),
                Field::new("share", DataType::Float64, false),
                Field::new("long_documents", DataType::Int64, false),
                Field::new("long_tokens", DataType::Int64, false),
            ])),
            vec![
                Arc::new(StringArray::from_iter_values(there.iter().map(name))),
                integers(&|d| count(d, |_| true)),
                integers(&|d| self.all(d) as i64),
                Arc::new(Float64Array::from_iter_values(there.iter().map(|d| self.all(*d) / sum))),
                integers(&|d| count(d, is_long)),
                integers(&|d| self.long(d) as i64),
            ],
        );
        let shares = RecordBatch::try_from_iter([
            (
                "domain",
                Arc::new(StringArray::from_iter_values((0..self.shares.len()).map(|d| name(&d)))) as _,
            ),
            ("share", Arc::new(Float64Array::from(self.shares.clone())) as _),
        ]);
        register_batch(session, "domains", domains.unwrap());
        register_batch(session, "shares", shares.unwrap());
    }

    fn session(&self, partitions: usize) -> SessionContext {
        let session = session(partitions);
        // partitions of uneven sizes
        let batch = self.documents_batch();
        let parts = (0..partitions).map(|p| {
            let from = batch.num_rows() * p / partitions;
            let to = batch.num_rows() * (p + 1) / partitions;
            vec![batch.slice(from, to - from)]
        });
        let table = MemTable::try_new(batch.schema(), parts.collect()).unwrap();
        session.register_table("documents", Arc::new(table)).unwrap();
        self.register_domains(&session);
        session
    }

    fn builtin(&self) -> BTreeMap<String, ScalarValue> {
        let values = [self.budget, LONG, MAX_COPIES as i64, SPAN, 42];
        ["budget", "long_tokens", "max_copies", "max_span", "seed"]
            .into_iter()
            .zip(values)
            .map(|(name, value)| (name.to_owned(), value.into()))
            .collect()
    }

    async fn rows(&self, recipe: &Recipe, given: &[(&str, ScalarValue)], partitions: usize) -> Vec<Row> {
        let session = self.session(partitions);
        let given = given.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let bound = shown_error(recipe.bind(&self.builtin(), &given));
        let plan = shown_error(bound.plan(&session).await);
        rows(&session, plan).await
    }
}

fn is_long(document: &Document) -> bool {
    document.tokens > LONG
}

/// A session without tables, configured as the engine's sessions are.
fn session(partitions: usize) -> SessionContext {
    let mut config = SessionConfig::new().with_target_partitions(partitions).with_batch_size(64);
    let options = config.options_mut();
    options.execution.parquet.schema_force_view_types = false;
    options.execution.split_file_groups_by_statistics = true;
    options.optimizer.prefer_existing_sort = true;
    let session = SessionContext::new_with_config(config);
    crate::sql::functions::register(&session);
    session
}

fn register_batch(session: &SessionContext, name: &str, batch: RecordBatch) {
    let table = MemTable::try_new(batch.schema(), vec![vec![batch]]).unwrap();
    session.register_table(name, Arc::new(table)).unwrap();
}

fn documents_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("doc_id", DataType::FixedSizeBinary(16), false),
        Field::new("domain", DataType::Utf8, false),
        Field::new("tokens", DataType::Int64, false),
        Field::new("bytes", DataType::Int64, false),
        Field::new("origin", DataType::Utf8, false),
    ]))
}

#[derive(Clone, Debug, PartialEq)]
struct Row {
    doc_id: Vec<u8>,
    start: i64,
    stop: i64,
    copies: f64,
    stratum: String,
}

/// A plan's rows, sorted by doc_id and start. Panics if a column does not have its exact type.
async fn rows(session: &SessionContext, plan: LogicalPlan) -> Vec<Row> {
    let batches = session.execute_logical_plan(plan).await.unwrap().collect().await.unwrap();
    let mut rows = Vec::new();
    for batch in batches {
        let types: Vec<_> =
            batch.schema().fields().iter().map(|f| (f.name().clone(), f.data_type().clone())).collect();
        assert_eq!(types, RESULT.map(|(name, t)| (name.to_owned(), t)));
        assert!(batch.columns().iter().all(|column| column.null_count() == 0), "a null in {batch:?}");
        for row in 0..batch.num_rows() {
            rows.push(Row {
                doc_id: batch.column(0).as_fixed_size_binary().value(row).to_vec(),
                start: batch.column(1).as_primitive::<Int64Type>().value(row),
                stop: batch.column(2).as_primitive::<Int64Type>().value(row),
                copies: batch.column(3).as_primitive::<Float64Type>().value(row),
                stratum: batch.column(4).as_string::<i32>().value(row).to_owned(),
            });
        }
    }
    rows.sort_by(|a, b| (&a.doc_id, a.start).cmp(&(&b.doc_id, b.start)));
    rows
}

/// Corpora of documents whose lengths have a heavy tail; some are empty.
fn corpora() -> impl Strategy<Value = Corpus> {
    let tokens = prop_oneof![1 => Just(0i64), 6 => 1..LONG + 2, 4 => LONG..260i64, 1 => 300..2000i64];
    let document = (0..4usize, tokens).prop_map(|(domain, tokens)| Document { domain, tokens });
    let parts = proptest::collection::vec(0..5u32, 4);
    (proptest::collection::vec(document, 1..60), parts, 1..40_000i64).prop_map(
        |(documents, parts, budget)| {
            let sum = parts.iter().sum::<u32>().max(1) as f64;
            let mut shares: Vec<f64> = parts.iter().map(|part| *part as f64 / sum).collect();
            if shares.iter().all(|share| *share == 0.0) {
                shares = vec![0.25; 4];
            }
            Corpus { documents, shares, budget }
        },
    )
}

/// Runs a recipe on a corpus, and compares every row with what `copies` and `strata` expect for its document.
/// The spans of a document have at most `span` tokens and tile it.
fn check(
    corpus: &Corpus,
    name: &str,
    given: &[(&str, ScalarValue)],
    span: i64,
    copies: impl Fn(&Document) -> f64,
    stratum: impl Fn(&Document) -> &'static str,
) -> Result<(), TestCaseError> {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let found = runtime.block_on(corpus.rows(&recipe(name), given, 2));
    let mut found = found.into_iter();
    let mut drawn = 0.0;
    for (i, document) in corpus.documents.iter().enumerate() {
        if name == "prolong" && corpus.shares[document.domain] == 0.0 {
            continue;
        }
        let mut start = 0;
        while start < document.tokens {
            let row = found
                .next()
                .ok_or_else(|| TestCaseError::fail(format!("no span {start} of {i} {document:?}")))?;
            let stop = document.tokens.min(start + span);
            prop_assert_eq!((row.doc_id, row.start, row.stop), (corpus.id(i).to_vec(), start, stop));
            prop_assert_eq!(row.stratum.as_str(), stratum(document));
            let expected = copies(document);
            prop_assert!(
                (row.copies - expected).abs() <= 1e-6 * expected.max(1e-9),
                "{} copies of {:?}, not {}",
                row.copies,
                document,
                expected
            );
            drawn += row.copies * (row.stop - row.start) as f64;
            start = stop;
        }
    }
    prop_assert_eq!(found.next(), None);
    if corpus.supplies_all() && name != "upsample_domain" && name != "prolong" {
        let budget = corpus.budget as f64;
        prop_assert!((drawn - budget).abs() <= 1e-6 * budget, "{} tokens, not {}", drawn, budget);
    }
    Ok(())
}

fn long_or_short(document: &Document) -> &'static str {
    if is_long(document) { "long" } else { "short" }
}

/// The copies that per_source gives to the long and the short documents of a domain, computed step by step
/// where the SQL has formulas.
fn per_source_copies(corpus: &Corpus, domain: usize, wanted_share: f64) -> (f64, f64) {
    let (budget, long, all) = (corpus.domain_budget(domain), corpus.long(domain), corpus.all(domain));
    let short = all - long;
    if budget > MAX_COPIES * all {
        return (budget / all, budget / all);
    }
    let (mut from_long, mut from_short) = (budget * wanted_share, budget * (1.0 - wanted_share));
    let too_much = from_long - MAX_COPIES * long;
    if too_much > 0.0 {
        from_long -= too_much;
        from_short += too_much;
    }
    let too_much = from_short - MAX_COPIES * short;
    if too_much > 0.0 {
        from_short -= too_much;
        from_long += too_much;
    }
    (from_long / long, from_short / short)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn cut_128k_draws_each_domain_evenly(corpus in corpora()) {
        let copies = |d: &Document| corpus.domain_budget(d.domain) / corpus.all(d.domain);
        check(&corpus, "cut_128k", &[], SPAN, copies, |_| "")?;
    }

    #[test]
    fn cut_4k_cuts_documents_into_pieces(corpus in corpora(), piece in 1..300i64) {
        let copies = |d: &Document| corpus.domain_budget(d.domain) / corpus.all(d.domain);
        check(&corpus, "cut_4k", &[("piece_tokens", piece.into())], piece.min(SPAN), copies, |_| "")?;
    }

    #[test]
    fn per_source_raises_long_documents_and_keeps_domains(corpus in corpora(), long_share in 0.0..1.0f64) {
        let copies = |d: &Document| {
            let own_share = corpus.long(d.domain) / corpus.all(d.domain);
            let (long, short) = per_source_copies(&corpus, d.domain, own_share.max(long_share));
            if is_long(d) { long } else { short }
        };
        check(&corpus, "per_source", &[("long_share", long_share.into())], SPAN, copies, long_or_short)?;
    }

    #[test]
    fn per_source_given_short_keep_does_what_the_authors_code_does(corpus in corpora(), keep in 0.0..6.0f64) {
        let copies = |d: &Document| {
            let long = corpus.long(d.domain);
            let short = (corpus.all(d.domain) - long) * keep;
            let share = if long > 0.0 { long / (long + short) } else { 0.0 };
            let (long, short) = per_source_copies(&corpus, d.domain, share);
            if is_long(d) { long } else { short }
        };
        check(&corpus, "per_source", &[("short_keep", keep.into())], SPAN, copies, long_or_short)?;
    }

    #[test]
    fn global_raises_long_documents_whatever_their_domain(corpus in corpora(), long_share in 0.0..1.0f64) {
        let original = |d: usize| corpus.domain_budget(d) / corpus.all(d);
        let there = || (0..4).filter(|d| corpus.all(*d) > 0.0);
        let long: f64 = there().map(|d| original(d) * corpus.long(d)).sum();
        let all: f64 = there().map(|d| original(d) * corpus.all(d)).sum();
        let most = there().filter(|d| corpus.long(*d) > 0.0).map(original).fold(0.0, f64::max);
        let mut raised = long_share * all / long;
        if raised > MAX_COPIES / most {
            raised = MAX_COPIES / most;
        }
        if !(raised > 1.0 && long > 0.0) {
            raised = 1.0;
        }
        let copies = |d: &Document| match (original(d.domain), is_long(d)) {
            (0.0, _) => 0.0,
            (copies, true) => copies * raised,
            (copies, false) => copies * (all - raised * long) / (all - long),
        };
        check(&corpus, "global", &[("long_share", long_share.into())], SPAN, copies, long_or_short)?;
    }

    #[test]
    fn upsample_domain_sets_one_weight_before_normalising(corpus in corpora(), weight in 0.01..2.0f64) {
        let weight_of = |d: usize| if d == 2 { weight } else { corpus.shares[d] };
        let sum: f64 = (0..4).map(weight_of).sum();
        let copies = |d: &Document| weight_of(d.domain) / sum * corpus.budget as f64 / corpus.all(d.domain);
        check(&corpus, "upsample_domain", &[("domain", "d2".into()), ("weight", weight.into())], SPAN, copies, |_| "")?;
    }

    #[test]
    fn length_power_weighs_tokens_by_their_document_s_length(corpus in corpora(), exponent in -1.0..2.0f64) {
        let power = |tokens: i64| (tokens as f64).powf(exponent);
        let sum = |domain: usize| -> f64 {
            let documents = corpus.documents.iter().filter(|d| d.domain == domain && d.tokens > 0);
            documents.map(|d| power(d.tokens) * d.tokens as f64).sum()
        };
        let copies = |d: &Document| corpus.domain_budget(d.domain) * power(d.tokens) / sum(d.domain);
        check(&corpus, "length_power", &[("exponent", exponent.into())], SPAN, copies, |_| "")?;
    }

    #[test]
    fn prolong_takes_a_share_of_the_budget_from_very_long_documents(corpus in corpora(), long_share in 0.0..1.0f64) {
        const MIN: i64 = 150;
        let (long, short) = (|d: &Document| d.tokens >= MIN, |d: &Document| d.tokens < MIN);
        let part = |which: fn(&Document) -> bool| -> f64 {
            (0..4).filter(|d| corpus.tokens(*d, which) > 0.0).map(|d| corpus.shares[d]).sum()
        };
        let (long_part, short_part) = (part(long), part(short));
        let long_share_got = if short_part == 0.0 { 1.0 } else if long_part == 0.0 { 0.0 } else { long_share };
        let copies = |d: &Document| {
            let budget = corpus.budget as f64 * corpus.shares[d.domain];
            if long(d) {
                budget * long_share_got / long_part / corpus.tokens(d.domain, long)
            } else {
                budget * (1.0 - long_share_got) / short_part / corpus.tokens(d.domain, short)
            }
        };
        let stratum = |d: &Document| if long(d) { "long" } else { "short" };
        check(&corpus, "prolong", &[("long_share", long_share.into()), ("long_min", MIN.into())], SPAN, copies, stratum)?;
    }
}

/// A corpus with domains of all kinds: mixed, only long documents, only short ones.
fn a_corpus(documents: usize) -> Corpus {
    let documents = (0..documents).map(|i| {
        let hash = crate::hash::unit_hash("test", 1, &[0; 16], i as u64, 0);
        let (domain, spread) = ((hash % 4) as usize, (hash >> 8) % 1000);
        let tokens = match domain {
            2 => LONG + 1 + spread as i64,
            3 => 1 + spread as i64 % LONG,
            _ => 1 + (spread * spread * spread / 500_000) as i64,
        };
        Document { domain, tokens }
    });
    Corpus { documents: documents.collect(), shares: vec![0.4, 0.3, 0.2, 0.1], budget: 20_000 }
}

/// Values of the parameters that have no default.
fn required(name: &str) -> Vec<(&'static str, ScalarValue)> {
    match name {
        "upsample_domain" => vec![("domain", "d1".into())],
        "prolong" => vec![("long_min", 500i64.into())],
        _ => vec![],
    }
}

#[tokio::test]
async fn copies_are_the_same_to_the_last_bit_in_any_number_of_partitions() {
    let corpus = a_corpus(3000);
    for name in names() {
        let one = corpus.rows(&recipe(name), &required(name), 1).await;
        assert!(one.len() >= 2900, "{name}: {} rows", one.len());
        for partitions in [2, 7] {
            assert_eq!(
                one,
                corpus.rows(&recipe(name), &required(name), partitions).await,
                "{name} {partitions}"
            );
        }
    }
}

#[tokio::test]
async fn a_sorted_scan_stays_sorted_through_every_recipe() {
    // a wrong claim about the order of rows would be worse than a sort
    let corpus = a_corpus(5000);
    let folder = tempfile::tempdir().unwrap();
    let batch = corpus.documents_batch();
    for (file, from) in (0..batch.num_rows()).step_by(1300).enumerate() {
        let part = batch.slice(from, 1300.min(batch.num_rows() - from));
        let path = folder.path().join(format!("catalog-{file:05}.parquet"));
        let properties = parquet::file::properties::WriterProperties::builder()
            .set_max_row_group_row_count(Some(200))
            .build();
        let mut writer = parquet::arrow::ArrowWriter::try_new(
            std::fs::File::create(path).unwrap(),
            part.schema(),
            Some(properties),
        )
        .unwrap();
        writer.write(&part).unwrap();
        writer.close().unwrap();
    }
    let mut plans = String::new();
    for name in names() {
        for partitions in [1, 2, 7] {
            let session = session(partitions);
            let options = ListingOptions::new(Arc::new(ParquetFormat::default()))
                .with_file_extension("parquet")
                .with_file_sort_order(vec![vec![col("doc_id").sort(true, false)]]);
            let url = folder.path().to_str().unwrap();
            session
                .register_listing_table("documents", url, options, Some(documents_schema()), None)
                .await
                .unwrap();
            corpus.register_domains(&session);
            let given = required(name).into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            let bound = shown_error(recipe(name).bind(&corpus.builtin(), &given));
            let plan = shown_error(bound.plan(&session).await);
            let sorted = LogicalPlanBuilder::from(plan)
                .sort([col("doc_id").sort(true, false)])
                .unwrap()
                .build()
                .unwrap();
            let frame = session.execute_logical_plan(sorted).await.unwrap();
            let physical = frame.clone().create_physical_plan().await.unwrap();
            let text = displayable(physical.as_ref()).indent(false).to_string();
            if partitions == 2 {
                writeln!(plans, "{name}\n{text}").unwrap();
            }
            assert!(!text.contains("SortExec"), "{name} in {partitions} partitions sorts:\n{text}");
            let mut before = vec![];
            for batch in frame.collect().await.unwrap() {
                for id in batch.column(0).as_fixed_size_binary().iter() {
                    let id = id.unwrap().to_vec();
                    assert!(before <= id, "{name} in {partitions} partitions is not sorted:\n{text}");
                    before = id;
                }
            }
        }
    }
    if let Ok(path) = std::env::var("SHOW_PLANS") {
        std::fs::write(path, plans).unwrap();
    }
}

#[test]
fn a_recipe_says_what_it_is() {
    for name in names() {
        let recipe = recipe(name);
        assert!(recipe.title.ends_with('.'), "{}", recipe.title);
        assert!(recipe.description.contains("One row: "), "{}", recipe.description);
        assert!(recipe.parameters.iter().all(|p| !p.description.is_empty()));
    }
    let per_source = recipe("per_source");
    let names: Vec<_> =
        per_source.parameters.iter().map(|p| (p.name.as_str(), p.kind, p.default.clone())).collect();
    assert_eq!(
        names,
        [
            ("long_share", Kind::Double, Some(0.7.into())),
            ("short_keep", Kind::Double, Some(ScalarValue::Float64(None)))
        ]
    );
}

#[test]
fn white_space_comments_and_defaults_are_not_in_the_key() {
    let text = text_of("per_source");
    let other = text.replace("= 0.70", "= 0.55").replace(",\n", ", -- a comment\n\n   ");
    let (one, other) = (recipe("per_source"), shown_error(Recipe::parse("r.sql", &other)));
    assert_eq!(one.key, other.key);
    let other = text.replace("least(start + $max_span, tokens)", "least(start + $max_span, tokens - 1)");
    assert_ne!(one.key, shown_error(Recipe::parse("r.sql", &other)).key);
}

#[test]
fn texts_that_print_alike_have_keys_of_their_own() {
    let key = |text: &str| {
        let recipe =
            shown_error(Recipe::parse("r.sql", &format!("select doc_id from documents where {text}")));
        let sql = shown_error(crate::sql::StageSql::parse(
            "r.sql",
            &format!("select doc_id from documents where {text}"),
        ));
        assert_eq!(recipe.key, sql.key);
        recipe.key
    };
    let texts = [
        "origin = 'it''s'",
        "origin = 'it''''s'",
        "origin = \"it\"",
        "origin = 'it'",
        "origin = it",
        "origin = IT",
        "origin = 'a' -- ' or origin = 'b'",
        "origin = 'a -- ' or origin = 'b'",
        "tokens = 1.0",
        "tokens = 1.00",
        "tokens = - -1",
        "tokens = 1e1",
    ];
    let keys: BTreeSet<String> = texts.into_iter().map(key).collect();
    assert_eq!(keys.len(), texts.len());
    assert_eq!(key("tokens=1/*  */ --x\n or\ttrue"), key("tokens = 1 or true"));
}

proptest! {
    #[test]
    fn keys_are_equal_where_tokens_are_and_nowhere_else(
        texts in proptest::array::uniform2(proptest::collection::vec((
            prop::sample::select(vec![
                "a", "A", "\"a\"", "'a'", "'a''a'", "'a''''a'", "n'a'", "e'a'", "$a", "$$a$$", "1", "1.5", "1.", ".", "<", "=", "<=",
                "-", "->", "[", "]", "`a`", ";", ",", "select", "SELECT", "x'61'", "'\"'", "'\\'", "\"'\"", "@", "#", "|", "||", "'a, b'",
            ]),
            prop::sample::select(vec!["", " ", "\n", "/* ' */", "-- \"\n"]),
        ), 0..6)),
    ) {
        let tokens = texts.map(|parts| {
            let text: String = parts.into_iter().flat_map(|(token, space)| [token, space]).collect();
            Tokenizer::new(&GenericDialect {}, &text).tokenize_with_location().unwrap_or_default()
        });
        let plain = |tokens: &[TokenWithSpan]| -> Vec<Token> {
            let tokens = tokens.iter().map(|token| token.token.clone());
            tokens.filter(|token| !matches!(token, Token::Whitespace(_) | Token::EOF)).collect()
        };
        prop_assert_eq!(plain(&tokens[0]) == plain(&tokens[1]), key(&tokens[0]) == key(&tokens[1]));
    }
}

#[tokio::test]
async fn a_parameter_arrives_with_its_type_and_value_whatever_it_holds() {
    let text = "--   $text    varchar = 'it''s'\n--   $number  double = -1e-7   small\n--   $yes boolean = true  y\n--   $n bigint = -5  n\n\
         select doc_id, cast(0 as bigint) as start, tokens as stop, cast($n + 6 as double) as copies, \
         concat($text, ' ', arrow_typeof($number), ' ', $number, ' ', $yes) as stratum from documents";
    let corpus = a_corpus(1);
    let recipe = shown_error(Recipe::parse("r.sql", text));
    let row = &corpus.rows(&recipe, &[], 1).await[0];
    assert_eq!((row.stratum.as_str(), row.copies), ("it's Float64 -1e-7 true", 1.0));
    let given = [("text", "'; drop table x --".into()), ("number", 3i64.into())];
    let row = &corpus.rows(&recipe, &given, 1).await[0];
    assert_eq!(row.stratum, "'; drop table x -- Float64 3.0 true");
}

#[test]
fn a_recipe_s_values_are_what_it_declares_and_the_built_in_ones_it_uses() {
    let bound = shown_error(recipe("cut_4k").bind(&a_corpus(1).builtin(), &BTreeMap::new()));
    let names: Vec<_> = bound.values.keys().map(String::as_str).collect();
    assert_eq!(names, ["budget", "max_span", "piece_tokens"]);
}

#[tokio::test]
async fn a_result_s_columns_are_put_in_order_and_cast() {
    let text = "select cast(1 as int) as copies, tokens as stop, cast(0 as int) as start, null as stratum, doc_id from documents";
    let row = &a_corpus(1).rows(&shown_error(Recipe::parse("r.sql", text)), &[], 1).await[0];
    assert_eq!((row.start, row.copies, row.stratum.as_str()), (0, 1.0, ""));
}

// ---- messages ----

/// The message that an analyst sees for a recipe that is refused.
async fn message(text: &str, given: &[(&str, ScalarValue)]) -> String {
    let corpus = a_corpus(20);
    let given = given.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
    let planned = async {
        let recipe = Recipe::parse("sql/mixtures/mine.sql", text)?;
        recipe.bind(&corpus.builtin(), &given)?.plan(&corpus.session(1)).await
    };
    match planned.await {
        Err(error) => rendered(error),
        Ok(plan) => panic!("this is refused nowhere:\n{text}\n{}", plan.display_indent()),
    }
}

/// The messages for some texts, one after the other.
async fn messages(texts: &[&str]) -> String {
    let mut all = String::new();
    for text in texts {
        all += &message(text, &[]).await;
        all += "\n────────\n";
    }
    all
}

/// A recipe with one step, over documents.
fn step(columns: &str) -> String {
    format!(
        "-- Mine.\nwith step as (\n    select *, {columns} as x\n    from documents\n)\n\n\
         select doc_id, cast(0 as bigint) as start, tokens as stop, cast(x as double) as copies from step\n"
    )
}

/// A recipe with one step, grouped by domain.
fn by_domain(aggregate: &str) -> String {
    format!(
        "-- Mine.\nwith step as (\n    select domain, {aggregate} as x\n    from documents\n    group by domain\n)\n\n\
         select doc_id, cast(0 as bigint) as start, tokens as stop, 1.0 as copies\nfrom step inner join documents on step.domain = documents.domain\n"
    )
}

async fn messages_of(texts: impl IntoIterator<Item = String>) -> String {
    let texts: Vec<String> = texts.into_iter().collect();
    messages(&texts.iter().map(String::as_str).collect::<Vec<_>>()).await
}

#[tokio::test]
async fn only_one_select() {
    insta::assert_snapshot!(
        messages(&[
            "-- Mine.\n",
            "-- Mine.\ncreate table mine as select * from documents",
            "copy (select * from documents) to 'x.parquet'",
            "set datafusion.execution.target_partitions = 1;\nselect 1",
            "explain select * from documents",
            "insert into documents select * from documents",
            "select doc_id from documents;\nselect domain from documents",
            "select doc_id from documents where where tokens > 3",
            "select doc_id\nfrom documents\nwhere tokens > 3 tokens < 5",
            "select 'doc_id from documents",
            "select doc_id into mine from documents",
            "with gone as (delete from documents where tokens = 0) select doc_id from documents",
        ])
        .await
    );
}

#[tokio::test]
async fn only_the_tables_of_a_recipe() {
    insta::assert_snapshot!(
        messages(&[
            "with steps as (\n    select * from docments\n)\nselect doc_id from steps",
            "with spans as (select * from documents)\nselect doc_id from span",
            "select doc_id from 's3://bucket/catalog.parquet'",
            "select doc_id from catalog.parquet",
            "select doc_id from public.documents",
            "select schema_name from information_schema.schemata",
            "select * from read_csv('weights.csv')",
            "select * from documents tablesample (10 percent)",
        ])
        .await
    );
}

#[tokio::test]
async fn sums_do_not_depend_on_order_and_do_not_wrap() {
    let aggregates = [
        "sum(tokens * 0.5)",
        "sum(tokens)",
        "avg(tokens)",
        "mean(tokens)",
        "stddev(tokens)",
        "corr(tokens, bytes)",
        "covar_pop(tokens, bytes)",
        "regr_slope(tokens, bytes)",
        "approx_distinct(tokens)",
        "approx_median(tokens)",
        "approx_percentile_cont(tokens, 0.5)",
        "max(tokens) + sum(cast(tokens as decimal(38, 0))) + sum(bytes)",
    ];
    let aggregates = aggregates.map(by_domain);
    let windows = ["sum(cast(tokens as double)) over (partition by domain)", "avg(tokens) over ()"].map(step);
    insta::assert_snapshot!(messages_of(aggregates.into_iter().chain(windows)).await);
}

#[tokio::test]
async fn functions_that_differ_between_runs_and_machines() {
    let calls = [
        "random()",
        "uuid()",
        "now()",
        "current_date",
        "version()",
        "sin(tokens)",
        "log(2, tokens)",
        "cbrt(tokens)",
        "log(tokens)",
    ];
    let in_subquery = "-- Mine.\nselect doc_id from documents\nwhere tokens > (\n    select max(tokens) * random() from documents\n)";
    insta::assert_snapshot!(messages_of(calls.map(step).into_iter().chain([in_subquery.to_owned()])).await);
}

#[tokio::test]
async fn order_is_total_where_it_matters() {
    let windows = [
        "row_number() over (order by tokens)",
        "ntile(4) over (partition by domain order by tokens desc)",
        "lag(tokens) over (order by domain)",
        "lag(tokens) over (order by doc_id range 1 preceding)",
        "first_value(tokens) over (partition by domain order by bytes)",
        "sum(cast(tokens as decimal(38, 0))) over (order by tokens rows between unbounded preceding and current row)",
    ];
    let aggregates = [
        "first_value(tokens order by bytes)",
        "array_agg(tokens)",
        "string_agg(origin, ',' order by tokens)",
    ];
    let others = [
        "select * from documents order by tokens limit 10",
        "select * from documents offset 10",
        "select distinct on (domain) doc_id, domain from documents order by domain, tokens",
        "with spans as (select doc_id, unnest(range(0, tokens, 5)) as start from documents)\nselect * from spans order by doc_id limit 3",
        "with spans as (select doc_id, unnest(make_array(0, 0)) as start, tokens from documents)\nselect * from spans order by doc_id, start limit 3",
        "with top as (select * from domains order by tokens limit 3)\nselect * from top",
        // columns that have the name of a key, but are not unique
        "with pairs as (select doc_id as x, domain, tokens from documents)\nselect * from pairs order by domain limit 5",
        "with named as (select domain as doc_id, tokens, doc_id as x from documents)\nselect * from named order by doc_id limit 5",
        "with pairs as (select a.doc_id, b.bytes from documents as a inner join documents as b on a.domain = b.domain)\nselect * from pairs order by doc_id limit 5",
        "with both as (select doc_id, tokens from documents union all select doc_id, bytes from documents)\nselect * from both order by doc_id limit 5",
    ];
    let texts =
        windows.map(step).into_iter().chain(aggregates.map(by_domain)).chain(others.map(str::to_owned));
    insta::assert_snapshot!(messages_of(texts).await);
}

#[tokio::test]
async fn the_columns_of_the_result() {
    insta::assert_snapshot!(
        messages(&[
            "with last as (select doc_id, 0 as start, tokens as stop from documents)\nselect * from last",
            "select doc_id, 0 as start, tokens as stop, 1.0 as copy from documents",
            "select\n    doc_id,\n    0 as start,\n    tokens as stop,\n    1.0 as copies,\n    domain\nfrom documents",
            "select doc_id, 0.5 as start, tokens as stop, 1.0 as copies from documents",
            "select doc_id, 0 as start, tokens as stop, domain as copies from documents",
            "select domain as doc_id, 0 as start, tokens as stop, 1.0 as copies from documents",
            "select doc_id, 0 as start, tokens as stop, 1.0 as copies, tokens as stratum from documents",
            "select a.doc_id, b.doc_id, 0 as start, 1 as stop, 1.0 as copies from documents as a, documents as b",
        ])
        .await
    );
}

#[tokio::test]
async fn names_that_are_not_there() {
    insta::assert_snapshot!(
        messages(&[
            "select doc_id,\n    toknes\nfrom documents",
            "select documents.tokens from documents as d",
            "select domain from documents inner join domains on documents.domain = domains.domain",
            "select doc_id, powr(tokens, 2) from documents",
            "select doc_id, tokens + domain as x from documents",
            "select doc_id, power(domain) from documents",
            "select domain, tokens from documents group by domain",
            "select doc_id from documents where tokens > @x",
        ])
        .await
    );
}

#[tokio::test]
async fn parameters() {
    let header = "-- Mine.\n--   $long_share  double = 0.7   share\n--   $domain      varchar        which\n";
    let text = format!("{header}select doc_id, $long_share, $domain from documents");
    let domain = ("domain", ScalarValue::from("Book"));
    let mut all = String::new();
    for given in [
        vec![],
        vec![domain.clone(), ("long_shar", 0.5.into())],
        vec![domain.clone(), ("nothing_like_it", 0.5.into())],
        vec![domain.clone(), ("long_share", "high".into())],
        vec![domain.clone(), ("long_share", f64::NAN.into())],
        vec![("domain", 3i64.into())],
        vec![domain.clone(), ("budget", 3i64.into())],
        vec![domain.clone(), ("seed", 3i64.into())],
    ] {
        all += &message(&text, &given).await;
        all += "\n────────\n";
    }
    for (text, given) in [
        ("--   $n bigint = 3  n\nselect $n", vec![("n", ScalarValue::from(0.5))]),
        ("select 1", vec![("n", ScalarValue::from(0.5))]),
        ("-- Mine.\nselect doc_id\nfrom documents\nwhere tokens > $long_token", vec![]),
        ("select doc_id from documents where tokens > ?", vec![]),
        ("--   $share  float = 0.7  share\nselect 1", vec![]),
        ("--   $share  duoble = 0.7  share\nselect 1", vec![]),
        ("--   $share  double = high  share\nselect 1", vec![]),
        ("--   $share  varchar = high  share\nselect 1", vec![]),
        ("--   $share  double  share\n--   $share  double\nselect 1", vec![]),
        ("--   $1  double  share\nselect 1", vec![]),
        ("--   $budget  bigint = 5  tokens\nselect 1", vec![]),
    ] {
        all += &message(text, &given).await;
        all += "\n────────\n";
    }
    insta::assert_snapshot!(all);
}

#[tokio::test]
async fn what_is_allowed() {
    for aggregate in [
        "sum(cast(tokens as decimal(38, 0)))",
        "sum(cast(round(power(tokens, 0.5) * 4294967296) as decimal(38, 0)))",
        "count(*)",
        "count(distinct tokens)",
        "median(tokens)",
        "percentile_cont(tokens, 0.9)",
        "min(bytes) + max(tokens)",
        "bool_or(tokens > 5)",
        "first_value(tokens order by bytes, doc_id)",
        "array_agg(tokens order by tokens)",
    ] {
        accepted(&by_domain(aggregate)).await;
    }
    for window in [
        "rank() over (order by tokens)",
        "row_number() over (order by tokens, doc_id)",
        "row_number() over (partition by domain order by doc_id)",
        "coalesce(lag(tokens) over (order by doc_id), 0)",
        "sum(cast(tokens as decimal(38, 0))) over (partition by domain order by doc_id)",
        "first_value(tokens) over (partition by origin order by doc_id desc)",
        "sum(cast(tokens as decimal(38, 0))) over (partition by domain order by tokens)",
        "sum(cast(tokens as decimal(38, 0))) over (order by tokens, doc_id rows unbounded preceding)",
        "coalesce(lag(tokens) over (order by doc_id rows between unbounded preceding and current row), 0)",
        "unit_hash($seed, doc_id, 0)",
        "power(tokens, 0.5) + ln(2.0) + sqrt(tokens) + exp(0)",
    ] {
        accepted(&step(window)).await;
    }
    accepted("select doc_id, 0 as start, tokens as stop, 1 as copies from documents order by tokens, doc_id, start limit 7").await;
    accepted("with w as (select * from (values ('d1', 2.0)) as w(domain, weight))\nselect doc_id, 0 as start, tokens as stop, weight as copies from w inner join documents on w.domain = documents.domain").await;
    for (from, order) in [
        ("documents inner join domains on documents.domain = domains.domain", "documents.doc_id"),
        (
            "documents left join shares on documents.domain = shares.domain",
            "documents.tokens, documents.doc_id",
        ),
        ("documents cross join (select count(*) as n from domains) as all_of_them", "documents.doc_id"),
        ("(select distinct doc_id as known, doc_id, tokens from documents) as documents", "documents.known"),
        (
            "(select doc_id, tokens, unnest(range(0, tokens, 5)) as at from documents) as documents",
            "documents.at, documents.doc_id",
        ),
        (
            "(select doc_id, tokens, row_number() over (partition by documents.domain order by doc_id) as n from documents \
             inner join shares on documents.domain = shares.domain) as documents",
            "documents.n, documents.doc_id",
        ),
        (
            "(select doc_id, max(tokens) as tokens from documents group by doc_id) as documents",
            "documents.doc_id",
        ),
    ] {
        accepted(&format!("select documents.doc_id, 0 as start, documents.tokens as stop, 1 as copies from {from} order by {order} limit 7")).await;
    }
    accepted("(select doc_id, 0 as start, tokens as stop, 1 as copies from documents);").await;
}

async fn accepted(text: &str) {
    let corpus = a_corpus(20);
    corpus.rows(&shown_error(Recipe::parse("sql/mixtures/mine.sql", text)), &[], 2).await;
}

#[tokio::test]
async fn what_other_dialects_write_has_a_cure_in_this_one() {
    let said = messages(&[
        "select doc_id, 0 as start, tokens // 2 as stop, 1.0 as copies from documents",
        "with twice as (select tokens * 2, count(*) as n from documents group by tokens * 2 limit 3)\nselect * from twice",
    ])
    .await;
    assert!(
        said.contains("there is no operator `//`") && said.contains("`/` of two integers is an integer"),
        "{said}"
    );
    assert!(said.contains("a name with AS, and add it to ORDER BY"), "{said}");
}

#[tokio::test]
async fn words_that_mean_something_else_or_nothing() {
    let columns = "doc_id, 0 as start, tokens as stop, 1.0 as copies";
    let texts = [
        "select doc_id, 0 as start, tokens as stop,\n    tokens ^ 2 as copies from documents".to_owned(),
        format!("select {columns} from documents where 1 << tokens > 5"),
        format!(
            "select {columns} from documents,\n    lateral (select share from shares where domain = documents.domain) as s"
        ),
        format!("select {columns} from documents cross join lateral generate_series(0, tokens)"),
        format!(
            "select {columns} from documents\n    cross join generate_series(0, cast(date_part('second', now()) as bigint))"
        ),
        format!("select {columns} from documents cross join range(9000000000 * 9000000000)"),
        format!("select {columns} from documents cross join range(0, (select max(tokens) from documents))"),
        format!("select {columns} from documents where cast(make_array(origin) as double[]) is not null"),
    ];
    insta::assert_snapshot!(messages_of(texts).await);
    for from in [
        "range($budget)",
        "generate_series(-(1), 1, 1)",
        "generate_series(date '2024-01-01', date '2024-01-03', interval '1 day')",
    ] {
        let text = format!("select {columns} from documents where (select count(*) from {from}) > 0");
        accepted(&text).await;
    }
}

/// The message that an analyst sees for a recipe that fails while it runs.
async fn failure(text: &str) -> String {
    let corpus = a_corpus(20);
    let session = corpus.session(2);
    let recipe = shown_error(Recipe::parse("sql/mixtures/mine.sql", text));
    let plan =
        shown_error(shown_error(recipe.bind(&corpus.builtin(), &BTreeMap::new())).plan(&session).await);
    let ran = async { session.execute_logical_plan(plan).await?.collect().await };
    rendered(crate::sql::engine::query("sql/mixtures/mine.sql failed while it ran", ran.await.unwrap_err()))
}

#[tokio::test]
async fn numbers_that_are_too_large_are_said_with_their_place() {
    let mut all = String::new();
    for column in [
        "tokens * 9000000000000000000",
        "cast(tokens * $budget as double) * ($budget * 900000000000000)",
        "9000000000 * 9000000000",
        "bytes / (tokens - tokens)",
        "cast(tokens as decimal(38, 0)) * cast(9e37 as decimal(38, 0))",
        "cardinality(range(0, tokens * 1000000000))",
    ] {
        all += &failure(&step(column)).await;
        all += "\n────────\n";
    }
    let sum = "sum(cast(tokens as decimal(38, 0)) * cast(1e35 as decimal(38, 0)))";
    all += &failure(&by_domain(sum).replace("1.0 as copies", "x as copies")).await;
    insta::assert_snapshot!(all);
}

#[tokio::test]
async fn floats_are_the_same_whatever_the_order_of_the_rows() {
    let odd = "case tokens % 4 when 0 then 0.0 / (tokens % 2) when 1 then (tokens % 3) * -0.0 when 2 then -1.0 / (tokens % 3) else tokens * 0.5 end";
    let text = format!(
        "with odd as (select *, {odd} as x from documents),
         by_domain as (
             select domain, max(x) as most, min(x) as least, count(distinct x) as n, median(x) as half,
                 array_agg(distinct x order by x) as all_of_them, first_value(x order by x) as first
             from odd group by domain
         ),
         by_number as (select x, count(*) as n, min(doc_id) as doc_id from odd group by x),
         windows as (
             select *, max(x) over (partition by domain) as most, rank() over (order by x) as place,
                 greatest(x, -0.0) as above, cast(x as varchar) as shown
             from odd
         )
         select windows.doc_id, 0 as start, windows.tokens as stop, 1.0 as copies,
             concat_ws(' ', windows.most, place, above, shown, by_domain.most, by_domain.least, by_domain.n, half,
                 array_to_string(all_of_them, ','), first, by_number.n, array_max(make_array(windows.x, 0.0))) as stratum
         from windows
         inner join by_domain on windows.domain = by_domain.domain
         left join by_number on windows.doc_id = by_number.doc_id"
    );
    let mut corpus = a_corpus(400);
    let recipe = shown_error(Recipe::parse("r.sql", &text));
    let want = corpus.rows(&recipe, &[], 1).await;
    assert!(want.iter().all(|row| !row.stratum.contains("NaN") && !row.stratum.contains("-0.0")));
    for partitions in [1, 2, 7] {
        assert_eq!(corpus.rows(&recipe, &[], partitions).await, want, "{partitions} partitions");
    }
    // the same documents with other ids, so that they come in another order
    corpus.documents.reverse();
    let strata = |rows: &[Row]| {
        let said = |row: &Row| row.stratum.split(' ').take(9).collect::<Vec<_>>().join(" ");
        let mut strata: Vec<_> = rows.iter().map(said).collect();
        strata.sort();
        strata
    };
    assert_eq!(strata(&corpus.rows(&recipe, &[], 2).await), strata(&want));
}

#[test]
fn every_function_of_this_datafusion_was_looked_at() {
    let session = session(1);
    let state = session.state();
    let sorted = |names: Vec<&str>| {
        let sorted: BTreeSet<String> = names.iter().map(|name| (*name).to_owned()).collect();
        assert_eq!(sorted.len(), names.len(), "a name is twice in {names:?}");
        sorted.into_iter().collect::<Vec<_>>()
    };
    let canonical =
        |names: Vec<&str>| sorted(names.into_iter().collect::<BTreeSet<_>>().into_iter().collect());
    let refused = allowed::REFUSED.iter().flat_map(|(names, ..)| names.iter());
    let scalars = state.scalar_functions().values().map(|f| f.name());
    let lambdas = state.higher_order_functions().values().map(|f| f.name());
    assert_eq!(
        canonical(scalars.chain(lambdas).collect()),
        sorted(allowed::SCALARS.iter().chain(refused).copied().collect())
    );
    let aggregates = [allowed::AGGREGATES, allowed::FLOAT_SUMS, allowed::OTHER_AGGREGATES].concat();
    assert_eq!(
        canonical(state.aggregate_functions().values().map(|f| f.name()).collect()),
        sorted(aggregates)
    );
    assert_eq!(
        canonical(state.window_functions().values().map(|f| f.name()).collect()),
        sorted(allowed::WINDOWS.to_vec())
    );
    let tables = state.table_functions().keys().map(String::as_str).chain(["unnest"]);
    assert_eq!(canonical(tables.collect()), sorted(allowed::TABLES.to_vec()));
    // a function in no list is refused
    assert!(allowed::refused("exact_sum_2").is_some());
}

#[tokio::test]
async fn numbers_up_to_the_last_bigint_are_counted_and_end() {
    for (from, count) in [
        ("range(9223372036854775800, 9223372036854775807, 5)", 2),
        ("generate_series(9223372036854775800, 9223372036854775807, 5)", 2),
        ("generate_series(9223372036854775806, 9223372036854775807)", 2),
        ("unnest(range(9223372036854775800, 9223372036854775807, 5))", 2),
        ("unnest(generate_series(-9223372036854775807, -9223372036854775807 - 1, -1))", 2),
    ] {
        let text = format!(
            "select doc_id, 0 as start, tokens as stop, (select count(*) from {from}) as copies from documents"
        );
        let rows = a_corpus(1).rows(&shown_error(Recipe::parse("r.sql", &text)), &[], 1).await;
        assert_eq!(rows[0].copies, f64::from(count), "{from}");
    }
}
