//! The embedded DataFusion: sessions that share one memory limit, stages' tables registered as SQL tables,
//! and query results written as files whose bytes depend only on the rows.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::sync::{Arc, Mutex};

use arrow::array::{Array, ArrayRef, AsArray, ListArray, RecordBatch};
use arrow::buffer::OffsetBuffer;
use arrow::compute::{BatchCoalescer, CastOptions, cast_with_options};
use arrow::datatypes::{DataType, SchemaRef};
use arrow::util::display::FormatOptions;
use datafusion::common::runtime::SpawnedTask;
use datafusion::datasource::MemTable;
use datafusion::datasource::file_format::parquet::ParquetFormat;
use datafusion::datasource::listing::{ListingOptions, ListingTable, ListingTableConfig, ListingTableUrl};
use datafusion::error::DataFusionError;
use datafusion::execution::memory_pool::{FairSpillPool, TrackConsumersPool};
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::execution::{
    SendableRecordBatchStream, disk_manager::DiskManagerBuilder, disk_manager::DiskManagerMode,
};
use datafusion::prelude::{SessionConfig, SessionContext, col};
use futures::{Stream, StreamExt, TryStreamExt};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use crate::hash::{Digest, RowDigest};
use crate::output::{File, Table};
use crate::sql::functions;
use crate::sql::functions::exact::NoNumber;
use crate::storage::Location;
use crate::{Error, Result};

/// How many files are requested from storage at the same time.
pub const FILES_AT_A_TIME: usize = 16;

/// The query engine: one DataFusion runtime with its memory limit and its number of partitions.
pub struct Engine {
    runtime: Arc<RuntimeEnv>,
    memory: usize,
    /// How many jobs, and how many partitions of a query, run at the same time. No result depends on it.
    pub partitions: usize,
    /// URLs of the files whose digests have been compared with their manifests.
    checked: Mutex<HashSet<String>>,
}

impl Engine {
    /// `memory` is the limit for all queries together, in bytes. Data that does not fit is spilled to the
    /// folder `spill`, by default the system's temporary folder.
    ///
    /// # Errors
    /// [`Error::Query`] if the runtime cannot be built, for example because `spill` cannot be created.
    pub fn new(partitions: usize, memory: u64, spill: Option<&str>) -> Result<Self> {
        let mode = match spill {
            Some(folder) => DiskManagerMode::Directories(vec![folder.into()]),
            None => DiskManagerMode::OsTmpDirectory,
        };
        let pool =
            TrackConsumersPool::new(FairSpillPool::new(memory as usize), 5.try_into().expect("not zero"));
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(pool))
            .with_disk_manager_builder(DiskManagerBuilder::default().with_mode(mode))
            .build_arc()
            .map_err(|e| query("cannot start the query engine", e))?;
        Ok(Self { runtime, memory: memory as usize, partitions, checked: Mutex::default() })
    }

    /// The engine for one of `tasks` tasks that run at the same time: it shares the memory limit and takes
    /// `1/tasks` of the partitions, at least one.
    pub fn share(&self, tasks: usize) -> Self {
        let partitions = (self.partitions / tasks).max(1);
        Self { runtime: self.runtime.clone(), memory: self.memory, partitions, checked: Mutex::default() }
    }

    /// A new session without tables. It has the functions of [`functions`].
    pub fn session(&self) -> SessionContext {
        let mut config = SessionConfig::new().with_target_partitions(self.partitions).with_batch_size(4096);
        let options = config.options_mut();
        options.execution.parquet.schema_force_view_types = false;
        options.sql_parser.map_string_types_to_utf8view = false;
        options.sql_parser.collect_spans = true;
        // each partition reserves this much to merge spilled runs; all partitions together must not take the
        // whole pool
        options.execution.sort_spill_reservation_bytes =
            (self.memory / (self.partitions * 16)).clamp(256 << 10, 10 << 20);
        // a scan keeps the order of its files if that order is declared, so that no sort is needed
        options.execution.split_file_groups_by_statistics = true;
        options.optimizer.prefer_existing_sort = true;
        let session = SessionContext::new_with_config_rt(config, self.runtime.clone());
        functions::register(&session);
        session
    }

    /// A session that uses sort-merge joins, because a hash join holds one of its tables in memory.
    pub fn merging_session(&self) -> SessionContext {
        let session = self.session();
        session.state_ref().write().config_mut().options_mut().optimizer.prefer_hash_join = false;
        session
    }

    /// Compares a file with its digest, once per engine.
    async fn check(&self, folder: &Location, file: &File) -> Result<()> {
        let url = folder.join(&file.name).url();
        if self.checked.lock().expect("no panic while held").contains(&url) {
            return Ok(());
        }
        file.check(folder).await?;
        self.checked.lock().expect("no panic while held").insert(url);
        Ok(())
    }

    /// Registers a stage's table in a session under `name`. `sorted_by` names the columns that its files are
    /// sorted by, within each file and from one file to the next.
    ///
    /// # Errors
    /// [`Error::Withdrawn`] if a file does not have the digest that its manifest states.
    pub async fn register(
        &self,
        session: &SessionContext,
        name: &str,
        schema: SchemaRef,
        tables: &[(&Location, &Table)],
        sorted_by: &[&str],
    ) -> Result<()> {
        let failed = |e| query(&format!("cannot open table {name}"), e);
        let (mut urls, mut checks) = (vec![], vec![]);
        for (folder, table) in tables {
            session.register_object_store(&folder.store_url(), folder.store.clone());
            for file in table.files.iter().filter(|file| file.rows > 0) {
                urls.push(ListingTableUrl::parse(folder.join(&file.name).table_url()).map_err(failed)?);
                // a query would read a broken file without noticing
                checks.push(self.check(folder, file));
            }
        }
        futures::stream::iter(checks).buffer_unordered(FILES_AT_A_TIME).try_collect::<()>().await?;
        if urls.is_empty() {
            let empty = MemTable::try_new(schema, vec![vec![]]).map_err(failed)?;
            session.register_table(name, Arc::new(empty)).map_err(failed)?;
            return Ok(());
        }
        let mut options =
            ListingOptions::new(Arc::new(ParquetFormat::default())).with_file_extension("parquet");
        if !sorted_by.is_empty() {
            options = options
                .with_file_sort_order(vec![sorted_by.iter().map(|c| col(*c).sort(true, false)).collect()]);
        }
        let config =
            ListingTableConfig::new_with_multi_paths(urls).with_listing_options(options).with_schema(schema);
        let table = ListingTable::try_new(config).map_err(failed)?;
        session.register_table(name, Arc::new(table)).map_err(failed)?;
        Ok(())
    }
}

/// Wraps an error of DataFusion in an [`Error`], with advice if the cause is known.
pub fn query(doing: &str, source: DataFusionError) -> Error {
    let source = match source {
        DataFusionError::External(inner) => match inner.downcast::<Error>() {
            Ok(ours) => return *ours,
            Err(other) => DataFusionError::External(other),
        },
        other => other,
    };
    // a storage error may lie deep in the chain: inside a scan, its Parquet reader, or an error shared
    // between partitions
    let mut cause: Option<&dyn std::error::Error> = Some(&source);
    while let Some(error) = cause {
        if let Some(no_number) = error.downcast_ref::<NoNumber>() {
            return Error::data(format!("{doing}: {no_number}"), no_number.cure);
        }
        // our own readers report storage errors as `Error`
        match error.downcast_ref() {
            Some(Error::Withdrawn { url }) => return Error::Withdrawn { url: url.clone() },
            Some(Error::Storage { doing, url, .. }) => {
                let (doing, url) = (*doing, url.clone());
                let source = object_store::Error::Generic { store: "storage", source: Box::new(source) };
                return Error::Storage { doing, url, source };
            }
            _ => {}
        }
        if error.is::<object_store::Error>() {
            let source = object_store::Error::Generic { store: "storage", source: Box::new(source) };
            return Error::Storage { doing: "read what a query needs", url: format!("({doing})"), source };
        }
        cause = error.source();
    }
    // the libraries pass on only the text of an I/O error
    let text = source.to_string();
    if text.contains("No space left on device") {
        let doing = format!(
            "{doing}: set engine.spill (`--spill` of an executor) to a folder with more room, or raise engine.memory"
        );
        return Error::Io { doing, source: std::io::Error::new(ErrorKind::StorageFull, text) };
    }
    let help = matches!(source.find_root(), DataFusionError::ResourcesExhausted(_)).then(|| {
        "the query needs more memory than `engine.memory` (an executor's `--memory`) allows even with spilling: raise it, or lower `engine.partitions`".to_owned()
    });
    Error::Query { doing: doing.to_owned(), cause: Box::new(source), help }
}

/// Runs one SELECT and streams its rows, all partitions merged into one stream.
pub async fn stream(session: &SessionContext, doing: &str, sql: &str) -> Result<SendableRecordBatchStream> {
    let frame = session.sql(sql).await.map_err(|e| query(doing, e))?;
    frame.execute_stream().await.map_err(|e| query(doing, e))
}

/// A cast fails on a number that does not fit its column, instead of writing a null.
const STRICT: CastOptions<'static> = CastOptions { safe: false, format_options: FormatOptions::new() };

/// Rows per row group, and rows per file.
const GROUP_ROWS: usize = 65_536;
const FILE_ROWS: u64 = 1 << 20;

/// The properties of every Parquet file that is written. They record no time, no machine and no version, so
/// that equal rows give equal bytes.
pub fn writer_properties() -> WriterProperties {
    // ids are spread over a whole vocabulary: a dictionary takes three times as long to write, and is larger
    let ids = ColumnPath::from(vec!["ids".into(), "list".into(), "item".into()]);
    WriterProperties::builder()
        .set_created_by("lengthwise".into())
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1).expect("1 is a level")))
        .set_max_row_group_row_count(Some(GROUP_ROWS))
        .set_column_dictionary_enabled(ids.clone(), false)
        .set_column_encoding(ids.clone(), Encoding::BYTE_STREAM_SPLIT)
        // no query filters on ids, and their minimum and maximum per page cost time
        .set_column_statistics_enabled(ids, EnabledStatistics::None)
        .build()
}

/// How many list values are encoded at a time.
const SLICE_VALUES: usize = 1 << 18;

/// Cuts a row group into slices of about [`SLICE_VALUES`] list values, so that what the encoder converts
/// stays in the processor's cache.
fn slices(group: &RecordBatch) -> Vec<RecordBatch> {
    let lists: Vec<&ListArray> = group.columns().iter().filter_map(|column| column.as_list_opt()).collect();
    if lists.is_empty() {
        return vec![group.clone()];
    }
    let (mut all, mut from, mut values) = (vec![], 0, 0);
    for row in 0..group.num_rows() {
        values += lists.iter().map(|list| list.value_length(row) as usize).sum::<usize>();
        if values >= SLICE_VALUES || row + 1 == group.num_rows() {
            all.push(compact(&group.slice(from, row + 1 - from)));
            (from, values) = (row + 1, 0);
        }
    }
    all
}

/// Copies of the rows whose list arrays hold only these rows' values: the encoder converts all values of an
/// array, also those outside a slice.
fn compact(rows: &RecordBatch) -> RecordBatch {
    let column = |column: &ArrayRef| -> ArrayRef {
        let Some(list) = column.as_list_opt::<i32>() else { return column.clone() };
        let offsets = list.value_offsets();
        let (first, last) = (offsets[0], offsets[list.len()]);
        let values = list.values().slice(first as usize, (last - first) as usize);
        let offsets = OffsetBuffer::new(offsets.iter().map(|offset| offset - first).collect());
        let DataType::List(item) = list.data_type() else { unreachable!("a list is of type list") };
        Arc::new(ListArray::new(item.clone(), offsets, values, list.nulls().cloned()))
    };
    let columns = rows.columns().iter().map(column).collect();
    RecordBatch::try_new(rows.schema(), columns).expect("the same columns")
}

/// Writes rows as `<name>-00000.parquet`, `<name>-00001.parquet`, … into a folder. The bytes depend on the
/// rows and their order, not on how the rows were batched. A file is written whole, once it is full.
pub struct TableWriter {
    folder: Location,
    name: String,
    schema: SchemaRef,
    /// Columns that enter the digest of the rows: all but `part`, which is a location.
    content: Vec<usize>,
    groups: BatchCoalescer,
    open: Option<ArrowWriter<Vec<u8>>>,
    open_rows: u64,
    table: Table,
}

impl TableWriter {
    pub fn new(folder: &Location, name: &str, schema: SchemaRef) -> Self {
        let content = (0..schema.fields().len()).filter(|i| schema.field(*i).name() != "part").collect();
        Self {
            folder: folder.clone(),
            name: name.to_owned(),
            groups: BatchCoalescer::new(schema.clone(), GROUP_ROWS),
            schema,
            content,
            open: None,
            open_rows: 0,
            table: Table::default(),
        }
    }

    /// Adds rows. The columns of `batch` are taken by position and cast to the table's types.
    ///
    /// # Errors
    /// If a value does not fit its column, or a file cannot be written.
    pub async fn write(&mut self, batch: RecordBatch) -> Result<()> {
        // the columns of a query are nullable, and its sums have wider types than the table's columns
        let columns = self.schema.fields().iter().zip(batch.columns());
        let columns = columns.map(|(field, column)| cast_with_options(column, field.data_type(), &STRICT));
        let columns: Vec<_> = columns.collect::<Result<_, _>>().map_err(|e| self.failed(e.into()))?;
        let batch = RecordBatch::try_new(self.schema.clone(), columns).map_err(|e| self.failed(e.into()))?;
        self.groups.push_batch(batch).map_err(|e| self.failed(e.into()))?;
        self.drain().await
    }

    /// Writes what is left and returns the table.
    pub async fn finish(mut self) -> Result<Table> {
        self.groups.finish_buffered_batch().map_err(|e| self.failed(e.into()))?;
        self.drain().await?;
        self.close().await?;
        Ok(self.table)
    }

    async fn drain(&mut self) -> Result<()> {
        while let Some(group) = self.groups.next_completed_batch() {
            let rows = group.num_rows() as u64;
            self.table
                .digest
                .add(RowDigest::of(&group.project(&self.content).map_err(|e| self.failed(e.into()))?));
            if self.open.is_none() {
                let options = ArrowWriterOptions::new()
                    .with_properties(writer_properties())
                    .with_skip_arrow_metadata(true);
                let writer = ArrowWriter::try_new_with_options(Vec::new(), self.schema.clone(), options);
                self.open = Some(writer.map_err(|e| self.failed(e.into()))?);
            }
            let writer = self.open.as_mut().expect("opened above");
            let written = slices(&group).iter().try_for_each(|slice| writer.write(slice));
            written.and_then(|()| writer.flush()).map_err(|e| self.failed(e.into()))?;
            self.open_rows += rows;
            if self.open_rows >= FILE_ROWS {
                self.close().await?;
            }
        }
        Ok(())
    }

    async fn close(&mut self) -> Result<()> {
        let Some(writer) = self.open.take() else { return Ok(()) };
        let bytes = writer.into_inner().map_err(|e| self.failed(e.into()))?;
        let name = format!("{}-{:05}.parquet", self.name, self.table.files.len());
        let file = put_file(&self.folder, &name, bytes, self.open_rows).await?;
        self.table.rows += self.open_rows;
        self.open_rows = 0;
        self.table.files.push(file);
        Ok(())
    }

    fn failed(&self, source: DataFusionError) -> Error {
        query(&format!("cannot write table {}", self.name), source)
    }
}

/// Writes a file, and returns its manifest entry.
pub async fn put_file(folder: &Location, name: &str, bytes: Vec<u8>, rows: u64) -> Result<File> {
    let file = File { name: name.to_owned(), bytes: bytes.len() as u64, rows, blake3: Digest::of(&bytes) };
    folder.join(name).put(bytes).await?;
    Ok(file)
}

/// Writes a query's rows as a table.
pub async fn write_table(
    folder: &Location,
    name: &str,
    schema: SchemaRef,
    rows: impl Stream<Item = Result<RecordBatch, DataFusionError>>,
) -> Result<Table> {
    let mut writer = TableWriter::new(folder, name, schema);
    let mut rows = std::pin::pin!(rows);
    while let Some(batch) = rows.next().await {
        writer.write(batch.map_err(|e| query(&format!("cannot compute table {name}"), e))?).await?;
    }
    writer.finish().await
}

/// Reads a table's rows file by file, in order; one file is in memory at a time. Each file's digest is
/// checked, and if a file is broken its stage's output is withdrawn.
pub fn scan(
    folder: Location,
    table: Table,
    columns: Option<Vec<&'static str>>,
) -> impl Stream<Item = Result<RecordBatch>> {
    let files = futures::stream::iter(table.files);
    files.then(move |file| rows(folder.clone(), file, columns.clone())).try_flatten()
}

/// Reads the rows of many small files, `at_a_time` files at once and in any order: one after the other,
/// waiting for storage would take longer than reading.
pub fn scan_all(files: Vec<(Location, File)>, at_a_time: usize) -> impl Stream<Item = Result<RecordBatch>> {
    // spawned tasks, because a query that spills does not poll this stream for a while, and requests that are
    // not polled time out
    let files = futures::stream::iter(files).map(|(folder, file)| {
        let reading = SpawnedTask::spawn(rows(folder, file, None));
        async { reading.join().await.expect("reading does not panic") }
    });
    files.buffer_unordered(at_a_time).try_flatten()
}

/// A file's rows. The digest is checked, and if the file is broken its stage's output is withdrawn.
async fn rows(
    folder: Location,
    file: File,
    columns: Option<Vec<&'static str>>,
) -> Result<impl Stream<Item = Result<RecordBatch>>> {
    let url = folder.join(&file.name).url();
    let bytes = file.checked(&folder).await?;
    let corrupt = move |e: String| Error::Corrupt { url: url.clone(), message: e };
    let mut builder = ParquetRecordBatchReaderBuilder::try_new(bytes).map_err(|e| corrupt(e.to_string()))?;
    if let Some(columns) = &columns {
        let mask = parquet::arrow::ProjectionMask::columns(builder.parquet_schema(), columns.iter().copied());
        builder = builder.with_projection(mask);
    }
    let reader = builder.with_batch_size(8192).build().map_err(|e| corrupt(e.to_string()))?;
    Ok(futures::stream::iter(reader.map(move |batch| batch.map_err(|e| corrupt(e.to_string())))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use arrow::array::Int64Array;

    fn numbers(range: std::ops::Range<i64>) -> RecordBatch {
        RecordBatch::try_from_iter([("n", Arc::new(Int64Array::from_iter_values(range)) as _)]).unwrap()
    }

    #[tokio::test]
    async fn a_table_s_bytes_do_not_depend_on_how_its_rows_came_in_batches() {
        let stores = crate::storage::Stores::new("/");
        let mut tables = vec![];
        for cut in [1_300_000, 7, 100_000] {
            let folder = stores.open(&format!("memory:///t/{cut}")).unwrap();
            let mut writer = TableWriter::new(&folder, "n", numbers(0..0).schema());
            for batch in [numbers(0..cut), numbers(cut..1_300_000)] {
                writer.write(batch).await.unwrap();
            }
            tables.push(writer.finish().await.unwrap());
        }
        assert_eq!(tables[0].files.len(), 2);
        assert_eq!(tables[0], tables[1]);
        assert_eq!(tables[0], tables[2]);
    }

    #[tokio::test]
    async fn files_ahead_are_read_while_nobody_asks_for_rows() {
        let folder = crate::storage::Stores::new("/").open("memory:///t/ahead").unwrap();
        let mut files = vec![];
        for file in 0..3 {
            let mut writer = TableWriter::new(&folder, &format!("n-{file}"), numbers(0..0).schema());
            writer.write(numbers(0..10)).await.unwrap();
            files.push((folder.clone(), writer.finish().await.unwrap().files.remove(0)));
        }
        let mut rows = std::pin::pin!(scan_all(files.clone(), 3));
        assert_eq!(rows.next().await.unwrap().unwrap().num_rows(), 10);
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        for (folder, file) in files {
            folder.join(&file.name).delete().await.unwrap();
        }
        let left: Vec<_> = rows.try_collect().await.unwrap();
        assert_eq!(left.iter().map(RecordBatch::num_rows).sum::<usize>(), 20);
    }

    #[test]
    fn a_full_disk_is_the_machine_s_fault_and_not_the_data_s() {
        // ENOSPC as a spilling sort reports it
        let full = || {
            let full = std::io::Error::from_raw_os_error(28);
            arrow::error::ArrowError::IoError(full.to_string(), std::io::Error::other("lost"))
        };
        for error in
            [DataFusionError::ArrowError(Box::new(full()), None), DataFusionError::External(Box::new(full()))]
        {
            let error = query("cannot sort", error);
            assert_eq!(error.exit_code(), 4);
            assert!(error.to_string().contains("engine.spill"), "{error}");
        }
    }

    #[test]
    fn storage_that_fails_deep_inside_a_query_is_said_with_its_url() {
        let source = object_store::Error::Generic { store: "S3", source: "403 Forbidden".into() };
        let ours = Error::Storage { doing: "read", url: "s3://bucket/x".into(), source };
        let shared = DataFusionError::Shared(Arc::new(DataFusionError::External(Box::new(ours))));
        let error = query("cannot compute table catalog", shared);
        assert!(error.to_string().contains("s3://bucket/x"), "{error}");
        let help = miette::Diagnostic::help(&error).unwrap().to_string();
        assert!(help.contains("the credentials are wrong"), "{help}");
    }

    #[tokio::test]
    async fn a_changed_file_is_refused_and_withdrawn_by_all_who_read_it() {
        let folder = crate::storage::Stores::new("/").open("memory:///t/changed").unwrap();
        folder.join("manifest.json").put("").await.unwrap();
        let mut writer = TableWriter::new(&folder, "n", numbers(0..0).schema());
        writer.write(numbers(0..10)).await.unwrap();
        let table = writer.finish().await.unwrap();
        let at = folder.join(&table.files[0].name);
        let mut bytes = at.read().await.unwrap().to_vec();
        bytes[20] ^= 1;
        at.put(bytes).await.unwrap();
        let read: Result<Vec<_>> = scan(folder.clone(), table.clone(), None).try_collect().await;
        assert!(matches!(read, Err(Error::Withdrawn { .. })), "{read:?}");
        assert_eq!(folder.join("manifest.json").get().await.unwrap(), None);
        // those who read later get the same error, because the file is gone
        let engine = Engine::new(1, 64 << 20, None).unwrap();
        let read =
            engine.register(&engine.session(), "n", numbers(0..0).schema(), &[(&folder, &table)], &[]).await;
        assert!(matches!(read, Err(Error::Withdrawn { .. })), "{read:?}");
    }
}
