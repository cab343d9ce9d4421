//! The packed dataset as the trainer reads it: sequences by index, repeated after the last.

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Int64Type, Schema};
use bytes::Bytes;
use bytes::buf::Reader;
use futures::future::BoxFuture;
use futures::{FutureExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::{
    AsyncFileReader, ParquetRecordBatchStream, ParquetRecordBatchStreamBuilder,
};
use parquet::column::page::PageReader;
use parquet::errors::ParquetError;
use parquet::file::FOOTER_SIZE;
use parquet::file::metadata::{FooterTail, ParquetMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;

use crate::{Error, Location, Result, headers};

/// The target of a position without loss.
pub const NO_TARGET: i32 = -100;

/// A training example.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Its index in the dataset.
    pub index: u64,
    pub ids: Vec<i32>,
    /// The id after each; [`NO_TARGET`] where there is none or it is padding.
    pub targets: Vec<i32>,
    /// Its documents and its padding in order, which cover it without gaps.
    pub segments: Vec<Segment>,
}

/// A piece of a document in a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Segment {
    pub domain: String,
    /// Empty for padding.
    pub doc_id: String,
    /// Indices in the sequence.
    pub range: Range<usize>,
}

/// The sequences of a folder's `*.parquet` files, in the order of their names. One row group is in memory at a time.
pub struct Dataset {
    folder: Location,
    /// Each file, with the number of sequences in the files before it.
    files: Vec<(Path, u64)>,
    pub sequences: u64,
    vocab_size: usize,
    length: Option<usize>,
    /// The file that is being read, and the index of its next sequence.
    reading: Option<(usize, u64, ParquetRecordBatchStream<ParquetObject>)>,
}

impl Dataset {
    /// `vocab_size` is the model's. Every id has to be below it.
    pub async fn open(folder: &Location, vocab_size: usize) -> Result<Self> {
        let listed: Vec<_> = folder
            .store
            .list(Some(&folder.path))
            .try_collect()
            .await
            .map_err(|source| Error::Storage { doing: "list", path: folder.url(), source })?;
        let mut paths: Vec<Path> = listed.into_iter().map(|meta| meta.location).collect();
        paths.retain(|path| path.filename().is_some_and(|name| name.ends_with(".parquet")));
        paths.sort();
        let mut new = Self {
            folder: folder.clone(),
            files: vec![],
            sequences: 0,
            vocab_size,
            length: None,
            reading: None,
        };
        for path in paths {
            let builder = new.builder(&path).await?;
            check_schema(builder.schema())
                .map_err(|message| Error::Dataset { file: new.url(&path), message })?;
            let rows = builder.metadata().file_metadata().num_rows() as u64;
            new.files.push((path, new.sequences));
            new.sequences += rows;
        }
        if new.sequences == 0 {
            let message =
                if new.files.is_empty() { "there is no *.parquet" } else { "no file has a sequence" };
            return Err(Error::Dataset { file: folder.url(), message: message.into() });
        }
        Ok(new)
    }

    /// A file's URL.
    fn url(&self, path: &Path) -> String {
        Location { path: path.clone(), ..self.folder.clone() }.url()
    }

    async fn builder(&self, path: &Path) -> Result<ParquetRecordBatchStreamBuilder<ParquetObject>> {
        let meta = self.folder.store.head(path).await;
        let meta = meta.map_err(|source| Error::Storage { doing: "read", path: self.url(path), source })?;
        let store = self.folder.store.clone();
        let object = ParquetObject { store, path: path.clone(), size: meta.size, metadata: None };
        let builder = catch_parquet_panic(ParquetRecordBatchStreamBuilder::new(object)).await;
        builder.map_err(|message| Error::Dataset { file: self.url(path), message })
    }

    /// The sequence of a sample of training. After the dataset's last sequence comes its first.
    pub async fn sequence(&mut self, sample: u64) -> Result<Sequence> {
        let index = sample % self.sequences;
        let file = self.files.partition_point(|(_, before)| *before <= index) - 1;
        let (path, before) = self.files[file].clone();
        let url = self.url(&path);
        let wrong = |message: String| Error::Dataset { file: url.clone(), message };
        let (mut next, mut stream) = match self.reading.take() {
            // Reading past a few sequences is cheaper than opening the file again.
            Some((same, next, stream))
                if same == file && (index.saturating_sub(64)..=index).contains(&next) =>
            {
                (next, stream)
            }
            _ => {
                let builder = self.builder(&path).await?.with_batch_size(1);
                let skipped = usize::try_from(index - before).unwrap_or(usize::MAX);
                (index, builder.with_offset(skipped).build().map_err(|e| wrong(e.to_string()))?)
            }
        };
        loop {
            let batch = catch_parquet_panic(stream.try_next()).await.map_err(wrong)?;
            let batch = batch.ok_or_else(|| wrong("it has fewer rows than its footer claims".into()))?;
            next += 1;
            if next > index {
                let sequence = parse_sequence(&batch, index, self.vocab_size).map_err(wrong)?;
                let length = sequence.ids.len();
                if *self.length.get_or_insert(length) != length {
                    return Err(wrong("its sequences have different lengths".into()));
                }
                self.reading = Some((file, next, stream));
                return Ok(sequence);
            }
        }
    }
}

/// Runs a call of the Parquet library, which may panic on damaged files.
async fn catch_parquet_panic<T>(read: impl Future<Output = Result<T, ParquetError>>) -> Result<T, String> {
    match AssertUnwindSafe(read).catch_unwind().await {
        Ok(read) => read.map_err(|e| e.to_string()),
        Err(_) => Err("its pages are damaged".into()),
    }
}

/// A file in object storage, for the Parquet library.
struct ParquetObject {
    store: Arc<dyn ObjectStore>,
    path: Path,
    size: u64,
    metadata: Option<Arc<ParquetMetaData>>,
}

impl AsyncFileReader for ParquetObject {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes, ParquetError>> {
        let read = async move {
            let read = self.store.get_range(&self.path, range.clone()).await;
            let bytes = read.map_err(|e| ParquetError::External(Box::new(e)))?;
            if let Some(metadata) = &self.metadata {
                check_pages(metadata, range, &bytes)?;
            }
            Ok(bytes)
        };
        read.boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        _: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<Arc<ParquetMetaData>, ParquetError>> {
        async move {
            let short = || ParquetError::EOF("it is too short for a Parquet file".into());
            let end = self.size.checked_sub(FOOTER_SIZE as u64).ok_or_else(short)?;
            let tail = FooterTail::try_from(self.get_bytes(end..self.size).await?.as_ref())?;
            let start = end.checked_sub(tail.metadata_length() as u64).ok_or_else(short)?;
            let footer = self.get_bytes(start..end).await?;
            headers::check_footer(&footer)?;
            let metadata = ParquetMetaDataReader::decode_metadata(&footer)?;
            Ok(self.metadata.insert(Arc::new(metadata)).clone())
        }
        .boxed()
    }
}

/// Refuses pages whose headers the Parquet library must not read, and dictionaries with fewer bytes than their headers claim
/// values. For those the library would allocate up to 16 GiB before it looks at the data.
fn check_pages(metadata: &ParquetMetaData, range: Range<u64>, bytes: &Bytes) -> Result<(), ParquetError> {
    let mut columns =
        metadata.row_groups().iter().flat_map(parquet::file::metadata::RowGroupMetaData::columns);
    let Some(column) = columns.find(|column| {
        let (start, length) = column.byte_range();
        (start..start + length) == range
    }) else {
        return Ok(());
    };
    headers::check_page_headers(bytes.len() as u64, |range| {
        Ok(bytes.slice(range.start as usize..range.end as usize))
    })?;
    let chunk = Arc::new(Chunk { start: range.start, bytes: bytes.clone() });
    // The number of rows is needed only with an index of pages.
    let mut pages = SerializedPageReader::new(chunk, column, 0, None)?;
    // The reader of the values reports other errors.
    while let Ok(Some(page)) = pages.peek_next_page() {
        if !page.is_dict {
            pages.skip_next_page()?;
        } else if let Some(page) = pages.get_next_page()? {
            headers::check_dictionary(&page)?;
        }
    }
    Ok(())
}

/// A column chunk, at its position in its file.
struct Chunk {
    start: u64,
    bytes: Bytes,
}

impl Length for Chunk {
    fn len(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

impl ChunkReader for Chunk {
    type T = Reader<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        self.bytes.get_read(start - self.start)
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        self.bytes.get_bytes(start - self.start, length)
    }
}

/// Checks for the schema of the authors' published dataset, with doc_id. Another program may have saved it with other types
/// of lists, integers and texts.
fn check_schema(schema: &Schema) -> Result<(), String> {
    let kind = |name: &str| match schema.field_with_name(name) {
        Ok(field) => Ok(field.data_type()),
        Err(_) => {
            Err(format!("there is no column `{name}`; a packed dataset has input_ids, labels and source"))
        }
    };
    let list_of = |name: &str| match kind(name)? {
        DataType::List(item) | DataType::LargeList(item) | DataType::FixedSizeList(item, _) => {
            Ok(item.data_type())
        }
        other => Err(format!("column `{name}` is {other}, not a list")),
    };
    if !list_of("input_ids")?.is_integer() {
        return Err("column `input_ids` has to be a list of whole numbers".into());
    }
    if !kind("labels")?.is_integer() {
        return Err("column `labels` has to be of whole numbers".into());
    }
    let DataType::Struct(fields) = list_of("source")? else {
        return Err("column `source` has to be a list of structs".into());
    };
    let number: fn(&DataType) -> bool = DataType::is_integer;
    let wanted = [
        ("source", "texts", is_text as _),
        ("doc_id", "texts", is_text as _),
        ("start", "whole numbers", number),
        ("end", "whole numbers", number),
    ];
    for (name, what, good) in wanted {
        if !fields.iter().any(|field| field.name() == name && good(field.data_type())) {
            return Err(format!("column `source` has to have `{name}`, of {what}"));
        }
    }
    Ok(())
}

fn is_text(kind: &DataType) -> bool {
    match kind {
        DataType::Dictionary(_, values) => is_text(values),
        other => other.is_string(),
    }
}

/// The list in the first row of a column of lists.
fn first_list(column: &ArrayRef) -> Result<ArrayRef, String> {
    match column.data_type() {
        DataType::List(_) => Ok(column.as_list::<i32>().value(0)),
        DataType::LargeList(_) => Ok(column.as_list::<i64>().value(0)),
        DataType::FixedSizeList(..) => Ok(column.as_fixed_size_list().value(0)),
        other => Err(format!("{other} is no list")),
    }
}

/// Casts a column; nulls and values that do not fit are errors.
fn cast_strict(column: &ArrayRef, kind: &DataType) -> Result<ArrayRef, String> {
    let strict = CastOptions { safe: false, ..Default::default() };
    let column = cast_with_options(column, kind, &strict).map_err(|e| e.to_string())?;
    if column.logical_null_count() > 0 {
        return Err("a value is null".into());
    }
    Ok(column)
}

fn to_i64s(column: &ArrayRef) -> Result<Vec<i64>, String> {
    Ok(cast_strict(column, &DataType::Int64)?.as_primitive::<Int64Type>().values().to_vec())
}

/// Parses the only row of a batch.
fn parse_sequence(batch: &RecordBatch, index: u64, vocab_size: usize) -> Result<Sequence, String> {
    let column =
        |name: &str| batch.column_by_name(name).ok_or_else(|| format!("there is no column `{name}`"));
    let id = |what: &str, id: i64| match i32::try_from(id) {
        Ok(known) if known >= 0 && (known as usize) < vocab_size => Ok(known),
        _ => Err(format!("{what} {id} is not in the model's vocabulary of {vocab_size}")),
    };
    let ids = to_i64s(&first_list(column("input_ids")?)?)?;
    let ids = ids.into_iter().map(|one| id("id", one)).collect::<Result<Vec<i32>, _>>()?;
    let mut targets: Vec<i32> = ids.iter().skip(1).copied().collect();
    targets.push(match to_i64s(column("labels")?)?[0] {
        label if label == i64::from(NO_TARGET) => NO_TARGET,
        label => id("label", label)?,
    });
    let segments = first_list(column("source")?)?;
    let segments = segments.as_struct();
    let field = |name: &str| segments.column_by_name(name).ok_or_else(|| format!("`source` has no `{name}`"));
    let text = |name: &str| cast_strict(field(name)?, &DataType::Utf8);
    let (domains, doc_ids) = (text("source")?, text("doc_id")?);
    let (domains, doc_ids) = (domains.as_string::<i32>(), doc_ids.as_string::<i32>());
    let (starts, ends) = (to_i64s(field("start")?)?, to_i64s(field("end")?)?);
    let bound = |bound: i64| usize::try_from(bound).unwrap_or(usize::MAX);
    let (mut all, mut end) = (vec![], 0);
    for row in 0..segments.len() {
        let range = bound(starts[row])..bound(ends[row]);
        if range.start != end || range.end < end {
            return Err("the documents of a sequence don't follow one another".into());
        }
        if range.end > ids.len() {
            return Err("a document ends after its sequence".into());
        }
        if doc_ids.value(row).is_empty() {
            // Padding is not predicted, and nothing is predicted from it.
            targets[range.start.saturating_sub(1)..range.end].fill(NO_TARGET);
        }
        end = range.end;
        let (domain, doc_id) = (domains.value(row).to_owned(), doc_ids.value(row).to_owned());
        all.push(Segment { domain, doc_id, range });
    }
    if end != ids.len() {
        return Err("the documents of a sequence end before the sequence".into());
    }
    Ok(Sequence { index, ids, targets, segments: all })
}

impl Sequence {
    /// The starts of its documents, in ascending order.
    pub fn starts(&self) -> Vec<usize> {
        self.segments.iter().map(|segment| segment.range.start).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::headers::tests::{UNKNOWN, endless, list};
    use crate::headers::wire;
    use arrow::array::{Int32Array, Int32Builder, ListBuilder, StringBuilder, StructBuilder};
    use arrow::datatypes::{Field, Fields};
    use std::time::{Duration, Instant};

    /// A packed file of rows with ids, a label, and segments as (doc_id, start, end).
    pub(crate) fn packed(rows: &[(Vec<i32>, i32, Vec<(&str, i32, i32)>)]) -> Vec<u8> {
        let mut ids = ListBuilder::new(Int32Builder::new());
        let fields: Fields = vec![
            Field::new("source", DataType::Utf8, true),
            Field::new("doc_id", DataType::Utf8, true),
            Field::new("start", DataType::Int32, true),
            Field::new("end", DataType::Int32, true),
        ]
        .into();
        let mut source = ListBuilder::new(StructBuilder::from_fields(fields, 0));
        for (row, _, segments) in rows {
            ids.values().append_slice(row);
            ids.append(true);
            for (doc_id, start, end) in segments {
                let s = source.values();
                s.field_builder::<StringBuilder>(0).unwrap().append_value("d");
                s.field_builder::<StringBuilder>(1).unwrap().append_value(doc_id);
                s.field_builder::<Int32Builder>(2).unwrap().append_value(*start);
                s.field_builder::<Int32Builder>(3).unwrap().append_value(*end);
                s.append(true);
            }
            source.append(true);
        }
        let labels = Int32Array::from_iter_values(rows.iter().map(|row| row.1));
        let batch = RecordBatch::try_from_iter([
            ("input_ids", Arc::new(ids.finish()) as _),
            ("labels", Arc::new(labels) as _),
            ("source", Arc::new(source.finish()) as _),
        ])
        .unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.into_inner().unwrap()
    }

    pub(crate) async fn folder(files: &[(&str, Vec<u8>)]) -> Location {
        let folder = Location {
            store: Arc::new(object_store::memory::InMemory::new()),
            path: Path::from("data"),
            base: "memory:///".into(),
        };
        for (name, bytes) in files {
            folder.join(name).put(bytes.clone()).await.unwrap();
        }
        folder
    }

    #[tokio::test]
    async fn sequences_come_in_the_order_of_the_files_and_then_again() {
        let one = |id: i32| packed(&[(vec![id, 2], 3, vec![("a", 0, 2)])]);
        let folder = folder(&[
            ("train-00001-of-00002.parquet", one(7)),
            ("train-00000-of-00002.parquet", one(5)),
            ("other.txt", vec![1]),
        ])
        .await;
        let mut dataset = Dataset::open(&folder, 10).await.unwrap();
        for (sample, first) in [(0, 5), (1, 7), (2, 5), (3, 7), (1, 7), (0, 5)] {
            let sequence = dataset.sequence(sample).await.unwrap();
            assert_eq!((sequence.ids, sequence.targets), (vec![first, 2], vec![2, 3]));
        }
    }

    #[tokio::test]
    async fn sequences_are_found_by_their_place_in_any_order() {
        let row = |id: i32| (vec![id, 2], 3, vec![("a", 0, 1), ("b", 1, 2)]);
        let files: Vec<(String, Vec<u8>)> = (0..3)
            .map(|file| {
                let rows: Vec<_> = (0..50).map(|i| row(file * 50 + i)).collect();
                (format!("train-{file:05}-of-00003.parquet"), packed(&rows))
            })
            .collect();
        let files: Vec<(&str, Vec<u8>)> = files.iter().map(|(n, b)| (n.as_str(), b.clone())).collect();
        let folder = folder(&files).await;
        let mut dataset = Dataset::open(&folder, 1000).await.unwrap();
        assert_eq!(dataset.sequences, 150);
        for sample in [0, 1, 3, 49, 50, 149, 150, 2, 1, 140, 77, 140 + 150] {
            let sequence = dataset.sequence(sample).await.unwrap();
            assert_eq!((sequence.ids[0] as u64, sequence.index), (sample % 150, sample % 150));
            assert_eq!(sequence.starts(), [0, 1]);
        }
    }

    #[tokio::test]
    async fn padding_is_neither_predicted_nor_predicted_from() {
        let bytes = packed(&[(vec![1, 2, 3, 0, 0], -100, vec![("a", 0, 3), ("", 3, 5)])]);
        let folder = folder(&[("train-00000-of-00001.parquet", bytes)]).await;
        let sequence = Dataset::open(&folder, 10).await.unwrap().sequence(0).await.unwrap();
        assert_eq!(sequence.targets, [2, 3, NO_TARGET, NO_TARGET, NO_TARGET]);
    }

    #[tokio::test]
    async fn a_file_that_is_no_packed_dataset_is_named_with_what_is_wrong() {
        let good = packed(&[(vec![1, 12], 3, vec![("a", 0, 2)])]);
        let batch = RecordBatch::try_from_iter([("x", Arc::new(Int32Array::from(vec![1])) as _)]).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        let mut lying = packed(&[(vec![1, 2, 3], 4, vec![("a", 0, 3)])]);
        // In the page header, find the dictionary's field and in it the number of values, which Thrift doubles.
        let at = lying.windows(3).position(|bytes| bytes == [0x4c, 0x15, 2 * 3]).unwrap();
        lying[at + 2] = 2 * 63;
        for (bytes, message) in [
            (lying, "a dictionary of 63 values has 12 bytes"),
            (good, "id 12 is not in the model's vocabulary of 10"),
            (packed(&[(vec![1, 2, 3], 4, vec![("a", 0, 1), ("b", 2, 3)])]), "don't follow one another"),
            (packed(&[(vec![1, 2, 3], 4, vec![("a", 0, 2)])]), "end before the sequence"),
            (packed(&[(vec![1, 2, 3], 4, vec![("a", 0, 4)])]), "ends after its sequence"),
            (packed(&[(vec![1, 2, 3], 4, vec![("a", 0, 2), ("b", 2, -1)])]), "ends after its sequence"),
            (writer.into_inner().unwrap(), "there is no column `input_ids`"),
            (b"no parquet".to_vec(), "memory:///data/train-00000-of-00001.parquet: "),
        ] {
            let folder = folder(&[("train-00000-of-00001.parquet", bytes)]).await;
            let error = match Dataset::open(&folder, 10).await {
                Ok(mut dataset) => dataset.sequence(0).await.unwrap_err(),
                Err(error) => error,
            };
            assert!(error.to_string().contains(message), "{error}");
        }
        let error = Dataset::open(&folder(&[]).await, 10).await.err().unwrap().to_string();
        assert!(error.contains("there is no *.parquet"), "{error}");
    }

    /// Casts a column to another type.
    fn cast(column: &ArrayRef, kind: &DataType) -> ArrayRef {
        let strict = CastOptions { safe: false, ..Default::default() };
        cast_with_options(column, kind, &strict).unwrap()
    }

    fn saved(columns: [(&str, ArrayRef); 3]) -> Vec<u8> {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let mut writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.into_inner().unwrap()
    }

    #[tokio::test]
    async fn a_dataset_that_another_program_saved_again_gives_the_same_sequences() {
        let rows = [
            (vec![1, 2, 3], 4, vec![("a", 0, 2), ("b", 2, 3)]),
            (vec![4, 5, 0], -100, vec![("b", 0, 2), ("", 2, 3)]),
        ];
        let bytes = packed(&rows);
        let mut reader =
            parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(Bytes::from(bytes.clone()), 10)
                .unwrap();
        let batch = reader.next().unwrap().unwrap();
        let read = async |bytes: Vec<u8>| {
            let folder = folder(&[("train-00000-of-00001.parquet", bytes)]).await;
            let mut dataset = Dataset::open(&folder, 10).await?;
            Ok::<_, Error>([dataset.sequence(0).await?, dataset.sequence(1).await?])
        };
        let want = read(bytes).await.unwrap();
        let item = |kind: &DataType| Arc::new(Field::new("item", kind.clone(), true));
        let texts = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::LargeUtf8));
        for (list, number, text) in [
            (DataType::LargeList as fn(_) -> _, DataType::Int64, DataType::LargeUtf8),
            (DataType::List, DataType::UInt16, DataType::Utf8View),
            (DataType::List, DataType::UInt64, texts),
            (|item| DataType::FixedSizeList(item, 3), DataType::Int8, DataType::Utf8),
        ] {
            let segment = DataType::Struct(Fields::from(vec![
                Field::new("source", text.clone(), true),
                Field::new("doc_id", text.clone(), true),
                Field::new("start", number.clone(), true),
                Field::new("end", number.clone(), true),
            ]));
            // A label may be negative.
            let label = if number == DataType::Int64 { number.clone() } else { DataType::Int32 };
            let fixed = matches!(list(item(&number)), DataType::FixedSizeList(..));
            let segments = if fixed { DataType::LargeList(item(&segment)) } else { list(item(&segment)) };
            let bytes = saved([
                ("input_ids", cast(batch.column(0), &list(item(&number)))),
                ("labels", cast(batch.column(1), &label)),
                ("source", cast(batch.column(2), &segments)),
            ]);
            assert_eq!(read(bytes).await.unwrap(), want, "{number}");
        }
        let wide = arrow::array::Int64Array::from(vec![5_000_000_001, 1, 2, 3, 4, 5]);
        let offsets = arrow::buffer::OffsetBuffer::from_lengths([3, 3]);
        let ids = arrow::array::LargeListArray::new(item(&DataType::Int64), offsets, Arc::new(wide), None);
        let bytes = saved([
            ("input_ids", Arc::new(ids)),
            ("labels", batch.column(1).clone()),
            ("source", batch.column(2).clone()),
        ]);
        let error = read(bytes).await.unwrap_err().to_string();
        assert!(error.contains("id 5000000001 is not in the model's vocabulary of 10"), "{error}");
        let bytes = saved([
            ("input_ids", cast(batch.column(0), &DataType::List(item(&DataType::Float32)))),
            ("labels", batch.column(1).clone()),
            ("source", batch.column(2).clone()),
        ]);
        let error = read(bytes).await.unwrap_err().to_string();
        assert!(error.contains("column `input_ids` has to be a list of whole numbers"), "{error}");
    }

    async fn read(bytes: Vec<u8>) -> crate::Result<usize> {
        let folder = folder(&[("train-00000-of-00001.parquet", bytes)]).await;
        let mut dataset = Dataset::open(&folder, 1000).await?;
        Ok(dataset.sequence(0).await?.ids.len())
    }

    /// A packed file of three kilobytes.
    fn file() -> Vec<u8> {
        let ids: Vec<i32> = (0..400).map(|i| i * 7919 % 1000).collect();
        packed(&[(ids, 3, vec![("a", 0, 400)])])
    }

    #[tokio::test]
    async fn a_page_whose_header_has_no_end_is_refused_at_once() {
        let whole = file();
        assert_eq!(read(whole.clone()).await.unwrap(), 400);
        for kind in [wire::TRUE, wire::FALSE, wire::DOUBLE, wire::UUID] {
            // Overwrite the first column's pages.
            let mut lying = whole.clone();
            let evil = endless(1000, kind);
            lying[4..4 + evil.len()].copy_from_slice(&evil);
            let started = Instant::now();
            let error = read(lying).await.unwrap_err().to_string();
            assert!(error.contains("header"), "{error}");
            assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        }
    }

    #[tokio::test]
    async fn a_footer_that_has_no_end_is_refused_at_once() {
        let whole = file();
        let end = whole.len() - 8;
        let length = u32::from_le_bytes(whole[end..end + 4].try_into().unwrap()) as usize;
        let footer = &whole[end - length..end];
        assert_eq!(footer[length - 1], 0, "the end of the struct");
        let with = |more: &[u8]| {
            let footer = [&footer[..length - 1], more, &[0]].concat();
            let size = (footer.len() as u32).to_le_bytes();
            [&whole[..end - length], &footer, &size, b"PAR1"].concat()
        };
        // An unknown field, of a type that the library skips.
        assert_eq!(read(with(&[UNKNOWN | wire::I32, 5])).await.unwrap(), 400);
        let map = [vec![UNKNOWN | wire::MAP], list(0, i32::MAX as u32)[1..].to_vec(), vec![0x11]].concat();
        let row_groups = [vec![0x08 | 1, 8], list(wire::STRUCT, i32::MAX as u32)].concat();
        for evil in [endless(2000, wire::TRUE), map, row_groups] {
            let started = Instant::now();
            let error = read(with(&evil)).await.unwrap_err().to_string();
            assert!(error.contains("header"), "{error}");
            assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        }
    }
}
