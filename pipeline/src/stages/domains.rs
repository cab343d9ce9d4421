//! domains: exact statistics of each domain, and the target shares.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{Array, AsArray, Float64Array, Int64Array, ListArray, RecordBatch, StringArray};
use arrow::datatypes::Int64Type;
use futures::TryStreamExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::catalog::register_documents;
use crate::output::{Output, Published};
use crate::run::{Run, ingredients};
use crate::sql::engine::{query, scan, write_table};
use crate::stage::Stage;
use crate::tables::column;
use crate::{Result, tables};

/// Tables `domains` and `shares`.
pub async fn obtain(run: &Run, catalog: &Published) -> Result<Published> {
    let domains_sql = run.stage_sql("domains")?;
    let shares_sql = run.stage_sql("shares")?;
    let long_tokens = run.conf.mixture.long_tokens.0 as i64;
    let named = run.conf.mixture.shares.targets();
    // the conf's target shares are in the key; the corpus's own follow from the catalog
    let list = ingredients(
        Stage::Domains,
        [
            ("catalog", catalog.digest("catalog")),
            ("heldout", catalog.digest("heldout")),
            ("sql", json!(domains_sql.key)),
            ("shares_sql", json!(shares_sql.key)),
            ("long_tokens", json!(long_tokens)),
            ("shares", json!(named)),
        ],
    );
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
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq, JsonSchema)]
pub struct Domain {
    /// The domain.
    pub domain: String,
    /// How many documents it has.
    pub documents: u64,
    /// How many tokens they have.
    pub tokens: u64,
    /// Its share of all tokens that a recipe may draw from.
    pub share: f64,
    /// Its target share; 0 if the conf's shares don't name it.
    pub target: f64,
    /// How many long documents it has.
    pub long_documents: u64,
    /// How many tokens are in long documents.
    pub long_tokens: u64,
    /// The median of the documents' lengths.
    pub p50: u64,
    /// The length that nine of ten documents do not exceed.
    pub p90: u64,
    /// The length of the longest document.
    pub longest: u64,
    /// How many documents there are in each length bucket.
    pub documents_by_length: Vec<u64>,
    /// How many tokens there are in each length bucket.
    pub tokens_by_length: Vec<u64>,
}

/// Reads all rows of `domains` with their target shares, sorted by domain. A domain with a target share but
/// no documents gets a row of zeros.
pub async fn read(domains: &Published) -> Result<Vec<Domain>> {
    let batches: Vec<_> = scan(domains.folder.clone(), domains.table("domains"), None).try_collect().await?;
    let mut rows: BTreeMap<String, Domain> = BTreeMap::new();
    for batch in batches {
        let names: &StringArray = column(&batch, "domain")?;
        let shares: &Float64Array = column(&batch, "share")?;
        for row in 0..batch.num_rows() {
            let number =
                |name: &str| -> Result<u64> { Ok(column::<Int64Array>(&batch, name)?.value(row) as u64) };
            let list = |name: &str| -> Result<Vec<u64>> {
                let values = column::<ListArray>(&batch, name)?.value(row);
                Ok(values.as_primitive::<Int64Type>().values().iter().map(|v| *v as u64).collect())
            };
            let name = names.value(row).to_owned();
            let domain = Domain {
                domain: name.clone(),
                documents: number("documents")?,
                tokens: number("tokens")?,
                share: shares.value(row),
                target: 0.0,
                long_documents: number("long_documents")?,
                long_tokens: number("long_tokens")?,
                p50: number("p50")?,
                p90: number("p90")?,
                longest: number("longest")?,
                documents_by_length: list("documents_by_length")?,
                tokens_by_length: list("tokens_by_length")?,
            };
            rows.insert(name, domain);
        }
    }
    let shares: Vec<_> = scan(domains.folder.clone(), domains.table("shares"), None).try_collect().await?;
    for batch in shares {
        let names: &StringArray = column(&batch, "domain")?;
        let values: &Float64Array = column(&batch, "share")?;
        for row in 0..names.len() {
            let domain = names.value(row).to_owned();
            let domain = rows.entry(domain.clone()).or_insert_with(|| Domain {
                domain,
                documents_by_length: vec![0; 9],
                tokens_by_length: vec![0; 9],
                ..Default::default()
            });
            domain.target = values.value(row);
        }
    }
    Ok(rows.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::StageSql;
    use datafusion::prelude::SessionContext;

    #[tokio::test]
    async fn shares_of_any_number_of_domains_sum_to_one_and_others_do_not() {
        let check = include_str!("../../../sql/checks/domains_have_shares_that_sum_to_one.sql");
        let check = StageSql::parse("check.sql", check).unwrap();
        let wrong = async |shares: Vec<f64>| {
            let session = SessionContext::new();
            let shares: [(&str, arrow::array::ArrayRef); 1] =
                [("share", Arc::new(Float64Array::from(shares)))];
            session.register_batch("shares", RecordBatch::try_from_iter(shares).unwrap()).unwrap();
            let rows = check.plan(&session, &Default::default()).await.unwrap().collect().await.unwrap();
            rows.iter().any(|rows| rows.num_rows() > 0)
        };
        for domains in (1..3000).step_by(113).chain([600, 100_000]) {
            let equal = vec![1.0 / domains as f64; domains];
            assert!(!wrong(equal.clone()).await, "{domains}");
            assert!(wrong(equal.iter().map(|share| share * (1.0 + 1e-9)).collect()).await, "{domains}");
            assert!(wrong([equal, vec![1e-9]].concat()).await, "{domains}");
        }
        let uneven: Vec<f64> = (1..=5000).map(|i| i as f64).collect();
        let sum: f64 = uneven.iter().sum();
        assert!(!wrong(uneven.iter().map(|weight| weight / sum).collect()).await);
    }
}
