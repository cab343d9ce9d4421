//! Measures what `lengthwise preview` does on a catalog of `synthetic_catalog`: statistics of domains, the
//! recipe, and the sums.
//!
//!     cargo run --release --example preview_speed -- sql/mixtures/per_source.sql /tmp/catalog 2 [name=text …]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::AsArray;
use arrow::datatypes::{DataType, Field, Int64Type, Schema};
use datafusion::common::ScalarValue;
use datafusion::datasource::MemTable;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::ListingOptions;
use datafusion::functions_aggregate::expr_fn::{count, sum};
use datafusion::logical_expr::{LogicalPlanBuilder, cast, lit};
use datafusion::physical_plan::{displayable, execute_stream};
use datafusion::prelude::{DataFrame, SessionConfig, SessionContext, col};
use futures::TryStreamExt;
use lengthwise::algorithms::spans::SpanJoin;
use lengthwise::algorithms::strata::Sums;
use lengthwise::sql::StageSql;
use lengthwise::sql::engine::query;
use lengthwise::sql::recipe::Recipe;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [file, folder, partitions, given @ ..] = arguments.as_slice() else {
        eprintln!("usage: preview_speed RECIPE.sql DIR PARTITIONS [name=text …]");
        std::process::exit(2);
    };
    let mut config = SessionConfig::new().with_target_partitions(partitions.parse()?).with_batch_size(4096);
    let options = config.options_mut();
    options.execution.parquet.schema_force_view_types = false;
    options.execution.split_file_groups_by_statistics = true;
    options.optimizer.prefer_existing_sort = true;
    let session = SessionContext::new_with_config(config);
    lengthwise::sql::functions::register(&session);
    let schema = Schema::new(vec![
        Field::new("doc_id", DataType::FixedSizeBinary(16), false),
        Field::new("domain", DataType::Utf8, false),
        Field::new("tokens", DataType::Int64, false),
        Field::new("bytes", DataType::Int64, false),
        Field::new("origin", DataType::Utf8, false),
    ]);
    let listing = ListingOptions::new(Arc::new(ParquetFormat::default()))
        .with_file_extension("parquet")
        .with_file_sort_order(vec![vec![col("doc_id").sort(true, false)]]);
    session.register_listing_table("documents", folder, listing, Some(schema.into()), None).await?;

    let begin = Instant::now();
    let sql = StageSql::parse("sql/stages/domains.sql", include_str!("../../sql/stages/domains.sql"))?;
    let domains = sql.plan(&session, &[("long_tokens", 4096)].into()).await?.collect().await?;
    let table = MemTable::try_new(domains[0].schema(), vec![domains])?;
    session.register_table("domains", Arc::new(table))?;
    let shares =
        "with total as (select cast(sum(cast(tokens as decimal(38, 0))) as double) as tokens from domains)
        select domain, cast(domains.tokens as double) / total.tokens as share from domains cross join total";
    let shares = session.sql(shares).await?.cache().await?;
    session.register_table("shares", shares.into_view())?;
    println!("statistics of domains: {:.2} s, peak {} MB", begin.elapsed().as_secs_f64(), peak_megabytes());

    let number = |(name, value): (&str, i64)| (name.to_owned(), ScalarValue::from(value));
    let builtin = [
        ("budget", 5_000_000_000),
        ("long_tokens", 4096),
        ("max_copies", 4),
        ("max_span", 131_072),
        ("seed", 1),
    ];
    let given = given.iter().filter_map(|pair| pair.split_once('='));
    let given = given.map(|(name, value)| (name.to_owned(), ScalarValue::from(value)));
    let bound = Recipe::parse(file, &std::fs::read_to_string(file)?)?
        .bind(&builtin.map(number).into(), &given.collect::<BTreeMap<_, _>>())?;
    // the query that other engines are measured with, too: the recipe's rows, counted and summed in any
    // order, unchecked
    let begin = Instant::now();
    let asked = DataFrame::new(session.state(), bound.plan(&session).await?);
    let tokens = col("copies") * cast(col("stop") - col("start"), DataType::Float64);
    let summed = asked.aggregate(vec![], vec![count(lit(1)), sum(tokens)])?.collect().await?;
    let spans = summed[0].column(0).as_primitive::<Int64Type>().value(0);
    println!("recipe, {spans} spans counted and summed: {:.2} s", begin.elapsed().as_secs_f64());

    let begin = Instant::now();
    let plan = LogicalPlanBuilder::from(bound.plan(&session).await?)
        .sort([col("doc_id").sort(true, false)])?
        .build()?;
    let physical = session.execute_logical_plan(plan).await?.create_physical_plan().await?;
    if std::env::var_os("EXPLAIN").is_some() {
        eprintln!("{}", displayable(physical.as_ref()).indent(false));
    }
    // the work of a preview: the rows are joined with the catalog, checked one by one, and summed by stratum
    // and length
    let rows = execute_stream(physical, session.task_ctx())?.map_err(|e| query("the recipe", e));
    let documents = "select doc_id, domain, tokens from documents order by doc_id";
    let documents =
        session.sql(documents).await?.execute_stream().await?.map_err(|e| query("the catalog", e));
    let mut span_join = SpanJoin::new(file, 131_072, Box::pin(rows), Box::pin(documents), None);
    let mut sums = Sums::new(4096, 4);
    while span_join
        .step(&mut |span| {
            sums.add(&span);
            Ok(())
        })
        .await?
    {}
    let asked = sums.asked();
    println!(
        "{file}: {} spans, {} tokens, {:.1} s, peak {} MB",
        asked.strata.iter().map(|stratum| stratum.spans).sum::<u64>(),
        asked.strata.iter().map(|stratum| stratum.budget).sum::<u64>(),
        begin.elapsed().as_secs_f64(),
        peak_megabytes()
    );
    Ok(())
}

/// The peak resident memory of this process, in MiB.
fn peak_megabytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or_default() / 1024
}
