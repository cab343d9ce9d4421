//! catalog: one row for each distinct document, and which documents are held out.
//!
//! Documents are made distinct in buckets. A bucket is a range of doc_id and one task, which reads the
//! documents of all units and sorts those of its range.

use std::sync::Arc;

use arrow::array::Int64Array;
use arrow::datatypes::Schema;
use datafusion::prelude::SessionContext;
use futures::{StreamExt, TryStreamExt};
use serde_json::json;

use super::tokens::Tokens;
use crate::output::{Draft, Output, Published, Table};
use crate::run::{Run, ingredients};
use crate::sql::StageSql;
use crate::sql::engine::{query, scan, write_table};
use crate::sql::functions::hashes;
use crate::stage::Stage;
use crate::storage::{Location, sealed};
use crate::tables::column;
use crate::tasks::Task;
use crate::tasks::distinct::{Distinct, Documents};
use crate::{Error, Result, tables};

/// About how many documents a bucket has: as many as a core sorts in five minutes. More buckets would mean
/// more passes over the documents of all units.
const BUCKET_DOCUMENTS: u64 = 1 << 26;

/// Tables `catalog` and, if documents are held out, `heldout`.
pub async fn obtain(run: &Run, tokens: &Tokens) -> Result<Published> {
    let catalog_sql = run.stage_sql("catalog")?;
    let heldout_sql = run.stage_sql("heldout")?;
    // millionths, so that the limit is exact integer arithmetic in SQL
    let millionths = (run.conf.mixture.holdout * 1e6).round() as i64;
    // parts are in the key because the catalog says in which part a document's ids are
    let mut list = ingredients(
        Stage::Catalog,
        [
            ("documents", json!(tokens.digest("documents"))),
            ("parts", json!(tokens.parts_digest())),
            ("sql", json!(catalog_sql.key)),
            ("holdout", json!(millionths)),
        ],
    );
    if millionths > 0 {
        list.insert("heldout_sql".into(), json!(heldout_sql.key));
        list.insert("seed".into(), json!(run.conf.run.seed));
    }
    run.obtain(Stage::Catalog, list, async |draft| {
        let mut output = distinct(run, tokens, &catalog_sql, draft).await?;
        let documents = tokens.count("documents");
        let catalog = output.tables["catalog"].clone();
        output.count("documents", catalog.rows);
        let Some(duplicates) = documents.checked_sub(catalog.rows) else {
            let message = format!("{documents} documents came in, {} went out", catalog.rows);
            return Err(Error::Unbalanced { stage: "catalog", message });
        };
        output.count("duplicates", duplicates);

        // candidates may be as many as the documents, and are joined with each other, so joins have to merge
        let session = run.engine.merging_session();
        run.engine
            .register(&session, "catalog", tables::catalog(), &[(&draft.folder, &catalog)], &["doc_id"])
            .await?;
        run.check(Stage::Catalog, &session).await?;
        if millionths > 0 {
            hashes::register(&session);
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
        Ok(output)
    })
    .await
}

/// Table `catalog`, computed with one task per bucket.
async fn distinct(run: &Run, tokens: &Tokens, sql: &StageSql, draft: &Draft) -> Result<Output> {
    let documents = tokens.count("documents");
    let bar = run.progress.stage("catalog", documents);
    let units = draft.folder.join("jobs/documents.json");
    let tables = tokens.tables("documents").into_iter();
    let tables = tables.map(|(folder, table)| (folder.url(), table.clone())).collect();
    units.put(sealed::seal(&Documents { units: tables })).await?;
    let of = documents.div_ceil(BUCKET_DOCUMENTS).max(1);
    let buckets = (0..of).map(|bucket| {
        let distinct = Distinct {
            bucket,
            of,
            documents: units.url(),
            sql: sql.text.clone(),
            folder: draft.folder.url(),
        };
        let bar = bar.clone();
        async move {
            run.check_stop()?;
            let job = format!("bucket-{bucket:05}-of-{of:05}");
            let output = draft.job(&job, run.executor.perform(Task::Distinct(distinct), &bar)).await?;
            if run.executor.is_remote() {
                let rows = output.tables["catalog"].rows;
                bar.add(rows, rows, 0, 0);
            }
            Ok::<_, Error>(output)
        }
    });
    // in the order of buckets, which is that of doc_id
    let buckets = futures::stream::iter(buckets).buffered(run.executor.tasks_at_a_time());
    let mut buckets = std::pin::pin!(buckets);
    let mut output = Output::default();
    while let Some(bucket) = buckets.try_next().await? {
        output.merge(bucket);
    }
    Ok(output)
}

/// The columns of `documents` that a recipe sees.
pub const OF_RECIPES: [&str; 5] = ["doc_id", "domain", "tokens", "bytes", "origin"];

/// Registers `documents`, as a recipe sees it: the catalog without held-out documents and without
/// the columns `text_id` and `part`.
pub async fn register_documents(run: &Run, session: &SessionContext, catalog: &Published) -> Result<()> {
    let all = tables::documents();
    let seen = all.fields().iter().filter(|field| OF_RECIPES.contains(&field.name().as_str()));
    let columns = Arc::new(Schema::new(seen.cloned().collect::<Vec<_>>()));
    let files = catalog.table("catalog");
    let heldout = catalog.table("heldout");
    let name = if heldout.rows > 0 { "all_documents" } else { "documents" };
    run.engine.register(session, name, columns, &[(&catalog.folder, &files)], &["doc_id"]).await?;
    if heldout.rows > 0 {
        run.engine
            .register(session, "heldout", tables::heldout(), &[(&catalog.folder, &heldout)], &["doc_id"])
            .await?;
        let doing = "cannot set the held-out documents apart";
        let sql = "select * from all_documents where doc_id not in (select doc_id from heldout)";
        let view = session.sql(sql).await.map_err(|e| query(doing, e))?.into_view();
        session.register_table("documents", view).map_err(|e| query(doing, e))?;
        // the view keeps these tables, but no recipe can read them
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
        sum += column::<Int64Array>(&batch, "stop")?.values().iter().sum::<i64>() as u64;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, FixedSizeBinaryArray, Int64Array, RecordBatch, StringArray};
    use proptest::prelude::*;

    use super::*;
    use crate::progress::Progress;
    use crate::sql::engine::{Engine, TableWriter};
    use crate::storage::Stores;
    use crate::tasks::Worker;
    use arrow::array::AsArray;

    /// A table of documents with these ids and parts. Equal ids give equal rows, apart from the part.
    fn documents(rows: &[([u8; 16], i64)]) -> RecordBatch {
        let number = |of: fn(&([u8; 16], i64)) -> i64| -> ArrayRef {
            Arc::new(Int64Array::from_iter_values(rows.iter().map(of)))
        };
        let text = |text: &str| -> ArrayRef { Arc::new(StringArray::from(vec![text; rows.len()])) };
        let ids = FixedSizeBinaryArray::try_from_iter(rows.iter().map(|row| row.0)).unwrap();
        let tokens = number(|row| row.0[15] as i64 + 1);
        let text_ids: ArrayRef = Arc::new(ids.clone());
        let columns = vec![
            Arc::new(ids) as ArrayRef,
            text("d"),
            tokens.clone(),
            tokens,
            text("o"),
            text_ids.clone(),
            number(|row| row.1),
        ];
        RecordBatch::try_new(tables::documents(), columns).unwrap()
    }

    #[tokio::test]
    async fn a_catalog_in_buckets_is_the_catalog_of_one() {
        let stores = Stores::new("/");
        let folder = stores.open("memory:///catalog").unwrap();
        // ids all over the range, including its ends and the bounds of buckets, each in two of the three
        // units
        let mut ids: Vec<[u8; 16]> = (0..500).map(|i| crate::hash::doc_id("d", &format!("{i}"))).collect();
        let bounds = [3u128, 7].into_iter().flat_map(|of| (1..of).map(move |n| (u128::MAX / of + 1) * n));
        ids.extend(
            bounds.chain([0, u128::MAX]).flat_map(|id| [id, id.wrapping_sub(1)]).map(u128::to_be_bytes),
        );
        let mut units = vec![];
        for unit in 0..3 {
            let own = ids.iter().filter(|id| id[3] % 3 != unit).map(|id| (*id, unit as i64));
            let mut writer = TableWriter::new(&folder, &format!("documents-{unit}"), tables::documents());
            writer.write(documents(&own.collect::<Vec<_>>())).await.unwrap();
            units.push((folder.url(), writer.finish().await.unwrap()));
        }
        let listed = folder.join("documents.json");
        listed.put(sealed::seal(&Documents { units })).await.unwrap();

        ids.sort_unstable();
        ids.dedup();
        let engine = Arc::new(Engine::new(2, 64 << 20, None).unwrap());
        let worker = Worker::new(stores, None, engine, Arc::default());
        let bar = Progress::none().stage("catalog", 0);
        let mut digests = vec![];
        for of in [1, 3, 7] {
            let mut all = Output::default();
            for bucket in 0..of {
                let sql = include_str!("../../../sql/stages/catalog.sql").to_owned();
                let (documents, folder) = (listed.url(), folder.join(&format!("{of}")).url());
                let task = Distinct { bucket, of, documents, sql, folder };
                let one = task.perform(&worker, &bar).await.unwrap();
                assert!(one.tables["catalog"].rows > 0);
                all.merge(one);
            }
            let catalog = all.tables["catalog"].clone();
            digests.push((catalog.rows, catalog.digest));
            let rows: Vec<RecordBatch> = scan(folder.join(&format!("{of}")), catalog, Some(vec!["doc_id"]))
                .try_collect()
                .await
                .unwrap();
            let read = rows.iter().flat_map(|rows| rows.column(0).as_fixed_size_binary().iter());
            let read: Vec<&[u8]> = read.map(Option::unwrap).collect();
            assert_eq!(read, ids.iter().map(<[u8; 16]>::as_slice).collect::<Vec<_>>(), "{of} buckets");
        }
        assert!(digests.iter().all(|digest| *digest == digests[0]));
    }

    /// Which of these documents (domain, text, tokens) heldout.sql holds out, by their index.
    async fn heldout(documents: &[(usize, u8, i64)], millionths: i64, seed: i64) -> Vec<usize> {
        let session = Engine::new(2, 64 << 20, None).unwrap().merging_session();
        hashes::register(&session);
        let ids = |of: &dyn Fn(usize) -> [u8; 16]| -> ArrayRef {
            let ids = (0..documents.len()).map(of);
            Arc::new(FixedSizeBinaryArray::try_from_iter(ids).unwrap())
        };
        let columns: [(&str, ArrayRef); 4] = [
            ("doc_id", ids(&|i| (i as u128).to_be_bytes())),
            (
                "domain",
                Arc::new(StringArray::from_iter_values(documents.iter().map(|d| format!("d{}", d.0)))),
            ),
            ("tokens", Arc::new(Int64Array::from_iter_values(documents.iter().map(|d| d.2)))),
            ("text_id", ids(&|i| [documents[i].1; 16])),
        ];
        let catalog = RecordBatch::try_from_iter(columns).unwrap();
        session.register_batch("catalog", catalog).unwrap();
        let sql = include_str!("../../../sql/stages/heldout.sql");
        let sql = StageSql::parse("heldout.sql", sql).unwrap();
        let place = (millionths as i128 * i64::MAX as i128 / 1_000_000) as i64;
        let parameters = [("seed", seed), ("place", place), ("millionths", millionths)];
        let rows = sql.plan(&session, &parameters.into()).await.unwrap().collect().await.unwrap();
        let ids = rows.iter().flat_map(|rows| rows.column(0).as_fixed_size_binary().iter().flatten());
        ids.map(|id| u128::from_be_bytes(id.try_into().unwrap()) as usize).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn a_text_is_held_out_where_every_domain_that_has_it_has_room(
            texts in prop::collection::vec((1i64..200, prop::collection::btree_set(0usize..4, 1..4)), 1..60),
            millionths in 1i64..900_000,
            seed in 0i64..100,
        ) {
            let documents: Vec<(usize, u8, i64)> = (0u8..)
                .zip(&texts)
                .flat_map(|(text, (tokens, domains))| domains.iter().map(move |domain| (*domain, text, *tokens)))
                .collect();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let got = runtime.block_on(heldout(&documents, millionths, seed));

            // the definition: each domain goes through its candidates in order, and each that fits by itself
            // takes its room
            let place = |text: u8| crate::hash::unit_hash("heldout", seed as u64, &[text; 16], 0, 0) >> 1;
            let below = (millionths as i128 * i64::MAX as i128 / 1_000_000) as u64;
            let mut out: Vec<u8> = (0..texts.len() as u8).filter(|text| place(*text) < below).collect();
            out.sort_by_key(|text| (place(*text), *text));
            let mut refused = vec![];
            for domain in 0..4 {
                let own = |text: &u8| texts[*text as usize].1.contains(&domain);
                let all: i64 = texts.iter().filter(|text| text.1.contains(&domain)).map(|text| text.0).sum();
                let (most, mut sum) = (all * millionths, 0);
                for text in out.iter().filter(|text| own(text)) {
                    let tokens = texts[*text as usize].0 * 1_000_000;
                    sum += if tokens <= most { tokens } else { 0 };
                    if tokens > most || sum > most {
                        refused.push(*text);
                    }
                }
            }
            let want: Vec<usize> = (0..documents.len())
                .filter(|i| out.contains(&documents[*i].1) && !refused.contains(&documents[*i].1))
                .collect();
            prop_assert_eq!(got, want);
        }
    }
}
