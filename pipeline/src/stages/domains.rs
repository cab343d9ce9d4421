//! domains: exact statistics of each domain, and the target shares.

use std::sync::Arc;

use arrow::array::{Array, AsArray, Float64Array, RecordBatch, StringArray};
use arrow::datatypes::{Float64Type, Int64Type};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::catalog::register_documents;
use crate::engine::{query, scan, write_table};
use crate::run::{Run, Stage, ingredients};
use crate::stage::{Output, Published};
use crate::{Result, tables};
use futures::TryStreamExt;

const VERSION: u32 = 1;

/// Tables `domains` and `shares`.
pub async fn obtain(run: &Run, catalog: &Published) -> Result<Published> {
    let domains_sql = run.stage_sql("domains")?;
    let shares_sql = run.stage_sql("shares")?;
    let long_tokens = run.conf.mixture.long_tokens.0 as i64;
    let named = run.conf.mixture.shares.targets();
    let list = ingredients([
        ("version", json!(VERSION)),
        ("catalog", catalog.digest("catalog")),
        ("heldout", catalog.digest("heldout")),
        ("sql", json!(domains_sql.key)),
        ("shares_sql", json!(shares_sql.key)),
        ("long_tokens", json!(long_tokens)),
        ("shares", json!(named)),
    ]);
    run.obtain(Stage::Domains, list, async |draft| {
        let bar = run.progress.stage("domains", 0);
        let session = run.engine.session();
        register_documents(run, &session, catalog).await?;
        let rows = domains_sql.plan(&session, &[("long_tokens", long_tokens)].into()).await?;
        let rows = rows.execute_stream().await.map_err(|e| query("cannot describe the domains", e))?;
        let domains = write_table(&draft.folder, "domains", tables::domains(), bar.watch(rows)).await?;

        let shares = match named {
            Some(named) => {
                let names = StringArray::from_iter_values(named.keys());
                let shares = Float64Array::from_iter_values(named.values().copied());
                let batch = RecordBatch::try_new(tables::shares(), vec![Arc::new(names), Arc::new(shares)]);
                let rows = futures::stream::iter([batch.map_err(Into::into)]);
                write_table(&draft.folder, "shares", tables::shares(), rows).await?
            }
            None => {
                let session = run.engine.session();
                let table = catalog.table("catalog");
                run.engine
                    .register(
                        &session,
                        "catalog",
                        tables::catalog(),
                        &[(&catalog.folder, &table)],
                        &["doc_id"],
                    )
                    .await?;
                let rows = shares_sql.plan(&session, &Default::default()).await?;
                let rows = rows
                    .execute_stream()
                    .await
                    .map_err(|e| query("cannot compute the corpus's shares", e))?;
                write_table(&draft.folder, "shares", tables::shares(), rows).await?
            }
        };
        for (name, schema, table) in
            [("domains", tables::domains(), &domains), ("shares", tables::shares(), &shares)]
        {
            run.engine.register(&session, name, schema, &[(&draft.folder, table)], &[]).await?;
        }
        run.check(Stage::Domains, &session).await?;
        let mut output = Output::default();
        output.count("domains", domains.rows);
        output.table("domains", domains);
        output.table("shares", shares);
        Ok(output)
    })
    .await
}

/// A row of `domains`, for previews and reports.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Domain {
    pub domain: String,
    pub documents: u64,
    pub tokens: u64,
    /// Of all tokens that a recipe may draw from.
    pub share: f64,
    /// What the recipe should make of it; 0 for a domain that the conf's shares don't name.
    pub target: f64,
    pub long_documents: u64,
    pub long_tokens: u64,
    pub p50: u64,
    pub p90: u64,
    pub longest: u64,
    pub documents_by_length: Vec<u64>,
    pub tokens_by_length: Vec<u64>,
}

/// All rows of `domains` with their target shares, by domain; target shares of domains that have no documents too.
pub async fn read(domains: &Published) -> Result<Vec<Domain>> {
    let batches: Vec<_> = scan(domains.folder.clone(), domains.table("domains"), None).try_collect().await?;
    let mut rows = vec![];
    for batch in batches {
        let number = |i: usize, row: usize| batch.column(i).as_primitive::<Int64Type>().value(row) as u64;
        let list = |i: usize, row: usize| -> Vec<u64> {
            let values = batch.column(i).as_list::<i32>().value(row);
            values.as_primitive::<Int64Type>().values().iter().map(|v| *v as u64).collect()
        };
        for row in 0..batch.num_rows() {
            rows.push(Domain {
                domain: batch.column(0).as_string::<i32>().value(row).to_owned(),
                documents: number(1, row),
                tokens: number(2, row),
                share: batch.column(3).as_primitive::<Float64Type>().value(row),
                target: 0.0,
                long_documents: number(4, row),
                long_tokens: number(5, row),
                p50: number(7, row),
                p90: number(9, row),
                longest: number(11, row),
                documents_by_length: list(12, row),
                tokens_by_length: list(13, row),
            });
        }
    }
    let shares: Vec<_> = scan(domains.folder.clone(), domains.table("shares"), None).try_collect().await?;
    for batch in shares {
        let (names, values) =
            (batch.column(0).as_string::<i32>(), batch.column(1).as_primitive::<Float64Type>());
        for row in 0..names.len() {
            match rows.iter_mut().find(|d| d.domain == names.value(row)) {
                Some(domain) => domain.target = values.value(row),
                None => rows.push(Domain {
                    domain: names.value(row).to_owned(),
                    target: values.value(row),
                    documents_by_length: vec![0; 9],
                    tokens_by_length: vec![0; 9],
                    ..Default::default()
                }),
            }
        }
    }
    rows.sort_by(|a, b| a.domain.cmp(&b.domain));
    Ok(rows)
}
