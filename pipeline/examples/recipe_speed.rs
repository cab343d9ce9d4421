//! Streams a recipe's rows over a catalog of `synthetic_catalog`, sorted by doc_id, and counts them.
//!
//!     cargo run --release --example recipe_speed -- sql/mixtures/per_source.sql /tmp/catalog 2 [name=text …]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::AsArray;
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema};
use datafusion::common::ScalarValue;
use datafusion::datasource::MemTable;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::ListingOptions;
use datafusion::logical_expr::LogicalPlanBuilder;
use datafusion::physical_plan::{displayable, execute_stream};
use datafusion::prelude::{SessionConfig, SessionContext, col};
use futures::TryStreamExt;
use lengthwise::recipe::Recipe;

const DOMAINS: &str = "
    select
        domain,
        count(*) as documents,
        cast(sum(cast(tokens as decimal(38, 0))) as bigint) as tokens,
        count(*) filter (where tokens > 4096) as long_documents,
        cast(coalesce(sum(cast(tokens as decimal(38, 0))) filter (where tokens > 4096), 0) as bigint) as long_tokens
    from documents group by domain order by domain";

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [file, folder, partitions, given @ ..] = arguments.as_slice() else {
        eprintln!("usage: recipe_speed RECIPE.sql DIR PARTITIONS [name=text …]");
        std::process::exit(2);
    };
    let mut config = SessionConfig::new().with_target_partitions(partitions.parse()?).with_batch_size(4096);
    let options = config.options_mut();
    options.execution.parquet.schema_force_view_types = false;
    options.execution.split_file_groups_by_statistics = true;
    options.optimizer.prefer_existing_sort = true;
    let session = SessionContext::new_with_config(config);
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
    let domains = session.sql(DOMAINS).await?.collect().await?;
    let table = MemTable::try_new(domains[0].schema(), vec![domains])?;
    session.register_table("domains", Arc::new(table))?;
    let shares =
        "with total as (select cast(sum(cast(tokens as decimal(38, 0))) as double) as tokens from domains)
        select domain, cast(domains.tokens as double) / total.tokens as share from domains cross join total";
    let shares = session.sql(shares).await?.cache().await?;
    session.register_table("shares", shares.into_view())?;
    eprintln!("statistics of domains: {:.1} s, peak {} MB", begin.elapsed().as_secs_f64(), peak_megabytes());

    let begin = Instant::now();
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
    let plan = LogicalPlanBuilder::from(bound.plan(&session).await?)
        .sort([col("doc_id").sort(true, false)])?
        .build()?;
    let physical = session.execute_logical_plan(plan).await?.create_physical_plan().await?;
    if std::env::var_os("EXPLAIN").is_some() {
        eprintln!("{}", displayable(physical.as_ref()).indent(false));
    }
    let mut stream = execute_stream(physical, session.task_ctx())?;
    let (mut rows, mut tokens, mut last) = (0u64, 0.0, vec![]);
    while let Some(batch) = stream.try_next().await? {
        rows += batch.num_rows() as u64;
        let (starts, stops) =
            (batch.column(1).as_primitive::<Int64Type>(), batch.column(2).as_primitive::<Int64Type>());
        let copies = batch.column(3).as_primitive::<Float64Type>();
        tokens += (0..batch.num_rows())
            .map(|i| copies.value(i) * (stops.value(i) - starts.value(i)) as f64)
            .sum::<f64>();
        let ids = batch.column(0).as_fixed_size_binary();
        assert!(last.as_slice() <= ids.value(0), "not sorted by doc_id");
        last = ids.value(ids.len() - 1).to_vec();
    }
    println!(
        "{file}: {rows} spans, {tokens:.1} tokens, {:.1} s, peak {} MB",
        begin.elapsed().as_secs_f64(),
        peak_megabytes()
    );
    Ok(())
}

/// The most memory that this process has held.
fn peak_megabytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok()).unwrap_or_default() / 1024
}
