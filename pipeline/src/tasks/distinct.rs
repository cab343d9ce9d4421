//! distinct: writes one row for each distinct document of a bucket.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;
use datafusion::catalog::streaming::StreamingTable;
use datafusion::common::ScalarValue;
use datafusion::common::runtime::SpawnedTask;
use datafusion::error::DataFusionError;
use datafusion::execution::{SendableRecordBatchStream, TaskContext};
use datafusion::physical_plan::stream::RecordBatchStreamAdapter;
use datafusion::physical_plan::streaming::PartitionStream;
use datafusion::prelude::{col, lit};
use futures::TryStreamExt;
use serde::{Deserialize, Serialize};

use super::Worker;
use crate::output::{File, Output, Table};
use crate::progress::Bar;
use crate::sql::StageSql;
use crate::sql::engine::{FILES_AT_A_TIME, query, scan_all, write_table};
use crate::storage::{Location, sealed};
use crate::{Error, Result, tables};

/// The tables of documents of all units, each with the URL of its folder.
#[derive(Serialize, Deserialize)]
pub struct Documents {
    pub units: Vec<(String, Table)>,
}

/// A task of the catalog: finds the distinct documents whose ids lie in one of `of` equal ranges.
#[derive(Debug, Serialize, Deserialize)]
pub struct Distinct {
    pub bucket: u64,
    pub of: u64,
    /// The URL of [`Documents`]. They are stored once, because they are too large to be part of each task.
    pub documents: String,
    pub sql: String,
    pub folder: String,
}

impl Distinct {
    pub async fn perform(self, worker: &Worker, bar: &Bar) -> Result<Output> {
        let documents = worker.stores.open(&self.documents)?;
        let listed = sealed::open(&documents.read().await?);
        let Documents { units } =
            listed.map_err(|message| Error::Corrupt { url: documents.url(), message })?;
        let engine = worker.engine.share((self.of as usize).min(worker.engine.partitions));
        let mut files = vec![vec![]; engine.partitions];
        for (i, (url, table)) in units.into_iter().enumerate() {
            let folder = worker.stores.open(&url)?;
            let own = table.files.into_iter().map(|file| (folder.clone(), file));
            files[i % engine.partitions].extend(own);
        }
        let at_a_time = (FILES_AT_A_TIME / engine.partitions).max(2);
        let partitions = files.into_iter().map(|files| {
            Arc::new(Units { schema: tables::documents(), files, at_a_time }) as Arc<dyn PartitionStream>
        });

        let failed = |e| query("cannot compute the catalog", e);
        let session = engine.session();
        let all = StreamingTable::try_new(tables::documents(), partitions.collect()).map_err(failed)?;
        let mut own = session.read_table(Arc::new(all)).map_err(failed)?;
        if self.bucket > 0 {
            own = own.filter(col("doc_id").gt_eq(lit(self.first(self.bucket)))).map_err(failed)?;
        }
        if self.bucket + 1 < self.of {
            own = own.filter(col("doc_id").lt(lit(self.first(self.bucket + 1)))).map_err(failed)?;
        }
        session.register_table("documents", own.into_view()).map_err(failed)?;
        let sql = StageSql::parse("sql/stages/catalog.sql", &self.sql)?;
        let rows = sql.plan(&session, &BTreeMap::new()).await?.execute_stream().await.map_err(failed)?;
        let name = match self.of {
            1 => "catalog".to_owned(),
            _ => format!("catalog-{:05}", self.bucket),
        };
        let folder = worker.stores.open(&self.folder)?;
        let rows = bar.watch(rows);
        // a task of its own, so that others run in parallel; it is cancelled when whoever waits for it is
        // dropped
        let written =
            SpawnedTask::spawn(async move { write_table(&folder, &name, tables::catalog(), rows).await });
        let mut output = Output::default();
        output.table("catalog", written.join().await.expect("a query does not panic")?);
        Ok(output)
    }

    /// The smallest id of a bucket.
    fn first(&self, bucket: u64) -> ScalarValue {
        let first = (u128::MAX / self.of as u128 + 1) * bucket as u128;
        ScalarValue::FixedSizeBinary(16, Some(first.to_be_bytes().to_vec()))
    }
}

/// The documents of some units. They are many small files, which DataFusion would open one after the other;
/// this opens several at a time.
#[derive(Debug)]
struct Units {
    schema: SchemaRef,
    files: Vec<(Location, File)>,
    at_a_time: usize,
}

impl PartitionStream for Units {
    fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    fn execute(&self, _: Arc<TaskContext>) -> SendableRecordBatchStream {
        let rows =
            scan_all(self.files.clone(), self.at_a_time).map_err(|e| DataFusionError::External(Box::new(e)));
        Box::pin(RecordBatchStreamAdapter::new(self.schema.clone(), rows))
    }
}
