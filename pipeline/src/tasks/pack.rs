//! pack: writes an output file of packed sequences.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, FixedSizeBinaryArray, Int32Array, Int32Builder, Int64Array, ListArray,
    ListBuilder, RecordBatch, StringArray, StringBuilder, StructBuilder,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::DataType;
use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use hashbrown::HashMap;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_writer::ArrowWriterOptions;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use parquet::schema::types::ColumnPath;
use serde::{Deserialize, Serialize};

use super::Worker;
use crate::hash::{RowDigest, hex};
use crate::output::{File, Output, Table};
use crate::sql::engine::{put_file, scan};
use crate::storage::Location;
use crate::tables::column;
use crate::{Error, Result, tables};

/// The settings that all packing tasks of a dataset share.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Packing {
    pub sequence_tokens: usize,
    pub sequences_per_row_group: usize,
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// The id that fills up incomplete sequences in best fit. No loss is taken on it.
    pub padding: u32,
    /// Bytes of an id in the scattered files, 2 or 4.
    pub width: usize,
    /// How many output files the dataset has.
    pub files: usize,
    /// `train` or `heldout`: the beginning of the file names.
    pub split: String,
}

/// What one output file takes from one part's scattered ids.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Range {
    pub part: i64,
    /// Where the range begins in the part's scattered file, in tokens.
    pub begin: i64,
    pub tokens: i64,
}

/// The scattered ids of several parts. Each part's ids are taken from the left.
struct Scattered {
    parts: HashMap<i64, Bytes>,
    width: usize,
}

impl Scattered {
    /// Reads an output file's ranges.
    async fn read(
        folder: &Location,
        files: &HashMap<i64, File>,
        ranges: &[Range],
        width: usize,
    ) -> Result<Self> {
        let reads = ranges.iter().map(|range| async move {
            let file = files.get(&range.part).ok_or_else(|| lacking(range.part))?;
            let bytes = |tokens: i64| tokens as u64 * width as u64;
            let begin = bytes(range.begin);
            let read = folder.join(&file.name).read_range(begin..begin + bytes(range.tokens)).await?;
            Ok::<_, Error>((range.part, read))
        });
        let parts = futures::stream::iter(reads).buffer_unordered(16).try_collect().await?;
        Ok(Self { parts, width })
    }

    fn take(&mut self, part: i64, tokens: usize, out: &mut Vec<i32>) -> Result<()> {
        let bytes = self.parts.get_mut(&part).ok_or_else(|| lacking(part))?;
        if bytes.len() < tokens * self.width {
            return Err(lacking(part));
        }
        let ids = bytes.split_to(tokens * self.width);
        match self.width {
            2 => out.extend(ids.chunks_exact(2).map(|id| u16::from_le_bytes([id[0], id[1]]) as i32)),
            _ => out.extend(ids.chunks_exact(4).map(|id| i32::from_le_bytes([id[0], id[1], id[2], id[3]]))),
        }
        Ok(())
    }
}

fn lacking(part: i64) -> Error {
    Error::Unbalanced {
        stage: "pack",
        message: format!("part {part:016x} was scattered with too few tokens"),
    }
}

/// A sequence that is being filled.
#[derive(Default)]
struct Filling {
    ids: Vec<i32>,
    label: Option<i32>,
    /// domain, doc_id, and the positions `[start, end)` in the sequence
    segments: Vec<(String, String, i32, i32)>,
}

/// A task that writes an output file from its plan and the scattered ids that it takes.
#[derive(Debug, Serialize, Deserialize)]
pub struct PackFile {
    pub packing: Packing,
    pub file: usize,
    /// The URL of the folder that has the plan and the scattered ids.
    pub shuffled: String,
    pub plan: Table,
    /// The scattered files that `ranges` refer to, by part.
    pub ids: Vec<(i64, File)>,
    pub ranges: Vec<Range>,
    /// The URL of the folder that the file is written to.
    pub folder: String,
}

impl PackFile {
    /// Writes the file, and counts its sequences and padding.
    ///
    /// # Errors
    /// [`Error::Unbalanced`] if plan and scattered ids do not fit together.
    pub async fn perform(self, worker: &Worker) -> Result<Output> {
        let (shuffled, out) = (worker.stores.open(&self.shuffled)?, worker.stores.open(&self.folder)?);
        let files: HashMap<i64, File> = self.ids.into_iter().collect();
        let ids = Scattered::read(&shuffled, &files, &self.ranges, self.packing.width).await?;
        pack_file(&self.packing, self.file, scan(shuffled, self.plan, None), ids, &out).await
    }
}

async fn pack_file(
    packing: &Packing,
    file: usize,
    plan: impl Stream<Item = Result<RecordBatch>>,
    mut ids: Scattered,
    out: &Location,
) -> Result<Output> {
    let size = packing.sequence_tokens;
    let mut sequences: Vec<Filling> = vec![];
    let mut plan = std::pin::pin!(plan);
    while let Some(batch) = plan.next().await {
        let batch = batch?;
        let positions: &Int64Array = column(&batch, "at")?;
        let labels: &BooleanArray = column(&batch, "label")?;
        let doc_ids: &FixedSizeBinaryArray = column(&batch, "doc_id")?;
        let domains: &StringArray = column(&batch, "domain")?;
        let (starts, stops): (&Int64Array, &Int64Array) = (column(&batch, "start")?, column(&batch, "stop")?);
        let (bos, eos): (&BooleanArray, &BooleanArray) = (column(&batch, "bos")?, column(&batch, "eos")?);
        let parts: &Int64Array = column(&batch, "part")?;
        for row in 0..batch.num_rows() {
            let at = positions.value(row) as usize;
            let mut piece = vec![];
            if bos.value(row) {
                piece.push(special(packing.bos)?);
            }
            let tokens = (stops.value(row) - starts.value(row)) as usize;
            if tokens > 0 {
                ids.take(parts.value(row), tokens, &mut piece)?;
            }
            if eos.value(row) {
                piece.push(special(packing.eos)?);
            }
            if labels.value(row) {
                let ended = sequences.last_mut().ok_or_else(|| crooked(file, at))?;
                ended.label = piece.first().copied();
                continue;
            }
            if at.is_multiple_of(size) {
                sequences.push(Filling::default());
            }
            let sequence_at = at - (sequences.len().max(1) - 1) * size;
            let sequence = sequences.last_mut().ok_or_else(|| crooked(file, at))?;
            if sequence.ids.len() != sequence_at || sequence_at + piece.len() > size {
                return Err(crooked(file, at));
            }
            sequence.ids.extend_from_slice(&piece);
            let (start, end) = (sequence_at as i32, sequence.ids.len() as i32);
            sequence.segments.push((domains.value(row).to_owned(), hex(doc_ids.value(row)), start, end));
        }
    }
    if let Some((part, left)) = ids.parts.iter().find(|(_, left)| !left.is_empty()) {
        let message = format!("file {file} leaves {} bytes of part {part:016x} behind", left.len());
        return Err(Error::Unbalanced { stage: "pack", message });
    }
    let mut output = Output::default();
    for sequence in &mut sequences {
        let used = sequence.ids.len();
        if used < size {
            sequence.ids.resize(size, packing.padding as i32);
            sequence.segments.push((String::new(), String::new(), used as i32, size as i32));
        }
        output.count("padding", (size - used) as u64);
    }
    output.count("sequences", sequences.len() as u64);

    let name = format!("{}-{file:05}-of-{:05}.parquet", packing.split, packing.files);
    let rows = sequences.len() as u64;
    let groups = packing.sequences_per_row_group;
    for group in sequences.chunks(groups) {
        let segments = group.iter().flat_map(|sequence| &sequence.segments);
        let (domains, doc_ids) = segments.fold((0, 0), |(domains, doc_ids), (domain, doc_id, ..)| {
            (domains + domain.len(), doc_ids + doc_id.len())
        });
        if domains.max(doc_ids) > i32::MAX as usize {
            let help = "lower `pack.sequences_per_row_group`, or leave very short documents out";
            return Err(Error::data("the names of a row group's documents take more than 2 GiB", help));
        }
    }
    let write = move || -> Result<(Vec<u8>, RowDigest), parquet::errors::ParquetError> {
        let options =
            ArrowWriterOptions::new().with_properties(properties(groups)).with_skip_arrow_metadata(true);
        let mut writer = ArrowWriter::try_new_with_options(Vec::new(), tables::packed(), options)?;
        let mut digest = RowDigest::default();
        for group in sequences.chunks(groups) {
            let batch = batch(group);
            digest.add(RowDigest::of(&batch));
            writer.write(&batch)?;
            writer.flush()?;
        }
        Ok((writer.into_inner()?, digest))
    };
    let written = tokio::task::spawn_blocking(write).await.expect("the writer does not panic");
    let (bytes, digest) =
        written.map_err(|e| crate::sql::engine::query("cannot write packed sequences", e.into()))?;
    let file = put_file(out, &name, bytes, rows).await?;
    output.table(&packing.split, Table { rows, digest, files: vec![file] });
    Ok(output)
}

fn special(id: Option<u32>) -> Result<i32> {
    id.map(|id| id as i32).ok_or_else(|| Error::Unbalanced {
        stage: "pack",
        message: "the plan has a BOS or EOS that the tokenizer has not".into(),
    })
}

fn crooked(file: usize, at: usize) -> Error {
    Error::Unbalanced { stage: "pack", message: format!("the plan of file {file} does not tile at {at}") }
}

/// Ids get no dictionary: they are nearly random numbers, so one would cost more than it saves.
fn properties(sequences_per_row_group: usize) -> WriterProperties {
    WriterProperties::builder()
        .set_created_by("lengthwise".into())
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(3).expect("3 is a level")))
        .set_max_row_group_row_count(Some(sequences_per_row_group))
        .set_column_dictionary_enabled(
            ColumnPath::from(vec!["input_ids".into(), "list".into(), "element".into()]),
            false,
        )
        .build()
}

fn batch(sequences: &[Filling]) -> RecordBatch {
    let schema = tables::packed();
    let DataType::List(item) = schema.field(0).data_type() else { unreachable!("input_ids is a list") };
    let offsets = OffsetBuffer::from_lengths(sequences.iter().map(|s| s.ids.len()));
    let ids = Int32Array::from_iter_values(sequences.iter().flat_map(|s| s.ids.iter().copied()));
    let input_ids = ListArray::new(item.clone(), offsets, Arc::new(ids), None);
    let labels = Int32Array::from_iter_values(sequences.iter().map(|s| s.label.unwrap_or(-100)));
    let DataType::List(segment) = schema.field(2).data_type() else { unreachable!("source is a list") };
    let DataType::Struct(fields) = segment.data_type() else { unreachable!("of structs") };
    let mut source =
        ListBuilder::new(StructBuilder::from_fields(fields.clone(), 0)).with_field(segment.clone());
    for sequence in sequences {
        let rows = source.values();
        for (domain, doc_id, start, end) in &sequence.segments {
            let text = |rows: &mut StructBuilder, i: usize, value: &str| {
                rows.field_builder::<StringBuilder>(i).expect("a text column").append_value(value);
            };
            text(rows, 0, domain);
            text(rows, 1, doc_id);
            for (i, value) in [(2, *start), (3, *end)] {
                rows.field_builder::<Int32Builder>(i).expect("a number column").append_value(value);
            }
            rows.append(true);
        }
        source.append(true);
    }
    let columns: Vec<ArrayRef> = vec![Arc::new(input_ids), Arc::new(labels), Arc::new(source.finish())];
    RecordBatch::try_new(schema, columns).expect("columns as the layout has them")
}
