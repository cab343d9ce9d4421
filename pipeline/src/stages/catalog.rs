//! catalog: one row a distinct document, and which of them are held out.

use std::collections::BTreeMap;

use arrow::array::AsArray;
use arrow::datatypes::Int64Type;
use datafusion::prelude::SessionContext;
use futures::TryStreamExt;
use serde_json::json;

use super::places;
use super::tokens::Tokens;
use crate::engine::{query, scan, write_table};
use crate::run::{Run, Stage, ingredients};
use crate::stage::{Output, Published, Table};
use crate::store::Location;
use crate::{Error, Result, tables};

const VERSION: u32 = 2;

/// Tables `catalog` and, where documents are held out, `heldout`.
pub async fn obtain(run: &Run, tokens: &Tokens) -> Result<Published> {
    let catalog_sql = run.stage_sql("catalog")?;
    let heldout_sql = run.stage_sql("heldout")?;
    // millionths, so that the limit is exact integer arithmetic in SQL
    let millionths = (run.conf.mixture.holdout * 1e6).round() as i64;
    let mut list = ingredients([
        ("version", json!(VERSION)),
        ("documents", json!(tokens.digest("documents"))),
        ("parts", json!(tokens.parts_digest())),
        ("sql", json!(catalog_sql.canonical())),
        ("holdout", json!(millionths)),
    ]);
    if millionths > 0 {
        list.insert("heldout_sql".into(), json!(heldout_sql.canonical()));
        list.insert("seed".into(), json!(run.conf.run.seed));
    }
    run.obtain(Stage::Catalog, list, async |draft| {
        let documents = tokens.count("documents");
        let bar = run.progress.stage("catalog", documents);
        let session = run.engine.session();
        tokens.register(run, &session, "documents").await?;
        let rows = catalog_sql.plan(&session, &BTreeMap::new()).await?;
        let rows = rows.execute_stream().await.map_err(|e| query("cannot compute the catalog", e))?;
        let catalog = write_table(&draft.folder, "catalog", tables::catalog(), bar.watch(rows)).await?;

        let mut output = Output::default();
        output.count("documents", catalog.rows);
        let Some(duplicates) = documents.checked_sub(catalog.rows) else {
            let message = format!("{documents} documents came in, {} went out", catalog.rows);
            return Err(Error::Unbalanced { stage: "catalog", message });
        };
        output.count("duplicates", duplicates);

        run.engine
            .register(&session, "catalog", tables::catalog(), &[(&draft.folder, &catalog)], &["doc_id"])
            .await?;
        run.check(Stage::Catalog, &session).await?;
        if millionths > 0 {
            places::register(&session);
            let place = (millionths as i128 * i64::MAX as i128 / 1_000_000) as i64;
            let parameters =
                [("seed", run.conf.run.seed as i64), ("place", place), ("millionths", millionths)];
            let rows = heldout_sql.plan(&session, &parameters.into()).await?;
            let rows = rows.execute_stream().await.map_err(|e| query("cannot choose what is held out", e))?;
            let heldout = write_table(&draft.folder, "heldout", tables::heldout(), rows).await?;
            output.count("heldout_documents", heldout.rows);
            output.count("heldout_tokens", sum_of_stops(&draft.folder, &heldout).await?);
            output.table("heldout", heldout);
        }
        output.table("catalog", catalog);
        Ok(output)
    })
    .await
}

/// Registers `documents`, as a recipe sees it: the catalog without what is held out and without places.
pub async fn register_documents(run: &Run, session: &SessionContext, catalog: &Published) -> Result<()> {
    let columns = tables::documents().project(&[0, 1, 2, 3, 4]).expect("five of six columns");
    let files = catalog.table("catalog");
    let heldout = catalog.table("heldout");
    let name = if heldout.rows > 0 { "all_documents" } else { "documents" };
    run.engine.register(session, name, columns.into(), &[(&catalog.folder, &files)], &["doc_id"]).await?;
    if heldout.rows > 0 {
        run.engine
            .register(session, "heldout", tables::heldout(), &[(&catalog.folder, &heldout)], &["doc_id"])
            .await?;
        let doing = "cannot set the held-out documents apart";
        let sql = "select * from all_documents where doc_id not in (select doc_id from heldout)";
        let view = session.sql(sql).await.map_err(|e| query(doing, e))?.into_view();
        session.register_table("documents", view).map_err(|e| query(doing, e))?;
        // the view keeps them; no recipe reaches them
        for hidden in [name, "heldout"] {
            session.deregister_table(hidden).map_err(|e| query(doing, e))?;
        }
    }
    Ok(())
}

async fn sum_of_stops(folder: &Location, table: &Table) -> Result<u64> {
    let mut batches = std::pin::pin!(scan(folder.clone(), table.clone(), Some(vec!["stop"])));
    let mut sum = 0;
    while let Some(batch) = batches.try_next().await? {
        sum += batch.column(0).as_primitive::<Int64Type>().values().iter().sum::<i64>() as u64;
    }
    Ok(sum)
}
