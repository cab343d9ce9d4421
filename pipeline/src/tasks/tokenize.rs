//! tokenize: turns a unit of source files into documents, ids and rejects, part by part.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, FixedSizeBinaryBuilder, Int32Builder, Int64Builder, ListArray, RecordBatch, StringBuilder,
    UInt16Array, UInt32Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::DataType;
use futures::TryStreamExt;
use globset::Glob;
use hashbrown::HashSet;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Worker;
use crate::conf::{self, Domain, Format};
use crate::hash::{Digest, doc_id, text_id};
use crate::output::{Draft, Input, Output};
use crate::progress::Bar;
use crate::source::{self, Column, DomainRule, Part, Reader, Spec, Unit};
use crate::sql::engine::TableWriter;
use crate::storage::Location;
use crate::{Error, Result, tables};

/// A part's number: a hash of the unit's key and the part's index, so that it is the same in every run.
fn part_number(unit_key: &str, index: u32) -> i64 {
    let digest = Digest::of(format!("{unit_key} {index}").as_bytes());
    i64::from_le_bytes(digest.0[..8].try_into().expect("8 of 32 bytes")) & i64::MAX
}

/// A task that tokenises a unit.
#[derive(Debug, Serialize, Deserialize)]
pub struct Tokenize {
    pub source: conf::Source,
    pub unit: Unit,
    /// The unit's key. The numbers of its parts are derived from it.
    pub key: String,
    /// The URL of the folder that its files are written to.
    pub folder: String,
    /// Whether parts that an earlier attempt finished are done again.
    pub again: bool,
    pub tokenizer: Digest,
    pub tokenizer_url: String,
}

/// How a source is read, as its conf says.
///
/// # Errors
/// A glob of its domains is invalid.
pub fn spec(conf: &conf::Source) -> Result<Spec, globset::Error> {
    // `conf::check` has made sure that the path is valid
    let column = |path: &str| Column::parse(path).unwrap_or_default();
    let domain = match &conf.domain {
        Domain::Column(path) => DomainRule::Column(column(path)),
        Domain::Const(constant) => DomainRule::Const(constant.domain.clone()),
        Domain::Rules(rules) => DomainRule::Paths(
            rules
                .iter()
                .map(|rule| Ok((Glob::new(&rule.glob)?.compile_matcher(), rule.domain.clone())))
                .collect::<Result<_, globset::Error>>()?,
        ),
    };
    let format = match conf.format {
        Format::Jsonl => source::Format::Jsonl,
        Format::Parquet => source::Format::Parquet,
        Format::Text => source::Format::Text,
    };
    Ok(Spec {
        origin: conf.name.clone(),
        format,
        text: conf.text.as_deref().map(column).unwrap_or_default(),
        domain,
        max_document_bytes: conf.max_document_bytes.0,
    })
}

impl Tokenize {
    pub async fn perform(self, worker: &Worker, bar: &Bar) -> Result<Output> {
        let tokenizer = worker.tokenizer(self.tokenizer, &self.tokenizer_url).await?;
        let spec = spec(&self.source);
        let spec = Arc::new(spec.map_err(|e| Error::data(e.to_string(), "mend the source's globs"))?);
        let reader = worker.reader(worker.stores.open(&self.source.url)?);
        let draft = Draft::begin(worker.stores.open(&self.folder)?, self.again).await?;
        tokenize(worker, &tokenizer, (&reader, &spec), &self.unit, &self.key, &draft, bar).await
    }
}

/// Reads a unit part by part and tokenises each part on a blocking thread.
async fn tokenize(
    worker: &Worker,
    tokenizer: &Arc<crate::algorithms::tokenizer::Tokenizer>,
    (reader, spec): (&Reader, &Arc<Spec>),
    unit: &Unit,
    key: &str,
    draft: &Draft,
    bar: &Bar,
) -> Result<Output> {
    // parts that an earlier attempt finished, up to the first that is missing
    let mut output = Output::default();
    let mut done = 0;
    let mut reasons: BTreeMap<String, u64> = BTreeMap::new();
    let mut first_reject = Value::Null;
    let mut account = |output: &mut Output, part: Output| {
        if let Ok(counted) = serde_json::from_value::<BTreeMap<String, u64>>(part.notes["reasons"].clone()) {
            counted.into_iter().for_each(|(reason, count)| *reasons.entry(reason).or_default() += count);
        }
        if first_reject.is_null() {
            first_reject = part.notes["first_reject"].clone();
        }
        output.merge(part);
    };
    while let Some(part) = draft.done(&format!("part-{done:05}")).await? {
        account(&mut output, part);
        done += 1;
    }
    let mut parts = reader.parts(unit.clone(), spec.clone(), move |index| index < done);
    let mut working = futures::stream::FuturesOrdered::new();
    loop {
        let permit = worker.parts.clone().acquire_owned().await.expect("never closed");
        let Some(part) = parts.next().await? else { break };
        worker.check_stop()?;
        let index = part.index;
        let (spec, loaded) = (spec.clone(), tokenizer.clone());
        let number = part_number(key, index);
        let narrow = loaded.vocab_size() <= 1 << 16;
        let bar = bar.clone();
        // start it now, not when it is awaited: the loop may wait for the permit that this part gives back
        let made = tokio::task::spawn_blocking(move || {
            let made = PartRows::make(&part, &spec, &loaded, number, narrow);
            drop(permit);
            made
        });
        let work = async move {
            let made = made.await.expect("a worker does not panic")?;
            bar.add(0, made.rows, made.tokens, made.bytes);
            // a task of its own: encoding Parquet takes CPU time, and would otherwise be done for one part
            // after the other
            let written = tokio::spawn(made.write(draft.folder.clone(), number, narrow));
            let written = async { written.await.expect("a worker does not panic") };
            draft.job(&format!("part-{index:05}"), written).await
        };
        working.push_back(work);
        while working.len() > worker.engine.partitions {
            if let Some(part) = working.try_next().await? {
                account(&mut output, part);
            }
        }
    }
    while let Some(part) = working.try_next().await? {
        account(&mut output, part);
    }
    bar.add(unit.bytes(), 0, 0, 0);
    let read = parts.files().iter();
    let inputs: Vec<Input> = read
        .map(|file| Input {
            url: file.url.clone(),
            bytes: file.size,
            blake3: Digest(*file.blake3.as_bytes()),
        })
        .collect();
    output.notes = json!({ "inputs": inputs, "reasons": reasons, "first_reject": first_reject });
    let rows = output.counted("rows");
    let kept: u64 =
        ["documents", "duplicates", "rejects", "empty"].map(|name| output.counted(name)).iter().sum();
    if rows != kept {
        let message =
            format!("{rows} rows were read, {kept} became documents, duplicates or rejects, or were empty");
        return Err(Error::Unbalanced { stage: "tokens", message });
    }
    Ok(output)
}

/// The tables and counts that a part's rows become.
struct PartRows {
    documents: RecordBatch,
    ids: RecordBatch,
    rejects: RecordBatch,
    rows: u64,
    /// Rows with an empty text.
    empty: u64,
    duplicates: u64,
    tokens: u64,
    bytes: u64,
    reasons: BTreeMap<String, u64>,
    first_reject: Option<String>,
}

impl PartRows {
    /// Parses and tokenises a part. It computes, so call it on a blocking thread.
    fn make(
        part: &Part,
        spec: &Spec,
        tokenizer: &crate::algorithms::tokenizer::Tokenizer,
        number: i64,
        narrow: bool,
    ) -> Result<Self> {
        let mut encoder = tokenizer.encoder();
        let mut seen: HashSet<[u8; 16]> = HashSet::new();
        let (mut rows, mut empty, mut duplicates, mut bytes) = (0, 0, 0, 0);
        let mut reasons: BTreeMap<String, u64> = BTreeMap::new();
        let mut first_reject = None;
        // documents
        let mut doc_ids = FixedSizeBinaryBuilder::new(16);
        let mut text_ids = FixedSizeBinaryBuilder::new(16);
        let (mut domains, mut origins) = (StringBuilder::new(), StringBuilder::new());
        let (mut lengths, mut sizes, mut numbers) =
            (Int64Builder::new(), Int64Builder::new(), Int64Builder::new());
        // tokens
        let mut chunk_ids = FixedSizeBinaryBuilder::new(16);
        let mut chunks = Int32Builder::new();
        let (mut offsets, mut narrow_ids, mut wide_ids) = (vec![0i32], Vec::<u16>::new(), Vec::<u32>::new());
        // most texts have more than three bytes per token
        if narrow {
            narrow_ids.reserve(part.bytes() as usize / 3);
        } else {
            wide_ids.reserve(part.bytes() as usize / 3);
        }
        // rejects
        let (mut reject_origins, mut files) = (StringBuilder::new(), StringBuilder::new());
        let (mut reject_reasons, mut details) = (StringBuilder::new(), StringBuilder::new());
        let mut lines = Int64Builder::new();

        let mut ids = Vec::new();
        part.rows(spec, &mut |row| {
            rows += 1;
            let document = match &row.outcome {
                Ok(Some(document)) => document,
                Ok(None) => {
                    empty += 1;
                    return Ok(());
                }
                Err(reject) => {
                    let reason = reject.reason.name();
                    *reasons.entry(reason.to_owned()).or_default() += 1;
                    first_reject.get_or_insert_with(|| row.rejected(reject));
                    reject_origins.append_value(&spec.origin);
                    files.append_value(row.file);
                    lines.append_value(row.line as i64);
                    reject_reasons.append_value(reason);
                    details.append_value(&reject.detail);
                    return Ok(());
                }
            };
            let id = doc_id(document.domain, document.text);
            if !seen.insert(id) {
                duplicates += 1;
                return Ok(());
            }
            ids.clear();
            encoder.encode(document.text, &mut ids)?;
            bytes += document.text.len() as u64;
            doc_ids.append_value(id).expect("16 bytes");
            text_ids.append_value(text_id(document.text)).expect("16 bytes");
            domains.append_value(document.domain);
            origins.append_value(&spec.origin);
            lengths.append_value(ids.len() as i64);
            sizes.append_value(document.text.len() as i64);
            numbers.append_value(number);
            for (chunk, ids) in ids.chunks(tables::CHUNK_IDS).enumerate() {
                chunk_ids.append_value(id).expect("16 bytes");
                chunks.append_value(chunk as i32);
                if narrow {
                    narrow_ids.extend(ids.iter().map(|id| *id as u16));
                } else {
                    wide_ids.extend_from_slice(ids);
                }
                let end = i32::try_from(narrow_ids.len() + wide_ids.len()).map_err(|_| {
                    Error::data(
                        format!(
                            "{} line {}: the rows before it have 2 billion tokens already",
                            row.file, row.line
                        ),
                        "cut the file into smaller ones, or lower the source's `max_document_bytes`",
                    )
                })?;
                offsets.push(end);
            }
            Ok(())
        })?;

        let tokens = *offsets.last().expect("begins with 0") as u64;
        let values: ArrayRef = if narrow {
            Arc::new(UInt16Array::from(narrow_ids))
        } else {
            Arc::new(UInt32Array::from(wide_ids))
        };
        let schema = tables::tokens(narrow);
        let DataType::List(item) = schema.field(2).data_type() else { unreachable!("ids is a list") };
        let lists = ListArray::new(item.clone(), OffsetBuffer::new(offsets.into()), values, None);
        let ids = tables::rows(
            schema,
            [
                ("doc_id", Arc::new(chunk_ids.finish())),
                ("chunk", Arc::new(chunks.finish())),
                ("ids", Arc::new(lists)),
            ],
        );
        let documents = tables::rows(
            tables::documents(),
            [
                ("doc_id", Arc::new(doc_ids.finish())),
                ("domain", Arc::new(domains.finish())),
                ("tokens", Arc::new(lengths.finish())),
                ("bytes", Arc::new(sizes.finish())),
                ("origin", Arc::new(origins.finish())),
                ("text_id", Arc::new(text_ids.finish())),
                ("part", Arc::new(numbers.finish())),
            ],
        );
        let rejects = tables::rows(
            tables::rejects(),
            [
                ("origin", Arc::new(reject_origins.finish())),
                ("file", Arc::new(files.finish())),
                ("line", Arc::new(lines.finish())),
                ("reason", Arc::new(reject_reasons.finish())),
                ("detail", Arc::new(details.finish())),
            ],
        );
        Ok(Self { documents, ids, rejects, rows, empty, duplicates, tokens, bytes, reasons, first_reject })
    }

    /// Writes the three tables of a part.
    async fn write(self, folder: Location, number: i64, narrow: bool) -> Result<Output> {
        let mut output = Output::default();
        let documents = self.documents.num_rows() as u64;
        output.count("rows", self.rows);
        output.count("documents", documents);
        output.count("empty", self.empty);
        output.count("duplicates", self.duplicates);
        output.count("rejects", self.rejects.num_rows() as u64);
        output.count("tokens", self.tokens);
        output.count("bytes", self.bytes);
        output.notes = json!({ "reasons": self.reasons, "first_reject": self.first_reject });
        for (name, schema, rows) in [
            ("documents", tables::documents(), self.documents),
            ("tokens", tables::tokens(narrow), self.ids),
            ("rejects", tables::rejects(), self.rejects),
        ] {
            let mut writer = TableWriter::new(&folder, &format!("{name}-{number:016x}"), schema);
            writer.write(rows).await?;
            output.table(name, writer.finish().await?);
        }
        Ok(output)
    }
}
